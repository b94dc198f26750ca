"""Buffers of a running process that we hold while we read them, and when to let go.

A dmabuf keeps its BO's VRAM allocated even if the job freed it. So while a round lasts the
process's BOs are listed again, at least every ``RELIST`` seconds; of those that are gone
dmabuf and mapping are closed at once. If a GPU's free VRAM falls below a reserve all are
let go: the job may be about to need what we hold.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from migrate.kfd.sysfs import VramUsage
from migrate.orchestrator.clock import Clock
from migrate.orchestrator.sharing import Place

RELIST = 1.0  # seconds; a listing takes milliseconds, and the process stands meanwhile
RESERVE = 1 / 64  # of a GPU's VRAM


class Holding:
    """What one live round holds. ``tick`` is to be called a few times a second."""

    def __init__(
        self,
        held: Mapping[int, Place],
        *,
        clock: Clock,
        relist: Callable[[], Mapping[int, Place]],
        short: Callable[[], str],
        give_up: Callable[[int], None],
        close: Callable[[int], None],
    ) -> None:
        """*held*: the buffers, by object id; *relist*: those that exist now, see
        ``objects.buffers``. *short*: why VRAM is, or nothing.

        *give_up* is told of each object before *close* is.
        """
        self._held = dict(held)
        self._clock = clock
        self._relist = relist
        self._short = short
        self._give_up = give_up
        self._close = close
        self._next = clock.monotonic() + RELIST
        self.dropped = ""  # why all were let go

    def tick(self) -> None:
        """Let go of what is to be let go."""
        if self.dropped:
            return
        short = self._short()
        if short:
            self.dropped = short
            self._let_go(set(self._held))
        elif self._clock.monotonic() >= self._next:
            now = self._relist()
            self._let_go({n for n, buffer in self._held.items() if now.get(n) != buffer})
            self._next = self._clock.monotonic() + RELIST

    def _let_go(self, gone: set[int]) -> None:
        for number in gone:
            del self._held[number]
            self._give_up(number)
            self._close(number)


def shortage(usage: Sequence[VramUsage], gpus: Sequence[int]) -> str:
    """Why VRAM is short on one of *gpus* (gpu_ids), or nothing."""
    for one in usage:
        if one.gpu_id in gpus and one.free < one.total * RESERVE:
            return f"of GPU {one.gpu_id}'s VRAM only {one.free >> 20} MiB are free"
    return ""
