"""RESTORE, after kfd_chardev.c of Linux 6.1: same checks, order and errnos."""

from __future__ import annotations

import ctypes
import errno
from typing import TYPE_CHECKING, Any

from migrate.kfd import privdata, uapi
from migrate.kfd.marshal import close_all
from migrate.kfd.sim import callers, scheduler
from migrate.kfd.sim.criu_dump import WITH_DMABUF, bucket_offset, export
from migrate.kfd.sim.event_ioctls import kmap_event_page
from migrate.kfd.sim.faults import Fault
from migrate.kfd.sim.memory_ioctls import create_bo, map_bo
from migrate.kfd.sim.process import MAX_QUEUES, SimProcess, error
from migrate.kfd.sim.queue_ioctls import add_queue
from migrate.kfd.sim.queues import Queue, QueueType, mqd_size

if TYPE_CHECKING:
    from migrate.kfd.sim.device import Host

INT_MAX = 0x7FFFFFFF

_PROCESS = ctypes.sizeof(privdata.kfd_criu_process_priv_data)
_DEVICE = ctypes.sizeof(privdata.kfd_criu_device_priv_data)
_QUEUE = ctypes.sizeof(privdata.kfd_criu_queue_priv_data)
_SVM_RANGE = ctypes.sizeof(privdata.kfd_criu_svm_range_priv_data)
_EVENT = ctypes.sizeof(privdata.kfd_criu_event_priv_data)


class _Private:
    """Private data in the caller's buffer; every record is bounds-checked as it is taken."""

    def __init__(self, pointer: int, size: int) -> None:
        self._pointer = pointer
        self._size = size
        self.offset = 0

    def need(self, length: int) -> int:
        """Address of the next *length* bytes. Raises OSError(EINVAL)."""
        if self.offset + length > self._size:
            raise error(errno.EINVAL)
        return self._pointer + self.offset

    def take(self, length: int) -> bytes:
        data = ctypes.string_at(self.need(length), length)
        self.offset += length
        return data

    def peek_type(self) -> int:
        return ctypes.c_uint32.from_address(self.need(4)).value

    @property
    def at_end(self) -> bool:
        return self.offset == self._size


def restore(host: Host, process: SimProcess, caller: callers.Caller, args: Any) -> None:
    """criu_restore(): what it made before it failed stays until the process ends."""
    if (
        (args.num_bos > 0 and not args.bos)
        or not args.devices
        or not args.priv_data
        or not args.priv_data_size
        or not args.num_devices
    ):
        raise error(errno.EINVAL)
    scheduler.evict(host, process)
    private = _Private(args.priv_data, args.priv_data_size)
    _restore_process(process, private)
    _restore_devices(host, process, args, private, caller.pid)
    _restore_bos(host, process, args, private)
    # What fails from here on leaves the dmabuf fds in the caller's buckets.
    _restore_objects(host, process, args.num_objects, private)
    if not private.at_end:
        raise error(errno.EINVAL)
    host.write_process(process)


def _restore_process(process: SimProcess, private: _Private) -> None:
    record = privdata.kfd_criu_process_priv_data.from_buffer_copy(private.take(_PROCESS))
    if record.version != privdata.KFD_CRIU_PRIV_VERSION:
        raise error(errno.EINVAL)
    if record.xnack_mode:
        raise error(errno.EPERM)


def _restore_devices(
    host: Host, process: SimProcess, args: Any, private: _Private, caller: int
) -> None:
    if args.num_devices != len(process.devices):
        raise error(errno.EINVAL)
    private.need(args.num_devices * _DEVICE)
    buckets = (uapi.kfd_criu_device_bucket * args.num_devices).from_address(args.devices)
    for bucket in buckets:
        if not bucket.user_gpu_id:
            raise error(errno.EINVAL)
        gpu = next((g for g in host.gpus if g.gpu_id == bucket.actual_gpu_id), None)
        device = process.device_on(gpu) if gpu is not None else None
        if device is None or device.drm_file is not None:
            raise error(errno.EINVAL)
        device.user_gpu_id = bucket.user_gpu_id
        file = host.find_file(bucket.drm_fd)
        if file is None:
            raise error(errno.EINVAL)
        host.init_vm(device, file, caller)
        device.doorbell_backing()
    private.take(args.num_devices * _DEVICE)


def _restore_bos(host: Host, process: SimProcess, args: Any, private: _Private) -> None:
    """criu_restore_bos(): the caller sees its buckets changed only if all BOs are made."""
    record_type = privdata.BO_RECORDS[host.bo_record_size]
    private.need(args.num_bos * host.bo_record_size)
    process.block_mmu_notifications = True
    if host.faults.strike(Fault.RESTORE_ENOMEM):
        raise error(errno.ENOMEM)
    size = args.num_bos * ctypes.sizeof(uapi.kfd_criu_bo_bucket)
    buckets = (uapi.kfd_criu_bo_bucket * args.num_bos)()
    ctypes.memmove(buckets, args.bos, size)
    fds: list[int] = []
    try:
        for bucket in buckets:
            record = record_type.from_buffer_copy(private.take(host.bo_record_size))
            _restore_bo(host, process, bucket, record)
            fds.append(bucket.dmabuf_fd)
    except OSError:
        close_all([fd for fd in fds if fd != uapi.KFD_INVALID_FD])
        raise
    ctypes.memmove(args.bos, buckets, size)


