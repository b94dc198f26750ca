"""A ``KfdFile`` in this process: a small, strict CRIU side of the driver.

It follows the pointers it is given, as the kernel does, and answers the errnos of the
real driver for the order of operations and for counts.
"""

from __future__ import annotations

import ctypes
import errno
import os

from migrate.kfd import uapi
from migrate.kfd.file import MappedMemory
from migrate.kfd.privdata import BoRecord, EventRecord, PrivateData, decode, encode
from migrate.kfd.usermem import read_memory, write_memory

GPU = 0xBEEF
PAGE = 4096
VRAM = uapi.KFD_IOC_ALLOC_MEM_FLAGS_VRAM | uapi.KFD_IOC_ALLOC_MEM_FLAGS_WRITABLE
USERPTR = uapi.KFD_IOC_ALLOC_MEM_FLAGS_USERPTR


def private(num_bos: int = 2) -> PrivateData:
    return PrivateData(
        xnack_mode=0,
        devices=(0,),
        bos=tuple(
            BoRecord(user_addr=0, idr_handle=n + 1, mapped_gpuids=(GPU,)) for n in range(num_bos)
        ),
        objects=(EventRecord(user_handle=0, event_id=1, auto_reset=1, type=0, signaled=0),),
    )


class KfdDouble:
    """One process with one GPU, a VRAM BO, and a userptr BO."""

    def __init__(self) -> None:
        self.fail: dict[int, int] = {}  # errno by operation
        self.calls: list[int] = []
        self.paused = False
        self.devices: list[tuple[int, int, int]] = []
        self.private = private()
        self.leave_fds_on_failure = False
        self.halves_aql = True
        self.visible = 1  # GPUs
        self.handed_out: list[int] = []

    def ioctl(self, request: int, arg: ctypes.Structure) -> None:
        if request == uapi.AMDKFD_IOC_GET_PROCESS_APERTURES_NEW:
            apertures = uapi.kfd_ioctl_get_process_apertures_new_args
            apertures.from_address(ctypes.addressof(arg)).num_of_nodes = self.visible
            return
        if request != uapi.AMDKFD_IOC_CRIU_OP:
            raise OSError(errno.ENOTTY, "")
        args = uapi.kfd_ioctl_criu_args.from_address(ctypes.addressof(arg))
        self.calls.append(args.op)
        operation = {
            uapi.KFD_CRIU_OP_PROCESS_INFO: self._process_info,
            uapi.KFD_CRIU_OP_CHECKPOINT: self._checkpoint,
            uapi.KFD_CRIU_OP_UNPAUSE: self._unpause,
            uapi.KFD_CRIU_OP_RESTORE: self._restore,
            uapi.KFD_CRIU_OP_RESUME: self._resume,
        }[args.op]
        if args.op in self.fail and not self.leave_fds_on_failure:
            raise OSError(self.fail[args.op], "")
        operation(args)
        if args.op in self.fail:
            raise OSError(self.fail[args.op], "")

    def open_node(self, path: str) -> int:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)

    def give_fd(self, fd: int) -> int:
        return os.dup(fd)

    def close_given(self, number: int) -> None:
        os.close(number)

    def mmap(self, offset: int, length: int, address: int | None = None) -> MappedMemory:
        raise OSError(errno.ENODEV, "")

    def fileno(self) -> int:
        return -1

    def close(self) -> None:
        pass

    def counts(self) -> tuple[int, int, int, int]:
        data = self.private
        return len(data.devices), len(data.bos), len(data.objects), len(encode(data))

    def _process_info(self, args: uapi.kfd_ioctl_criu_args) -> None:
        self.paused = True
        args.num_devices, args.num_bos, args.num_objects, args.priv_data_size = self.counts()
        args.pid = 77

    def _unpause(self, args: uapi.kfd_ioctl_criu_args) -> None:
        if not self.paused:
            raise OSError(errno.EINVAL, "")
        self.paused = False

    def _checkpoint(self, args: uapi.kfd_ioctl_criu_args) -> None:
        given = (args.num_devices, args.num_bos, args.num_objects, args.priv_data_size)
        if not self.paused or given != self.counts():
            raise OSError(errno.EINVAL, "")
        device = uapi.kfd_criu_device_bucket(user_gpu_id=GPU, actual_gpu_id=GPU + 1)
        write_memory(args.devices, bytes(device))
        write_memory(args.priv_data, encode(self.private))
        buckets = [
            uapi.kfd_criu_bo_bucket(
                addr=(n + 1) * 16 * PAGE,
                size=PAGE,
                offset=n * PAGE,
                gpu_id=GPU,
                alloc_flags=USERPTR if n else VRAM,
                dmabuf_fd=uapi.KFD_INVALID_FD if n else self._dmabuf(),
            )
            for n in range(len(self.private.bos))
        ]
        write_memory(args.bos, b"".join(bytes(bucket) for bucket in buckets))

    def _resume(self, args: uapi.kfd_ioctl_criu_args) -> None:
        pass

    def _dmabuf(self, size: int = PAGE) -> int:
        fd = os.memfd_create("dmabuf", 0)  # without CLOEXEC, as the kernel does it
        os.ftruncate(fd, size)
        self.handed_out.append(fd)
        return fd

    def _restore(self, args: uapi.kfd_ioctl_criu_args) -> None:
        decode(
            read_memory(args.priv_data, args.priv_data_size),
            args.num_devices,
            args.num_bos,
            args.num_objects,
        )
        size = ctypes.sizeof(uapi.kfd_criu_device_bucket)
        raw = read_memory(args.devices, args.num_devices * size)
        devices = (uapi.kfd_criu_device_bucket * args.num_devices).from_buffer_copy(raw)
        self.devices = [(d.user_gpu_id, d.actual_gpu_id, d.drm_fd) for d in devices]
        bos = (uapi.kfd_criu_bo_bucket * args.num_bos).from_address(args.bos)
        for n, bo in enumerate(bos):
            if bo.alloc_flags & uapi.KFD_IOC_ALLOC_MEM_FLAGS_VRAM:
                is_aql = bo.alloc_flags & uapi.KFD_IOC_ALLOC_MEM_FLAGS_AQL_QUEUE_MEM
                halved = is_aql and self.halves_aql
                bo.dmabuf_fd = self._dmabuf(bo.size // 2 if halved else bo.size)
                bo.restored_offset = (n + 5) * PAGE
