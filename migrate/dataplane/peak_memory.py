"""The peak memory of this process and its children, without BO memory, staging apart.

PSS from /proc/PID/smaps (proc_pid_smaps(5)): pages shared by several processes count in
parts. Left out are mappings of BOs (memfds and dmabufs: they are the job's memory, not ours);
staging is known by its addresses (:meth:`.staging.Staging.address_ranges`).
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from migrate.model import Value

INTERVAL = 0.25  # seconds
SHARE = 20  # times a look takes pass at least until the next
_HEAD = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ \S+ *(.*)$")
_BO_NAMES = ("/memfd:", "/dmabuf:", "/dev/dri/", "anon_inode:dmabuf")

Ranges = tuple[tuple[int, int], ...]


class Memory(Value):
    """PSS in bytes: of the agent itself, and of staging."""

    agent: int = 0
    staging: int = 0


def measure(smaps: Iterable[str], staging: Ranges = ()) -> Memory:
    """The sum over one smaps file. Mappings that touch *staging* count as such.

    The kernel joins staging only with other staging, live or closed and then empty.
    """
    agent = staged = 0
    kind = ""
    for line in smaps:
        head = _HEAD.match(line)
        if head is not None:
            kind = _kind(int(head[1], 16), int(head[2], 16), head[3], staging)
        elif line.startswith("Pss:"):
            size = int(line.split()[1]) * 1024
            if kind == "staging":
                staged += size
            elif kind == "agent":
                agent += size
    return Memory(agent=agent, staging=staged)


def _kind(start: int, end: int, name: str, staging: Ranges) -> str:
    if any(first < end and start < last for first, last in staging):
        return "staging"
    return "bo" if name.startswith(_BO_NAMES) else "agent"


def descendants(pid: int) -> list[int]:
    """*pid* and all its living descendants (/proc/PID/task/TID/children)."""
    found = [pid]
    for parent in found:
        for children in Path(f"/proc/{parent}/task").glob("*/children"):
            try:
                found.extend(int(child) for child in children.read_text().split())
            except OSError:  # ended meanwhile
                continue
    return found


def sample(staging: Ranges = (), *, exclude: Callable[[int], bool] = lambda pid: False) -> Memory:
    """The memory of this process and its descendants now; *exclude* leaves a child out."""
    agent = staged = 0
    for pid in descendants(os.getpid()):
        mine = pid == os.getpid()
        if not mine and exclude(pid):
            continue
        try:
            with Path(f"/proc/{pid}/smaps").open() as lines:
                memory = measure(lines, staging if mine else ())
        except OSError:  # ended meanwhile, or not ours
            continue
        agent += memory.agent
        staged += memory.staging
    return Memory(agent=agent, staging=staged)


class PeakMemory:
    """Samples on a thread of its own from ``start`` to ``stop``.

    ``staging`` is asked at each sample; ``exclude`` names children that are no helpers (the
    migrated process of a demo).
    """

    def __init__(
        self,
        staging: Callable[[], Ranges] = tuple,
        *,
        exclude: Callable[[int], bool] = lambda pid: False,
        interval: float = INTERVAL,
    ) -> None:
        self._staging = staging
        self._exclude = exclude
        self._interval = interval
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._peak = Memory()
        self._thread = threading.Thread(target=self._run, name="peak-memory", daemon=True)

    def start(self) -> None:
        """Begin to sample."""
        self._thread.start()

    @property
    def peak(self) -> Memory:
        """The highest figures so far, each for itself."""
        return self._peak

    def stop(self) -> Memory:
        """A last sample, then the peaks. Idempotent."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        self._sample()
        return self._peak

    def _run(self) -> None:
        pause = self._interval
        while not self._ended.wait(pause):
            began = time.monotonic()
            self._sample()
            # A look holds the interpreter: on a slow host it comes less often.
            pause = max(self._interval, SHARE * (time.monotonic() - began))

    def _sample(self) -> None:
        now = sample(self._staging(), exclude=self._exclude)
        with self._lock:
            self._peak = Memory(
                agent=max(self._peak.agent, now.agent),
                staging=max(self._peak.staging, now.staging),
            )
