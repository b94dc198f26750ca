"""A process's KFD state as values: what the kernel answers, what goes over the wire.

``check_checkpoint`` is for what came over the wire: nothing of it reaches the kernel
before.
"""

from __future__ import annotations

from collections.abc import Iterable

from migrate.errors import BrokenPrivateData, CheckpointFailed
from migrate.kfd import uapi
from migrate.kfd.privdata import PrivateData, decode
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


class RestoreProof(Value):
    """RESTORE was seen to succeed for this very process. Journal it: RESUME asks for it."""

    process: ProcessRef


# ---------------------------------------------------------------- checks

_PAGE = 4096
_U32 = 0xFFFFFFFF
_ADDRESS_LIMIT = 1 << 57  # five-level page tables
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
    if not 0 <= bo.alloc_flags <= _U32 or not bo.alloc_flags & _MEMORY_TYPES:
        raise BrokenPrivateData(f"{where} has flags {bo.alloc_flags:#x}: no type of memory")


def _check_private(checkpoint: KfdCheckpoint, private: PrivateData, gpus: set[int]) -> None:
    handles: set[tuple[int, int]] = set()
    for bucket, bo in zip(checkpoint.bos, private.bos, strict=True):
        handle = (bucket.gpu_id, bo.idr_handle)
        if handle in handles:
            raise BrokenPrivateData(f"BO {bo.idr_handle} of GPU {bucket.gpu_id} is given twice")
        handles.add(handle)
        if not gpus.issuperset(bo.mapped_gpuids):
            raise BrokenPrivateData(f"BO {bo.idr_handle} is mapped to GPUs {bo.mapped_gpuids}")
    for queue in private.queues:
        if queue.gpu_id not in gpus:
            raise BrokenPrivateData(f"queue {queue.q_id} is of GPU {queue.gpu_id}")
    _check_unique("queue", (queue.q_id for queue in private.queues))
    _check_unique("event", (event.event_id for event in private.events))
    for event in private.events:
        page = (uapi.GET_GPU_ID(event.user_handle), uapi.GET_IDR_HANDLE(event.user_handle))
        if event.user_handle and page not in handles:
            raise BrokenPrivateData(f"the event page is BO {page[1]} of GPU {page[0]}: unknown")


def _check_unique(what: str, numbers: Iterable[int]) -> None:
    seen: set[int] = set()
    for number in numbers:
        if number in seen:
            raise BrokenPrivateData(f"{what} {number} is given twice")
        seen.add(number)
