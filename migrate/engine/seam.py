"""The ``ProcessEngine`` seam: the CPU side of a process.

``criu`` is the production engine, ``reexec`` the one that needs no root: the
process's own runtime hands over its CPU state on a signal, at any instant.
Both drive the GPU side through the same visitors, so that all that is said to KFD
is said by the orchestrator's code.

Everything is addressed by :class:`~migrate.model.ProcessRef` and idempotent, because
an agent that comes back after kill -9 has nothing but its journal.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Protocol, TypeVar

from migrate.dataplane.access import MemoryAccess
from migrate.kfd.process import KfdProcess
from migrate.model import GpuMap, ProcessRef, Value
from migrate.preflight.facts import Facts
from migrate.preflight.findings import Finding

T = TypeVar("T", covariant=True)  # noqa: PLC0105 - users of the seam write Visitor[T]


Blocker = Finding  # why a process can't be moved by an engine


class Survey(Value):
    """What an engine sees of a process before anything is touched."""

    process: ProcessRef
    command: tuple[str, ...]
    uid: int
    kfd_processes: tuple[int, ...]  # pids of the tree that have /dev/kfd open
    cpu_bytes: int  # estimate of the CPU memory to move
    blockers: tuple[Blocker, ...] = ()
    image_bytes: int = 0  # of files (Blob) in the run directory
    cpu_copies: int = 2  # how often the CPU memory is in the destination's host memory, at most


class CpuRange(Value):
    """A range of a process's CPU memory, in bytes of its virtual address space."""

    pid: int
    address: int
    length: int


class Blob(Value):
    """A file of the engine's own that has to be at the destination before the restore.

    ``sparse``: nobody reads what of it is not sent.
    """

    name: str
    size: int  # bytes
    sparse: bool = False


class Piece(Value):
    """*size* bytes from *offset* of the file *name*, a Blob whose size is not known yet."""

    name: str
    offset: int
    size: int


class CpuImage(Value):
    """The CPU side of a frozen process: what is not memory contents.

    ``state`` is the engine's own document (opaque to everybody else). ``ranges`` are read
    from the frozen process and written into the new one, ``blobs`` are files.
    """

    engine: str
    state: bytes
    ranges: tuple[CpuRange, ...]
    blobs: tuple[Blob, ...] = ()


class MovedGpu(Value):
    """A GPU of the process: the id it knows, those of source and destination, and its node.

    ``process`` is the KFD process's place in the tree, ``drm_fd`` the number of the render
    node in it (KfdFile.open_node).
    """

    user_gpu_id: int
    source_gpu_id: int
    gpu_id: int
    drm_fd: int
    process: int = 0


class MovedBo(Value):
    """A BO whose mmap offset changed. ``gpu_id`` is the id the process knows."""

    gpu_id: int
    offset: int
    size: int
    restored_offset: int


class Visitor(Protocol[T]):
    """What the orchestrator does with a process's KFD side while the engine holds it."""

    def __call__(self, kfd: Sequence[KfdProcess]) -> T:
        """Called once with all KFD processes of the tree, every thread of them stopped."""


