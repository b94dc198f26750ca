"""KFD private data: what the kernel tells of a checkpointed process beside the buckets.

Order (kfd_chardev.c, criu_checkpoint): one process record, a record per device, a record
per BO, then the objects: queues (each with its MQD and control stack), events, SVM
ranges. RESTORE takes objects in any order, so do we. Little-endian, C layout; the
structs are those of kfd_priv.h, private data version 1.

The BO record has 80 bytes in Linux 6.1 (room for 16 GPUs) and 272 in later kernels (64),
both with version 1: only the sizes tell. The data may come from a peer and is hostile:
every count, size, type and bound is checked before it is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from ctypes import Structure, c_uint32, c_uint64, sizeof
from typing import TypeVar

from migrate.errors import BrokenPrivateData
from migrate.kfd import uapi
from migrate.model import Value

KFD_CRIU_PRIV_VERSION = 1

KFD_CRIU_OBJECT_TYPE_QUEUE = 0
KFD_CRIU_OBJECT_TYPE_EVENT = 1
KFD_CRIU_OBJECT_TYPE_SVM_RANGE = 2

# enum kfd_queue_type (kfd_priv.h): not the numbers of CREATE_QUEUE
KFD_QUEUE_TYPE_COMPUTE = 0
KFD_QUEUE_TYPE_SDMA = 1
KFD_QUEUE_TYPE_HIQ = 2
KFD_QUEUE_TYPE_DIQ = 3
KFD_QUEUE_TYPE_SDMA_XGMI = 4

T = TypeVar("T", bound=Structure)

INT_MAX = 0x7FFFFFFF
SVM_COMMON_ATTRIBUTES = 4  # preferred location, prefetch location, flags, granularity


class kfd_criu_process_priv_data(Structure):
    """First record."""

    _fields_ = (("version", c_uint32), ("xnack_mode", c_uint32))


class kfd_criu_device_priv_data(Structure):
    """One per device; the kernel writes zero."""

    _fields_ = (("reserved", c_uint64),)


class kfd_criu_bo_priv_data(Structure):
    """One per BO, Linux 6.1: MAX_GPU_INSTANCE is 16."""

    _fields_ = (
        ("user_addr", c_uint64),
        ("idr_handle", c_uint32),
        ("mapped_gpuids", c_uint32 * 16),
    )


class kfd_criu_bo_priv_data_64(Structure):
    """The same record of kernels whose MAX_GPU_INSTANCE is 64."""

    _fields_ = (
        ("user_addr", c_uint64),
        ("idr_handle", c_uint32),
        ("mapped_gpuids", c_uint32 * 64),
    )


class kfd_criu_svm_range_priv_data(Structure):
    """One per SVM range, followed by its attributes; address and size in pages."""

    _fields_ = (
        ("object_type", c_uint32),
        ("start_addr", c_uint64),
        ("size", c_uint64),
        ("attrs", uapi.kfd_ioctl_svm_attribute * 0),
    )


class kfd_criu_queue_priv_data(Structure):
    """One per queue, followed by mqd_size and ctl_stack_size bytes."""

    _fields_ = (
        ("object_type", c_uint32),
        ("q_address", c_uint64),
        ("q_size", c_uint64),
        ("read_ptr_addr", c_uint64),
        ("write_ptr_addr", c_uint64),
        ("doorbell_off", c_uint64),
        ("eop_ring_buffer_address", c_uint64),
        ("ctx_save_restore_area_address", c_uint64),
        ("gpu_id", c_uint32),
        ("type", c_uint32),
        ("format", c_uint32),
        ("q_id", c_uint32),
        ("priority", c_uint32),
        ("q_percent", c_uint32),
        ("doorbell_id", c_uint32),
        ("gws", c_uint32),
        ("sdma_id", c_uint32),
        ("eop_ring_buffer_size", c_uint32),
        ("ctx_save_restore_area_size", c_uint32),
        ("ctl_stack_size", c_uint32),
        ("mqd_size", c_uint32),
    )


class kfd_criu_event_priv_data(Structure):
    """One per event."""

    _anonymous_ = ("exception_data",)
    _fields_ = (
        ("object_type", c_uint32),
        ("user_handle", c_uint64),
        ("event_id", c_uint32),
        ("auto_reset", c_uint32),
        ("type", c_uint32),
        ("signaled", c_uint32),
        ("exception_data", uapi.kfd_exception_data),
    )


BO_RECORDS: dict[int, type[Structure]] = {
    sizeof(record): record for record in (kfd_criu_bo_priv_data, kfd_criu_bo_priv_data_64)
}

# ---------------------------------------------------------------- values


class BoRecord(Value):
    """``user_addr`` is the CPU address of a userptr; GPUs by user_gpu_id."""

    user_addr: int
    idr_handle: int
    mapped_gpuids: tuple[int, ...]


class QueueRecord(Value, tag_field="object_type", tag="queue"):
    """A queue with its memory queue descriptor and saved control stack."""

    q_address: int
    q_size: int
    read_ptr_addr: int
    write_ptr_addr: int
    doorbell_off: int
    eop_ring_buffer_address: int
    ctx_save_restore_area_address: int
    gpu_id: int
    type: int
    format: int
    q_id: int
    priority: int
    q_percent: int
    doorbell_id: int
    gws: int
    sdma_id: int
    eop_ring_buffer_size: int
    ctx_save_restore_area_size: int
    mqd: bytes
    ctl_stack: bytes = b""


class EventRecord(Value, tag_field="object_type", tag="event"):
    """An event. ``user_handle`` (of the event page's BO) is set in the first one only.

    ``exception_data`` are the 32 bytes of the union, zero for signal events.
    """

    user_handle: int
    event_id: int
    auto_reset: int
    type: int
    signaled: int
    exception_data: bytes = bytes(sizeof(uapi.kfd_exception_data))


class SvmRangeRecord(Value, tag_field="object_type", tag="svm_range"):
    """An SVM range: start and size in pages, attributes as (type, value)."""

    start_addr: int
    size: int
    attributes: tuple[tuple[int, int], ...]


Object = QueueRecord | EventRecord | SvmRangeRecord


class PrivateData(Value):
    """All of it, decoded. ``bo_record_size`` is 80 or 272; 80 if there is no BO to tell."""

    xnack_mode: int
    devices: tuple[int, ...]  # the reserved word of each
    bos: tuple[BoRecord, ...]
    objects: tuple[Object, ...]
    bo_record_size: int = sizeof(kfd_criu_bo_priv_data)

    @property
    def queues(self) -> tuple[QueueRecord, ...]:
        """The queues among the objects."""
        return tuple(o for o in self.objects if isinstance(o, QueueRecord))

    @property
    def events(self) -> tuple[EventRecord, ...]:
        """The events among the objects."""
        return tuple(o for o in self.objects if isinstance(o, EventRecord))

    @property
    def svm_ranges(self) -> tuple[SvmRangeRecord, ...]:
        """The SVM ranges among the objects."""
        return tuple(o for o in self.objects if isinstance(o, SvmRangeRecord))


# ---------------------------------------------------------------- decode


def decode(data: bytes, num_devices: int, num_bos: int, num_objects: int) -> PrivateData:
    """Decode private data; the counts are those of PROCESS_INFO.

    Raises BrokenPrivateData if any count, size, type or bound does not fit, or if the
    data can be read with either size of BO record.
    """
    found: list[PrivateData] = []
    complaints: list[str] = []
    for size in BO_RECORDS:
        try:
            found.append(_Decoder(data).decode(num_devices, num_bos, num_objects, size))
        except BrokenPrivateData as error:
            complaints.append(f"with BO records of {size} bytes: {error}")
        if not num_bos:
            break  # nothing to tell the sizes apart by
    if len(found) > 1:
        raise BrokenPrivateData("private data can be read with either size of BO record")
    if not found:
        raise BrokenPrivateData("; ".join(complaints))
    return found[0]


class _Decoder:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def decode(self, num_devices: int, num_bos: int, num_objects: int, bo_size: int) -> PrivateData:
        process = self._record(kfd_criu_process_priv_data)
        if process.version != KFD_CRIU_PRIV_VERSION:
            raise self._broken(f"version {process.version}, not {KFD_CRIU_PRIV_VERSION}")
        if process.xnack_mode > 1:
            raise self._broken(f"XNACK mode {process.xnack_mode}")
        devices = tuple(
            self._record(kfd_criu_device_priv_data).reserved for _ in range(num_devices)
        )
        bos = tuple(self._bo(BO_RECORDS[bo_size], num_devices) for _ in range(num_bos))
        objects = tuple(self._object(num_devices) for _ in range(num_objects))
        if self._at != len(self._data):
            raise self._broken(f"{len(self._data) - self._at} bytes are left over")
        return PrivateData(
            xnack_mode=process.xnack_mode,
            devices=devices,
            bos=bos,
            objects=objects,
            bo_record_size=bo_size,
        )

    def _broken(self, what: str) -> BrokenPrivateData:
        return BrokenPrivateData(f"private data of {len(self._data)} bytes: {what}")

    def _need(self, length: int) -> None:
        if length > len(self._data) - self._at:
            raise self._broken(f"{length} bytes are wanted at {self._at}")

    def _take(self, length: int) -> bytes:
        self._need(length)
        self._at += length
        return self._data[self._at - length : self._at]

    def _record(self, kind: type[T]) -> T:
        return kind.from_buffer_copy(self._take(sizeof(kind)))

    def _bo(self, kind: type[Structure], num_devices: int) -> BoRecord:
        record = self._record(kind)
        if record.idr_handle > INT_MAX:
            raise self._broken(f"BO handle {record.idr_handle}")
        ids = list(record.mapped_gpuids)
        mapped = ids[: ids.index(0)] if 0 in ids else ids
        if any(ids[len(mapped) :]) or len(mapped) > num_devices or len(set(mapped)) < len(mapped):
            raise self._broken(f"BO {record.idr_handle} is mapped to GPUs {ids}")
        return BoRecord(
            user_addr=record.user_addr, idr_handle=record.idr_handle, mapped_gpuids=tuple(mapped)
        )

    def _object(self, num_devices: int) -> Object:
        self._need(sizeof(c_uint32))
        kind = c_uint32.from_buffer_copy(self._data, self._at).value
        if kind == KFD_CRIU_OBJECT_TYPE_QUEUE:
            return self._queue()
        if kind == KFD_CRIU_OBJECT_TYPE_EVENT:
            return self._event()
        if kind == KFD_CRIU_OBJECT_TYPE_SVM_RANGE:
            return self._svm_range(num_devices)
        raise self._broken(f"object type {kind} at {self._at}")

    def _queue(self) -> QueueRecord:
        record = self._record(kfd_criu_queue_priv_data)
        if record.type not in (
            KFD_QUEUE_TYPE_COMPUTE,
            KFD_QUEUE_TYPE_SDMA,
            KFD_QUEUE_TYPE_SDMA_XGMI,
        ):
            raise self._broken(f"queue {record.q_id} has type {record.type}")
        if not record.mqd_size:
            raise self._broken(f"queue {record.q_id} has no MQD")
        mqd = self._take(record.mqd_size)
        ctl_stack = self._take(record.ctl_stack_size)
        plain = {
            name: getattr(record, name)
            for name in QueueRecord.__struct_fields__
            if name not in ("mqd", "ctl_stack")
        }
        return QueueRecord(**plain, mqd=mqd, ctl_stack=ctl_stack)

    def _event(self) -> EventRecord:
        record = self._record(kfd_criu_event_priv_data)
        if record.event_id > INT_MAX:
            raise self._broken(f"event {record.event_id}")
        if record.auto_reset > 1 or record.signaled > 1:
            raise self._broken(f"event {record.event_id}: a flag is neither 0 nor 1")
        return EventRecord(
            user_handle=record.user_handle,
            event_id=record.event_id,
            auto_reset=record.auto_reset,
            type=record.type,
            signaled=record.signaled,
            exception_data=bytes(record.exception_data),
        )

    def _svm_range(self, num_devices: int) -> SvmRangeRecord:
        record = self._record(kfd_criu_svm_range_priv_data)
        if not record.size or record.start_addr + record.size > 1 << 52:
            raise self._broken(f"SVM range of {record.size} pages at page {record.start_addr}")
        attributes = [
            self._record(uapi.kfd_ioctl_svm_attribute)
            for _ in range(SVM_COMMON_ATTRIBUTES + num_devices)
        ]
        if any(a.type > uapi.KFD_IOCTL_SVM_ATTR_GRANULARITY for a in attributes):
            raise self._broken(f"SVM range at page {record.start_addr}: unknown attribute")
        return SvmRangeRecord(
            start_addr=record.start_addr,
            size=record.size,
            attributes=tuple((a.type, a.value) for a in attributes),
        )


# ---------------------------------------------------------------- encode


def encode(private: PrivateData) -> bytes:
    """The bytes of *private*, paddings zero. Raises BrokenPrivateData if it does not fit."""
    return b"".join(_encoded(private))


def _encoded(private: PrivateData) -> Iterator[bytes]:
    yield bytes(kfd_criu_process_priv_data(KFD_CRIU_PRIV_VERSION, private.xnack_mode))
    for reserved in private.devices:
        yield bytes(kfd_criu_device_priv_data(reserved))
    kind = BO_RECORDS.get(private.bo_record_size)
    if kind is None:
        raise BrokenPrivateData(f"no BO record has {private.bo_record_size} bytes")
    for bo in private.bos:
        yield _encode_bo(kind, bo)
    for item in private.objects:
        yield from _encode_object(item, len(private.devices))


def _encode_bo(kind: type[Structure], bo: BoRecord) -> bytes:
    record = kind(user_addr=bo.user_addr, idr_handle=bo.idr_handle)
    if len(bo.mapped_gpuids) > len(record.mapped_gpuids):
        raise BrokenPrivateData(f"BO {bo.idr_handle} is mapped to {len(bo.mapped_gpuids)} GPUs")
    for index, gpu_id in enumerate(bo.mapped_gpuids):
        record.mapped_gpuids[index] = gpu_id
    return bytes(record)


def _encode_object(item: Object, num_devices: int) -> Iterator[bytes]:
    if isinstance(item, QueueRecord):
        plain = {
            name: getattr(item, name)
            for name in QueueRecord.__struct_fields__
            if name not in ("mqd", "ctl_stack")
        }
        sizes = {"mqd_size": len(item.mqd), "ctl_stack_size": len(item.ctl_stack)}
        yield bytes(
            kfd_criu_queue_priv_data(object_type=KFD_CRIU_OBJECT_TYPE_QUEUE, **plain, **sizes)
        )
        yield item.mqd
        yield item.ctl_stack
    elif isinstance(item, EventRecord):
        record = kfd_criu_event_priv_data(
            object_type=KFD_CRIU_OBJECT_TYPE_EVENT,
            user_handle=item.user_handle,
            event_id=item.event_id,
            auto_reset=item.auto_reset,
            type=item.type,
            signaled=item.signaled,
        )
        if len(item.exception_data) != sizeof(uapi.kfd_exception_data):
            raise BrokenPrivateData(f"event {item.event_id}: {len(item.exception_data)} bytes")
        record.exception_data = uapi.kfd_exception_data.from_buffer_copy(item.exception_data)
        yield bytes(record)
    else:
        if len(item.attributes) != SVM_COMMON_ATTRIBUTES + num_devices:
            raise BrokenPrivateData(f"an SVM range has {len(item.attributes)} attributes")
        yield bytes(
            kfd_criu_svm_range_priv_data(
                object_type=KFD_CRIU_OBJECT_TYPE_SVM_RANGE,
                start_addr=item.start_addr,
                size=item.size,
            )
        )
        for kind, value in item.attributes:
            yield bytes(uapi.kfd_ioctl_svm_attribute(kind, value))
