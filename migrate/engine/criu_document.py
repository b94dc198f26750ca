"""What the criu engine must know at the destination and CRIU's images do not say.

The document is made at the source, in the freeze, from what the hook saw and from
/proc/PID/maps, and goes with the images.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping

import msgspec

from migrate.errors import EngineUnsupported, FrameRejected
from migrate.model import Value

DRM_MAJOR = 226
_MAPS = re.compile(r"([0-9a-f]+)-[0-9a-f]+ (....) [0-9a-f]+ ([0-9a-f]+):([0-9a-f]+) (\d+)\s*(.*)")
KFD = 0  # DeviceFile.gpu_id of /dev/kfd


class DeviceFile(Value):
    """A file of the process that the hook dumped: CRIU's id of it, and the GPU it is of.

    ``gpu_id`` is the source's actual one, or KFD for /dev/kfd.
    """

    id: int
    gpu_id: int


class DeviceMapping(Value):
    """A mapping of a device file. ``fresh``: CRIU will want an fd for it.

    CRIU opens a file once for neighbouring mappings of it; an fd that it is given and does
    not use would stay open in the process.
    """

    address: int
    fresh: bool


class Task(Value):
    """A process of the tree that has device files or mappings of them."""

    pid: int
    mappings: tuple[DeviceMapping, ...]


class CriuDocument(Value):
    """The criu engine's part of an image.

    ``root``: pid of the tree's root. ``kfd``: pids of its KFD processes, in the order of
    the checkpoints. ``render_nodes``: the source's render minors by actual gpu_id.
    """

    root: int
    kfd: tuple[int, ...]
    tasks: tuple[Task, ...]
    files: tuple[DeviceFile, ...]
    render_nodes: dict[int, int]
    criu: tuple[int, int, int]
    tcp_established: bool = False
    tcp_close: bool = False

    def encode(self) -> bytes:
        """MessagePack."""
        return msgspec.msgpack.encode(self)

    @classmethod
    def decode(cls, state: bytes) -> CriuDocument:
        """Raises EngineUnsupported for another version's, FrameRejected for a contradiction."""
        try:
            found = msgspec.msgpack.decode(state, type=cls)
        except msgspec.DecodeError as error:
            raise EngineUnsupported(f"the image of criu can't be read: {error}") from error
        for what, values in (
            ("KFD process", found.kfd),
            ("task", [task.pid for task in found.tasks]),
            ("file", [file.id for file in found.files]),
        ):
            if len(set(values)) != len(values):
                raise FrameRejected(f"the image of criu lists a {what} twice")
        if found.root < 1 or any(pid < 1 for pid in found.kfd):
            raise FrameRejected("the image of criu lists a pid that is none")
        return found


def device_mappings(maps: str, devices: Iterable[int]) -> tuple[DeviceMapping, ...]:
    """The mappings of *devices* (st_rdev numbers) in the text of a /proc/PID/maps.

    *devices* are told apart by the device node's own inode, which is why each is looked up
    by path: a mapping's major and minor are those of the file system.
    """
    wanted = set(devices)
    found: list[DeviceMapping] = []
    before: tuple[str, str, str] | None = None  # the file of the mapping before, with a file
    for line in maps.splitlines():
        match = _MAPS.match(line)
        if match is None or match[5] == "0" or match[6].startswith(("/dev/zero", "/SYSV")):
            continue  # anonymous, shared or not: CRIU opens no file for it
        file = (match[3], match[4], match[5])
        if _rdev(match[6]) in wanted:
            found.append(DeviceMapping(address=int(match[1], 16), fresh=file != before))
        before = file
    return tuple(found)


def _rdev(path: str) -> int:
    try:
        return os.stat(path.replace("\\012", "\n")).st_rdev
    except OSError:
        return 0


def minor_to_gpu(render_nodes: Mapping[int, int]) -> dict[int, int]:
    """gpu_id by render minor."""
    return {minor: gpu for gpu, minor in render_nodes.items()}
