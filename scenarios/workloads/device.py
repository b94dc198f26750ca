"""A small KFD client: what a compute runtime does with /dev/kfd, and nothing else.

Values (Bo, Queue, Event) are plain and immutable, so that a program keeps them in the
record that moves with it. Functions that make something in the kernel are to be called
within ``Runtime.indivisible`` together with the commit that records the result.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path

from migrate.engine.runtime import Runtime, view
from migrate.kfd import uapi
from migrate.kfd.sim.aql import (
    AMD_SIGNAL_KIND_USER,
    HEADER_ACQUIRE_SYSTEM,
    HEADER_BARRIER,
    HEADER_RELEASE_SYSTEM,
    PACKET_SIZE,
    PacketType,
    amd_signal,
    barrier_and_packet,
    kernel_dispatch_packet,
)
from migrate.kfd.sysfs import read_topology
from migrate.model import Value

VRAM = (
    uapi.KFD_IOC_ALLOC_MEM_FLAGS_VRAM
    | uapi.KFD_IOC_ALLOC_MEM_FLAGS_WRITABLE
    | uapi.KFD_IOC_ALLOC_MEM_FLAGS_EXECUTABLE
    | uapi.KFD_IOC_ALLOC_MEM_FLAGS_PUBLIC
)
GTT = (
    uapi.KFD_IOC_ALLOC_MEM_FLAGS_GTT
    | uapi.KFD_IOC_ALLOC_MEM_FLAGS_WRITABLE
    | uapi.KFD_IOC_ALLOC_MEM_FLAGS_EXECUTABLE
    | uapi.KFD_IOC_ALLOC_MEM_FLAGS_COHERENT
)
USERPTR = (
    uapi.KFD_IOC_ALLOC_MEM_FLAGS_USERPTR
    | uapi.KFD_IOC_ALLOC_MEM_FLAGS_WRITABLE
    | uapi.KFD_IOC_ALLOC_MEM_FLAGS_COHERENT
)
DOORBELL = uapi.KFD_IOC_ALLOC_MEM_FLAGS_DOORBELL | uapi.KFD_IOC_ALLOC_MEM_FLAGS_WRITABLE
DOORBELL_SLICE = 8192  # bytes a process has; kfd_doorbell_process_slice with 8-byte doorbells
EVENT_PAGE = 8 * uapi.KFD_SIGNAL_EVENT_LIMIT
SIGNAL_SIZE = ctypes.sizeof(amd_signal)
HEADER = HEADER_BARRIER | HEADER_ACQUIRE_SYSTEM | HEADER_RELEASE_SYSTEM
WAIT_FOR_EVER = 0xFFFFFFFF

_U64 = struct.Struct("<Q")
_I64 = struct.Struct("<q")
_U32 = struct.Struct("<I")


class Bo(Value):
    """A buffer object; ``address`` is that of the CPU and of every GPU it is mapped to."""

    gpu_id: int
    handle: int
    address: int
    size: int
    flags: int


class Queue(Value):
    """An AQL queue. Addresses are virtual; ``packets`` is the ring's room."""

    gpu_id: int
    queue_id: int
    ring: int
    packets: int
    write_pointer: int
    read_pointer: int
    doorbell: int


class Event(Value):
    """A signal event; ``mailbox`` is its slot's address in the event page."""

    event_id: int
    mailbox: int


# ---------------------------------------------------------------- memory of this process


def load_u64(address: int) -> int:
    """The u64 at *address*."""
    value: int = _U64.unpack(view(address, 8))[0]
    return value


def load_i64(address: int) -> int:
    """The i64 at *address*."""
    value: int = _I64.unpack(view(address, 8))[0]
    return value


def store_u64(address: int, value: int) -> None:
    """Store a u64, in one access (it is a doorbell, or a pointer the GPU reads)."""
    ctypes.c_uint64.from_address(address).value = value


def store(address: int, data: ctypes.Structure | bytes) -> None:
    """Copy *data* to *address*."""
    raw = bytes(data)
    ctypes.memmove(address, raw, len(raw))


# ---------------------------------------------------------------- opening


def open_gpus(runtime: Runtime) -> tuple[int, ...]:
    """Open every visible GPU's render node and acquire its VM; their gpu_ids.

    All of them, used or not, as ROCr does: the kernel pauses a process only if each GPU
    that it sees has a VM. Raises OSError, KfdUnavailable.
    """
    gpu_ids = visible_gpus(runtime)
    topology = read_topology(runtime.paths.topology)
    for gpu_id in gpu_ids:
        minor = topology.gpu(gpu_id).drm_render_minor
        node = runtime.open_render_node(gpu_id, str(Path(runtime.paths.dri) / f"renderD{minor}"))
        args = uapi.kfd_ioctl_acquire_vm_args(drm_fd=node.fileno(), gpu_id=gpu_id)
        runtime.kfd.ioctl(uapi.AMDKFD_IOC_ACQUIRE_VM, args)
    return gpu_ids


