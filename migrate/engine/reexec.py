"""The ``reexec`` engine: moves programs that use its runtime, without root.

Freeze is a signal at any instant; the runtime hands over a document and stops the
whole process (SIGSTOP), which outlives this agent. At the destination the same command
is started anew, and its runtime becomes the process before the program's own code
runs; the pid may change. See migrate.engine.runtime for why any instant is right.

Children that have the runtime come along, and are started anew by their parents; pipes and
other files that a parent and its child have in common do not.
"""

from __future__ import annotations

import contextlib
import os
import stat
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec

from migrate.dataplane.access import MemoryAccess
from migrate.dataplane.memory import ProcessMemoryAccess
from migrate.decode import from_msgpack
from migrate.engine import control, procfs
from migrate.engine.document import Document, Member, Spawn, Tree
from migrate.engine.held import Held, Started, here
from migrate.engine.marker import Marker
from migrate.engine.seam import Blob, Blocker, CpuImage, CpuRange, Piece, Survey, T, Visitor
from migrate.engine.tracing import traced
from migrate.engine.trampoline import EXECUTOR_FD
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

D = TypeVar("D", Document, Tree, Spawn)


class ReexecEngine:
    """``ProcessEngine`` of one host. Its state is in the processes.

    It holds what was started early (``prepare``), which ends with the agent.
    """

    name = "reexec"

    can_hide_gpus = False  # no root, so no device cgroup
    ways_out: frozenset[str] = frozenset()  # it is in nobody's way: the command starts anew

    def __init__(self, paths: HostPaths, *, freeze_timeout: float = 10.0) -> None:
        self._paths = paths
        self._freeze_timeout = freeze_timeout
        self._early: dict[str, Started] = {}  # by migration
        self._lock = threading.Lock()  # of the above

    # ------------------------------------------------------------ looking

    def survey(self, pid: int) -> Survey:
        """See ProcessEngine. Its tree are those of its descendants that have the runtime."""
        process = procfs.reference(pid)
        uid = procfs.uid(pid)
        if os.geteuid() not in (0, uid):
            raise ForeignProcess(f"process {pid} belongs to user {uid}")
        if not find_kfd_fds(pid, self._paths):
            raise NotKfdProcess(f"process {pid} has no open {self._paths.kfd}")
        members = self._members(process)
        return Survey(
            process=process,
            command=procfs.command(pid),
            uid=uid,
            kfd_processes=tuple(self._with_kfd(members)),
            cpu_bytes=sum(procfs.resident_bytes(member.pid) for member in members),
            blockers=tuple(self._blockers(members)),
        )

    def _members(self, process: ProcessRef) -> list[ProcessRef]:
        """The root, whatever it is, and its descendants that can be moved, parents first."""
        found = [process]
        for pid in procfs.descendants(process.pid):
            with contextlib.suppress(NoSuchProcess, EngineUnsupported, ForeignProcess):
                child = procfs.reference(pid)
                Marker.of(child).close()
                found.append(child)
        return found

    def _with_kfd(self, members: Sequence[ProcessRef]) -> list[int]:
        found = []
        for member in members:
            with contextlib.suppress(NoSuchProcess):
                if find_kfd_fds(member.pid, self._paths):
                    found.append(member.pid)
        return found

    def _blockers(self, members: Sequence[ProcessRef]) -> list[Blocker]:
        found: list[MigrateError] = []
        for member in members:
            try:
                with Marker.of(member) as marker:
                    if procfs.all_stopped(member.pid) and not marker.handed:
                        found.append(
                            EngineUnsupported(
                                f"process {member.pid} is stopped by somebody else",
                                advice=f"Continue it first: kill -CONT {member.pid}",
                            )
                        )
            except (EngineUnsupported, ForeignProcess) as error:
                found.append(error)
        root, pids = members[0].pid, {member.pid for member in members}
        for child in procfs.descendants(root):
            with contextlib.suppress(NoSuchProcess):
                if child not in pids and find_kfd_fds(child, self._paths):
                    text = f"its child {child} has {self._paths.kfd} open and not the runtime"
                    found.append(EngineUnsupported(f"process {root}: {text}"))
        return [Blocker(reason=e.reason, message=e.message, advice=e.hint) for e in found]

    def facts(self, process: ProcessRef) -> Facts:
        """See ProcessEngine: what the commands need to be started again."""
        return restarted([member.pid for member in self._members(process)], self._paths)

    # ------------------------------------------------------------ source

    def ahead(self, process: ProcessRef) -> bytes:
        """See ProcessEngine: how the root's command is started anew, as /proc tells it."""
        try:
            return msgspec.msgpack.encode(procfs_spawn(process.pid))
        except OSError as error:
            raise NoSuchProcess(f"process {process.pid} has ended") from error

    def snapshot(self, process: ProcessRef, visit: Visitor[T]) -> T:
        """See ProcessEngine."""
        pids = self._with_kfd(self._members(process))
        with traced(process, self._paths, pids=pids or None) as kfd:
            return visit(kfd)

    def freeze(self, process: ProcessRef) -> CpuImage:
        """See ProcessEngine. Raises EngineUnsupported, FreezeTimeout, ProcessExited.

        A child that is born meanwhile is born by one that runs still, so looking again until
        there is none but frozen ones finds them all.
        """
        if not procfs.is_alive(process):
            raise NoSuchProcess(f"process {process.pid} has ended")
        states: dict[ProcessRef, bytes] = {}
        try:
            while fresh := [m for m in self._members(process) if m not in states]:
                for member in fresh:
                    with Marker.of(member) as marker:
                        control.freeze(member, marker, self._freeze_timeout)
                        states[member] = marker.document()
        except BaseException:
            with contextlib.suppress(MigrateError):
                self.thaw(process)
            raise
        tree = self._tree(states)
        ranges = tuple(
            CpuRange(pid=member.pid, address=arena.address, length=arena.length)
            for member in tree.members
            for arena in member.document.arenas
        )
        return CpuImage(engine=self.name, state=msgspec.msgpack.encode(tree), ranges=ranges)

    def _tree(self, states: Mapping[ProcessRef, bytes]) -> Tree:
        pids = [member.pid for member in states]
        with_kfd = self._with_kfd(list(states))
        return Tree(
            members=tuple(
                Member(
                    pid=member.pid,
                    parent=_nearest(member.pid, pids) if number else -1,
                    document=_decoded(state, Document),
                    has_kfd=member.pid in with_kfd,
                )
                for number, (member, state) in enumerate(states.items())
            )
        )

    def dump(
        self,
        process: ProcessRef,
        visit: Visitor[T],
        ways_out: Collection[str] = (),
        copy_files: tuple[str, ...] = (),
    ) -> T:
        """See ProcessEngine: the image is whole since the freeze."""
        return self.visit_frozen(process, visit)

    def precopy(self, process: ProcessRef) -> None:
        """See ProcessEngine: it does not."""

    def outdated(self, process: ProcessRef, written: Iterable[CpuRange]) -> Sequence[Piece]:
        """See ProcessEngine: none."""
        return ()

    def pieces(self, process: ProcessRef) -> Iterator[tuple[Piece, MemoryAccess]]:
        """See ProcessEngine: there are none."""
        return iter(())

    def finish_dump(self, process: ProcessRef, image: CpuImage) -> CpuImage:
        """See ProcessEngine."""
        return image

    def visit_frozen(self, process: ProcessRef, visit: Visitor[T]) -> T:
        """See ProcessEngine. If *visit* raises, queues it left paused are started again."""
        pids = self._with_kfd(self._members(process))
        with traced(process, self._paths, pids=pids or None, leave_paused=True) as kfd:
            return visit(kfd)

    def memory(self, process: ProcessRef, wanted: CpuRange) -> MemoryAccess:
        """See ProcessEngine."""
        return ProcessMemoryAccess(wanted.pid, wanted.address, wanted.length)

    def blob(self, process: ProcessRef, wanted: Blob) -> MemoryAccess:
        """See ProcessEngine: there are none."""
        raise EngineUnsupported(f"the engine {self.name} has no file {wanted.name!r}")

    def thaw(self, process: ProcessRef) -> None:
        """See ProcessEngine. Also releases a held process at the destination."""
        for member in self._members(process):
            control.thaw(member)

    # ------------------------------------------------------------ destination

    def receive(self, migration: str, coming: Blob) -> MemoryAccess:
        """See ProcessEngine: there are none."""
        raise EngineUnsupported(f"the engine {self.name} has no use for a file {coming.name!r}")

    def prepare(self, migration: str, ahead: bytes) -> None:
        """See ProcessEngine: starts the root's command, which comes to its trampoline by itself.

        An interpreter and a program's modules take longer than all the rest of a build.
        """
        log, spawn = self._log(migration), _decoded(ahead, Spawn)
        if not spawn.command:
            raise EngineUnsupported("the peer says no command to begin with")
        early = Started.start(here(spawn, self._paths, log), log)
        with self._lock:
            self._early[migration] = early

    def discard(self, migration: str) -> None:
        """See ProcessEngine."""
        with self._lock:
            early = self._early.pop(migration, None)
        if early is not None:
            early.end()

    def restore(self, image: CpuImage, migration: str, gpu_map: GpuMap) -> Held:
        """See ProcessEngine. Raises RestoreFailed, InsufficientMemory."""
        if image.engine != self.name:
            raise EngineUnsupported(f"the image is one of the engine {image.engine}")
        tree = decode_tree(image.state)
        with self._lock:
            early = self._early.pop(migration, None)
        return Held.start(tree, image.ranges, self._paths, self._log(migration), early)

    def _log(self, migration: str) -> Path:
        return Path(self._paths.run) / f"{migration}.log"

    # ------------------------------------------------------------ both

    def kill(self, process: ProcessRef) -> None:
        """See ProcessEngine: the root last, since it is by it that the others are found."""
        for member in reversed(self._members(process)):
            control.kill(member)

    def is_alive(self, process: ProcessRef) -> bool:
        """See ProcessEngine."""
        return procfs.is_alive(process)

    def is_frozen(self, process: ProcessRef) -> bool:
        """See ProcessEngine."""
        if not procfs.is_alive(process):
            return False
        try:
            return all(_is_frozen(member) for member in self._members(process))
        except (EngineUnsupported, NoSuchProcess):
            return False


