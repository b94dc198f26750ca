"""A process under construction: started anew, under the agent's command, then held."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import msgspec

from migrate.dataplane.access import MemoryAccess
from migrate.dataplane.memory import ProcessMemoryAccess
from migrate.engine import control, limits, procfs
from migrate.engine.document import Finish, Member, Spawn, Tree
from migrate.engine.marker import Marker
from migrate.engine.remote import Connection, RemoteFile
from migrate.engine.runtime import HOST_ROOT, PTRACER
from migrate.engine.seam import CpuRange, MovedBo, MovedGpu
from migrate.engine.trampoline import OPEN_KFD, pack_ranges, start_again
from migrate.engine.wire import Kind
from migrate.errors import (
    InsufficientMemory,
    MigrateError,
    NoSuchProcess,
    ProcessExited,
    RestoreFailed,
)
from migrate.kfd.process import KfdProcess
from migrate.model import HostPaths, ProcessRef

_BUILD_TIMEOUT = 120.0  # seconds the new process may take to start or to build itself
_HELD_TIMEOUT = 10.0  # seconds from its word that it is built until it is stopped
_POLL = 0.0005
_TAIL = 4096  # bytes of what the new process wrote that are looked at after a failure


class Held:
    """``HeldProcess`` of the reexec engine: a process, and its children that came with it."""

    process: ProcessRef

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self._copies: list[_Copy] = []

    @classmethod
    def start(
        cls,
        tree: Tree,
        ranges: Sequence[CpuRange],
        paths: HostPaths,
        log: Path,
        early: Started | None = None,
    ) -> Self:
        """Start the commands anew and let them open /dev/kfd and map their CPU ranges.

        A child is started by its parent. *early* becomes the root if it was started as that
        would be now, and ends if not. Raises RestoreFailed, InsufficientMemory; then no
        process is left.
        """
        held = cls(tree)
        try:
            for member in tree.members:
                parent = held._copies[member.parent] if member.parent >= 0 else None
                copy = _Copy.start(member, parent, paths, log, early if parent is None else None)
                held._copies.append(copy)
                copy.begin([(r.address, r.length) for r in ranges if r.pid == member.pid])
        except BaseException:
            for copy in held._copies:
                copy.close()  # a trampoline ends when its agent does
            raise
        held.process = held._copies[0].process
        return held

    @property
    def kfd(self) -> Sequence[KfdProcess]:
        """Its KFD processes; ioctls and ``open_node`` run inside each new process."""
        return [copy.kfd for copy in self._copies if copy.kfd is not None]

    def memory(self, wanted: CpuRange) -> MemoryAccess:
        """Write access to a range; its ``pid`` is the source's."""
        for member, copy in zip(self._tree.members, self._copies, strict=True):
            if member.pid == wanted.pid:
                return ProcessMemoryAccess(copy.process.pid, wanted.address, wanted.length)
        raise RestoreFailed(f"process {wanted.pid} is none of the image's")

    def restored(self, gpus: Sequence[MovedGpu], bos: Sequence[MovedBo]) -> None:
        """See HeldProcess: all the rest needs the memory's contents."""

    def finish(self, gpus: Sequence[MovedGpu], bos: Sequence[MovedBo]) -> None:
        """Map BOs, rebuild the CPU state, and hold. Raises RestoreFailed, ProcessExited."""
        pids = {
            member.pid: copy.process.pid
            for member, copy in zip(self._tree.members, self._copies, strict=True)
        }
        process = 0
        for copy in self._copies:
            mine = [gpu for gpu in gpus if copy.kfd is not None and gpu.process == process]
            process += copy.kfd is not None
            copy.finish(mine, bos, pids)

    def release(self) -> None:
        """Let it run. Raises ProcessExited."""
        for copy in self._copies:
            if not procfs.is_alive(copy.process):
                raise ProcessExited(f"process {copy.process.pid} ended while it was held")
        for copy in self._copies:
            control.thaw(copy.process)

    def abandon(self) -> None:
        """End it, built or not, and wait until it is gone. Idempotent."""
        for copy in self._copies:
            copy.close()
        for copy in reversed(self._copies):
            control.kill(copy.process)


