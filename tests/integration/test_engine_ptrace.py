"""Seizing real processes: threads, group-stop, pending signals, other tracers."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from migrate.engine import procfs
from migrate.engine.ptrace import Stopped
from migrate.errors import AlreadyTraced, NoSuchProcess
from tests.integration.engine_rig import PATIENCE, REPOSITORY, until

THREADS = """
import signal, sys, threading, time
signal.signal(signal.SIGUSR1, lambda *_: print("got it", flush=True))
count = 0
def spin():
    global count
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    while True:
        count += 1
        time.sleep(0.001)
for _ in range(5):
    threading.Thread(target=spin, daemon=True).start()
print("ready", flush=True)
while True:
    line = sys.stdin.readline()
    if not line:
        break
    print(count, flush=True)
"""


@contextlib.contextmanager
def started(code: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", code, *arguments]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=REPOSITORY) as found:
        try:
            assert found.stdout is not None
            assert found.stdout.readline() == "ready\n"
            yield found
        finally:
            found.kill()


def ask(process: subprocess.Popen[str]) -> int:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return int(process.stdout.readline())


def test_every_thread_is_stopped_and_runs_on() -> None:
    with started(THREADS) as target:
        stopped = Stopped(target.pid)
        stopped.stop(PATIENCE)
        assert len(procfs.threads(target.pid)) == 6
        assert procfs.all_stopped(target.pid)
        assert procfs.tracer(target.pid) == os.getpid()
        stopped.let_go()
        stopped.let_go()
        assert procfs.tracer(target.pid) == 0
        first = ask(target)
        until(lambda: ask(target) > first, "its threads run on")


def test_a_process_in_group_stop_stays_in_it() -> None:
    with started(THREADS) as target:
        os.kill(target.pid, signal.SIGSTOP)
        until(lambda: procfs.all_stopped(target.pid))
        stopped = Stopped(target.pid)
        stopped.stop(PATIENCE)
        stopped.let_go()
        assert procfs.all_stopped(target.pid)
        assert procfs.status(target.pid, "State").startswith("T")
        os.kill(target.pid, signal.SIGCONT)
        assert ask(target) >= 0


def test_a_signal_that_comes_in_between_is_delivered() -> None:
    with started(THREADS) as target:
        assert target.stdout is not None
        stopped = Stopped(target.pid)
        for _ in range(20):
            os.kill(target.pid, signal.SIGUSR1)
            stopped.stop(PATIENCE)
            stopped.let_go()
            assert target.stdout.readline() == "got it\n"


class SignalledWhileSeized(Stopped):
    """The first thread gets a signal between PTRACE_SEIZE and PTRACE_INTERRUPT."""

    def _interrupt(self, thread: int) -> None:
        if thread == self.pid:
            os.kill(thread, signal.SIGUSR1)
            until(lambda: procfs.status(thread, "State").startswith("t"), "it stops for the signal")
        super()._interrupt(thread)


def test_a_signal_whose_delivery_was_stopped_is_delivered() -> None:
    with started(THREADS) as target:
        assert target.stdout is not None
        stopped = SignalledWhileSeized(target.pid)
        stopped.stop(PATIENCE)
        stopped.let_go()
        assert target.stdout.readline() == "got it\n"


def test_another_tracer_is_named() -> None:
    code = (
        "import sys; from migrate.engine.ptrace import Stopped\n"
        "Stopped(int(sys.argv[1])).stop(60); print('ready', flush=True); sys.stdin.read()"
    )
    with started(THREADS) as target:
        with (
            started(code, str(target.pid)) as debugger,
            pytest.raises(AlreadyTraced, match=f"by process {debugger.pid}"),
        ):
            Stopped(target.pid).stop(PATIENCE)
        until(lambda: procfs.tracer(target.pid) == 0, "the kernel lets go with the tracer")
        assert ask(target) >= 0


def test_a_process_that_is_gone_is_said_to_be() -> None:
    with started(THREADS) as target:
        target.kill()
        target.wait()
    with pytest.raises(NoSuchProcess):
        Stopped(target.pid).stop(PATIENCE)
