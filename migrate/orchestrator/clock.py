"""The ``Clock`` seam: time, waiting and threads.

Everything in the drivers that waits does so through the clock of its host, so that a
simulation can run both hosts in its own time and choose who goes next.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol


class Thread(Protocol):
    """As much of a thread as is used."""

    def is_alive(self) -> bool:
        """Whether it has not ended."""

    def join(self, timeout: float | None = None) -> None:
        """Wait until it has ended, at most *timeout* seconds."""


class Clock:
    """The machine's own. Times are seconds."""

    def monotonic(self) -> float:
        """Seconds since some start; never goes back."""
        return time.monotonic()

    def event(self) -> threading.Event:
        """Something to wait for."""
        return threading.Event()

    def lock(self) -> AbstractContextManager[object]:
        """A lock that its holder may take again."""
        return threading.RLock()

    def start(self, name: str, target: Callable[[], object]) -> Thread:
        """Run *target* beside us; it does not keep the agent from ending."""
        thread = threading.Thread(target=target, name=name, daemon=True)
        thread.start()
        return thread


class Laps:
    """Seconds by name, one lap after another; *now* is a monotonic clock."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._laps: dict[str, float] = {}
        self.began = 0.0
        self.since = 0.0  # when the last lap ended

    def begin(self) -> None:
        """The first lap begins."""
        self.began = self.since = self._now()

    def lap(self, name: str) -> None:
        """The time since the last lap belongs to *name*."""
        now = self._now()
        self._laps[name] = now - self.since
        self.since = now

    def __getitem__(self, name: str) -> float:
        """The lap's seconds; 0.0 if it never ended."""
        return self._laps.get(name, 0.0)
