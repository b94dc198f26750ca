"""KFD ioctls as functions: one call each, plain values in and out.

For what a process does with KFD (the workloads' runtime) and for what preflight asks.
All raise OSError with the kernel's errno. Addresses and sizes are in bytes; gpu ids are
those that the calling process knows. The CRIU operations are in ``process``.
"""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Sequence
from typing import NamedTuple

from migrate.kfd import uapi
from migrate.kfd.file import KfdFile

WAIT_FOR_EVER = 0xFFFFFFFF  # milliseconds


class Aperture(NamedTuple):
    """One GPU as the process sees it; addresses of its apertures, limits inclusive."""

    gpu_id: int
    lds_base: int
    lds_limit: int
    scratch_base: int
    scratch_limit: int
    gpuvm_base: int
    gpuvm_limit: int


class Bo(NamedTuple):
    """A new BO: its handle, and the offset to mmap it at in its file."""

    handle: int
    mmap_offset: int


class Queue(NamedTuple):
    """A new queue; *doorbell_offset* is for mmap of /dev/kfd, its low bits are in the page."""

    queue_id: int
    doorbell_offset: int


class Event(NamedTuple):
    """A new event; *page_offset* is for mmap of /dev/kfd (signal events only)."""

    event_id: int
    trigger_data: int
    slot: int
    page_offset: int


# ---------------------------------------------------------------- the node


def get_version(kfd: KfdFile) -> tuple[int, int]:
    """(major, minor) of the KFD interface; CRIU operations came with 1.8."""
    args = uapi.kfd_ioctl_get_version_args()
    kfd.ioctl(uapi.AMDKFD_IOC_GET_VERSION, args)
    return args.major_version, args.minor_version


def get_process_apertures(kfd: KfdFile) -> tuple[Aperture, ...]:
    """All GPUs that the process sees."""
    args = uapi.kfd_ioctl_get_process_apertures_new_args()
    kfd.ioctl(uapi.AMDKFD_IOC_GET_PROCESS_APERTURES_NEW, args)
    array = (uapi.kfd_process_device_apertures * args.num_of_nodes)()
    args.kfd_process_device_apertures_ptr = ctypes.addressof(array)
    kfd.ioctl(uapi.AMDKFD_IOC_GET_PROCESS_APERTURES_NEW, args)
    return tuple(
        Aperture(*(getattr(a, field) for field in Aperture._fields))
        for a in array[: args.num_of_nodes]
    )


def get_available_memory(kfd: KfdFile, gpu_id: int) -> int:
    """Bytes of VRAM that can still be allocated (interface 1.9)."""
    args = uapi.kfd_ioctl_get_available_memory_args(gpu_id=gpu_id)
    kfd.ioctl(uapi.AMDKFD_IOC_AVAILABLE_MEMORY, args)
    return int(args.available)


def acquire_vm(kfd: KfdFile, gpu_id: int, drm_fd: int) -> None:
    """Give the process its address space on a GPU: that of the open render node *drm_fd*."""
    args = uapi.kfd_ioctl_acquire_vm_args(drm_fd=drm_fd, gpu_id=gpu_id)
    kfd.ioctl(uapi.AMDKFD_IOC_ACQUIRE_VM, args)


# ---------------------------------------------------------------- memory


def alloc_memory(
    kfd: KfdFile, gpu_id: int, address: int, size: int, flags: int, cpu_address: int = 0
) -> Bo:
    """A BO at GPU *address*; *flags* of KFD_IOC_ALLOC_MEM_FLAGS_*, *cpu_address* of a userptr."""
    args = uapi.kfd_ioctl_alloc_memory_of_gpu_args(
        va_addr=address, size=size, gpu_id=gpu_id, flags=flags, mmap_offset=cpu_address
    )
    kfd.ioctl(uapi.AMDKFD_IOC_ALLOC_MEMORY_OF_GPU, args)
    return Bo(args.handle, args.mmap_offset)


def free_memory(kfd: KfdFile, handle: int) -> None:
    """Free a BO that is mapped to no GPU."""
    kfd.ioctl(
        uapi.AMDKFD_IOC_FREE_MEMORY_OF_GPU, uapi.kfd_ioctl_free_memory_of_gpu_args(handle=handle)
    )


def map_memory(kfd: KfdFile, handle: int, gpu_ids: Sequence[int]) -> None:
    """Let these GPUs see a BO."""
    array = (ctypes.c_uint32 * len(gpu_ids))(*gpu_ids)
    args = uapi.kfd_ioctl_map_memory_to_gpu_args(
        handle=handle, device_ids_array_ptr=ctypes.addressof(array), n_devices=len(gpu_ids)
    )
    kfd.ioctl(uapi.AMDKFD_IOC_MAP_MEMORY_TO_GPU, args)


def unmap_memory(kfd: KfdFile, handle: int, gpu_ids: Sequence[int]) -> None:
    """Take a BO from these GPUs."""
    array = (ctypes.c_uint32 * len(gpu_ids))(*gpu_ids)
    args = uapi.kfd_ioctl_unmap_memory_from_gpu_args(
        handle=handle, device_ids_array_ptr=ctypes.addressof(array), n_devices=len(gpu_ids)
    )
    kfd.ioctl(uapi.AMDKFD_IOC_UNMAP_MEMORY_FROM_GPU, args)


def import_dmabuf(kfd: KfdFile, gpu_id: int, address: int, dmabuf_fd: int) -> int:
    """The handle of a BO at GPU *address* that shares a dmabuf's memory."""
    args = uapi.kfd_ioctl_import_dmabuf_args(va_addr=address, gpu_id=gpu_id, dmabuf_fd=dmabuf_fd)
    kfd.ioctl(uapi.AMDKFD_IOC_IMPORT_DMABUF, args)
    return int(args.handle)


