"""Many schedules on all cores, and the table of what came of them."""

from __future__ import annotations

import logging
import multiprocessing
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from migrate import faults as fault_points
from scenarios.simulate.mutations import MUTATIONS
from scenarios.simulate.scheduler import Scheduler
from scenarios.simulate.world import Outcome, World

BATCH = 100  # schedules a worker is given at once
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - in memory: fsync is free there


class Totals:
    """Sums over schedules."""

    def __init__(self) -> None:
        self.schedules = 0
        self.double = self.lost = self.stuck = self.bugs = 0
        self.operator = 0
        self.moved = 0
        self.simulated = 0.0  # seconds
        self.points = 0
        self.faults: Counter[str] = Counter()
        self.bad: list[Outcome] = []

    def add(self, outcome: Outcome) -> None:
        """One more."""
        self.schedules += 1
        self.double += outcome.double
        self.lost += outcome.lost
        self.stuck += outcome.stuck
        self.bugs += outcome.bugs
        self.operator += outcome.operator
        self.moved += outcome.moved
        self.simulated += outcome.seconds
        self.points += outcome.points
        self.faults.update(outcome.faults)
        if outcome.bad:
            self.bad.append(outcome)


class Runner:
    """Runs schedules one after another in this process."""

    def __init__(self, mutation: str = "", parent: str | None = None) -> None:
        logging.disable(logging.CRITICAL)  # the story is told by the simulation
        if mutation:
            MUTATIONS[mutation]()
        self._point = fault_points.point  # each world puts its own there
        self._scheduler = Scheduler()
        self._folder = tempfile.TemporaryDirectory(prefix="simulate-", dir=parent or _memory())

    def run(self, seed: int) -> Outcome:
        """One schedule."""
        folder = Path(self._folder.name) / str(seed)
        folder.mkdir()
        self._scheduler.reset()
        return World(seed, self._scheduler, folder).run()

    def close(self) -> None:
        """Remove its files; others of this process may log and have fault points again."""
        self._folder.cleanup()
        fault_points.point = self._point
        logging.disable(logging.NOTSET)


@contextmanager
def runner(mutation: str = "") -> Iterator[Runner]:
    """A Runner, closed at the end."""
    made = Runner(mutation)
    try:
        yield made
    finally:
        made.close()


_mine: Runner | None = None


def _memory() -> Path | None:
    return SHARED_MEMORY if SHARED_MEMORY.is_dir() else None


def _begin(mutation: str, parent: str) -> None:
    global _mine  # noqa: PLW0603 - one of each worker process
    _mine = Runner(mutation, parent)


def _batch(seeds: range) -> list[Outcome]:
    assert _mine is not None
    found = []
    for seed in seeds:
        found.append(_mine.run(seed))
    return found


def run_all(
    schedules: int,
    seed: int,
    *,
    mutation: str = "",
    workers: int = 0,
    stop_at_first: bool = False,
    progress: Callable[[Totals, float], None] = lambda _totals, _seconds: None,
) -> Totals:
    """Run seeds *seed*, *seed* + 1 and so on; in order, whatever the number of workers."""
    totals = Totals()
    began = time.monotonic()
    batch = 10 if stop_at_first else BATCH
    end = seed + schedules
    batches = [range(at, min(at + batch, end)) for at in range(seed, end, batch)]
    context = multiprocessing.get_context("spawn")
    count = min(workers or os.cpu_count() or 1, len(batches))
    # Workers end by a signal and leave their files: the folder of all is ours to remove.
    with (
        tempfile.TemporaryDirectory(
            prefix="simulate-", dir=_memory(), ignore_cleanup_errors=True
        ) as parent,
        context.Pool(count, initializer=_begin, initargs=(mutation, parent)) as pool,
    ):
        for outcomes in pool.imap(_batch, batches):
            for outcome in outcomes:
                totals.add(outcome)
                if outcome.bad and stop_at_first:
                    pool.terminate()
                    return totals
            progress(totals, time.monotonic() - began)
    return totals
