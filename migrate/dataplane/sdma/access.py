"""``MemoryAccess`` to a BO by its card's DMA engine, through the bounce buffer."""

from __future__ import annotations

import ctypes
import errno
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack

from migrate.dataplane.chunks import address_of
from migrate.dataplane.memory import check_bounds
from migrate.dataplane.sdma.card import Card, Fence, Slot


class SdmaAccess:
    """A BO through its dmabuf *fd*, which stays the caller's. Raises OSError.

    Reads and writes are cut into slots of the bounce buffer; as many are in flight as slots
    are free, and one always is, so that threads never wait for each other in a circle.
    """

    def __init__(self, card: Card, fd: int, size: int) -> None:
        self.size = size
        self._card = card
        with ExitStack() as stack:
            self._buffer = card.import_dmabuf(fd)
            stack.callback(self._buffer.close)
            if self._buffer.size < size:
                raise OSError(errno.EFAULT, f"the buffer has {self._buffer.size} bytes, not {size}")
            self._list = stack.enter_context(card.listed(self._buffer))
            self._stack = stack.pop_all()

    def read(self, offset: int, into: memoryview) -> None:
        """See MemoryAccess. ECANCELED if the engine refused or failed."""
        check_bounds(self.size, offset, len(into))
        self._copy(offset, into, reading=True)

    def write(self, offset: int, data: memoryview) -> None:
        """See MemoryAccess. ECANCELED if the engine refused or failed."""
        check_bounds(self.size, offset, len(data))
        self._copy(offset, data, reading=False)

    def close(self) -> None:
        """See MemoryAccess. Idempotent."""
        self._stack.close()

    def _copy(self, offset: int, data: memoryview, *, reading: bool) -> None:
        flight: deque[tuple[Fence, Slot, memoryview]] = deque()
        try:
            for done, part in _cut(data, self._card.slot):
                while (slot := self._card.take_slot(wait=not flight)) is None:
                    self._land(flight, reading=reading)
                fence = self._begin(slot, offset + done, part, reading=reading)
                flight.append((fence, slot, part))
            while flight:
                self._land(flight, reading=reading)
        finally:
            self._abandon(flight)

    def _begin(self, slot: Slot, offset: int, part: memoryview, *, reading: bool) -> Fence:
        """Start one slot's copy. The slot is given back if that fails."""
        at = self._buffer.address + offset
        try:
            if reading:
                return self._card.submit(self._list, slot, at, slot.address, len(part))
            source = bytes(part) if part.readonly else address_of(part)
            ctypes.memmove(slot.pointer, source, len(part))
            return self._card.submit(self._list, slot, slot.address, at, len(part))
        except BaseException:
            self._card.give_slot(slot)
            raise

    def _land(self, flight: deque[tuple[Fence, Slot, memoryview]], *, reading: bool) -> None:
        """Wait for the oldest copy and take what it brought."""
        fence, slot, part = flight[0]
        self._card.wait(fence)
        if reading:
            ctypes.memmove(address_of(part), slot.pointer, len(part))
        flight.popleft()
        self._card.give_slot(slot)

    def _abandon(self, flight: deque[tuple[Fence, Slot, memoryview]]) -> None:
        """After an error: a slot that the engine may still write to is not used again."""
        while flight:
            fence, slot, _ = flight.popleft()
            try:
                self._card.wait(fence)
            except OSError as error:
                if error.errno == errno.ETIME:
                    continue
            self._card.give_slot(slot)


def _cut(data: memoryview, size: int) -> Iterator[tuple[int, memoryview]]:
    for done in range(0, len(data), size):
        yield done, data[done : done + size]