# ---------------------------------------------------------------- queues


def create_queue(
    kfd: KfdFile,
    gpu_id: int,
    queue_type: int,
    ring: int,
    ring_size: int,
    read_pointer: int,
    write_pointer: int,
    *,
    percentage: int = uapi.KFD_MAX_QUEUE_PERCENTAGE,
    priority: int = 7,
    eop_buffer: tuple[int, int] = (0, 0),
    ctx_save_restore: tuple[int, int] = (0, 0),
    ctl_stack_size: int = 0,
) -> Queue:
    """A queue of type KFD_IOC_QUEUE_TYPE_*; buffers as (address, bytes)."""
    args = uapi.kfd_ioctl_create_queue_args(
        ring_base_address=ring,
        ring_size=ring_size,
        read_pointer_address=read_pointer,
        write_pointer_address=write_pointer,
        gpu_id=gpu_id,
        queue_type=queue_type,
        queue_percentage=percentage,
        queue_priority=priority,
        eop_buffer_address=eop_buffer[0],
        eop_buffer_size=eop_buffer[1],
        ctx_save_restore_address=ctx_save_restore[0],
        ctx_save_restore_size=ctx_save_restore[1],
        ctl_stack_size=ctl_stack_size,
    )
    kfd.ioctl(uapi.AMDKFD_IOC_CREATE_QUEUE, args)
    return Queue(args.queue_id, args.doorbell_offset)


def destroy_queue(kfd: KfdFile, queue_id: int) -> None:
    """End a queue."""
    kfd.ioctl(uapi.AMDKFD_IOC_DESTROY_QUEUE, uapi.kfd_ioctl_destroy_queue_args(queue_id=queue_id))


# ---------------------------------------------------------------- events


def create_event(
    kfd: KfdFile,
    event_type: int = uapi.KFD_IOC_EVENT_SIGNAL,
    *,
    auto_reset: bool = False,
    node_id: int = 0,
    page_handle: int = 0,
) -> Event:
    """An event; the first signal event brings the event page (*page_handle*: a BO for it)."""
    args = uapi.kfd_ioctl_create_event_args(
        event_page_offset=page_handle,
        event_type=event_type,
        auto_reset=auto_reset,
        node_id=node_id,
    )
    kfd.ioctl(uapi.AMDKFD_IOC_CREATE_EVENT, args)
    return Event(
        args.event_id, args.event_trigger_data, args.event_slot_index, args.event_page_offset
    )


def destroy_event(kfd: KfdFile, event_id: int) -> None:
    """End an event."""
    kfd.ioctl(uapi.AMDKFD_IOC_DESTROY_EVENT, uapi.kfd_ioctl_destroy_event_args(event_id=event_id))


def set_event(kfd: KfdFile, event_id: int) -> None:
    """Signal an event."""
    kfd.ioctl(uapi.AMDKFD_IOC_SET_EVENT, uapi.kfd_ioctl_set_event_args(event_id=event_id))


def reset_event(kfd: KfdFile, event_id: int) -> None:
    """Take an event's signal back."""
    kfd.ioctl(uapi.AMDKFD_IOC_RESET_EVENT, uapi.kfd_ioctl_reset_event_args(event_id=event_id))


def wait_events(
    kfd: KfdFile,
    event_ids: Sequence[int],
    *,
    wait_for_all: bool = True,
    timeout: int = WAIT_FOR_EVER,
) -> bool:
    """Wait for events; *timeout* in milliseconds. False if it ran out."""
    array = (uapi.kfd_event_data * len(event_ids))()
    for item, event_id in zip(array, event_ids, strict=True):
        item.event_id = event_id
    args = uapi.kfd_ioctl_wait_events_args(
        events_ptr=ctypes.addressof(array),
        num_events=len(event_ids),
        wait_for_all=wait_for_all,
        timeout=timeout,
    )
    kfd.ioctl(uapi.AMDKFD_IOC_WAIT_EVENTS, args)
    return bool(args.wait_result == uapi.KFD_IOC_WAIT_RESULT_COMPLETE)


# ---------------------------------------------------------------- SVM


def svm(
    kfd: KfdFile, operation: int, address: int, size: int, attributes: Sequence[tuple[int, int]]
) -> tuple[tuple[int, int], ...]:
    """Set or get SVM attributes, (type, value) each, of a range; returns what came back."""
    size_of_attributes = len(attributes) * ctypes.sizeof(uapi.kfd_ioctl_svm_attribute)
    room = ctypes.sizeof(uapi.kfd_ioctl_svm_args) + size_of_attributes
    if room > uapi._IOC_SIZEMASK:
        raise OSError(errno.EINVAL, f"{len(attributes)} attributes do not fit")
    buffer = bytearray(
        bytes(
            uapi.kfd_ioctl_svm_args(
                start_addr=address, size=size, op=operation, nattr=len(attributes)
            )
        )
        + b"".join(bytes(uapi.kfd_ioctl_svm_attribute(*pair)) for pair in attributes)
    )

    class Argument(ctypes.Structure):
        _fields_ = (("bytes", ctypes.c_uint8 * room),)

    # The header's number has room for no attribute: their size is added to it.
    request = uapi.AMDKFD_IOC_SVM + (size_of_attributes << uapi._IOC_SIZESHIFT)
    kfd.ioctl(request, Argument.from_buffer(buffer))
    start = ctypes.sizeof(uapi.kfd_ioctl_svm_args)
    array = (uapi.kfd_ioctl_svm_attribute * len(attributes)).from_buffer_copy(buffer[start:])
    return tuple((item.type, item.value) for item in array)
