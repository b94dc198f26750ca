"""Runs in a guest: snapshots of a process whose threads make and destroy objects all the time.

``python -m tests.lab.snapshot_stress LIBRARY COUNT HELPED`` takes COUNT snapshots in one process,
by the code of the tracer helper, and HELPED by the helper itself, and prints a line a fact.
LIBRARY is churn.c, compiled.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from migrate.engine import procfs
from migrate.engine.ptrace import Stopped
from migrate.engine.tracing import traced
from migrate.kfd.file import adopt, find_kfd_fds, steal_fd
from migrate.kfd.process import KfdProcess
from migrate.model import HostPaths
from tests.conformance.hosts import Link, any_host
from tests.conformance.kit import Process
from tests.conformance.target import Target

THREADS = 4
FIRST_ADDRESS = 0x300000000
BYTES = 64 << 20  # of addresses that a thread has for itself
U64 = ctypes.c_uint64


class Churn(ctypes.Structure):
    """``struct churn`` of churn.c."""

    _fields_ = [
        *((name, U64) for name in ("kfd", "gpu_id", "address")),
        *((name, U64) for name in ("stop", "events", "buffers", "error", "failed")),
    ]


class Churning(Target):
    """A target of the conformance suite with threads that churn."""

    churns: list[Churn]

    def start_churning(self, library: str) -> None:
        code = ctypes.CDLL(library)
        kfd, gpus = self.process.kfd.fileno(), self.process.gpu_ids
        self.churns = [
            Churn(kfd, gpus[n % len(gpus)], FIRST_ADDRESS + n * BYTES) for n in range(THREADS)
        ]
        self.threads = [
            threading.Thread(target=code.churn, args=(ctypes.byref(churn),), daemon=True)
            for churn in self.churns
        ]
        for thread in self.threads:
            thread.start()

    def state(self) -> dict[str, list[int]]:
        """What the threads did so far."""
        names = ("events", "buffers", "error", "failed")
        return {name: [getattr(churn, name) for churn in self.churns] for name in names}

    def stop_churning(self) -> None:
        for churn in self.churns:
            churn.stop = 1
        for thread in self.threads:
            thread.join()

    def fds(self) -> int:
        return len(os.listdir("/proc/self/fd"))


def churning(link: Link) -> None:
    """Serves the test's questions."""
    found = Churning(Process(link.paths))
    found.build()
    link.say(os.getpid())
    while True:
        name, *arguments = link.hear()
        link.say(getattr(found, name)(*arguments))


@contextmanager
def held(pid: int) -> Iterator[KfdProcess]:
    """As the helper holds it, in this process."""
    stopped = Stopped(pid)
    stopped.stop(60)
    try:
        file = adopt(steal_fd(pid, find_kfd_fds(pid, HostPaths())[0]))
        try:
            yield KfdProcess(file, pid)
        finally:
            file.close()
    finally:
        stopped.let_go()


def snapshot(process: KfdProcess) -> int:
    """Pause, read, go on; how many BOs there were."""
    process.process_info()
    try:
        with process.checkpoint() as found:
            return len(found.checkpoint.bos)
    finally:
        process.unpause()


def main(library: str, count: int, helped: int) -> None:
    """Print what came of it."""
    with any_host() as host:
        child = host.spawn(churning)
        pid: int = child.hear()
        fds, available = child.ask(("fds",)), child.ask(("available",))
        child.ask(("start_counter",))
        child.ask(("start_churning", library))
        before = child.ask(("state",))
        seen = set()
        started = time.monotonic()
        for _ in range(count):
            with held(pid) as process:
                seen.add(snapshot(process))
        print("snapshots", count)
        print(f"mean {1000 * (time.monotonic() - started) / max(1, count):.1f} ms", file=sys.stderr)
        for _ in range(helped):
            with traced(procfs.reference(pid), host.paths) as processes:
                seen.add(snapshot(processes[0]))
        print("by the helper", helped)
        print("counter moves", child.ask(("counter_moves",)))
        child.ask(("stop_churning",))
        after = child.ask(("state",))
        print("errors", sorted(set(zip(after["error"], after["failed"], strict=True))))
        for name in ("events", "buffers"):
            print(name, all(b > a for a, b in zip(before[name], after[name], strict=True)))
        print("made", sum(after["events"]), sum(after["buffers"]), file=sys.stderr)
        print("numbers of buffers seen", len(seen) > 1)
        counted, iterations = child.ask(("stop_counter",))
        print("kernel", "whole" if counted == iterations else f"{counted} of {iterations}")
        print("fds", child.ask(("fds",)) - fds)
        print("VRAM missing", available - child.ask(("available",)))
        child.kill()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
