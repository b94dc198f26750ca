"""The table of the ioctls of /dev/kfd but CRIU's and WAIT_EVENTS, and the small ones.

A handler gets its argument as the driver does, a struct in the node's own memory whose
pointers are valid; it changes it in place and raises OSError with the driver's errno.
"""

from __future__ import annotations

import ctypes
import errno
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from migrate.kfd import uapi
from migrate.kfd.sim import event_ioctls as event
from migrate.kfd.sim import memory_ioctls as memory
from migrate.kfd.sim import queue_ioctls as queue
from migrate.kfd.sim.process import SVM_USER_BASE, SimProcess, error

if TYPE_CHECKING:
    from migrate.kfd.sim.device import Host

GPUVM_LIMIT = (1 << 47) - 1

Handler = Callable[["Host", SimProcess, Any], None]

# ---------------------------------------------------------------- version, apertures


def get_version(host: Host, process: SimProcess, args: Any) -> None:
    """GET_VERSION."""
    args.major_version = uapi.KFD_IOCTL_MAJOR_VERSION
    args.minor_version = host.interface_minor


def get_process_apertures_new(host: Host, process: SimProcess, args: Any) -> None:
    """GET_PROCESS_APERTURES_NEW."""
    if args.num_of_nodes == 0:
        args.num_of_nodes = len(process.devices)
        return
    if args.num_of_nodes > len(host.gpus) + 8:  # of the topology, CPU nodes included
        raise error(errno.EINVAL)
    count = min(len(process.devices), args.num_of_nodes)
    pointer = args.kfd_process_device_apertures_ptr
    if count and not pointer:
        raise error(errno.EFAULT)
    args.num_of_nodes = count
    if not count:
        return
    out = (uapi.kfd_process_device_apertures * count).from_address(pointer)
    for entry, device in zip(out, process.devices, strict=False):
        entry.lds_base, entry.lds_limit = 0x1 << 48, (0x1 << 48) + 0xFFFFFFFF
        entry.scratch_base, entry.scratch_limit = 0x2 << 48, (0x2 << 48) + 0xFFFFFFFF
        entry.gpuvm_base, entry.gpuvm_limit = SVM_USER_BASE, GPUVM_LIMIT
        entry.gpu_id = device.gpu.gpu_id  # the actual one, as the driver has it


def get_clock_counters(host: Host, process: SimProcess, args: Any) -> None:
    """GET_CLOCK_COUNTERS."""
    now = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    args.gpu_clock_counter = now // 10
    args.cpu_clock_counter = now
    args.system_clock_counter = now
    args.system_clock_freq = 1_000_000_000


def per_gpu_setting(host: Host, process: SimProcess, args: Any) -> None:
    """Memory policy, scratch base, trap handler: nothing the engine would use."""
    process.device(args.gpu_id).bound(errno.ESRCH)


def get_available_memory(host: Host, process: SimProcess, args: Any) -> None:
    """AVAILABLE_MEMORY."""
    args.available = host.available_vram(process.device(args.gpu_id).gpu)


# ---------------------------------------------------------------- the table


def _refused(number: int) -> Handler:
    def refuse(host: Host, process: SimProcess, args: Any) -> None:
        raise error(number)

    return refuse


def _entry(
    request: int, kind: type[ctypes.Structure], handler: Handler
) -> tuple[int, tuple[type[ctypes.Structure], Handler]]:
    return uapi._IOC_NR(request), (kind, handler)


