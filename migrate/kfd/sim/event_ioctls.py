"""The ioctls of events but WAIT_EVENTS, after kfd_chardev.c and kfd_events.c of Linux 6.1."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

from migrate.kfd import uapi
from migrate.kfd.sim.process import SimProcess, bo_by_handle, error

if TYPE_CHECKING:
    from migrate.kfd.sim.device import Host


def create_event(host: Host, process: SimProcess, args: Any) -> None:
    """CREATE_EVENT."""
    if args.event_page_offset:
        kmap_event_page(process, args.event_page_offset)
    args.event_page_offset = 0
    event = process.events.create(args.event_type, auto_reset=args.auto_reset != 0)
    if event.has_slot:
        args.event_page_offset = uapi.KFD_MMAP_TYPE_EVENTS
        args.event_slot_index = event.event_id
    args.event_id = event.event_id
    args.event_trigger_data = event.event_id


def kmap_event_page(process: SimProcess, handle: int) -> None:
    """kfd_kmap_event_page(). Raises OSError(EINVAL, ENODEV)."""
    if process.events.page is not None:
        raise error(errno.EINVAL)
    process.device(uapi.GET_GPU_ID(handle)).bound()
    process.events.set_page(bo_by_handle(process, handle), handle)


def destroy_event(host: Host, process: SimProcess, args: Any) -> None:
    """DESTROY_EVENT."""
    process.events.destroy(args.event_id)
    host.changed.notify_all()


def set_event(host: Host, process: SimProcess, args: Any) -> None:
    """SET_EVENT."""
    event = process.events.find(args.event_id)
    if event.kind != uapi.KFD_IOC_EVENT_SIGNAL:
        raise error(errno.EINVAL)
    event.set()
    host.changed.notify_all()


def reset_event(host: Host, process: SimProcess, args: Any) -> None:
    """RESET_EVENT."""
    event = process.events.find(args.event_id)
    if event.kind != uapi.KFD_IOC_EVENT_SIGNAL:
        raise error(errno.EINVAL)
    event.signaled = False
