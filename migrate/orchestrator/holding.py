"""Buffers of a running process that we hold while we read them, and when to let go.

A dmabuf keeps its BO's VRAM allocated even if the job freed it. So while a round lasts the
process's BOs are listed again, at least every ``RELIST`` seconds; of those that are gone
dmabuf and mapping are closed at once. If a GPU's free VRAM falls below a reserve all are
let go: the job may be about to need what we hold.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence

from migrate.dataplane.access import MemoryAccess
from migrate.dataplane.messages import ObjectInfo
from migrate.kfd.process import Checkpointed
from migrate.kfd.sysfs import VramUsage
from migrate.orchestrator.clock import Clock
from migrate.orchestrator.plan import ObjectOrder

RELIST = 1.0  # seconds; a listing takes milliseconds, and the process stands meanwhile
RESERVE = 1 / 64  # of a GPU's VRAM


class Holding:
    """What one live round holds. ``tick`` is to be called a few times a second."""

    def __init__(
        self,
        orders: Sequence[ObjectOrder],
        objects: Sequence[tuple[ObjectInfo, MemoryAccess]],
        held: Sequence[Checkpointed],
        *,
        clock: Clock,
        relist: Callable[[], Mapping[int, int]],
        short: Callable[[], str],
        give_up: Callable[[int], None],
    ) -> None:
        """*relist*: the BOs that exist now, see ``listed``. *short*: why VRAM is, or nothing.

        *give_up* is told of each object before it is closed.
        """
        self._inodes = listed(orders, held)
        self._orders = {order.object_id: order for order in orders}
        self._access = {info.id: access for info, access in objects}
        self._held = held
        self._clock = clock
        self._relist = relist
        self._short = short
        self._give_up = give_up
        self._next = clock.monotonic() + RELIST
        self.dropped = ""  # why all were let go

    def tick(self) -> None:
        """Let go of what is to be let go."""
        if self.dropped:
            return
        short = self._short()
        if short:
            self.dropped = short
            self._close(set(self._orders))
        elif self._clock.monotonic() >= self._next:
            now = self._relist()
            self._close(
                {number for number in self._orders if now.get(number) != self._inodes[number]}
            )
            self._next = self._clock.monotonic() + RELIST

    def _close(self, gone: set[int]) -> None:
        for number in gone:
            order = self._orders.pop(number)
            self._give_up(number)
            self._access[number].close()
            if order.bo is not None:
                held = self._held[order.bo.process].dmabufs
                fd = held[order.bo.index]
                if fd is not None:
                    held[order.bo.index] = None
                    os.close(fd)


def listed(orders: Sequence[ObjectOrder], held: Sequence[Checkpointed]) -> dict[int, int]:
    """The inode of each BO's dmabuf, by object id.

    A BO is exported as one dmabuf for as long as that lives; one that was freed and made
    anew at the same place has another.
    """
    found = {}
    for order in orders:
        assert order.bo is not None
        fd = held[order.bo.process].dmabufs[order.bo.index]
        assert fd is not None
        found[order.object_id] = os.fstat(fd).st_ino
    return found


def shortage(usage: Sequence[VramUsage], gpus: Sequence[int]) -> str:
    """Why VRAM is short on one of *gpus* (gpu_ids), or nothing."""
    for one in usage:
        if one.gpu_id in gpus and one.free < one.total * RESERVE:
            return f"of GPU {one.gpu_id}'s VRAM only {one.free >> 20} MiB are free"
    return ""
