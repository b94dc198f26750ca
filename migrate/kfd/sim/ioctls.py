"""The ioctls of /dev/kfd but CRIU's, after kfd_chardev.c of Linux 6.1.

A handler gets its argument as the driver does, a struct in the node's own memory whose
pointers are valid; it changes it in place and raises OSError with the driver's errno.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from migrate.kfd import uapi
from migrate.kfd.sim import scheduler
from migrate.kfd.sim.memory import PAGE, Backing, Bo, page_align
from migrate.kfd.sim.process import DOORBELL_SLICE, DeviceData, SimProcess, bo_by_handle
from migrate.kfd.sim.queues import DOORBELL_SIZE, KINDS, Queue, QueueType

if TYPE_CHECKING:
    from migrate.kfd.sim.device import Gpu, Host

SVM_USER_BASE = 0x4000  # gpuvm_base: BOs at or below it are the driver's own
GPUVM_LIMIT = (1 << 47) - 1
MAX_QUEUES_PER_DEVICE = 127
ENOTSUPP = 524  # kernel-internal, leaks to user space

MEM = uapi.KFD_IOC_ALLOC_MEM_FLAGS_VRAM
GTT = uapi.KFD_IOC_ALLOC_MEM_FLAGS_GTT
USERPTR = uapi.KFD_IOC_ALLOC_MEM_FLAGS_USERPTR
DOORBELL = uapi.KFD_IOC_ALLOC_MEM_FLAGS_DOORBELL
MMIO = uapi.KFD_IOC_ALLOC_MEM_FLAGS_MMIO_REMAP
AQL = uapi.KFD_IOC_ALLOC_MEM_FLAGS_AQL_QUEUE_MEM

Handler = Callable[["Host", SimProcess, Any], None]


def error(number: int) -> OSError:
    """OSError of an errno."""
    return OSError(number, os.strerror(number))


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
    gpu = process.device(args.gpu_id).gpu
    host.reap_orphans(gpu)
    args.available = gpu.spec.vram_bytes - gpu.vram_used


# ---------------------------------------------------------------- memory


def acquire_vm(host: Host, process: SimProcess, args: Any) -> None:
    """ACQUIRE_VM."""
    file = host.find_file(args.drm_fd)
    if file is None:
        raise error(errno.EINVAL)
    device = process.device(args.gpu_id)
    if device.drm_file is not None:
        if device.drm_file is file:
            return
        raise error(errno.EBUSY)
    host.init_vm(device, file)


def alloc_memory_of_gpu(host: Host, process: SimProcess, args: Any) -> None:
    """ALLOC_MEMORY_OF_GPU."""
    if args.size == 0:
        raise error(errno.EINVAL)
    device = process.device(args.gpu_id).bound()
    bo = create_bo(host, device, args.va_addr, args.size, args.flags, args.mmap_offset)
    number = device.free_handle()
    device.handles[number] = bo
    args.handle = uapi.MAKE_HANDLE(args.gpu_id, number)
    args.mmap_offset = bo.mmap_offset
    if args.flags & MMIO:
        args.mmap_offset = uapi.KFD_MMAP_TYPE_MMIO | uapi.KFD_MMAP_GPU_ID(args.gpu_id)
    if args.flags & MEM:
        device.vram_usage += page_align(bo.size)
        host.write_process(process)


def create_bo(
    host: Host, device: DeviceData, va: int, size: int, flags: int, user_address: int
) -> Bo:
    """amdgpu_amdkfd_gpuvm_alloc_memory_of_gpu(), with a handle still to be given.

    Raises OSError: EINVAL, ENOMEM.
    """
    gpu = device.gpu
    length = page_align(size >> 1 if flags & AQL else size)
    backing: Backing | None
    if flags & MEM:
        host.reserve_vram(gpu, length)
        backing = Backing("kfd-vram", length, gpu)
    elif flags & GTT:
        backing = Backing("kfd-gtt", length)
    elif flags & USERPTR:
        if not user_address:
            raise error(errno.EINVAL)
        backing = None
    elif flags & DOORBELL:
        if size != DOORBELL_SLICE:
            raise error(errno.EINVAL)
        backing = device.doorbell_backing()
    elif flags & MMIO:
        if size != PAGE:
            raise error(errno.EINVAL)
        gpu.mmio = gpu.mmio or Backing("kfd-mmio", PAGE)
        backing = gpu.mmio
    else:
        raise error(errno.EINVAL)
    return register_bo(gpu, Bo(device, va, length, flags, 0, backing, user_address))


def register_bo(gpu: Gpu, bo: Bo) -> Bo:
    """Give a BO its mmap offset on the GPU's render node."""
    bo.mmap_offset = gpu.next_offset
    gpu.next_offset += page_align(bo.size)
    gpu.mmap_offsets[bo.mmap_offset] = bo
    if bo.backing is not None:
        bo.backing.users += 1
    return bo