def _is_frozen(process: ProcessRef) -> bool:
    with Marker.of(process) as marker:
        return control.is_frozen(process, marker)


def procfs_spawn(pid: int) -> Spawn:
    """How the command of *pid* was started. Raises OSError, NoSuchProcess.

    Nearly always as its runtime will say in the freeze, by which it is judged.
    """
    data = Path(f"/proc/{pid}/environ").read_bytes()
    pairs = (os.fsdecode(item).partition("=") for item in data.split(b"\0") if item)
    return Spawn(
        command=procfs.command(pid),
        directory=os.readlink(f"/proc/{pid}/cwd"),
        environment={name: value for name, _, value in pairs if name != EXECUTOR_FD},
        output=(_regular(pid, 1), _regular(pid, 2)),
    )


def _regular(pid: int, fd: int) -> str:
    try:
        if stat.S_ISREG(os.stat(f"/proc/{pid}/fd/{fd}").st_mode):
            return os.readlink(f"/proc/{pid}/fd/{fd}")
    except OSError:
        pass
    return ""


def _nearest(pid: int, pids: Sequence[int]) -> int:
    """Index of the closest ancestor of *pid* among *pids*; of the root if none is left."""
    with contextlib.suppress(NoSuchProcess):
        while pid := procfs.parent(pid):
            if pid in pids:
                return pids.index(pid)
    return 0


def decode_tree(state: bytes) -> Tree:
    """The processes of an image. Raises EngineUnsupported if they are not of this version."""
    tree = _decoded(state, Tree)
    pids = {member.pid for member in tree.members}
    for number, member in enumerate(tree.members):
        if not (-1 <= member.parent < number and (member.parent < 0) == (number == 0)):
            raise EngineUnsupported("the CPU image has a child before its parent")
    if not tree.members or len(pids) != len(tree.members):
        raise EngineUnsupported("the CPU image has no process, or one twice")
    return tree


def decode_document(state: bytes) -> Document:
    """The document of an image's first process. Raises EngineUnsupported."""
    return decode_tree(state).members[0].document


def _decoded(state: bytes, kind: type[D]) -> D:
    try:
        return from_msgpack(state, kind)
    except msgspec.DecodeError as error:
        raise EngineUnsupported(f"the CPU image can't be read: {error}") from error
