"""Where user pointers and file descriptors hide in each KFD ioctl: THE table.

``layout`` applies it to one argument. Sizes and directions: kfd_chardev.c of Linux 6.1.
The control stack that GET_QUEUE_WAVE_STATE copies out is not in it: only the kernel
knows its size.
"""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Callable
from enum import IntFlag
from typing import NamedTuple

from migrate.kfd import uapi

MAX_REGION = 256 << 20  # bytes; the biggest honest one is private data with control stacks
ARG = 0xFFFFFFFF  # FdSlot.region of a field of the argument itself


class Direction(IntFlag):
    """Which way bytes or an fd travel, as the kernel sees it."""

    IN = 1
    OUT = 2
    INOUT = 3


# ---------------------------------------------------------------- the table


class Pointer(NamedTuple):
    """A field that points to *elements(arg)* elements of *element* bytes."""

    field: str
    direction: Direction
    element: int
    elements: Callable[[ctypes.Structure], int]
    fd_offset: int | None = None  # of an fd in each element
    fd_direction: Direction = Direction.IN


class Entry(NamedTuple):
    """What one ioctl has beside plain numbers."""

    struct: type[ctypes.Structure]
    pointers: tuple[Pointer, ...] = ()
    fd_field: str | None = None
    fd_direction: Direction = Direction.IN


def _count(field: str) -> Callable[[ctypes.Structure], int]:
    return lambda arg: int(getattr(arg, field))


_DEVICE = ctypes.sizeof(uapi.kfd_criu_device_bucket)
_BO = ctypes.sizeof(uapi.kfd_criu_bo_bucket)
_DRM_FD = uapi.kfd_criu_device_bucket.drm_fd.offset
_DMABUF_FD = uapi.kfd_criu_bo_bucket.dmabuf_fd.offset
_CU_MASK_BITS = 1024  # kfd_ioctl_set_cu_mask reads no more

_CRIU_POINTERS = {
    uapi.KFD_CRIU_OP_CHECKPOINT: (
        Pointer("devices", Direction.OUT, _DEVICE, _count("num_devices")),
        Pointer("bos", Direction.OUT, _BO, _count("num_bos"), _DMABUF_FD, Direction.OUT),
        Pointer("priv_data", Direction.OUT, 1, _count("priv_data_size")),
    ),
    uapi.KFD_CRIU_OP_RESTORE: (
        Pointer("devices", Direction.IN, _DEVICE, _count("num_devices"), _DRM_FD, Direction.IN),
        Pointer("bos", Direction.INOUT, _BO, _count("num_bos"), _DMABUF_FD, Direction.OUT),
        Pointer("priv_data", Direction.IN, 1, _count("priv_data_size")),
    ),
}