def _restore_bo(host: Host, process: SimProcess, bucket: Any, record: Any) -> None:
    device = process.device(bucket.gpu_id, errno.ENODEV)
    if record.idr_handle > INT_MAX:
        raise error(errno.EINVAL)
    bo = create_bo(host, device, bucket.addr, bucket.size, bucket.alloc_flags, record.user_addr)
    if record.idr_handle in device.handles:
        host.drop_bo(bo)
        raise error(errno.ENOMEM)
    device.handles[record.idr_handle] = bo
    if bo.flags & (uapi.KFD_IOC_ALLOC_MEM_FLAGS_DOORBELL | uapi.KFD_IOC_ALLOC_MEM_FLAGS_MMIO_REMAP):
        bucket.restored_offset = bucket_offset(bo)
    elif bo.flags & WITH_DMABUF:
        bucket.restored_offset = bo.mmap_offset
    if bo.flags & uapi.KFD_IOC_ALLOC_MEM_FLAGS_VRAM:
        device.vram_usage += bucket.size
    for gpu_id in record.mapped_gpuids[: len(process.devices)]:
        if not gpu_id:
            break
        map_bo(bo, process.device(gpu_id).bound())
    bucket.dmabuf_fd = export(bo)


def _restore_objects(host: Host, process: SimProcess, count: int, private: _Private) -> None:
    for _ in range(count):
        kind = private.peek_type()
        if kind == privdata.KFD_CRIU_OBJECT_TYPE_QUEUE:
            _restore_queue(host, process, private)
        elif kind == privdata.KFD_CRIU_OBJECT_TYPE_EVENT:
            _restore_event(process, private)
        elif kind == privdata.KFD_CRIU_OBJECT_TYPE_SVM_RANGE and host.svm:
            _restore_svm_range(process, private)
        else:
            raise error(errno.EINVAL)


def _restore_queue(host: Host, process: SimProcess, private: _Private) -> None:
    record = privdata.kfd_criu_queue_priv_data.from_buffer_copy(private.take(_QUEUE))
    device = process.device(record.gpu_id)
    if record.type not in {int(kind) for kind in QueueType} or record.mqd_size != mqd_size(
        record.type
    ):
        raise error(errno.EINVAL)
    private.need(record.mqd_size + record.ctl_stack_size)
    mqd = private.take(record.mqd_size)
    stack = private.take(record.ctl_stack_size)
    queue = Queue(
        owner=device,
        queue_id=record.q_id,
        kind=record.type,
        format=record.format,
        ring_address=record.q_address,
        ring_size=record.q_size,
        read_pointer=record.read_ptr_addr,
        write_pointer=record.write_ptr_addr,
        doorbell_id=record.doorbell_id,
        percent=record.q_percent,
        priority=record.priority,
        sdma_id=record.sdma_id,
        eop_address=record.eop_ring_buffer_address,
        eop_size=record.eop_ring_buffer_size,
        ctx_address=record.ctx_save_restore_area_address,
        ctx_size=record.ctx_save_restore_area_size,
        ctl_stack_size=record.ctl_stack_size,
    )
    if record.doorbell_id >= MAX_QUEUES:
        raise error(errno.EINVAL)
    queue.restore(mqd, stack)
    add_queue(host, queue, record.q_id, record.doorbell_id)


def _restore_svm_range(process: SimProcess, private: _Private) -> None:
    record = privdata.kfd_criu_svm_range_priv_data.from_buffer_copy(private.take(_SVM_RANGE))
    count = privdata.SVM_COMMON_ATTRIBUTES + len(process.devices)
    attributes = (uapi.kfd_ioctl_svm_attribute * count).from_buffer_copy(
        private.take(count * ctypes.sizeof(uapi.kfd_ioctl_svm_attribute))
    )
    process.svm_restored.append(
        privdata.SvmRangeRecord(
            start_addr=record.start_addr,
            size=record.size,
            attributes=tuple((entry.type, entry.value) for entry in attributes),
        )
    )


def _restore_event(process: SimProcess, private: _Private) -> None:
    record = privdata.kfd_criu_event_priv_data.from_buffer_copy(private.take(_EVENT))
    if record.event_id > INT_MAX:
        raise error(errno.EINVAL)
    if record.user_handle:
        kmap_event_page(process, record.user_handle)
    known = {
        uapi.KFD_IOC_EVENT_SIGNAL,
        uapi.KFD_IOC_EVENT_DEBUG_EVENT,
        uapi.KFD_IOC_EVENT_MEMORY,
        uapi.KFD_IOC_EVENT_HW_EXCEPTION,
    }
    if record.type not in known:
        raise error(errno.EINVAL)
    event = process.events.create(
        record.type, auto_reset=bool(record.auto_reset), restore_id=record.event_id
    )
    event.signaled = bool(record.signaled)
    event.data = bytes(record.exception_data)