def visible_gpus(runtime: Runtime) -> tuple[int, ...]:
    """gpu_ids that the kernel shows now (the actual ones, also after a migration)."""
    args = uapi.kfd_ioctl_get_process_apertures_new_args()
    runtime.kfd.ioctl(uapi.AMDKFD_IOC_GET_PROCESS_APERTURES_NEW, args)
    found = (uapi.kfd_process_device_apertures * args.num_of_nodes)()
    args.kfd_process_device_apertures_ptr = ctypes.addressof(found)
    runtime.kfd.ioctl(uapi.AMDKFD_IOC_GET_PROCESS_APERTURES_NEW, args)
    return tuple(int(aperture.gpu_id) for aperture in found[: args.num_of_nodes])


# ---------------------------------------------------------------- buffers


def allocate(
    runtime: Runtime, gpu_id: int, size: int, flags: int, visible_to: Iterable[int] = ()
) -> Bo:
    """Allocate a BO, map it to its GPU, to *visible_to*, and into this process.

    A userptr is private memory of this process. Raises OSError.
    """
    address = runtime.reserve(size)
    args = uapi.kfd_ioctl_alloc_memory_of_gpu_args(
        va_addr=address, size=size, gpu_id=gpu_id, flags=flags
    )
    if flags & uapi.KFD_IOC_ALLOC_MEM_FLAGS_USERPTR:
        runtime.arena(size, address)
        args.mmap_offset = address
    runtime.kfd.ioctl(uapi.AMDKFD_IOC_ALLOC_MEMORY_OF_GPU, args)
    bo = Bo(gpu_id=gpu_id, handle=args.handle, address=address, size=size, flags=flags)
    gpus = dict.fromkeys((gpu_id, *visible_to))
    ids = (ctypes.c_uint32 * len(gpus))(*gpus)
    mapping = uapi.kfd_ioctl_map_memory_to_gpu_args(
        handle=bo.handle, device_ids_array_ptr=ctypes.addressof(ids), n_devices=len(gpus)
    )
    runtime.kfd.ioctl(uapi.AMDKFD_IOC_MAP_MEMORY_TO_GPU, mapping)
    if flags & (uapi.KFD_IOC_ALLOC_MEM_FLAGS_VRAM | uapi.KFD_IOC_ALLOC_MEM_FLAGS_GTT):
        runtime.map(gpu_id, args.mmap_offset, size, address)
    return bo


def free(runtime: Runtime, bo: Bo, visible_to: Iterable[int] = ()) -> None:
    """Unmap a BO of ``allocate`` everywhere and free it. Raises OSError."""
    runtime.unmap(bo.address)
    gpus = dict.fromkeys((bo.gpu_id, *visible_to))
    ids = (ctypes.c_uint32 * len(gpus))(*gpus)
    mapping = uapi.kfd_ioctl_unmap_memory_from_gpu_args(
        handle=bo.handle, device_ids_array_ptr=ctypes.addressof(ids), n_devices=len(gpus)
    )
    runtime.kfd.ioctl(uapi.AMDKFD_IOC_UNMAP_MEMORY_FROM_GPU, mapping)
    args = uapi.kfd_ioctl_free_memory_of_gpu_args(handle=bo.handle)
    runtime.kfd.ioctl(uapi.AMDKFD_IOC_FREE_MEMORY_OF_GPU, args)


# ---------------------------------------------------------------- queues


