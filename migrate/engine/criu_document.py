"""What the criu engine must know at the destination and CRIU's images do not say.

The document is made at the source, in the freeze, from what the hook saw, and goes with
the images.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from migrate.decode import from_msgpack
from migrate.engine import copied
from migrate.engine.copied import CopiedFile
from migrate.errors import EngineUnsupported, FrameRejected
from migrate.model import Value

DRM_MAJOR = 226
KFD = 0  # DeviceFile.gpu_id of /dev/kfd


class DeviceFile(Value):
    """A file of the process that the hook dumped: CRIU's id of it, and the GPU it is of.

    ``gpu_id`` is the source's actual one, or KFD for /dev/kfd.
    """

    id: int
    gpu_id: int


class CriuDocument(Value):
    """The criu engine's part of an image.

    ``root``: pid of the tree's root. ``kfd``: pids of its KFD processes, in the order of
    the checkpoints. ``render_nodes``: the source's render minors by actual gpu_id.
    ``tcp_close``: its TCP connections are to be closed ones; CRIU wants to be told again.
    ``copied``: files of its that are sent, too. ``deleted``: names of those that have none.
    """

    root: int
    kfd: tuple[int, ...]
    files: tuple[DeviceFile, ...]
    render_nodes: dict[int, int]
    criu: tuple[int, int, int]
    tcp_close: bool = False
    copied: tuple[CopiedFile, ...] = ()
    deleted: tuple[str, ...] = ()

    def encode(self) -> bytes:
        """MessagePack."""
        return msgspec.msgpack.encode(self)

    @classmethod
    def decode(cls, state: bytes) -> CriuDocument:
        """Raises EngineUnsupported for another version's, FrameRejected for a contradiction."""
        try:
            found = from_msgpack(state, cls)
        except msgspec.DecodeError as error:
            raise EngineUnsupported(f"the image of criu can't be read: {error}") from error
        for what, values in (
            ("KFD process", list(found.kfd)),
            ("file", [file.id for file in found.files]),
            ("copied file", [file.path for file in found.copied]),
        ):
            if len(set(values)) != len(values):
                raise FrameRejected(f"the image of criu lists a {what} twice")
        for file in found.copied:
            copied.check(file)
        for path in found.deleted:
            if not copied.is_plain(path):
                raise FrameRejected(f"{path[:70]!r} is no name that a file has had")
        if found.root < 1 or any(pid < 1 for pid in found.kfd):
            raise FrameRejected("the image of criu lists a pid that is none")
        return found


def minor_to_gpu(render_nodes: Mapping[int, int]) -> dict[int, int]:
    """gpu_id by render minor."""
    return {minor: gpu for gpu, minor in render_nodes.items()}
