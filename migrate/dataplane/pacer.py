"""A bandwidth limit shared by the streams of one sender."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

BURST = 0.05  # seconds of the rate that may be sent at once


class Pacer:
    """At most *rate* bytes a second over any time much longer than 50 ms; None: no limit."""

    def __init__(self, rate: float | None, *, clock: Callable[[], float] = time.monotonic) -> None:
        if rate is not None and rate <= 0:
            raise ValueError("a bandwidth limit is positive")
        self._rate = rate
        self._clock = clock
        self._lock = threading.Lock()
        self._free_at = clock()  # when all that was taken will have gone out

    def take(self, count: int, wait: Callable[[float], None]) -> None:
        """Take *count* bytes of the rate, calling ``wait(seconds)`` first where it is used up."""
        if self._rate is None:
            return
        with self._lock:
            now = self._clock()
            start = max(self._free_at, now - BURST)
            self._free_at = start + count / self._rate
            delay = self._free_at - now
        if delay > 0:
            wait(delay)
