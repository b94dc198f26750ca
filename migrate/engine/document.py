"""What a process with the runtime hands over, and what it is told when it is rebuilt."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from migrate.engine.seam import MovedBo, MovedGpu
from migrate.kfd import uapi
from migrate.model import Value

KFD = 0  # FileMapping.gpu_id of a mapping of /dev/kfd itself


class FileMapping(Value):
    """Memory of a device file: of a GPU's render node, or of /dev/kfd (gpu_id KFD).

    ``gpu_id`` is the id the process knows (user_gpu_id); lengths are bytes.
    """

    gpu_id: int
    offset: int
    address: int
    length: int


class Arena(Value):
    """Private memory at an address of ours, whose contents move with the process."""

    address: int
    length: int


class Spawn(Value):
    """How a command is started. ``output``: paths of stdout and stderr, regular files."""

    command: tuple[str, ...]
    directory: str
    environment: dict[str, str]
    output: tuple[str, str]


class Document(Value):
    """The CPU side of a process, at one instant. ``state`` is the program's own record.

    ``pids``: pids of its tree as the program knows them, and what they are now.
    """

    executable: str
    arguments: tuple[str, ...]
    directory: str
    environment: dict[str, str]
    umask: int
    output: tuple[str, str]  # paths of stdout and stderr where they are regular files
    mappings: tuple[FileMapping, ...]
    arenas: tuple[Arena, ...]
    next_address: int
    state: bytes
    pids: dict[int, int] = msgspec.field(default_factory=dict)

    def spawn(self) -> Spawn:
        """How its command is started anew. ``output`` is empty where there is no file."""
        return Spawn(
            command=(self.executable, *self.arguments[1:]),
            directory=self.directory,
            environment=self.environment,
            output=self.output,
        )


class Member(Value):
    """A process of a tree. ``parent`` is the index of another one, -1 that of the root."""

    pid: int
    parent: int
    document: Document
    has_kfd: bool = True


class Tree(Value):
    """A process and those of its descendants that have the runtime, parents first."""

    members: tuple[Member, ...]


class Finish(Value):
    """Everything the trampoline needs to become the process. ``pids``: old and new ones."""

    document: Document
    gpus: tuple[MovedGpu, ...]
    bos: tuple[MovedBo, ...]
    number: int  # of the freeze it then stops itself in
    pids: dict[int, int] = msgspec.field(default_factory=dict)


def moved(
    mapping: FileMapping, gpus: tuple[MovedGpu, ...], bos: tuple[MovedBo, ...]
) -> FileMapping:
    """*mapping* with the offset its memory has now.

    Offsets of render nodes are a GPU's own; those of /dev/kfd encode the GPU, also for
    doorbells that no BO stands for. Any other (the event page) stays.
    """
    for bo in bos:
        same_file = mapping.gpu_id in (KFD, bo.gpu_id)
        if same_file and bo.offset <= mapping.offset < bo.offset + bo.size:
            offset = bo.restored_offset + mapping.offset - bo.offset
            return msgspec.structs.replace(mapping, offset=offset)
    if mapping.gpu_id == KFD:
        offset = with_gpu(mapping.offset, {gpu.source_gpu_id: gpu.gpu_id for gpu in gpus})
        return msgspec.structs.replace(mapping, offset=offset)
    return mapping


def with_gpu(offset: int, gpu_ids: Mapping[int, int]) -> int:
    """An offset in /dev/kfd with its gpu_id replaced, if it is one of doorbells and known."""
    now = gpu_ids.get(uapi.KFD_MMAP_GET_GPU_ID(offset))
    if now is None or offset & uapi.KFD_MMAP_TYPE_MASK != uapi.KFD_MMAP_TYPE_DOORBELL:
        return offset
    return offset & ~uapi.KFD_MMAP_GPU_ID_MASK | uapi.KFD_MMAP_GPU_ID(now)