def free_memory_of_gpu(host: Host, process: SimProcess, args: Any) -> None:
    """FREE_MEMORY_OF_GPU."""
    if process.events.page_handle and process.events.page_handle == args.handle:
        raise error(errno.EPERM)
    device = process.device(uapi.GET_GPU_ID(args.handle))
    bo = device.find_handle(uapi.GET_IDR_HANDLE(args.handle))
    if bo.mapped:
        raise error(errno.EBUSY)
    del device.handles[uapi.GET_IDR_HANDLE(args.handle)]
    if bo.flags & MEM and not bo.imported:
        device.vram_usage -= page_align(bo.size)
    host.drop_bo(bo)
    host.write_process(process)


def _device_ids(args: Any) -> list[int]:
    if not args.n_devices or args.n_success > args.n_devices:
        raise error(errno.EINVAL)
    if not args.device_ids_array_ptr:
        raise error(errno.EFAULT)
    return list((ctypes.c_uint32 * args.n_devices).from_address(args.device_ids_array_ptr))


def map_memory_to_gpu(host: Host, process: SimProcess, args: Any) -> None:
    """MAP_MEMORY_TO_GPU."""
    ids = _device_ids(args)
    process.device(uapi.GET_GPU_ID(args.handle)).bound()
    bo = bo_by_handle(process, args.handle, errno.ENOMEM)
    for index in range(args.n_success, args.n_devices):
        map_bo(bo, process.device(ids[index]).bound())
        args.n_success = index + 1


def map_bo(bo: Bo, device: DeviceData) -> None:
    """amdgpu_amdkfd_gpuvm_map_memory_to_gpu(). Raises OSError(EINVAL)."""
    if device not in bo.mapped:
        device.memory.insert(bo)
        bo.mapped.append(device)


def unmap_memory_from_gpu(host: Host, process: SimProcess, args: Any) -> None:
    """UNMAP_MEMORY_FROM_GPU."""
    ids = _device_ids(args)
    bo = bo_by_handle(process, args.handle, errno.ENOMEM)
    for index in range(args.n_success, args.n_devices):
        device = process.device(ids[index])
        if device not in bo.mapped:
            raise error(errno.EINVAL)
        host.wait_engines(process)  # the update waits for the page tables' users
        device.memory.remove(bo)
        bo.mapped.remove(device)
        args.n_success = index + 1


def _dmabuf(host: Host, fd: int) -> Bo:
    """The BO a dmabuf fd was exported from, in whatever process. Raises OSError."""
    try:
        inode = os.fstat(fd).st_ino
    except OSError:
        raise error(errno.EBADF) from None
    for process in (*host.processes.values(), *host.pinned):
        for device in process.devices:
            for bo in device.handles.values():
                if bo.backing is not None and bo.backing.inode == inode:
                    return bo
    raise error(errno.EINVAL)


def get_dmabuf_info(host: Host, process: SimProcess, args: Any) -> None:
    """GET_DMABUF_INFO."""
    bo = _dmabuf(host, args.dmabuf_fd)
    args.size = bo.size
    args.metadata_size = 0
    args.gpu_id = bo.owner.gpu.gpu_id
    args.flags = bo.flags & (MEM | GTT | uapi.KFD_IOC_ALLOC_MEM_FLAGS_PUBLIC)


def import_dmabuf(host: Host, process: SimProcess, args: Any) -> None:
    """IMPORT_DMABUF."""
    source = _dmabuf(host, args.dmabuf_fd)
    device = process.device(args.gpu_id).bound()
    flags = (source.flags & (MEM | GTT)) | (
        uapi.KFD_IOC_ALLOC_MEM_FLAGS_WRITABLE | uapi.KFD_IOC_ALLOC_MEM_FLAGS_EXECUTABLE
    )
    bo = Bo(device, args.va_addr, source.size, flags, 0, source.backing, imported=True)
    register_bo(device.gpu, bo)
    number = device.free_handle()
    device.handles[number] = bo
    args.handle = uapi.MAKE_HANDLE(args.gpu_id, number)


def export_dmabuf(host: Host, process: SimProcess, args: Any) -> None:
    """EXPORT_DMABUF."""
    bo = bo_by_handle(process, args.handle)
    if bo.backing is None or not bo.flags & (MEM | GTT):
        raise error(errno.EINVAL)
    args.dmabuf_fd = bo.backing.reopen()
    if not args.flags & os.O_CLOEXEC:
        fcntl.fcntl(args.dmabuf_fd, fcntl.F_SETFD, 0)


