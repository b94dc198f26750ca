"""AMDKFD_IOC_CRIU_OP, after kfd_chardev.c of Linux 6.1: same checks, order and errnos."""

from __future__ import annotations

import ctypes
import errno
import os
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from migrate.kfd import privdata, uapi
from migrate.kfd.sim import callers, ioctls, scheduler
from migrate.kfd.sim.faults import Fault
from migrate.kfd.sim.ioctls import error
from migrate.kfd.sim.memory import Bo
from migrate.kfd.sim.process import MAX_QUEUES, DeviceData, SimProcess
from migrate.kfd.sim.queues import Queue, QueueType, mqd_size

if TYPE_CHECKING:
    from migrate.kfd.sim.device import Host

RESUME_DELAY = 0.002  # seconds until the worker that RESUME schedules has run
WITH_DMABUF = uapi.KFD_IOC_ALLOC_MEM_FLAGS_VRAM | uapi.KFD_IOC_ALLOC_MEM_FLAGS_GTT
INT_MAX = 0x7FFFFFFF

_PROCESS = ctypes.sizeof(privdata.kfd_criu_process_priv_data)
_DEVICE = ctypes.sizeof(privdata.kfd_criu_device_priv_data)
_QUEUE = ctypes.sizeof(privdata.kfd_criu_queue_priv_data)
_EVENT = ctypes.sizeof(privdata.kfd_criu_event_priv_data)


def criu_op(host: Host, process: SimProcess, caller: callers.Caller, args: Any) -> None:
    """kfd_ioctl_criu(). Raises OSError."""
    operations: dict[int, Callable[[Host, SimProcess, callers.Caller, Any], None]] = {
        uapi.KFD_CRIU_OP_PROCESS_INFO: process_info,
        uapi.KFD_CRIU_OP_CHECKPOINT: checkpoint,
        uapi.KFD_CRIU_OP_UNPAUSE: unpause,
        uapi.KFD_CRIU_OP_RESTORE: restore,
        uapi.KFD_CRIU_OP_RESUME: resume,
    }
    operation = operations.get(args.op)
    if operation is None:
        raise error(errno.EINVAL)
    operation(host, process, caller, args)


# ---------------------------------------------------------------- dump


def process_info(host: Host, process: SimProcess, caller: callers.Caller, args: Any) -> None:
    """criu_process_info()."""
    stall = host.faults.spend(Fault.PROCESS_INFO_STALL)
    if stall:
        end = time.monotonic() + stall
        while (left := end - time.monotonic()) > 0:
            host.changed.wait(left)
    try:
        if not process.devices:
            raise error(errno.ENODEV)
        scheduler.evict(host, process)
    except OSError:
        _undo_process_info(host, process)
        raise
    process.queues_paused = True
    args.pid = callers.pid_in_own_namespace(process.pid)
    args.num_devices, args.num_bos, args.num_objects, args.priv_data_size = _counts(host, process)


def _undo_process_info(host: Host, process: SimProcess) -> None:
    try:
        scheduler.restore(host, process)
    except OSError:
        host.log("PROCESS_INFO: queues could not be restored")
    process.queues_paused = False


def _counted_bos(device: DeviceData) -> list[tuple[int, Bo]]:
    """(handle, BO) of those that CHECKPOINT shows, in the order of their handles."""
    return [
        (number, bo)
        for number, bo in sorted(device.handles.items())
        if bo.va > ioctls.SVM_USER_BASE
    ]


def _counts(host: Host, process: SimProcess) -> tuple[int, int, int, int]:
    """criu_get_process_object_info(): devices, BOs, objects, bytes of private data."""
    bos = sum(len(_counted_bos(device)) for device in process.devices)
    queues = sum(
        _QUEUE + mqd_size(queue.kind) + len(queue.control_stack())
        for queue in process.queues.values()
    )
    size = (
        _PROCESS
        + len(process.devices) * _DEVICE
        + bos * host.bo_record_size
        + queues
        + len(process.events) * _EVENT
    )
    return len(process.devices), bos, len(process.queues) + len(process.events), size


def checkpoint(host: Host, process: SimProcess, caller: callers.Caller, args: Any) -> None:
    """criu_checkpoint()."""
    if not args.devices or not args.bos or not args.priv_data:
        raise error(errno.EINVAL)
    if not process.devices:
        raise error(errno.ENODEV)
    if not process.queues_paused:
        raise error(errno.EINVAL)
    given = (args.num_devices, args.num_bos, args.num_objects, args.priv_data_size)
    if given != _counts(host, process):
        raise error(errno.EINVAL)
    buckets = (uapi.kfd_criu_device_bucket * args.num_devices).from_address(args.devices)
    for device, bucket in zip(process.devices, buckets, strict=True):
        bucket.user_gpu_id = device.user_gpu_id
        bucket.actual_gpu_id = device.gpu.gpu_id
        bucket.drm_fd = bucket.pad = 0
    records = _checkpoint_bos(process, args.bos)
    private = privdata.PrivateData(
        xnack_mode=int(process.xnack),
        devices=(0,) * len(process.devices),
        bos=tuple(records),
        objects=(*_queue_records(process), *_event_records(process)),
        bo_record_size=host.bo_record_size,
    )
    data = privdata.encode(private)
    assert len(data) == args.priv_data_size
    ctypes.memmove(args.priv_data, data, len(data))


