"""A KFD process in a few lines, on KfdFile and uapi alone: for tests and their children."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from migrate.kfd import uapi
from migrate.kfd.file import KfdFile, Mapping, open_device
from migrate.kfd.sim import opcodes
from migrate.kfd.sim.aql import (
    HEADER_BARRIER,
    PACKET_SIZE,
    PacketType,
    amd_signal,
    kernel_dispatch_packet,
)
from migrate.kfd.sysfs import read_topology
from migrate.model import HostPaths

PAGE = 4096
RING = 4096  # bytes: 64 packets
VRAM = uapi.KFD_IOC_ALLOC_MEM_FLAGS_VRAM
GTT = uapi.KFD_IOC_ALLOC_MEM_FLAGS_GTT
USERPTR = uapi.KFD_IOC_ALLOC_MEM_FLAGS_USERPTR
DOORBELL = uapi.KFD_IOC_ALLOC_MEM_FLAGS_DOORBELL
MMIO = uapi.KFD_IOC_ALLOC_MEM_FLAGS_MMIO_REMAP
AQL = uapi.KFD_IOC_ALLOC_MEM_FLAGS_AQL_QUEUE_MEM
WRITABLE = uapi.KFD_IOC_ALLOC_MEM_FLAGS_WRITABLE
DOORBELL_SLICE = 8192
CONTROL_STACK = 4096
FIRST_ADDRESS = 0x100000000


@dataclass
class Buffer:
    """A BO of the process; ``memory`` is its CPU mapping, ``size`` the bytes of that."""

    handle: int
    address: int
    size: int
    mmap_offset: int
    flags: int
    memory: Mapping | None = None

    def word(self, index: int, value: int | None = None) -> int:
        """u64 number *index*, stored first if a value is given."""
        assert self.memory is not None
        with self.memory.view() as view, view.cast("Q") as words:
            if value is not None:
                words[index] = value
            return words[index]

    def write(self, offset: int, data: bytes) -> None:
        assert self.memory is not None
        with self.memory.view() as view:
            view[offset : offset + len(data)] = data

    def read(self, offset: int, length: int) -> bytes:
        assert self.memory is not None
        with self.memory.view() as view:
            return bytes(view[offset : offset + length])


class Queue:
    """An AQL queue with its own doorbell; packets are run in order."""

    def __init__(
        self, process: Process, gpu_id: int, ring: Buffer, args: uapi.kfd_ioctl_create_queue_args
    ) -> None:
        self._process = process
        self.gpu_id = gpu_id
        self.ring = ring
        self.args = args

    @property
    def queue_id(self) -> int:
        return int(self.args.queue_id)

    @property
    def read_index(self) -> int:
        return self._process.pointers.word(2 * self.queue_id)

    @property
    def write_index(self) -> int:
        return self._process.pointers.word(2 * self.queue_id + 1)

    def submit(self, opcode: int, kernargs: ctypes.Structure | None, signal: int = 0) -> None:
        """Write one packet and ring the doorbell."""
        index = self.write_index
        packet = kernel_dispatch_packet(
            header=PacketType.INVALID,
            kernel_object=opcode,
            kernarg_address=self._process.kernarg(kernargs),
            completion_signal=signal,
        )
        at = index % (RING // PACKET_SIZE) * PACKET_SIZE
        self.ring.write(at, bytes(packet))
        header = PacketType.KERNEL_DISPATCH | HEADER_BARRIER
        self.ring.write(at, header.to_bytes(2, "little"))
        self._process.pointers.word(2 * self.queue_id + 1, index + 1)
        self.ring_doorbell(index + 1)

    def ring_doorbell(self, index: int) -> None:
        doorbells = self._process.doorbells[self.gpu_id]
        at = int(self.args.doorbell_offset) % DOORBELL_SLICE
        with doorbells.view() as view, view.cast("Q") as words:
            words[at // 8] = index


class Process:
    """This process as a KFD process: opened device, VMs, buffers, queues, events."""

    def __init__(self, paths: HostPaths, *, acquire: bool = True) -> None:
        self.paths = paths
        self.kfd: KfdFile = open_device(paths.kfd)
        self.render: dict[int, KfdFile] = {}
        self.doorbells: dict[int, Mapping] = {}
        self.buffers: list[Buffer] = []
        self._next_address = FIRST_ADDRESS
        self.gpus = gpu_nodes(paths)
        if acquire:
            for gpu_id in self.gpu_ids:
                self.acquire(gpu_id)

    @property
    def gpu_ids(self) -> list[int]:
        return list(self.gpus)

    def open_render(self, gpu_id: int) -> KfdFile:
        return open_device(f"{self.paths.dri}/renderD{self.gpus[gpu_id]}")

    def acquire(self, gpu_id: int) -> None:
        self.render[gpu_id] = self.open_render(gpu_id)
        args = uapi.kfd_ioctl_acquire_vm_args(drm_fd=self.render[gpu_id].fileno(), gpu_id=gpu_id)
        self.kfd.ioctl(uapi.AMDKFD_IOC_ACQUIRE_VM, args)

    # ------------------------------------------------------------ memory

    def alloc(
        self,
        gpu_id: int,
        size: int,
        flags: int = VRAM | WRITABLE,
        *,
        gpus: list[int] | None = None,
        user: int = 0,
        mapped: bool = True,
    ) -> Buffer:
        """A BO, mapped on *gpus* (default: all) and into this process."""
        address = self._next_address
        self._next_address += (size + PAGE - 1) // PAGE * PAGE + PAGE
        args = uapi.kfd_ioctl_alloc_memory_of_gpu_args(
            va_addr=address, size=size, gpu_id=gpu_id, flags=flags, mmap_offset=user
        )
        self.kfd.ioctl(uapi.AMDKFD_IOC_ALLOC_MEMORY_OF_GPU, args)
        buffer = Buffer(args.handle, address, size, args.mmap_offset, flags)
        wanted = self.gpu_ids if gpus is None else gpus
        if wanted:
            self.map(buffer, wanted)
        if flags & AQL:
            buffer.size //= 2  # mapped twice in a row on the GPU
        if mapped and flags & (VRAM | GTT):
            buffer.memory = self.render[gpu_id].mmap(args.mmap_offset, buffer.size)
        self.buffers.append(buffer)
        return buffer

    def map(self, buffer: Buffer, gpus: list[int]) -> None:
        array = (ctypes.c_uint32 * len(gpus))(*gpus)
        args = uapi.kfd_ioctl_map_memory_to_gpu_args(
            handle=buffer.handle,
            device_ids_array_ptr=ctypes.addressof(array),
            n_devices=len(gpus),
        )
        self.kfd.ioctl(uapi.AMDKFD_IOC_MAP_MEMORY_TO_GPU, args)

    def unmap(self, buffer: Buffer, gpus: list[int]) -> None:
        array = (ctypes.c_uint32 * len(gpus))(*gpus)
        args = uapi.kfd_ioctl_unmap_memory_from_gpu_args(
            handle=buffer.handle,
            device_ids_array_ptr=ctypes.addressof(array),
            n_devices=len(gpus),
        )
        self.kfd.ioctl(uapi.AMDKFD_IOC_UNMAP_MEMORY_FROM_GPU, args)

    def free(self, buffer: Buffer) -> None:
        self.kfd.ioctl(
            uapi.AMDKFD_IOC_FREE_MEMORY_OF_GPU,
            uapi.kfd_ioctl_free_memory_of_gpu_args(handle=buffer.handle),
        )
        self.buffers.remove(buffer)

    def available(self, gpu_id: int) -> int:
        args = uapi.kfd_ioctl_get_available_memory_args(gpu_id=gpu_id)
        self.kfd.ioctl(uapi.AMDKFD_IOC_AVAILABLE_MEMORY, args)
        return int(args.available)

    # ------------------------------------------------------------ queues, events

    def prepare_queues(self) -> None:
        """What queues need: pointers, kernargs, context save areas, event page."""
        gpu = self.gpu_ids[0]
        self.pointers = self.alloc(gpu, PAGE, GTT | WRITABLE)
        self.kernargs = self.alloc(gpu, 16 * PAGE, GTT | WRITABLE)
        self._kernarg_at = 0
        self.save_area = self.alloc(gpu, 16 * PAGE, GTT | WRITABLE)
        self.event_page = self.alloc(gpu, uapi.KFD_SIGNAL_EVENT_LIMIT * 8, GTT | WRITABLE)
        self._page_given = False
        self.signals = self.alloc(gpu, PAGE, GTT | WRITABLE)
        self._next_signal = 0

    def continue_at(self, signals: int) -> None:
        """After a restore: where fresh kernargs and signals may be put."""
        self._kernarg_at = 8 * PAGE
        self._next_signal = signals
        self._page_given = True

    def kernarg(self, kernargs: ctypes.Structure | None) -> int:
        """GPU address of a copy of *kernargs*."""
        if kernargs is None:
            return 0
        at = self._kernarg_at
        self._kernarg_at = (at + 128) % (16 * PAGE)
        self.kernargs.write(at, bytes(kernargs))
        return self.kernargs.address + at

    def create_queue(self, gpu_id: int, number: int) -> Queue:
        """Queue number *number* (which is its queue_id, if none was destroyed)."""
        ring = self.alloc(gpu_id, RING, GTT | WRITABLE)
        for at in range(0, RING, PACKET_SIZE):
            ring.write(at, bytes([PacketType.INVALID]))
        args = self.queue_args(gpu_id, ring, number)
        self.kfd.ioctl(uapi.AMDKFD_IOC_CREATE_QUEUE, args)
        assert args.queue_id == number
        if gpu_id not in self.doorbells:
            offset = args.doorbell_offset & ~(DOORBELL_SLICE - 1)
            self.doorbells[gpu_id] = self.kfd.mmap(offset, DOORBELL_SLICE)
        return Queue(self, gpu_id, ring, args)

    def queue_args(
        self, gpu_id: int, ring: Buffer, number: int
    ) -> uapi.kfd_ioctl_create_queue_args:
        return uapi.kfd_ioctl_create_queue_args(
            ring_base_address=ring.address,
            ring_size=RING,
            read_pointer_address=self.pointers.address + 16 * number,
            write_pointer_address=self.pointers.address + 16 * number + 8,
            gpu_id=gpu_id,
            queue_type=uapi.KFD_IOC_QUEUE_TYPE_COMPUTE_AQL,
            queue_percentage=100,
            queue_priority=7,
            ctx_save_restore_address=self.save_area.address,
            ctx_save_restore_size=self.save_area.size,
            ctl_stack_size=CONTROL_STACK,
        )

    def create_event(
        self, kind: int = uapi.KFD_IOC_EVENT_SIGNAL, *, auto_reset: bool = True
    ) -> int:
        args = uapi.kfd_ioctl_create_event_args(event_type=kind, auto_reset=int(auto_reset))
        if kind == uapi.KFD_IOC_EVENT_SIGNAL and not self._page_given:
            args.event_page_offset = self.event_page.handle
            self._page_given = True
        self.kfd.ioctl(uapi.AMDKFD_IOC_CREATE_EVENT, args)
        return int(args.event_id)

    def signal(self, value: int = 1, event_id: int = 0) -> int:
        """GPU address of a new signal."""
        at = self._next_signal
        self._next_signal += ctypes.sizeof(amd_signal)
        mailbox = self.event_page.address + 8 * event_id if event_id else 0
        self.signals.write(
            at, bytes(amd_signal(kind=1, value=value, event_id=event_id, event_mailbox_ptr=mailbox))
        )
        return self.signals.address + at

    def signal_value(self, address: int) -> int:
        index = (address - self.signals.address + amd_signal.value.offset) // 8
        return ctypes.c_int64(self.signals.word(index)).value

    def wait(
        self, event_ids: list[int], timeout: int = 30_000, *, wait_for_all: bool = True
    ) -> int:
        """WAIT_EVENTS; its result (KFD_IOC_WAIT_RESULT_*). *timeout* in ms."""
        data = (uapi.kfd_event_data * max(1, len(event_ids)))()
        for entry, event_id in zip(data, event_ids, strict=False):
            entry.event_id = event_id
        args = uapi.kfd_ioctl_wait_events_args(
            events_ptr=ctypes.addressof(data),
            num_events=len(event_ids),
            wait_for_all=int(wait_for_all),
            timeout=timeout,
        )
        self.kfd.ioctl(uapi.AMDKFD_IOC_WAIT_EVENTS, args)
        self.event_data = data
        return int(args.wait_result)

    def set_event(self, event_id: int) -> None:
        self.kfd.ioctl(uapi.AMDKFD_IOC_SET_EVENT, uapi.kfd_ioctl_set_event_args(event_id=event_id))

    # ------------------------------------------------------------ work

    def run(self, queue: Queue, opcode: int, kernargs: ctypes.Structure | None) -> None:
        """Run one kernel and wait for it by an event."""
        event = self.create_event(auto_reset=False)
        queue.submit(opcode, kernargs, self.signal(1, event))
        assert self.wait([event]) == uapi.KFD_IOC_WAIT_RESULT_COMPLETE

    def start_counter(self, queue: Queue, gpu_id: int) -> Buffer:
        """The persistent kernel; words of the buffer: counter, stop, iterations."""
        buffer = self.alloc(gpu_id, PAGE)
        queue.submit(
            opcodes.Opcode.COUNTER,
            opcodes.CounterKernargs(buffer.address, buffer.address + 8, buffer.address + 16),
        )
        return buffer


def gpu_nodes(paths: HostPaths) -> dict[int, int]:
    """gpu_id to render minor, in the kernel's order."""
    topology = read_topology(paths.kfd_sysfs)
    return {gpu.gpu_id: gpu.drm_render_minor for gpu in topology.gpus}
