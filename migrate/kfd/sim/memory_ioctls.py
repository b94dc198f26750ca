"""The ioctls that make, map and share memory, after kfd_chardev.c of Linux 6.1."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from typing import TYPE_CHECKING, Any

from migrate.kfd import uapi
from migrate.kfd.sim.memory import PAGE, Backing, Bo, page_align
from migrate.kfd.sim.process import DOORBELL_SLICE, DeviceData, SimProcess, bo_by_handle, error

if TYPE_CHECKING:
    from migrate.kfd.sim.device import Gpu, Host

MEM = uapi.KFD_IOC_ALLOC_MEM_FLAGS_VRAM
GTT = uapi.KFD_IOC_ALLOC_MEM_FLAGS_GTT
USERPTR = uapi.KFD_IOC_ALLOC_MEM_FLAGS_USERPTR
DOORBELL = uapi.KFD_IOC_ALLOC_MEM_FLAGS_DOORBELL
MMIO = uapi.KFD_IOC_ALLOC_MEM_FLAGS_MMIO_REMAP
AQL = uapi.KFD_IOC_ALLOC_MEM_FLAGS_AQL_QUEUE_MEM
ANY_GPU = 12  # interface minor since which a dmabuf may be imported on another GPU


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
    host.init_vm(device, file, process.pid)


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
        backing = host.allocate_vram(gpu, length)
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
    found = [
        bo
        for process in (*host.processes.values(), *host.pinned)
        for device in process.devices
        for bo in device.handles.values()
        if bo.backing is not None and bo.backing.inode == inode
    ]
    if not found:
        raise error(errno.EINVAL)
    return min(found, key=lambda bo: bo.imported)


def get_dmabuf_info(host: Host, process: SimProcess, args: Any) -> None:
    """GET_DMABUF_INFO."""
    bo = _dmabuf(host, args.dmabuf_fd)
    args.size = bo.size
    args.metadata_size = 0
    args.gpu_id = bo.owner.gpu.gpu_id
    args.flags = bo.flags & (MEM | GTT | uapi.KFD_IOC_ALLOC_MEM_FLAGS_PUBLIC)


def import_dmabuf(host: Host, process: SimProcess, args: Any) -> None:
    """IMPORT_DMABUF: another handle of the same buffer, at the same offset of its node.

    On another GPU EINVAL (amdgpu_amdkfd_gpuvm_import_dmabuf of Linux 6.1). Since interface
    1.12 that GPU has a BO of its own for the buffer, in the GTT domain
    (amdgpu_dma_buf_create_obj).
    """
    source = _dmabuf(host, args.dmabuf_fd)
    device = process.device(args.gpu_id).bound()
    here = device.gpu is source.owner.gpu
    if not here and host.interface_minor < ANY_GPU:
        raise error(errno.EINVAL)
    domain = source.flags & (MEM | GTT) if here else GTT
    flags = domain | (
        uapi.KFD_IOC_ALLOC_MEM_FLAGS_WRITABLE | uapi.KFD_IOC_ALLOC_MEM_FLAGS_EXECUTABLE
    )
    bo = Bo(
        *(device, args.va_addr, source.size, flags, source.mmap_offset, source.backing),
        imported=True,
    )
    assert bo.backing is not None
    if here:
        bo.backing.users += 1
    else:
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
