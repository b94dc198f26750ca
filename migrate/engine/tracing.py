"""The agent's side of the tracer helper."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from migrate.engine import procfs
from migrate.engine.remote import Connection, RemoteFile
from migrate.engine.wire import Kind
from migrate.errors import CheckpointFailed, MigrateError, NoSuchProcess, ProcessExited
from migrate.kfd.guards import refuse_gpus_without_vm
from migrate.kfd.process import KfdProcess
from migrate.kfd.sysfs import read_topology
from migrate.model import HostPaths, ProcessRef

HELPER_EXIT = 10.0  # seconds until a helper that was told to end is killed


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
    with _helper(paths) as connection:
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
    minors = {gpu.gpu_id: gpu.drm_render_minor for gpu in read_topology(paths.topology).gpus}
    return partial(refuse_gpus_without_vm, paths=paths, render_minors=minors)


@contextlib.contextmanager
def _helper(paths: HostPaths) -> Iterator[Connection]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours:
        with theirs:
            command = [sys.executable, "-m", "migrate.engine.tracer"]
            command += ["--fd", str(theirs.fileno()), "--kfd", paths.kfd]
            helper = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C at the agent's terminal is not for it
            )
        try:
            yield Connection(ours)
        finally:
            ours.close()  # a helper that was not told DONE undoes and ends
            try:
                helper.wait(HELPER_EXIT)
            except subprocess.TimeoutExpired:
                helper.kill()
                helper.wait()
