"""The agent's side of the tracer helper."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from migrate.engine import procfs
from migrate.engine.remote import Connection, RemoteFile
from migrate.engine.wire import Kind
from migrate.errors import CheckpointFailed, MigrateError, NoSuchProcess, ProcessExited
from migrate.kfd.guards import refuse_gpus_without_vm
from migrate.kfd.process import KfdProcess
from migrate.kfd.sysfs import read_render_minors
from migrate.model import HostPaths, ProcessRef

HELPER_EXIT = 10.0  # seconds until a helper that was told to end is killed
SPARE_LIFE = 60.0  # seconds that a helper waits for work: the next look is often near


@contextlib.contextmanager
def traced(
    process: ProcessRef,
    paths: HostPaths,
    *,
    pids: Sequence[int] | None = None,
    leave_paused: bool = False,
) -> Iterator[list[KfdProcess]]:
    """All threads of a tree's KFD processes stopped, their files usable for CRIU operations.

    *process* is the tree's root and *pids* its KFD processes (the root alone unless given).
    Whatever is still paused at the end is started again, unless the body ends well and
    *leave_paused* is set. Raises NoSuchProcess, NotKfdProcess, ForeignProcess, PtraceDenied,
    AlreadyTraced, FreezeTimeout; ProcessExited if the process dies in the middle,
    CheckpointFailed if the helper does.
    """
    if not procfs.is_alive(process):
        raise NoSuchProcess(f"process {process.pid} has ended")
    with _helper(paths, keep=not leave_paused) as connection:
        try:
            held = [
                KfdProcess(
                    RemoteFile(connection, connection.ask(Kind.ATTACH, file=pid).file),
                    pid,
                    before_pause=guard(paths),
                )
                for pid in ((process.pid,) if pids is None else pids)
            ]
            if not procfs.is_alive(process):
                raise NoSuchProcess(f"process {process.pid} has ended")
            yield held
            connection.ask(Kind.DONE, file=int(leave_paused))
        except (OSError, MigrateError) as error:
            if isinstance(error, NoSuchProcess):
                raise
            if not procfs.is_alive(process):
                raise ProcessExited(f"process {process.pid} ended while it was held") from error
            if isinstance(error, ConnectionResetError):
                raise CheckpointFailed("the helper that held the process died") from error
            raise


def guard(paths: HostPaths) -> Callable[[int], None]:
    """Refuses to pause a process that sees a GPU without a VM: the kernel would oops."""
    minors = read_render_minors(paths.topology)
    return partial(refuse_gpus_without_vm, paths=paths, render_minors=minors)


class _Helper:
    """A helper process and the agent's connection to it."""

    def __init__(self, paths: HostPaths) -> None:
        self.kfd = paths.kfd
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        command = [sys.executable, "-m", "migrate.engine.tracer"]
        command += ["--fd", str(theirs.fileno()), "--kfd", paths.kfd]
        try:
            with theirs:
                self.process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,  # Ctrl-C at the agent's terminal is not for it
                )
        except BaseException:
            ours.close()
            raise
        self.connection = Connection(ours)

    def answers(self) -> bool:
        """Whether one that holds nothing is alive; to wait(2), one that is dying still is."""
        try:
            self.connection.ask(Kind.DONE)
        except OSError:
            return False
        return True

    def close(self) -> None:
        """One that was not told DONE undoes; it ends in any case. Idempotent."""
        self.connection.close()
        try:
            self.process.wait(HELPER_EXIT)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def close_soon(self) -> None:
        """As ``close`` of one that was told DONE: nobody waits for an interpreter to end."""
        self.connection.close()
        threading.Thread(target=self.close, name="helper-end", daemon=True).start()


class _Spare:
    """At most one helper that waits: Python starts in much more time than a look takes.

    It ends with this process, because its socket does, or after SPARE_LIFE.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._helper: _Helper | None = None
        self._end: threading.Timer | None = None

    def take(self, paths: HostPaths) -> _Helper:
        """The one that waits, or a new one. Raises OSError."""
        found = self._remove()
        if found is not None:
            if found.kfd == paths.kfd and found.answers():
                return found
            found.close()
        return _Helper(paths)

    def keep(self, helper: _Helper) -> None:
        """Have *helper*, which holds nothing, wait for the next look; one does at most."""
        old = self._remove()
        if old is not None:
            old.close()
        with self._lock:
            if self._helper is None:
                self._helper = helper
                self._end = threading.Timer(SPARE_LIFE, self._expire, [helper])
                self._end.daemon = True
                self._end.start()
                return
        helper.close()

    def _remove(self) -> _Helper | None:
        with self._lock:
            found, self._helper = self._helper, None
            if self._end is not None:
                self._end.cancel()
                self._end = None
            return found

    def _expire(self, helper: _Helper) -> None:
        with self._lock:
            if self._helper is not helper:
                return
            self._helper = self._end = None
        helper.close()


_spare = _Spare()


@contextlib.contextmanager
def _helper(paths: HostPaths, *, keep: bool) -> Iterator[Connection]:
    """A helper for one look; *keep*: if that ends well another may follow soon."""
    helper = _spare.take(paths)
    try:
        yield helper.connection
    except BaseException:
        helper.close()
        raise
    if keep:
        _spare.keep(helper)
    else:
        helper.close_soon()