# ---------------------------------------------------------------- queues


def create_queue(host: Host, process: SimProcess, args: Any) -> None:
    """CREATE_QUEUE."""
    if (
        args.queue_percentage > uapi.KFD_MAX_QUEUE_PERCENTAGE
        or args.queue_priority > uapi.KFD_MAX_QUEUE_PRIORITY
    ):
        raise error(errno.EINVAL)
    args.ring_size = _ring_size(args.ring_size)
    kind = KINDS.get(args.queue_type)
    if kind is None:
        raise error(ENOTSUPP)
    device = process.device(args.gpu_id).bound(errno.ESRCH)
    device.doorbell_backing()
    queue = Queue(
        owner=device,
        queue_id=0,
        kind=kind[0],
        format=kind[1],
        ring_address=args.ring_base_address,
        ring_size=args.ring_size,
        read_pointer=args.read_pointer_address,
        write_pointer=args.write_pointer_address,
        doorbell_id=0,
        percent=args.queue_percentage,
        priority=args.queue_priority,
        eop_address=args.eop_buffer_address,
        eop_size=args.eop_buffer_size & 0xFFFFFFFF,
        ctx_address=args.ctx_save_restore_address,
        ctx_size=args.ctx_save_restore_size,
        ctl_stack_size=args.ctl_stack_size,
    )
    add_queue(host, queue)
    args.queue_id = queue.queue_id
    args.doorbell_offset = (
        uapi.KFD_MMAP_TYPE_DOORBELL
        | uapi.KFD_MMAP_GPU_ID(args.gpu_id)
        | queue.doorbell_id * DOORBELL_SIZE
    )


def _ring_size(size: int) -> int:
    if size & (size - 1):
        raise error(errno.EINVAL)
    return max(size, uapi.KFD_MIN_QUEUE_RING_SIZE)


def add_queue(
    host: Host, queue: Queue, queue_id: int | None = None, doorbell_id: int | None = None
) -> None:
    """pqm_create_queue(). Raises OSError, with nothing of the queue left."""
    device = queue.owner
    process = device.process
    if len(device.queues) >= MAX_QUEUES_PER_DEVICE:
        raise error(errno.ENOSPC)
    queue.queue_id = process.free_queue_id(queue_id)
    if queue.kind == QueueType.COMPUTE:
        queue.doorbell_id = device.allocate_doorbell(doorbell_id)
    else:
        queue.doorbell_id = doorbell_id if doorbell_id is not None else 0x1E0
    device.queues.insert(0, queue)
    process.queues[queue.queue_id] = queue
    try:
        if queue.is_active:
            scheduler.execute_queues(host, device.gpu)
    except OSError:
        _forget_queue(queue)
        raise
    host.write_process(process)


def _forget_queue(queue: Queue) -> None:
    device = queue.owner
    device.queues.remove(queue)
    device.doorbell_ids.discard(queue.doorbell_id)
    del device.process.queues[queue.queue_id]


def destroy_queue(host: Host, process: SimProcess, args: Any) -> None:
    """DESTROY_QUEUE."""
    queue = process.queues.get(args.queue_id)
    if queue is None:
        raise error(errno.EINVAL)
    _forget_queue(queue)
    host.wait_engines(process)
    host.write_process(process)
    scheduler.execute_queues(host, queue.owner.gpu)


def update_queue(host: Host, process: SimProcess, args: Any) -> None:
    """UPDATE_QUEUE."""
    if (
        args.queue_percentage > uapi.KFD_MAX_QUEUE_PERCENTAGE
        or args.queue_priority > uapi.KFD_MAX_QUEUE_PRIORITY
    ):
        raise error(errno.EINVAL)
    ring_size = _ring_size(args.ring_size)
    queue = process.queues.get(args.queue_id)
    if queue is None:
        raise error(errno.EFAULT)
    host.wait_engines(process)
    queue.ring_address = args.ring_base_address
    queue.ring_size = ring_size
    queue.percent = args.queue_percentage
    queue.priority = args.queue_priority
    queue.idle = False
    scheduler.execute_queues(host, queue.owner.gpu)


def set_cu_mask(host: Host, process: SimProcess, args: Any) -> None:
    """SET_CU_MASK."""
    if args.num_cu_mask % 32 or args.num_cu_mask == 0:
        raise error(errno.EINVAL)
    if args.queue_id not in process.queues:
        raise error(errno.EFAULT)


# ---------------------------------------------------------------- events


