"""PROCESS_INFO, CHECKPOINT and UNPAUSE, after kfd_chardev.c of Linux 6.1."""

from __future__ import annotations

import ctypes
import errno
import time
from typing import TYPE_CHECKING, Any

from migrate.kfd import privdata, uapi
from migrate.kfd.sim import callers, scheduler, svm
from migrate.kfd.sim.faults import Fault
from migrate.kfd.sim.memory import Bo
from migrate.kfd.sim.process import SVM_USER_BASE, DeviceData, SimProcess, error
from migrate.kfd.sim.queues import mqd_size

if TYPE_CHECKING:
    from migrate.kfd.sim.device import Host

WITH_DMABUF = uapi.KFD_IOC_ALLOC_MEM_FLAGS_VRAM | uapi.KFD_IOC_ALLOC_MEM_FLAGS_GTT

_PROCESS = ctypes.sizeof(privdata.kfd_criu_process_priv_data)
_DEVICE = ctypes.sizeof(privdata.kfd_criu_device_priv_data)
_QUEUE = ctypes.sizeof(privdata.kfd_criu_queue_priv_data)
_SVM_RANGE = ctypes.sizeof(privdata.kfd_criu_svm_range_priv_data)
_SVM_ATTRIBUTE = ctypes.sizeof(uapi.kfd_ioctl_svm_attribute)
_EVENT = ctypes.sizeof(privdata.kfd_criu_event_priv_data)


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
    return [(number, bo) for number, bo in sorted(device.handles.items()) if bo.va > SVM_USER_BASE]


def _counts(host: Host, process: SimProcess) -> tuple[int, int, int, int]:
    """criu_get_process_object_info(): devices, BOs, objects, bytes of private data."""
    bos = sum(len(_counted_bos(device)) for device in process.devices)
    queues = sum(
        _QUEUE + mqd_size(queue.kind) + len(queue.control_stack())
        for queue in process.queues.values()
    )
    ranges = len(svm.ranges(process))
    attributes = privdata.SVM_COMMON_ATTRIBUTES + len(process.devices)
    size = (
        _PROCESS
        + len(process.devices) * _DEVICE
        + bos * host.bo_record_size
        + queues
        + len(process.events) * _EVENT
        + ranges * (_SVM_RANGE + attributes * _SVM_ATTRIBUTE)
    )
    return len(process.devices), bos, len(process.queues) + len(process.events) + ranges, size


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
        objects=(
            *_queue_records(process),
            *_event_records(process),
            *(r.record([d.user_gpu_id for d in process.devices]) for r in process.svm_ranges),
        ),
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
            bucket.offset = bucket_offset(bo)
            bucket.restored_offset = bucket.pad = 0
            bucket.gpu_id, bucket.alloc_flags = device.user_gpu_id, bo.flags
            bucket.dmabuf_fd = export(bo)
            mapped = tuple(d.user_gpu_id for d in process.devices if d in bo.mapped)
            records.append(
                privdata.BoRecord(
                    user_addr=bo.user_address if bo.backing is None else 0,
                    idr_handle=number,
                    mapped_gpuids=mapped,
                )
            )
    return records


def export(bo: Bo) -> int:
    """A dmabuf fd of a BO with contents, else KFD_INVALID_FD."""
    if bo.backing is not None and bo.flags & WITH_DMABUF:
        return bo.backing.reopen()
    return uapi.KFD_INVALID_FD


def bucket_offset(bo: Bo) -> int:
    """kfd_criu_bo_bucket.offset: for doorbells and MMIO it encodes the actual gpu_id."""
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
