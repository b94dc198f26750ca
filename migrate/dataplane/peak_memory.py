"""How much memory an agent takes: sampled while it works, by the kernel's own accounts.

PSS of this process and its descendants from /proc/PID/smaps (proc(5)). Mappings of files
that hold objects are left out: buffers (dmabufs, the simulated node's memfds) are the
process's memory, not ours, and staging is listed apart by what its files hold.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from migrate.model import Value

INTERVAL = 0.25  # seconds between samples
NOT_OURS = ("/memfd:", "/dmabuf:", "anon_inode:dmabuf", "/dev/dri/")


class Peak(Value):
    """Peaks in bytes: PSS of the agent with its helpers, and memory held by staging."""

    agent: int = 0
    staging: int = 0


class PeakMemorySampler:
    """Samples on a thread of its own. ``staging`` tells what staging holds in bytes."""

    def __init__(self, staging: Callable[[], int] = lambda: 0) -> None:
        self._staging = staging
        self._lock = threading.Lock()
        self._peak = Peak()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory", daemon=True)

    def start(self) -> None:
        """Begin to sample."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread. Idempotent."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def peak(self) -> Peak:
        """The peaks so far, this moment included."""
        self.sample()
        return self._peak

    def sample(self) -> None:
        """Look once."""
        agent = sum(pss(pid) for pid in _tree(os.getpid()))
        staging = self._staging()
        with self._lock:
            self._peak = Peak(
                agent=max(agent, self._peak.agent), staging=max(staging, self._peak.staging)
            )

    def _run(self) -> None:
        while not self._stop.wait(INTERVAL):
            self.sample()


def pss(pid: int) -> int:
    """PSS in bytes of a process without the memory of objects; 0 if it is gone."""
    total, counted = 0, True
    try:
        with Path(f"/proc/{pid}/smaps").open(encoding="utf-8", errors="replace") as smaps:
            for line in smaps:
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024 if counted else 0
                elif line[0] in "0123456789abcdef":
                    name = line.split(maxsplit=5)[5:]
                    counted = not (name and name[0].startswith(NOT_OURS))
    except OSError:
        return 0
    return total


def _tree(pid: int) -> Iterator[int]:
    """A process and its descendants that are its helpers: those in its session."""
    yield pid
    try:
        session = os.getsid(pid)
        children = [
            int(child)
            for task in os.listdir(f"/proc/{pid}/task")
            for child in Path(f"/proc/{pid}/task/{task}/children").read_text().split()
        ]
    except (OSError, ValueError):
        return
    for child in children:
        try:
            if os.getsid(child) == session:
                yield from _tree(child)
        except OSError:
            continue