class Started:
    """A command started anew, whose trampoline waits for orders; it ends with *channel*."""

    def __init__(self, spawn: Spawn, channel: socket.socket, process: ProcessRef) -> None:
        self.spawn = spawn
        self.channel = channel
        self.process = process

    @classmethod
    def start(cls, spawn: Spawn, log: Path, parent: _Copy | None = None) -> Self:
        """Start it by *parent*, or as a child of this agent. Raises RestoreFailed."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            ours.settimeout(_BUILD_TIMEOUT)
            with theirs:
                if parent is None:
                    process = _start(spawn, theirs.fileno(), log)
                else:
                    process = parent.start_child(spawn, theirs.fileno())
        except BaseException:
            ours.close()
            raise
        return cls(spawn, ours, process)

    def end(self) -> None:
        """End it and wait until it is gone. Idempotent."""
        self.channel.close()
        control.kill(self.process)


class _Copy:
    """One process of the tree, under the agent's command."""

    process: ProcessRef

    def __init__(self, started: Started, member: Member, paths: HostPaths, log: Path) -> None:
        self.process = started.process
        self._connection = Connection(started.channel)
        self._member = member
        self._paths = paths
        self._errors = Path(member.document.output[1] or log)
        self._errors_start = self._errors.stat().st_size if self._errors.exists() else 0
        self.kfd: KfdProcess | None = None

    @classmethod
    def start(
        cls,
        member: Member,
        parent: _Copy | None,
        paths: HostPaths,
        log: Path,
        early: Started | None,
    ) -> Self:
        """Start its command, or take *early* for it. Raises RestoreFailed."""
        spawn = here(member.document.spawn(), paths, log)
        if early is not None and not (early.spawn == spawn and procfs.is_alive(early.process)):
            early.end()
            early = None
        return cls(early or Started.start(spawn, log, parent), member, paths, log)

    def start_child(self, spawn: Spawn, executor: int) -> ProcessRef:
        """Have this process start a child. Raises RestoreFailed."""
        try:
            packed = msgspec.msgpack.encode(spawn)
            return procfs.reference(self._connection.ask(Kind.SPAWN, packed, fds=(executor,)).file)
        except (OSError, MigrateError) as error:
            raise self._failed("starting its child", error) from error

    def begin(self, ranges: list[tuple[int, int]]) -> None:
        """Let it open /dev/kfd and map its CPU ranges."""
        try:
            number = None
            if self._member.has_kfd:
                path = os.fsencode(self._paths.kfd)
                number = self._connection.ask(Kind.OPEN, path, file=OPEN_KFD).file
            self._connection.ask(Kind.RANGES, pack_ranges(ranges))
        except MemoryError as error:
            raise InsufficientMemory(str(error)) from error
        except (OSError, MigrateError) as error:
            raise self._failed("starting it", error) from error
        if number is not None:
            self.kfd = KfdProcess(RemoteFile(self._connection, number), self.process.pid)

    def finish(
        self, gpus: Sequence[MovedGpu], bos: Sequence[MovedBo], pids: dict[int, int]
    ) -> None:
        """Have it become the process that was frozen, and stop."""
        number = random.getrandbits(63) | 1
        order = Finish(
            document=self._member.document,
            gpus=tuple(gpus),
            bos=tuple(bos),
            number=number,
            pids=pids,
        )
        try:
            self._connection.ask(Kind.FINISH, msgspec.msgpack.encode(order))
            self._await_held(number)
        except (OSError, MigrateError) as error:
            raise self._failed("rebuilding it", error) from error
        finally:
            self._connection.close()

    def _await_held(self, number: int) -> None:
        deadline = time.monotonic() + _HELD_TIMEOUT
        with Marker.of(self.process) as marker:
            while marker.handed != number or not procfs.all_stopped(self.process.pid):
                if not procfs.is_alive(self.process):
                    raise ProcessExited(f"process {self.process.pid} ended while it was built")
                if time.monotonic() > deadline:
                    raise TimeoutError("it did not stop")
                time.sleep(_POLL)

    def close(self) -> None:
        """Break off: a trampoline that was not told to finish ends."""
        self._connection.close()

    def _failed(self, doing: str, error: Exception) -> MigrateError:
        """RestoreFailed with the last line that the new process wrote, if it wrote any."""
        said = b""
        with contextlib.suppress(OSError), self._errors.open("rb") as file:
            file.seek(self._errors_start)
            said = file.read()[-_TAIL:].strip().rpartition(b"\n")[2]
        text = f"process {self.process.pid}: {doing} failed: {error}"
        return RestoreFailed(f"{text} ({said.decode(errors='replace')})" if said else text)


def here(there: Spawn, paths: HostPaths, log: Path) -> Spawn:
    """How a command of another host is started on this one."""
    environment = {**there.environment, **_host(paths)}
    if HOST_ROOT not in _host(paths):
        environment.pop(HOST_ROOT, None)
    out, errors = (path or str(log) for path in there.output)
    return msgspec.structs.replace(there, environment=environment, output=(out, errors))


def _start(spawn: Spawn, executor: int, log: Path) -> ProcessRef:
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        started = start_again(spawn, executor)
    except (OSError, ValueError) as error:  # of a name with a NUL, say
        raise RestoreFailed(f"{spawn.command[0]}: {error}") from error
    limits.give_back(started.pid)
    # Its parent is this agent as long as that lives: somebody has to take its exit code.
    threading.Thread(target=started.wait, name=f"reap-{started.pid}", daemon=True).start()
    try:
        return procfs.reference(started.pid)
    except NoSuchProcess as error:
        raise RestoreFailed(f"{' '.join(spawn.command)} ended at once") from error


def _host(paths: HostPaths) -> Mapping[str, str]:
    """Environment by which the program finds the host it is on."""
    found = {PTRACER: str(os.getpid())}
    root = Path(paths.kfd).parent
    if paths.kfd != HostPaths().kfd:
        found[HOST_ROOT] = str(root)
    return found