class ProcessEngine(Protocol):
    """Freeze, dump, restore held, release, kill. All methods raise MigrateError."""

    name: str
    can_hide_gpus: bool  # whether restore() can show the copy only the mapped GPUs
    ways_out: frozenset[str]  # which of migrate.preflight.findings.WAYS_OUT it can go

    def survey(self, pid: int) -> Survey:
        """Look at a process. Raises NoSuchProcess, NotKfdProcess, ForeignProcess."""

    def facts(self, process: ProcessRef) -> Facts:
        """What it does not move and the process needs at the destination, for preflight.

        An engine that moves processes whole answers with ``migrate.preflight.collect``'s
        ``whole_tree``. Stops and changes nothing. Raises NoSuchProcess, ForeignProcess,
        PtraceDenied.
        """

    # ------------------------------------------------------------ source

    def ahead(self, process: ProcessRef) -> bytes:
        """What ``prepare`` can begin with while the process runs on; empty: nothing."""

    def snapshot(self, process: ProcessRef, visit: Visitor[T]) -> T:
        """Stop every thread for a moment, let *visit* talk to KFD, let go.

        If the agent dies inside, the helper that holds the process UNPAUSEs and lets go.
        Raises PtraceDenied, AlreadyTraced, NoSuchProcess.
        """

    def precopy(self, process: ProcessRef) -> Iterator[tuple[Piece, MemoryAccess]] | None:
        """CPU memory of the running process, in pieces of Blobs of the image, to be taken to
        the end: then ``dump`` leaves out what was not written since. None: not this engine.

        Raises MigrateError if it can't be, then or from the iterator, which harms nothing.
        """

    def outdated(self, process: ProcessRef, written: Iterable[CpuRange]) -> Sequence[Piece]:
        """While ``dump`` visits: which pieces of ``precopy`` nobody needs any more.

        ``written``: memory that may have been written, though no bit says so. All of it
        comes with the dump.
        """

    def freeze(self, process: ProcessRef) -> CpuImage:
        """Stop the process at this instant so that it stays stopped if we die. Idempotent.

        What is not known yet of the image comes by ``dump`` and ``finish_dump``.
        """

    def dump(
        self,
        process: ProcessRef,
        visit: Visitor[T],
        ways_out: Collection[str] = (),
        copy_files: tuple[str, ...] = (),
    ) -> T:
        """Begin to write the CPU side of a frozen process; *visit* is called first.

        ``ways_out``: those of the engine's that the user chose; the image says them on.
        ``copy_files``: globs of open and mapped files that are to be sent, too.
        *visit* may leave queues paused. Returns when it has; the rest goes on by itself.
        If *visit* raises, queues that it left paused are started and the dump is given up.
        """

    def pieces(self, process: ProcessRef) -> Iterator[tuple[Piece, MemoryAccess]]:
        """Of files that are sent while they are written: once, between ``dump`` and
        ``finish_dump``, to the end. What is not taken and closed holds the dump up.
        """

    def finish_dump(self, process: ProcessRef, image: CpuImage) -> CpuImage:
        """Wait until the CPU side is written; the whole image. Raises CheckpointFailed."""

    def visit_frozen(self, process: ProcessRef, visit: Visitor[T]) -> T:
        """As ``snapshot`` on a frozen process: *visit* may leave queues paused.

        For whoever has nothing but the journal; a dump under way is given up first.
        """

    def memory(self, process: ProcessRef, wanted: CpuRange) -> MemoryAccess:
        """Read access to a range of a frozen process."""

    def blob(self, process: ProcessRef, wanted: Blob) -> MemoryAccess:
        """Read access to a file of the image that did not come in pieces."""

    def thaw(self, process: ProcessRef) -> None:
        """Let a frozen process run. Idempotent; a process that is gone is no error."""

    # ------------------------------------------------------------ destination

    def receive(self, migration: str, coming: Blob) -> MemoryAccess:
        """Write access to a file that ``restore`` of this migration will read. Repeatable."""

    def prepare(self, migration: str, ahead: bytes) -> None:
        """Begin with what ``restore`` would do first, by what ``ahead`` said: once a migration.

        What it makes ends with ``discard`` and with this agent, however that ends. It decides
        nothing: ``restore`` does without what does not fit.
        """

    def restore(self, image: CpuImage, migration: str, gpu_map: GpuMap) -> HeldProcess:
        """Build the process anew, without running any of its own code."""

    def discard(self, migration: str) -> None:
        """Remove what ``prepare`` and ``receive`` have made. Idempotent."""

    # ------------------------------------------------------------ both

    def kill(self, process: ProcessRef) -> None:
        """End it for good and wait until it is gone. Idempotent."""

    def is_alive(self, process: ProcessRef) -> bool:
        """Whether this very process exists and is not a zombie."""

    def is_frozen(self, process: ProcessRef) -> bool:
        """Whether it exists and every thread of it is stopped by us."""


class HeldProcess(Protocol):
    """A process under construction at the destination: it exists, nothing of it runs."""

    process: ProcessRef

    @property
    def kfd(self) -> Sequence[KfdProcess]:
        """Its KFD processes, on freshly opened files; ioctls run inside the process."""

    def memory(self, wanted: CpuRange) -> MemoryAccess:
        """Write access to a range of the new process (for placement)."""

    def restored(self, gpus: Sequence[MovedGpu], bos: Sequence[MovedBo]) -> None:
        """RESTORE was done in all of them: whatever needs no memory contents may go on."""

    def finish(self, gpus: Sequence[MovedGpu], bos: Sequence[MovedBo]) -> None:
        """Map BOs, rebuild CPU state, and hold: stopped so that it outlives the agent."""

    def release(self) -> None:
        """Let it run (after RESUME of its queues)."""

    def abandon(self) -> None:
        """Give up what is under construction and wait until it is gone. Idempotent."""
