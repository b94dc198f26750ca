"""Events of one process, after kfd_events.c.

All of it runs under the node's lock. Waiters are threads of the node that sleep on the
node's condition ``changed``.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from migrate.kfd import uapi
from migrate.kfd.sim.memory import Backing, Bo

INT_MAX = 0x7FFFFFFF
UNSIGNALED_EVENT_SLOT = 0xFFFFFFFFFFFFFFFF
KFD_FIRST_NONSIGNAL_EVENT_ID = (INT_MAX >> 1) + 1
SIGNAL_PAGE_SIZE = uapi.KFD_SIGNAL_EVENT_LIMIT * 8
OLDEST_USER_MODE_SLOTS = 256


@dataclass(eq=False)
class Waiter:
    """struct kfd_event_waiter: one event in one WAIT_EVENTS."""

    event: Event | None
    activated: bool = False


@dataclass(eq=False)
class Event:
    """struct kfd_event."""

    event_id: int
    kind: int
    auto_reset: bool
    signaled: bool = False
    data: bytes = b"\0" * 32  # kfd_hsa_memory_exception_data or kfd_hsa_hw_exception_data
    waiters: list[Waiter] = field(default_factory=list)

    @property
    def has_slot(self) -> bool:
        """SIGNAL and DEBUG events are signalled by the GPU through the signal page."""
        return self.kind in {uapi.KFD_IOC_EVENT_SIGNAL, uapi.KFD_IOC_EVENT_DEBUG_EVENT}

    def set(self) -> None:
        """set_event(): auto reset only if somebody is woken by it."""
        self.signaled = not self.auto_reset or not self.waiters
        for waiter in self.waiters:
            waiter.activated = True


class Events:
    """The events of a process and its signal page."""

    def __init__(self) -> None:
        self._events: dict[int, Event] = {}
        self.page: Backing | None = None
        self.page_handle = 0  # of the BO the process gave as signal page
        self._mapped_slots = 0
        self._signal_count = 1

    def __len__(self) -> int:
        return len(self._events)

    def all(self) -> list[Event]:
        """In the order of their ids, as idr_for_each_entry gives them."""
        return [self._events[event_id] for event_id in sorted(self._events)]

    def find(self, event_id: int) -> Event:
        """Raises OSError(EINVAL)."""
        try:
            return self._events[event_id]
        except KeyError:
            raise OSError(errno.EINVAL, f"no event {event_id}") from None

    # ------------------------------------------------------------ create, destroy

    def set_page(self, bo: Bo, handle: int) -> None:
        """kfd_event_page_set() with a BO of the process. Raises OSError."""
        if self.page is not None:
            raise OSError(errno.EBUSY, "signal page is set")
        if bo.backing is None or bo.size < SIGNAL_PAGE_SIZE:
            raise OSError(errno.EINVAL, "signal page too small")
        self._adopt_page(bo.backing)
        self.page_handle = handle
        self._mapped_slots = bo.size // 8

    def map_page(self, length: int) -> Backing:
        """kfd_event_mmap(). Raises OSError(EINVAL)."""
        if length > SIGNAL_PAGE_SIZE or self.page is None:
            raise OSError(errno.EINVAL, "event page")
        self._mapped_slots = length // 8
        return self.page

    def create(self, kind: int, *, auto_reset: bool, restore_id: int | None = None) -> Event:
        """A new event with the next free id, or with *restore_id*. Raises OSError."""
        event = Event(0, kind, auto_reset)
        if event.has_slot:
            event.event_id = self._slot(restore_id)
        elif restore_id is None:
            number = KFD_FIRST_NONSIGNAL_EVENT_ID
            while number in self._events:
                number += 1
            event.event_id = number
        else:
            self._claim(restore_id)
            event.event_id = restore_id
        self._events[event.event_id] = event
        return event

    def destroy(self, event_id: int) -> None:
        """Raises OSError(EINVAL)."""
        event = self.find(event_id)
        for waiter in event.waiters:
            waiter.event = None
        if event.has_slot:
            self._signal_count -= 1
        del self._events[event_id]

    def close(self) -> None:
        """The process is gone: wake who waits, give the page back."""
        for event_id in list(self._events):
            self.destroy(event_id)
        if self.page is not None and not self.page_handle:
            self.page.close()
        self.page = None

    def _slot(self, restore_id: int | None) -> int:
        if self._mapped_slots and self._signal_count == self._mapped_slots:
            raise OSError(errno.ENOSPC, "signal event limit reached")
        if self.page is None:
            self._adopt_page(Backing("kfd-events", SIGNAL_PAGE_SIZE))
            self._mapped_slots = OLDEST_USER_MODE_SLOTS
        if restore_id is not None:
            if restore_id >= uapi.KFD_SIGNAL_EVENT_LIMIT:
                raise OSError(errno.EINVAL, "event id")
            self._claim(restore_id)
            number = restore_id
        else:
            free = (n for n in range(1, self._mapped_slots) if n not in self._events)
            number = next(free, 0)
            if not number:
                raise OSError(errno.ENOSPC, "no free slot")
        self._signal_count += 1
        self._slots()[number] = UNSIGNALED_EVENT_SLOT
        return number

    def _claim(self, number: int) -> None:
        if number == 0 or number in self._events:
            raise OSError(errno.ENOSPC, "event id is taken")

    def _adopt_page(self, page: Backing) -> None:
        self.page = page
        self._slots()[:] = UNSIGNALED_EVENT_SLOT

    def _slots(self) -> NDArray[np.uint64]:
        assert self.page is not None
        return np.frombuffer(self.page.window(), np.uint64, uapi.KFD_SIGNAL_EVENT_LIMIT)

    # ------------------------------------------------------------ signals

    def signal_interrupt(self, event_id: int) -> None:
        """kfd_signal_event_interrupt(): the GPU says it wrote an event's slot."""
        if self.page is None:
            return
        slots = self._slots()
        if event_id < uapi.KFD_SIGNAL_EVENT_LIMIT and slots[event_id] != UNSIGNALED_EVENT_SLOT:
            self._signal_from_slot(event_id, slots)
            return
        for number in np.flatnonzero(slots != UNSIGNALED_EVENT_SLOT):
            self._signal_from_slot(int(number), slots)

    def _signal_from_slot(self, number: int, slots: NDArray[np.uint64]) -> None:
        event = self._events.get(number)
        if event is not None and event.has_slot:
            slots[number] = UNSIGNALED_EVENT_SLOT
            event.set()

    def signal_exception(self, kind: int, data: bytes) -> bool:
        """lookup_events_by_type_and_signal(); False if nobody asked for such events."""
        found = [event for event in self._events.values() if event.kind == kind]
        for event in found:
            event.set()
            event.data = data
        return bool(found)

    # ------------------------------------------------------------ wait

    def begin_wait(self, event_ids: list[int]) -> list[Waiter]:
        """init_event_waiter() for each; takes signals of auto reset events. Raises EINVAL."""
        waiters: list[Waiter] = []
        try:
            for event_id in event_ids:
                event = self.find(event_id)
                waiter = Waiter(event, event.signaled)
                event.signaled = event.signaled and not event.auto_reset
                if not waiter.activated:
                    event.waiters.append(waiter)
                waiters.append(waiter)
        except OSError:
            self.end_wait(waiters, undo=False)
            raise
        return waiters

    @staticmethod
    def end_wait(waiters: list[Waiter], *, undo: bool) -> None:
        """free_waiters(); *undo* gives taken signals of auto reset events back."""
        for waiter in waiters:
            event = waiter.event
            if event is None:
                continue
            if waiter in event.waiters:
                event.waiters.remove(waiter)
            if undo and waiter.activated and event.auto_reset:
                event.set()

    @staticmethod
    def test(waiters: list[Waiter], *, wait_for_all: bool) -> int:
        """test_event_condition(): one of KFD_IOC_WAIT_RESULT_*."""
        if any(waiter.event is None for waiter in waiters):
            return uapi.KFD_IOC_WAIT_RESULT_FAIL
        activated = [waiter.activated for waiter in waiters]
        done = all(activated) if wait_for_all else any(activated)
        if done or not waiters:
            return uapi.KFD_IOC_WAIT_RESULT_COMPLETE
        return uapi.KFD_IOC_WAIT_RESULT_TIMEOUT
