"""A process under construction: started anew, under the agent's command, then held."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import msgspec

from migrate.dataplane.access import MemoryAccess
from migrate.dataplane.memory import ProcessMemoryAccess
from migrate.engine import control, limits, procfs
from migrate.engine.document import Document, Finish
from migrate.engine.marker import Marker
from migrate.engine.remote import Connection, RemoteFile
from migrate.engine.runtime import HOST_ROOT, PTRACER
from migrate.engine.seam import CpuRange, MovedBo, MovedGpu
from migrate.engine.trampoline import EXECUTOR_FD, OPEN_KFD, pack_ranges
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
    """``HeldProcess`` of the reexec engine."""

    process: ProcessRef

    def __init__(
        self, channel: socket.socket, document: Document, paths: HostPaths, log: Path
    ) -> None:
        self._connection = Connection(channel)
        self._document = document
        self._paths = paths
        self._errors = Path(document.output[1] or log)
        self._errors_start = self._errors.stat().st_size if self._errors.exists() else 0
        self._kfd: tuple[KfdProcess, ...] = ()

    @classmethod
    def start(
        cls, document: Document, ranges: list[tuple[int, int]], paths: HostPaths, log: Path
    ) -> Self:
        """Start the command anew and let it open /dev/kfd and map its CPU ranges.

        Raises RestoreFailed, InsufficientMemory; then no process is left.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            ours.settimeout(_BUILD_TIMEOUT)
            held = cls(ours, document, paths, log)
            with theirs:
                held.process = _spawn(document, paths, log, theirs.fileno())
            held._begin(ranges)
        except BaseException:
            ours.close()  # a trampoline ends when its agent does
            raise
        return held

    def _begin(self, ranges: list[tuple[int, int]]) -> None:
        try:
            path = os.fsencode(self._paths.kfd)
            number = self._connection.ask(Kind.OPEN, path, file=OPEN_KFD).file
            self._connection.ask(Kind.RANGES, pack_ranges(ranges))
        except MemoryError as error:
            raise InsufficientMemory(str(error)) from error
        except (OSError, MigrateError) as error:
            raise self._failed("starting it", error) from error
        file = RemoteFile(self._connection, number)
        self._kfd = (KfdProcess(file, self.process.pid),)

    @property
    def kfd(self) -> Sequence[KfdProcess]:
        """Its KFD process; ioctls and ``open_node`` run inside the new process."""
        return self._kfd

    def memory(self, wanted: CpuRange) -> MemoryAccess:
        """Write access to a range; its ``pid`` (the source's) is not looked at."""
        return ProcessMemoryAccess(self.process.pid, wanted.address, wanted.length)

    def restored(self, gpus: Sequence[MovedGpu], bos: Sequence[MovedBo]) -> None:
        """See HeldProcess: all the rest needs the memory's contents."""

    def finish(self, gpus: Sequence[MovedGpu], bos: Sequence[MovedBo]) -> None:
        """Map BOs, rebuild the CPU state, and hold. Raises RestoreFailed, ProcessExited."""
        number = random.getrandbits(63) | 1
        order = Finish(document=self._document, gpus=tuple(gpus), bos=tuple(bos), number=number)
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

    def release(self) -> None:
        """Let it run. Raises ProcessExited."""
        if not procfs.is_alive(self.process):
            raise ProcessExited(f"process {self.process.pid} ended while it was held")
        control.thaw(self.process)

    def abandon(self) -> None:
        """End it, built or not, and wait until it is gone. Idempotent."""
        self._connection.close()
        control.kill(self.process)

    def _failed(self, doing: str, error: Exception) -> MigrateError:
        """RestoreFailed with the last line that the new process wrote, if it wrote any."""
        said = b""
        with contextlib.suppress(OSError), self._errors.open("rb") as file:
            file.seek(self._errors_start)
            said = file.read()[-_TAIL:].strip().rpartition(b"\n")[2]
        text = f"process {self.process.pid}: {doing} failed: {error}"
        return RestoreFailed(f"{text} ({said.decode(errors='replace')})" if said else text)


def _spawn(document: Document, paths: HostPaths, log: Path, executor: int) -> ProcessRef:
    command = [document.executable, *document.arguments[1:]]
    environment = {**document.environment, **_host(paths), EXECUTOR_FD: str(executor)}
    if not any(name == HOST_ROOT for name in _host(paths)):
        environment.pop(HOST_ROOT, None)
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(open(path or log, "ab")) for path in document.output]
            started = subprocess.Popen(
                command,
                cwd=document.directory,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=files[0],
                stderr=files[1],
                pass_fds=[executor],
                start_new_session=True,  # it outlives the agent and its terminal
            )
    except OSError as error:
        raise RestoreFailed(f"{command[0]}: {error}") from error
    limits.give_back(started.pid)
    # Its parent is this agent as long as that lives: somebody has to take its exit code.
    threading.Thread(target=started.wait, name=f"reap-{started.pid}", daemon=True).start()
    try:
        return procfs.reference(started.pid)
    except NoSuchProcess as error:
        raise RestoreFailed(f"{' '.join(command)} ended at once") from error


def _host(paths: HostPaths) -> Mapping[str, str]:
    """Environment by which the program finds the host it is on."""
    found = {PTRACER: str(os.getpid())}
    root = Path(paths.kfd).parent
    if paths.kfd != HostPaths().kfd:
        found[HOST_ROOT] = str(root)
    return found