HANDLERS: dict[int, tuple[type[ctypes.Structure], Handler]] = dict(
    [
        _entry(uapi.AMDKFD_IOC_GET_VERSION, uapi.kfd_ioctl_get_version_args, get_version),
        _entry(uapi.AMDKFD_IOC_CREATE_QUEUE, uapi.kfd_ioctl_create_queue_args, queue.create_queue),
        _entry(
            uapi.AMDKFD_IOC_DESTROY_QUEUE, uapi.kfd_ioctl_destroy_queue_args, queue.destroy_queue
        ),
        _entry(
            uapi.AMDKFD_IOC_SET_MEMORY_POLICY,
            uapi.kfd_ioctl_set_memory_policy_args,
            per_gpu_setting,
        ),
        _entry(
            uapi.AMDKFD_IOC_GET_CLOCK_COUNTERS,
            uapi.kfd_ioctl_get_clock_counters_args,
            get_clock_counters,
        ),
        _entry(uapi.AMDKFD_IOC_UPDATE_QUEUE, uapi.kfd_ioctl_update_queue_args, queue.update_queue),
        _entry(uapi.AMDKFD_IOC_CREATE_EVENT, uapi.kfd_ioctl_create_event_args, event.create_event),
        _entry(
            uapi.AMDKFD_IOC_DESTROY_EVENT, uapi.kfd_ioctl_destroy_event_args, event.destroy_event
        ),
        _entry(uapi.AMDKFD_IOC_SET_EVENT, uapi.kfd_ioctl_set_event_args, event.set_event),
        _entry(uapi.AMDKFD_IOC_RESET_EVENT, uapi.kfd_ioctl_reset_event_args, event.reset_event),
        _entry(
            uapi.AMDKFD_IOC_SET_SCRATCH_BACKING_VA,
            uapi.kfd_ioctl_set_scratch_backing_va_args,
            per_gpu_setting,
        ),
        _entry(
            uapi.AMDKFD_IOC_SET_TRAP_HANDLER,
            uapi.kfd_ioctl_set_trap_handler_args,
            per_gpu_setting,
        ),
        _entry(
            uapi.AMDKFD_IOC_GET_PROCESS_APERTURES_NEW,
            uapi.kfd_ioctl_get_process_apertures_new_args,
            get_process_apertures_new,
        ),
        _entry(uapi.AMDKFD_IOC_ACQUIRE_VM, uapi.kfd_ioctl_acquire_vm_args, memory.acquire_vm),
        _entry(
            uapi.AMDKFD_IOC_ALLOC_MEMORY_OF_GPU,
            uapi.kfd_ioctl_alloc_memory_of_gpu_args,
            memory.alloc_memory_of_gpu,
        ),
        _entry(
            uapi.AMDKFD_IOC_FREE_MEMORY_OF_GPU,
            uapi.kfd_ioctl_free_memory_of_gpu_args,
            memory.free_memory_of_gpu,
        ),
        _entry(
            uapi.AMDKFD_IOC_MAP_MEMORY_TO_GPU,
            uapi.kfd_ioctl_map_memory_to_gpu_args,
            memory.map_memory_to_gpu,
        ),
        _entry(
            uapi.AMDKFD_IOC_UNMAP_MEMORY_FROM_GPU,
            uapi.kfd_ioctl_unmap_memory_from_gpu_args,
            memory.unmap_memory_from_gpu,
        ),
        _entry(uapi.AMDKFD_IOC_SET_CU_MASK, uapi.kfd_ioctl_set_cu_mask_args, queue.set_cu_mask),
        _entry(
            uapi.AMDKFD_IOC_GET_DMABUF_INFO,
            uapi.kfd_ioctl_get_dmabuf_info_args,
            memory.get_dmabuf_info,
        ),
        _entry(
            uapi.AMDKFD_IOC_IMPORT_DMABUF, uapi.kfd_ioctl_import_dmabuf_args, memory.import_dmabuf
        ),
        _entry(
            uapi.AMDKFD_IOC_ALLOC_QUEUE_GWS,
            uapi.kfd_ioctl_alloc_queue_gws_args,
            _refused(errno.ENODEV),
        ),
        _entry(
            uapi.AMDKFD_IOC_SET_XNACK_MODE,
            uapi.kfd_ioctl_set_xnack_mode_args,
            _refused(errno.EPERM),
        ),
        _entry(
            uapi.AMDKFD_IOC_AVAILABLE_MEMORY,
            uapi.kfd_ioctl_get_available_memory_args,
            get_available_memory,
        ),
        _entry(
            uapi.AMDKFD_IOC_EXPORT_DMABUF, uapi.kfd_ioctl_export_dmabuf_args, memory.export_dmabuf
        ),
    ]
)
