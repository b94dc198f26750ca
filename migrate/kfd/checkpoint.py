"""A process's KFD state as values: what the kernel answers, what goes over the wire.

``check_checkpoint`` is for what came over the wire: nothing of it reaches the kernel
before.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Mapping
from ctypes import sizeof

from migrate.errors import BrokenPrivateData, CheckpointFailed
from migrate.kfd import uapi
from migrate.kfd.privdata import (
    KFD_QUEUE_TYPE_COMPUTE,
    EventRecord,
    PrivateData,
    QueueRecord,
    decode,
    kfd_criu_device_priv_data,
    kfd_criu_process_priv_data,
)
from migrate.model import ProcessRef, Value

MAX_DEVICES = 64  # MAX_GPU_INSTANCE of the newest kernels; 16 in 6.1
MAX_BOS = 1 << 20
MAX_OBJECTS = 1 << 20
MAX_PRIV_DATA = 256 << 20  # bytes


class ProcessCounts(Value):
    """What PROCESS_INFO answers; ``priv_data_size`` in bytes, ``pid`` in the target's namespace."""

    num_devices: int
    num_bos: int
    num_objects: int
    priv_data_size: int
    pid: int


class DeviceBucket(Value):
    """One GPU: the id the process knows, for ever, and the id the kernel has for it now."""

    user_gpu_id: int
    actual_gpu_id: int


class BoBucket(Value):
    """One BO: address and size in bytes, ``gpu_id`` is the user_gpu_id.

    ``offset`` is where the BO was mapped in its file; it is void after a restore.
    """

    addr: int
    size: int
    offset: int
    restored_offset: int
    gpu_id: int
    alloc_flags: int

    @property
    def is_vram(self) -> bool:
        """Memory of the GPU."""
        return bool(self.alloc_flags & uapi.KFD_IOC_ALLOC_MEM_FLAGS_VRAM)

    @property
    def is_gtt(self) -> bool:
        """System memory that the driver allocated."""
        return bool(self.alloc_flags & uapi.KFD_IOC_ALLOC_MEM_FLAGS_GTT)

    @property
    def is_userptr(self) -> bool:
        """The process's own memory, lent to the GPU."""
        return bool(self.alloc_flags & uapi.KFD_IOC_ALLOC_MEM_FLAGS_USERPTR)

    @property
    def is_doorbell(self) -> bool:
        """The process's page of doorbells: not memory."""
        return bool(self.alloc_flags & uapi.KFD_IOC_ALLOC_MEM_FLAGS_DOORBELL)

    @property
    def is_mmio(self) -> bool:
        """The remapped register page: not memory."""
        return bool(self.alloc_flags & uapi.KFD_IOC_ALLOC_MEM_FLAGS_MMIO_REMAP)

    @property
    def has_contents(self) -> bool:
        """Whether its bytes travel through a dmabuf (a userptr's travel with the CPU's)."""
        return self.is_vram or self.is_gtt


class KfdCheckpoint(Value):
    """A process's KFD state without memory contents, as it goes over the wire.

    ``pid`` is the one of the process in its own pid namespace.
    """

    pid: int
    devices: tuple[DeviceBucket, ...]
    bos: tuple[BoBucket, ...]
    num_objects: int
    priv_data: bytes

    def private(self) -> PrivateData:
        """The private data, decoded. Raises BrokenPrivateData."""
        return decode(self.priv_data, len(self.devices), len(self.bos), self.num_objects)


def without_bos(checkpoint: KfdCheckpoint, left_out: Collection[int]) -> KfdCheckpoint:
    """*checkpoint* without the BOs of these bucket indices, byte for byte else.

    Raises BrokenPrivateData.
    """
    if not left_out:
        return checkpoint
    record = checkpoint.private().bo_record_size
    start = sizeof(kfd_criu_process_priv_data)
    start += len(checkpoint.devices) * sizeof(kfd_criu_device_priv_data)
    end = start + len(checkpoint.bos) * record
    data = checkpoint.priv_data
    kept = [index for index in range(len(checkpoint.bos)) if index not in left_out]
    records = b"".join(data[start + index * record :][:record] for index in kept)
    return KfdCheckpoint(
        pid=checkpoint.pid,
        devices=checkpoint.devices,
        bos=tuple(checkpoint.bos[index] for index in kept),
        num_objects=checkpoint.num_objects,
        priv_data=data[:start] + records + data[end:],
    )


class RestoreProof(Value):
    """RESTORE was seen to succeed for this very process. Journal it: RESUME asks for it."""

    process: ProcessRef


# ---------------------------------------------------------------- checks