def _checkpoint_bos(process: SimProcess, pointer: int) -> list[privdata.BoRecord]:
    records = []
    at = pointer
    for device in process.devices:
        for number, bo in _counted_bos(device):
            bucket = uapi.kfd_criu_bo_bucket.from_address(at)
            at += ctypes.sizeof(uapi.kfd_criu_bo_bucket)
            bucket.addr, bucket.size = bo.va, bo.size
            bucket.offset = _bucket_offset(bo)
            bucket.restored_offset = bucket.pad = 0
            bucket.gpu_id, bucket.alloc_flags = device.user_gpu_id, bo.flags
            bucket.dmabuf_fd = _dmabuf(bo)
            mapped = tuple(d.user_gpu_id for d in process.devices if d in bo.mapped)
            records.append(
                privdata.BoRecord(
                    user_addr=bo.user_address if bo.backing is None else 0,
                    idr_handle=number,
                    mapped_gpuids=mapped,
                )
            )
    return records


def _dmabuf(bo: Bo) -> int:
    if bo.backing is not None and bo.flags & WITH_DMABUF:
        return bo.backing.reopen()
    return uapi.KFD_INVALID_FD


def _bucket_offset(bo: Bo) -> int:
    gpu_id = uapi.KFD_MMAP_GPU_ID(bo.owner.gpu.gpu_id)
    if bo.flags & uapi.KFD_IOC_ALLOC_MEM_FLAGS_DOORBELL:
        return uapi.KFD_MMAP_TYPE_DOORBELL | gpu_id
    if bo.flags & uapi.KFD_IOC_ALLOC_MEM_FLAGS_MMIO_REMAP:
        return uapi.KFD_MMAP_TYPE_MMIO | gpu_id
    return bo.mmap_offset


def _queue_records(process: SimProcess) -> list[privdata.QueueRecord]:
    return [
        privdata.QueueRecord(
            q_address=queue.ring_address,
            q_size=queue.ring_size,
            read_ptr_addr=queue.read_pointer,
            write_ptr_addr=queue.write_pointer,
            doorbell_off=0,
            eop_ring_buffer_address=queue.eop_address,
            ctx_save_restore_area_address=queue.ctx_address,
            gpu_id=device.user_gpu_id,
            type=queue.kind,
            format=queue.format,
            q_id=queue.queue_id,
            priority=queue.priority,
            q_percent=queue.percent,
            doorbell_id=queue.doorbell_id,
            gws=queue.gws,
            sdma_id=queue.sdma_id,
            eop_ring_buffer_size=queue.eop_size,
            ctx_save_restore_area_size=queue.ctx_size,
            mqd=queue.mqd(),
            ctl_stack=queue.control_stack(),
        )
        for device in process.devices
        for queue in device.queues
    ]


def _event_records(process: SimProcess) -> list[privdata.EventRecord]:
    events = process.events
    with_data = {uapi.KFD_IOC_EVENT_MEMORY, uapi.KFD_IOC_EVENT_HW_EXCEPTION}
    return [
        privdata.EventRecord(
            user_handle=events.page_handle if index == 0 else 0,
            event_id=event.event_id,
            auto_reset=int(event.auto_reset),
            type=event.kind,
            signaled=int(event.signaled),
            exception_data=event.data if event.kind in with_data else bytes(32),
        )
        for index, event in enumerate(events.all())
    ]


def unpause(host: Host, process: SimProcess, caller: callers.Caller, args: Any) -> None:
    """criu_unpause()."""
    if not process.queues_paused:
        raise error(errno.EINVAL)
    scheduler.restore(host, process)
    process.queues_paused = False


# ---------------------------------------------------------------- restore


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
    stranger = caller.pid != process.pid
    _restore_process(process, private)
    _restore_devices(host, process, args, private, stranger=stranger)
    fds = _restore_bos(host, process, args, private)
    try:
        _restore_objects(host, process, args.num_objects, private)
        if not private.at_end:
            raise error(errno.EINVAL)
    except OSError:
        _close_restored(args, fds)
        raise
    host.write_process(process)


def _close_restored(args: Any, fds: list[int]) -> None:
    """The driver leaves these fds open; who carries the ioctl closes them: see marshal."""
    for index, fd in enumerate(fds):
        bucket = uapi.kfd_criu_bo_bucket.from_address(
            args.bos + index * ctypes.sizeof(uapi.kfd_criu_bo_bucket)
        )
        if fd != uapi.KFD_INVALID_FD:
            os.close(fd)
            bucket.dmabuf_fd = uapi.KFD_INVALID_FD