_TABLE: dict[int, Entry] = {
    uapi.AMDKFD_IOC_GET_PROCESS_APERTURES_NEW: Entry(
        uapi.kfd_ioctl_get_process_apertures_new_args,
        (
            Pointer(
                "kfd_process_device_apertures_ptr",
                Direction.OUT,
                ctypes.sizeof(uapi.kfd_process_device_apertures),
                _count("num_of_nodes"),
            ),
        ),
    ),
    uapi.AMDKFD_IOC_WAIT_EVENTS: Entry(
        uapi.kfd_ioctl_wait_events_args,
        (
            Pointer(
                "events_ptr",
                Direction.INOUT,
                ctypes.sizeof(uapi.kfd_event_data),
                _count("num_events"),
            ),
        ),
    ),
    uapi.AMDKFD_IOC_MAP_MEMORY_TO_GPU: Entry(
        uapi.kfd_ioctl_map_memory_to_gpu_args,
        (Pointer("device_ids_array_ptr", Direction.IN, 4, _count("n_devices")),),
    ),
    uapi.AMDKFD_IOC_UNMAP_MEMORY_FROM_GPU: Entry(
        uapi.kfd_ioctl_unmap_memory_from_gpu_args,
        (Pointer("device_ids_array_ptr", Direction.IN, 4, _count("n_devices")),),
    ),
    uapi.AMDKFD_IOC_SET_CU_MASK: Entry(
        uapi.kfd_ioctl_set_cu_mask_args,
        (
            Pointer(
                "cu_mask_ptr",
                Direction.IN,
                4,
                lambda arg: min(arg.num_cu_mask, _CU_MASK_BITS) // 32,
            ),
        ),
    ),
    uapi.AMDKFD_IOC_GET_TILE_CONFIG: Entry(
        uapi.kfd_ioctl_get_tile_config_args,
        (
            Pointer("tile_config_ptr", Direction.OUT, 4, _count("num_tile_configs")),
            Pointer("macro_tile_config_ptr", Direction.OUT, 4, _count("num_macro_tile_configs")),
        ),
    ),
    uapi.AMDKFD_IOC_GET_DMABUF_INFO: Entry(
        uapi.kfd_ioctl_get_dmabuf_info_args,
        (Pointer("metadata_ptr", Direction.OUT, 1, _count("metadata_size")),),
        fd_field="dmabuf_fd",
    ),
    uapi.AMDKFD_IOC_ACQUIRE_VM: Entry(uapi.kfd_ioctl_acquire_vm_args, fd_field="drm_fd"),
    uapi.AMDKFD_IOC_IMPORT_DMABUF: Entry(uapi.kfd_ioctl_import_dmabuf_args, fd_field="dmabuf_fd"),
    uapi.AMDKFD_IOC_EXPORT_DMABUF: Entry(
        uapi.kfd_ioctl_export_dmabuf_args, fd_field="dmabuf_fd", fd_direction=Direction.OUT
    ),
    uapi.AMDKFD_IOC_SMI_EVENTS: Entry(
        uapi.kfd_ioctl_smi_events_args, fd_field="anon_fd", fd_direction=Direction.OUT
    ),
    uapi.AMDKFD_IOC_CRIU_OP: Entry(uapi.kfd_ioctl_criu_args),
}

# The kernel finds an ioctl by its number alone and takes any size (kfd_ioctl()); so do we.
_BY_NUMBER = {uapi._IOC_NR(request): entry for request, entry in _TABLE.items()}


class RegionSpec(NamedTuple):
    """Memory an argument points to; *offset* is where in the argument the pointer is."""

    offset: int
    pointer: int
    length: int
    direction: Direction


class FdSlot(NamedTuple):
    """*fields* fd fields (u32) in region number *region*, or in the argument (ARG)."""

    region: int
    offset: int
    stride: int
    fields: int
    direction: Direction


class Layout(NamedTuple):
    """What is hidden in one argument."""

    regions: tuple[RegionSpec, ...] = ()
    slots: tuple[FdSlot, ...] = ()


def layout(request: int, arg: bytes) -> Layout:
    """Pointers and fds of the argument *arg* (bytes of its struct).

    A NULL pointer is no region. An ioctl that is not in the table has neither.
    Raises OSError(EINVAL) if a count is absurd (nothing was allocated).
    """
    entry = _BY_NUMBER.get(uapi._IOC_NR(request))
    if entry is None or uapi._IOC_TYPE(request) != uapi.AMDKFD_IOCTL_BASE:
        return Layout()
    size = ctypes.sizeof(entry.struct)
    values = entry.struct.from_buffer_copy(arg[:size].ljust(size, b"\0"))
    regions: list[RegionSpec] = []
    slots: list[FdSlot] = []
    for pointer in _pointers(entry, values):
        address = getattr(values, pointer.field)
        if not address:
            continue
        count = pointer.elements(values)
        if count * pointer.element > MAX_REGION:
            raise OSError(errno.EINVAL, f"{pointer.field}: {count} elements are too many")
        if pointer.fd_offset is not None:
            slots.append(
                FdSlot(
                    len(regions), pointer.fd_offset, pointer.element, count, pointer.fd_direction
                )
            )
        offset = getattr(entry.struct, pointer.field).offset
        regions.append(RegionSpec(offset, address, count * pointer.element, pointer.direction))
    if entry.fd_field is not None:
        offset = getattr(entry.struct, entry.fd_field).offset
        if offset + 4 <= len(arg):
            slots.append(FdSlot(ARG, offset, 4, 1, entry.fd_direction))
    return Layout(tuple(regions), tuple(slots))


def _pointers(entry: Entry, values: ctypes.Structure) -> tuple[Pointer, ...]:
    if entry.struct is uapi.kfd_ioctl_criu_args:
        return _CRIU_POINTERS.get(values.op, ())
    return entry.pointers
