"""Looks at the copies of a process all the time, from outside: which run, which stand."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from migrate.model import Value
from scenarios.drills.stage import processes_of

INTERVAL = 0.02  # seconds
DISCOVER = 10  # looks between searches for new processes
RUNS, STANDS, GONE = "runs", "stands", "gone"


class Look(Value):
    """One copy at one time: ``wall`` in seconds since the epoch, ``cpu`` in clock ticks."""

    wall: float
    pid: int
    state: str
    cpu: int


class Watch(threading.Thread):
    """Samples every process whose command line names the job's log."""

    def __init__(self, log: Path) -> None:
        super().__init__(name="watch", daemon=True)
        self._needle = str(log)
        self._done = threading.Event()
        self.looks: list[Look] = []
        self._pids: list[int] = []

    def run(self) -> None:
        """Until ``end``."""
        count = 0
        while not self._done.wait(INTERVAL):
            if count % DISCOVER == 0:
                self._pids = sorted(
                    {*self._pids, *(p for p, c in processes_of(self._needle).items() if job(c))}
                )
            count += 1
            for pid in self._pids:
                self.looks.append(look(pid))

    def end(self) -> list[Look]:
        """What was seen."""
        self._done.set()
        self.join()
        return self.looks


def job(command: str) -> bool:
    """Whether a command line is the job's own, not that of a command which names it."""
    return "scenarios.workloads.train" in command


def look(pid: int) -> Look:
    """One look at a process; GONE for one that ended or is a zombie."""
    now = time.time()
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return Look(wall=now, pid=pid, state=GONE, cpu=0)
    state = {"T": STANDS, "t": STANDS, "Z": GONE, "X": GONE}.get(fields[0], RUNS)
    return Look(wall=now, pid=pid, state=state, cpu=int(fields[11]) + int(fields[12]))


def spans(looks: list[Look], pid: int) -> list[tuple[float, float, str]]:
    """Looks at one copy joined to stretches of one state: from, to, state."""
    found: list[tuple[float, float, str]] = []
    for seen in looks:
        if seen.pid != pid:
            continue
        if found and found[-1][2] == seen.state:
            found[-1] = (found[-1][0], seen.wall, seen.state)
        else:
            start = found[-1][1] if found else seen.wall
            found.append((start, seen.wall, seen.state))
    return [span for span in found if span[2] != GONE]


def overlaps(looks: list[Look], source: int, since: float, until: float) -> list[Look]:
    """Looks at which the source's copy ran in a time in which it must not."""
    return [
        seen
        for seen in looks
        if seen.pid == source and seen.state == RUNS and since < seen.wall < until
    ]