def _restore_process(process: SimProcess, private: _Private) -> None:
    record = privdata.kfd_criu_process_priv_data.from_buffer_copy(private.take(_PROCESS))
    if record.version != privdata.KFD_CRIU_PRIV_VERSION:
        raise error(errno.EINVAL)
    if record.xnack_mode:
        raise error(errno.EPERM)


def _restore_devices(
    host: Host, process: SimProcess, args: Any, private: _Private, *, stranger: bool
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
        host.init_vm(device, file, stranger=stranger)
        device.doorbell_backing()
    private.take(args.num_devices * _DEVICE)


def _restore_bos(host: Host, process: SimProcess, args: Any, private: _Private) -> list[int]:
    """criu_restore_bos(): the dmabuf fds, as they stand in the buckets. Raises OSError."""
    record_type = privdata.BO_RECORDS[host.bo_record_size]
    private.need(args.num_bos * host.bo_record_size)
    process.block_mmu_notifications = True
    if host.faults.strike(Fault.RESTORE_ENOMEM):
        raise error(errno.ENOMEM)
    fds: list[int] = []
    size = ctypes.sizeof(uapi.kfd_criu_bo_bucket)
    try:
        for index in range(args.num_bos):
            record = record_type.from_buffer_copy(private.take(host.bo_record_size))
            bucket = uapi.kfd_criu_bo_bucket.from_address(args.bos + index * size)
            _restore_bo(host, process, bucket, record)
            fds.append(bucket.dmabuf_fd)
    except OSError:
        _close_restored(args, fds)
        raise
    return fds


def _restore_bo(host: Host, process: SimProcess, bucket: Any, record: Any) -> None:
    device = process.device(bucket.gpu_id, errno.ENODEV)
    if record.idr_handle > INT_MAX:
        raise error(errno.EINVAL)
    bo = ioctls.create_bo(
        host, device, bucket.addr, bucket.size, bucket.alloc_flags, record.user_addr
    )
    if record.idr_handle in device.handles:
        host.drop_bo(bo)
        raise error(errno.ENOMEM)
    device.handles[record.idr_handle] = bo
    if bo.flags & (uapi.KFD_IOC_ALLOC_MEM_FLAGS_DOORBELL | uapi.KFD_IOC_ALLOC_MEM_FLAGS_MMIO_REMAP):
        bucket.restored_offset = _bucket_offset(bo)
    elif bo.flags & WITH_DMABUF:
        bucket.restored_offset = bo.mmap_offset
    if bo.flags & uapi.KFD_IOC_ALLOC_MEM_FLAGS_VRAM:
        device.vram_usage += bucket.size
    for gpu_id in record.mapped_gpuids[: len(process.devices)]:
        if not gpu_id:
            break
        ioctls.map_bo(bo, process.device(gpu_id).bound())
    bucket.dmabuf_fd = _dmabuf(bo)


def _restore_objects(host: Host, process: SimProcess, count: int, private: _Private) -> None:
    for _ in range(count):
        kind = private.peek_type()
        if kind == privdata.KFD_CRIU_OBJECT_TYPE_QUEUE:
            _restore_queue(host, process, private)
        elif kind == privdata.KFD_CRIU_OBJECT_TYPE_EVENT:
            _restore_event(process, private)
        else:  # SVM is not built in
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
    ioctls.add_queue(host, queue, record.q_id, record.doorbell_id)


def _restore_event(process: SimProcess, private: _Private) -> None:
    record = privdata.kfd_criu_event_priv_data.from_buffer_copy(private.take(_EVENT))
    if record.event_id > INT_MAX:
        raise error(errno.EINVAL)
    if record.user_handle:
        ioctls.kmap_event_page(process, record.user_handle)
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


def resume(host: Host, process: SimProcess, caller: callers.Caller, args: Any) -> None:
    """criu_resume(): says 0 once a worker is scheduled; the queues start later."""
    target = _find(host, caller, args.pid)
    if target is None:
        raise error(errno.ESRCH)
    if not target.has_vm:
        raise host.oops(f"amdgpu_amdkfd_criu_resume: process {target.pid} has no VM")
    if not target.block_mmu_notifications:
        raise error(errno.EINVAL)
    target.block_mmu_notifications = False
    if target.vm_by_stranger or host.faults.strike(Fault.RESUME_DEAD):
        return  # the worker finds no mm and gives up
    worker = threading.Timer(RESUME_DELAY, _resume_worker, (host, target))
    worker.daemon = True
    worker.start()


def _find(host: Host, caller: callers.Caller, pid: int) -> SimProcess | None:
    for number, target in host.processes.items():
        if not target.dead and callers.pid_as_seen_by(caller.pid, number) == pid:
            return target
    return None


def _resume_worker(host: Host, process: SimProcess) -> None:
    with host.lock:
        if process.dead or host.broken:
            return
        try:
            scheduler.restore(host, process)
        except OSError as failure:
            host.log(f"process {process.pid}: queues could not be resumed: {failure}")