_PAGE = 4096
_U32 = 0xFFFFFFFF
_U64 = 0xFFFFFFFFFFFFFFFF
_ADDRESS_LIMIT = 1 << 57  # five-level page tables
_KNOWN_FLAGS = 0xFFC00000  # above the types: 31 (WRITABLE) down to 22, where newer kernels add
_EVENT_PAGE = uapi.KFD_SIGNAL_EVENT_LIMIT * 8  # bytes
_MAX_QUEUES = 1024  # KFD_MAX_NUM_OF_QUEUES_PER_PROCESS
_MAX_CONTROL_STACK = 64 << 20
_MAX_MQD = 1 << 20
# struct v9_mqd and v9_sdma_mqd: restore_mqd() copies that much, whatever the record says.
_MIN_MQD = {KFD_QUEUE_TYPE_COMPUTE: 2048}
_MIN_SDMA_MQD = 512
_SIGNALS = (uapi.KFD_IOC_EVENT_SIGNAL, uapi.KFD_IOC_EVENT_DEBUG_EVENT)
_EVENTS = (*_SIGNALS, uapi.KFD_IOC_EVENT_MEMORY, uapi.KFD_IOC_EVENT_HW_EXCEPTION)
_MEMORY_TYPES = (
    uapi.KFD_IOC_ALLOC_MEM_FLAGS_VRAM
    | uapi.KFD_IOC_ALLOC_MEM_FLAGS_GTT
    | uapi.KFD_IOC_ALLOC_MEM_FLAGS_USERPTR
    | uapi.KFD_IOC_ALLOC_MEM_FLAGS_DOORBELL
    | uapi.KFD_IOC_ALLOC_MEM_FLAGS_MMIO_REMAP
)


def check_counts(counts: ProcessCounts) -> None:
    """Bound what is allocated on the kernel's word. Raises CheckpointFailed."""
    for name, most in (
        ("num_devices", MAX_DEVICES),
        ("num_bos", MAX_BOS),
        ("num_objects", MAX_OBJECTS),
        ("priv_data_size", MAX_PRIV_DATA),
    ):
        value = getattr(counts, name)
        if value > most:
            raise CheckpointFailed(f"the process has {name} {value}, more than {most}")


def check_checkpoint(checkpoint: KfdCheckpoint) -> PrivateData:
    """Check all that the kernel would take at face value, and decode the private data.

    GPU ids and handles are unique and known, sizes and addresses bounded. Raises
    BrokenPrivateData.
    """
    for name, value, most in (
        ("devices", len(checkpoint.devices), MAX_DEVICES),
        ("BOs", len(checkpoint.bos), MAX_BOS),
        ("objects", checkpoint.num_objects, MAX_OBJECTS),
        ("bytes of private data", len(checkpoint.priv_data), MAX_PRIV_DATA),
    ):
        if not 0 <= value <= most:
            raise BrokenPrivateData(f"the checkpoint has {value} {name}, more than {most}")
    if not checkpoint.devices:
        raise BrokenPrivateData("the checkpoint has no GPU")
    gpus = {device.user_gpu_id for device in checkpoint.devices}
    _check_ids("user_gpu_id", (d.user_gpu_id for d in checkpoint.devices))
    _check_ids("actual_gpu_id", (d.actual_gpu_id for d in checkpoint.devices))
    for bo in checkpoint.bos:
        _check_bo(bo, gpus)
    private = checkpoint.private()
    _check_private(checkpoint, private, gpus)
    return private


def _check_ids(what: str, ids: Iterable[int]) -> None:
    seen: set[int] = set()
    for value in ids:
        if not 0 < value <= _U32 or value in seen:
            raise BrokenPrivateData(f"{what} {value} is zero, too large or given twice")
        seen.add(value)


def _check_bo(bo: BoBucket, gpus: set[int]) -> None:
    where = f"the BO at {bo.addr:#x}"
    if bo.gpu_id not in gpus:
        raise BrokenPrivateData(f"{where} is of GPU {bo.gpu_id}, which the process has not")
    if not 0 < bo.size <= _ADDRESS_LIMIT or bo.size % _PAGE:
        raise BrokenPrivateData(f"{where} has {bo.size} bytes")
    if not 0 <= bo.addr <= _ADDRESS_LIMIT - bo.size or bo.addr % _PAGE:
        raise BrokenPrivateData(f"{where} of {bo.size} bytes is out of the address space")
    types = bo.alloc_flags & _MEMORY_TYPES
    if not 0 <= bo.alloc_flags <= _U32 or types.bit_count() != 1:
        raise BrokenPrivateData(f"{where} has flags {bo.alloc_flags:#x}: not one type of memory")
    if bo.alloc_flags & ~(_MEMORY_TYPES | _KNOWN_FLAGS):
        raise BrokenPrivateData(f"{where} has flags {bo.alloc_flags:#x}: some are unknown")
    for offset in (bo.offset, bo.restored_offset):
        if not 0 <= offset <= _U64:
            raise BrokenPrivateData(f"{where} has the offset {offset}")