def create_event(host: Host, process: SimProcess, args: Any) -> None:
    """CREATE_EVENT."""
    if args.event_page_offset:
        kmap_event_page(process, args.event_page_offset)
    args.event_page_offset = 0
    event = process.events.create(args.event_type, auto_reset=args.auto_reset != 0)
    if event.has_slot:
        args.event_page_offset = uapi.KFD_MMAP_TYPE_EVENTS
        args.event_slot_index = event.event_id
    args.event_id = event.event_id
    args.event_trigger_data = event.event_id


def kmap_event_page(process: SimProcess, handle: int) -> None:
    """kfd_kmap_event_page(). Raises OSError(EINVAL, ENODEV)."""
    if process.events.page is not None:
        raise error(errno.EINVAL)
    process.device(uapi.GET_GPU_ID(handle)).bound()
    process.events.set_page(bo_by_handle(process, handle), handle)


def destroy_event(host: Host, process: SimProcess, args: Any) -> None:
    """DESTROY_EVENT."""
    process.events.destroy(args.event_id)
    host.changed.notify_all()


def set_event(host: Host, process: SimProcess, args: Any) -> None:
    """SET_EVENT."""
    event = process.events.find(args.event_id)
    if event.kind != uapi.KFD_IOC_EVENT_SIGNAL:
        raise error(errno.EINVAL)
    event.set()
    host.changed.notify_all()


def reset_event(host: Host, process: SimProcess, args: Any) -> None:
    """RESET_EVENT."""
    event = process.events.find(args.event_id)
    if event.kind != uapi.KFD_IOC_EVENT_SIGNAL:
        raise error(errno.EINVAL)
    event.signaled = False


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
        _entry(uapi.AMDKFD_IOC_CREATE_QUEUE, uapi.kfd_ioctl_create_queue_args, create_queue),
        _entry(uapi.AMDKFD_IOC_DESTROY_QUEUE, uapi.kfd_ioctl_destroy_queue_args, destroy_queue),
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
        _entry(uapi.AMDKFD_IOC_UPDATE_QUEUE, uapi.kfd_ioctl_update_queue_args, update_queue),
        _entry(uapi.AMDKFD_IOC_CREATE_EVENT, uapi.kfd_ioctl_create_event_args, create_event),
        _entry(uapi.AMDKFD_IOC_DESTROY_EVENT, uapi.kfd_ioctl_destroy_event_args, destroy_event),
        _entry(uapi.AMDKFD_IOC_SET_EVENT, uapi.kfd_ioctl_set_event_args, set_event),
        _entry(uapi.AMDKFD_IOC_RESET_EVENT, uapi.kfd_ioctl_reset_event_args, reset_event),
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
        _entry(uapi.AMDKFD_IOC_ACQUIRE_VM, uapi.kfd_ioctl_acquire_vm_args, acquire_vm),
        _entry(
            uapi.AMDKFD_IOC_ALLOC_MEMORY_OF_GPU,
            uapi.kfd_ioctl_alloc_memory_of_gpu_args,
            alloc_memory_of_gpu,
        ),
        _entry(
            uapi.AMDKFD_IOC_FREE_MEMORY_OF_GPU,
            uapi.kfd_ioctl_free_memory_of_gpu_args,
            free_memory_of_gpu,
        ),
        _entry(
            uapi.AMDKFD_IOC_MAP_MEMORY_TO_GPU,
            uapi.kfd_ioctl_map_memory_to_gpu_args,
            map_memory_to_gpu,
        ),
        _entry(
            uapi.AMDKFD_IOC_UNMAP_MEMORY_FROM_GPU,
            uapi.kfd_ioctl_unmap_memory_from_gpu_args,
            unmap_memory_from_gpu,
        ),
        _entry(uapi.AMDKFD_IOC_SET_CU_MASK, uapi.kfd_ioctl_set_cu_mask_args, set_cu_mask),
        _entry(
            uapi.AMDKFD_IOC_GET_DMABUF_INFO, uapi.kfd_ioctl_get_dmabuf_info_args, get_dmabuf_info
        ),
        _entry(uapi.AMDKFD_IOC_IMPORT_DMABUF, uapi.kfd_ioctl_import_dmabuf_args, import_dmabuf),
        _entry(
            uapi.AMDKFD_IOC_ALLOC_QUEUE_GWS,
            uapi.kfd_ioctl_alloc_queue_gws_args,
            _refused(errno.ENODEV),
        ),
        # built without CONFIG_HSA_AMD_SVM
        _entry(uapi.AMDKFD_IOC_SVM, uapi.kfd_ioctl_svm_args, _refused(errno.EPERM)),
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
        _entry(uapi.AMDKFD_IOC_EXPORT_DMABUF, uapi.kfd_ioctl_export_dmabuf_args, export_dmabuf),
    ]
)
