"""The ``reexec`` engine: moves programs that use its runtime, without root.

Freeze is a signal at any instant; the runtime hands over a document and stops the
whole process (SIGSTOP), which outlives this agent. At the destination the same command
is started anew, and its runtime becomes the process before the program's own code
runs; the pid may change. See migrate.engine.runtime for why any instant is right.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection
from pathlib import Path

import msgspec

from migrate.dataplane.access import MemoryAccess
from migrate.dataplane.memory import ProcessMemoryAccess
from migrate.engine import control, procfs
from migrate.engine.document import Document
from migrate.engine.held import Held
from migrate.engine.marker import Marker
from migrate.engine.seam import Blob, Blocker, CpuImage, CpuRange, Survey, T, Visitor
from migrate.engine.tracing import traced
from migrate.errors import (
    EngineUnsupported,
    ForeignProcess,
    MigrateError,
    NoSuchProcess,
    NotKfdProcess,
)
from migrate.kfd.file import find_kfd_fds
from migrate.model import GpuMap, HostPaths, ProcessRef
from migrate.preflight.collect import restarted
from migrate.preflight.facts import Facts


class ReexecEngine:
    """``ProcessEngine`` of one host. Holds no state: all of it is in the processes."""

    name = "reexec"

    can_hide_gpus = False  # no root, so no device cgroup
    ways_out: frozenset[str] = frozenset()  # it is in nobody's way: the command starts anew

    def __init__(self, paths: HostPaths, *, freeze_timeout: float = 10.0) -> None:
        self._paths = paths
        self._freeze_timeout = freeze_timeout

    # ------------------------------------------------------------ looking

    def survey(self, pid: int) -> Survey:
        """See ProcessEngine."""
        process = procfs.reference(pid)
        uid = procfs.uid(pid)
        if os.geteuid() not in (0, uid):
            raise ForeignProcess(f"process {pid} belongs to user {uid}")
        if not find_kfd_fds(pid, self._paths):
            raise NotKfdProcess(f"process {pid} has no open {self._paths.kfd}")
        return Survey(
            process=process,
            command=procfs.command(pid),
            uid=uid,
            kfd_processes=(pid,),
            cpu_bytes=procfs.resident_bytes(pid),
            blockers=tuple(self._blockers(process)),
        )

    def _blockers(self, process: ProcessRef) -> list[Blocker]:
        found: list[MigrateError] = []
        try:
            with Marker.of(process) as marker:
                if procfs.all_stopped(process.pid) and not marker.handed:
                    found.append(
                        EngineUnsupported(
                            f"process {process.pid} is stopped by somebody else",
                            advice=f"Continue it first: kill -CONT {process.pid}",
                        )
                    )
        except (EngineUnsupported, ForeignProcess) as error:
            found.append(error)
        for child in procfs.descendants(process.pid):
            with contextlib.suppress(NoSuchProcess):
                if find_kfd_fds(child, self._paths):
                    text = f"its child {child} has {self._paths.kfd} open, too"
                    found.append(EngineUnsupported(f"process {process.pid}: {text}"))
        return [Blocker(reason=e.reason, message=e.message, advice=e.hint) for e in found]

    def facts(self, process: ProcessRef) -> Facts:
        """See ProcessEngine: what the command needs to be started again."""
        return restarted(process.pid, self._paths)

    # ------------------------------------------------------------ source

    def snapshot(self, process: ProcessRef, visit: Visitor[T]) -> T:
        """See ProcessEngine."""
        with traced(process, self._paths) as kfd:
            return visit(kfd)

    def freeze(self, process: ProcessRef) -> CpuImage:
        """See ProcessEngine. Raises EngineUnsupported, FreezeTimeout, ProcessExited."""
        if not procfs.is_alive(process):
            raise NoSuchProcess(f"process {process.pid} has ended")
        with Marker.of(process) as marker:
            control.freeze(process, marker, self._freeze_timeout)
            state = marker.document()
        document = decode_document(state)
        ranges = tuple(
            CpuRange(pid=process.pid, address=arena.address, length=arena.length)
            for arena in document.arenas
        )
        return CpuImage(engine=self.name, state=state, ranges=ranges)

    def dump(self, process: ProcessRef, visit: Visitor[T], ways_out: Collection[str] = ()) -> T:
        """See ProcessEngine: the image is whole since the freeze."""
        return self.visit_frozen(process, visit)

    def finish_dump(self, process: ProcessRef, image: CpuImage) -> CpuImage:
        """See ProcessEngine."""
        return image

    def visit_frozen(self, process: ProcessRef, visit: Visitor[T]) -> T:
        """See ProcessEngine. If *visit* raises, queues it left paused are started again."""
        with traced(process, self._paths, leave_paused=True) as kfd:
            return visit(kfd)

    def memory(self, process: ProcessRef, wanted: CpuRange) -> MemoryAccess:
        """See ProcessEngine."""
        return ProcessMemoryAccess(process.pid, wanted.address, wanted.length)

    def blob(self, process: ProcessRef, wanted: Blob) -> MemoryAccess:
        """See ProcessEngine: there are none."""
        raise EngineUnsupported(f"the engine {self.name} has no file {wanted.name!r}")

    def thaw(self, process: ProcessRef) -> None:
        """See ProcessEngine. Also releases a held process at the destination."""
        control.thaw(process)

    # ------------------------------------------------------------ destination

    def receive(self, migration: str, coming: Blob) -> MemoryAccess:
        """See ProcessEngine: there are none."""
        raise EngineUnsupported(f"the engine {self.name} has no use for a file {coming.name!r}")

    def discard(self, migration: str) -> None:
        """See ProcessEngine: there is nothing."""

    def restore(self, image: CpuImage, migration: str, gpu_map: GpuMap) -> Held:
        """See ProcessEngine. Raises RestoreFailed, InsufficientMemory."""
        if image.engine != self.name:
            raise EngineUnsupported(f"the image is one of the engine {image.engine}")
        ranges = [(item.address, item.length) for item in image.ranges]
        log = Path(self._paths.run) / f"{migration}.log"
        return Held.start(decode_document(image.state), ranges, self._paths, log)

    # ------------------------------------------------------------ both

    def kill(self, process: ProcessRef) -> None:
        """See ProcessEngine."""
        control.kill(process)

    def is_alive(self, process: ProcessRef) -> bool:
        """See ProcessEngine."""
        return procfs.is_alive(process)

    def is_frozen(self, process: ProcessRef) -> bool:
        """See ProcessEngine."""
        if not procfs.is_alive(process):
            return False
        try:
            with Marker.of(process) as marker:
                return control.is_frozen(process, marker)
        except (EngineUnsupported, NoSuchProcess):
            return False


def decode_document(state: bytes) -> Document:
    """The document of an image. Raises EngineUnsupported if it is another version's."""
    try:
        return msgspec.msgpack.decode(state, type=Document)
    except msgspec.DecodeError as error:
        raise EngineUnsupported(f"the CPU image can't be read: {error}") from error