def _check_private(checkpoint: KfdCheckpoint, private: PrivateData, gpus: set[int]) -> None:
    handles: dict[tuple[int, int], int] = {}
    for bucket, bo in zip(checkpoint.bos, private.bos, strict=True):
        handle = (bucket.gpu_id, bo.idr_handle)
        if handle in handles:
            raise BrokenPrivateData(f"BO {bo.idr_handle} of GPU {bucket.gpu_id} is given twice")
        handles[handle] = bucket.size
        if not gpus.issuperset(bo.mapped_gpuids):
            raise BrokenPrivateData(f"BO {bo.idr_handle} is mapped to GPUs {bo.mapped_gpuids}")
        if bucket.is_userptr and not _in_space(bo.user_addr, bucket.size):
            raise BrokenPrivateData(f"BO {bo.idr_handle} is of memory at {bo.user_addr:#x}")
    for queue in private.queues:
        _check_queue(queue, gpus)
    _check_unique("queue", (queue.q_id for queue in private.queues))
    _check_unique("doorbell", ((q.gpu_id, q.doorbell_id) for q in private.queues))
    _check_unique("event", (event.event_id for event in private.events))
    for event in private.events:
        _check_event(event, handles)
    if sum(bool(event.user_handle) for event in private.events) > 1:
        raise BrokenPrivateData("the event page is given twice")


def _in_space(address: int, length: int) -> bool:
    return 0 <= address <= _ADDRESS_LIMIT - length


def _check_queue(queue: QueueRecord, gpus: set[int]) -> None:
    """What CREATE_QUEUE would refuse; RESTORE does not ask (set_queue_properties_from_criu)."""
    where = f"queue {queue.q_id}"
    if queue.gpu_id not in gpus:
        raise BrokenPrivateData(f"{where} is of GPU {queue.gpu_id}")
    ring = queue.q_size
    least = _MIN_MQD.get(queue.type, _MIN_SDMA_MQD)
    for holds, what in (
        (queue.q_id < _MAX_QUEUES, "id"),
        (queue.doorbell_id < _MAX_QUEUES, "doorbell"),
        (queue.format <= 1, "format"),
        (queue.gws <= 1, "global wave sync"),
        (queue.priority <= uapi.KFD_MAX_QUEUE_PRIORITY, "priority"),
        (queue.q_percent <= uapi.KFD_MAX_QUEUE_PERCENTAGE, "percentage"),
        (ring <= 1 << 31 and not ring & (ring - 1), "ring size"),
        (_in_space(queue.q_address, ring), "ring"),
        (_in_space(queue.read_ptr_addr, 8) and not queue.read_ptr_addr % 4, "read pointer"),
        (_in_space(queue.write_ptr_addr, 8) and not queue.write_ptr_addr % 4, "write pointer"),
        (_in_space(queue.eop_ring_buffer_address, queue.eop_ring_buffer_size), "EOP buffer"),
        (
            _in_space(queue.ctx_save_restore_area_address, queue.ctx_save_restore_area_size),
            "save area",
        ),
        (least <= len(queue.mqd) <= _MAX_MQD and not len(queue.mqd) % 4, "MQD"),
        (len(queue.ctl_stack) <= _MAX_CONTROL_STACK, "control stack"),
    ):
        if not holds:
            raise BrokenPrivateData(f"{where} has a wrong {what}")


def _check_event(event: EventRecord, handles: Mapping[tuple[int, int], int]) -> None:
    where = f"event {event.event_id}"
    if event.type not in _EVENTS:
        raise BrokenPrivateData(f"{where} has the type {event.type}")
    # The kernel writes to its slot in the event page without looking at the number.
    if event.type in _SIGNALS and event.event_id >= uapi.KFD_SIGNAL_EVENT_LIMIT:
        raise BrokenPrivateData(f"{where} has no slot in the event page")
    if event.user_handle:
        page = (uapi.GET_GPU_ID(event.user_handle), uapi.GET_IDR_HANDLE(event.user_handle))
        if page not in handles:
            raise BrokenPrivateData(f"the event page is BO {page[1]} of GPU {page[0]}: unknown")
        if handles[page] < _EVENT_PAGE:
            raise BrokenPrivateData(f"the event page has {handles[page]} bytes")


def _check_unique(what: str, numbers: Iterable[Hashable]) -> None:
    seen: set[Hashable] = set()
    for number in numbers:
        if number in seen:
            raise BrokenPrivateData(f"{what} {number} is given twice")
        seen.add(number)