def create_queue(
    runtime: Runtime, memory: Bo, ring: int, packets: int, save_area: Bo, doorbells: Bo
) -> Queue:
    """Make an AQL queue: ring, then its two pointers, from address *ring* in *memory*.

    *save_area* takes the state of kernels that are preempted in their middle;
    *doorbells* is the GPU's doorbell BO, mapped by the first queue. Raises OSError.
    """
    for index in range(packets):
        store(ring + index * PACKET_SIZE, PacketType.INVALID.to_bytes(2, "little"))
    pointers = ring + packets * PACKET_SIZE
    args = uapi.kfd_ioctl_create_queue_args(
        ring_base_address=ring,
        ring_size=packets * PACKET_SIZE,
        write_pointer_address=pointers,
        read_pointer_address=pointers + 64,
        gpu_id=memory.gpu_id,
        queue_type=uapi.KFD_IOC_QUEUE_TYPE_COMPUTE_AQL,
        queue_percentage=100,
        queue_priority=7,
        eop_buffer_address=save_area.address,
        eop_buffer_size=4096,
        ctx_save_restore_address=save_area.address + 4096,
        ctx_save_restore_size=save_area.size - 4096,
        ctl_stack_size=4096,
    )
    runtime.kfd.ioctl(uapi.AMDKFD_IOC_CREATE_QUEUE, args)
    offset = args.doorbell_offset & ~(DOORBELL_SLICE - 1)
    if not runtime.is_mapped(doorbells.address):
        runtime.map(0, offset, DOORBELL_SLICE, doorbells.address)
    return Queue(
        gpu_id=memory.gpu_id,
        queue_id=args.queue_id,
        ring=ring,
        packets=packets,
        write_pointer=pointers,
        read_pointer=pointers + 64,
        doorbell=doorbells.address + (args.doorbell_offset - offset),
    )


def submit(queue: Queue, index: int, packet: bytes) -> None:
    """Packet number *index* of the queue: into the ring, write pointer, doorbell.

    May be repeated from anywhere in its middle: if the write pointer is past *index* the
    packet was there, and the GPU may have taken it already, so it is not written again.
    """
    if load_u64(queue.write_pointer) <= index:
        at = queue.ring + index % queue.packets * PACKET_SIZE
        store(at + 4, packet[4:])
        store(at, packet[:4])  # the header last: until then the packet is INVALID
        store_u64(queue.write_pointer, index + 1)
    store_u64(queue.doorbell, index + 1)


def dispatch(kernel_object: int, kernarg_address: int, completion_signal: int = 0) -> bytes:
    """A kernel dispatch packet that waits for the packets before it."""
    return bytes(
        kernel_dispatch_packet(
            header=PacketType.KERNEL_DISPATCH | HEADER,
            setup=1,
            workgroup_size_x=64,
            workgroup_size_y=1,
            workgroup_size_z=1,
            grid_size_x=64,
            grid_size_y=1,
            grid_size_z=1,
            kernel_object=kernel_object,
            kernarg_address=kernarg_address,
            completion_signal=completion_signal,
        )
    )


def barrier(signals: Sequence[int], completion_signal: int = 0) -> bytes:
    """A barrier packet: done when all (up to five) *signals* have the value 0."""
    packet = barrier_and_packet(
        header=PacketType.BARRIER_AND | HEADER, completion_signal=completion_signal
    )
    packet.dep_signal[: len(signals)] = list(signals)
    return bytes(packet)


# ---------------------------------------------------------------- events and signals


def create_event(runtime: Runtime, page: Bo, *, first: bool) -> Event:
    """An event that resets itself. The *first* one gives the kernel its event page."""
    args = uapi.kfd_ioctl_create_event_args(event_type=uapi.KFD_IOC_EVENT_SIGNAL, auto_reset=1)
    if first:
        args.event_page_offset = page.handle
    runtime.kfd.ioctl(uapi.AMDKFD_IOC_CREATE_EVENT, args)
    return Event(event_id=args.event_id, mailbox=page.address + 8 * args.event_slot_index)


def wait_events(runtime: Runtime, events: Sequence[Event]) -> None:
    """Wait until any of *events* is set. Raises OSError."""
    data = (uapi.kfd_event_data * len(events))()
    for item, event in zip(data, events, strict=True):
        item.event_id = event.event_id
    args = uapi.kfd_ioctl_wait_events_args(
        events_ptr=ctypes.addressof(data), num_events=len(events), timeout=WAIT_FOR_EVER
    )
    runtime.kfd.ioctl(uapi.AMDKFD_IOC_WAIT_EVENTS, args)


def set_event(runtime: Runtime, event: Event) -> None:
    """Set an event, as the GPU would. Raises OSError."""
    args = uapi.kfd_ioctl_set_event_args(event_id=event.event_id)
    runtime.kfd.ioctl(uapi.AMDKFD_IOC_SET_EVENT, args)


def prepare_signal(address: int, event: Event | None = None) -> None:
    """A signal of value 1 at *address* that sets *event* when it becomes 0."""
    signal = amd_signal(kind=AMD_SIGNAL_KIND_USER, value=1)
    if event is not None:
        signal.event_mailbox_ptr = event.mailbox
        signal.event_id = event.event_id
    store(address, signal)


def is_done(signal: int) -> bool:
    """Whether the packet whose completion signal is at that address is done."""
    return load_i64(signal + amd_signal.value.offset) == 0
