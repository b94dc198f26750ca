"""Raw CRIU operations, for tests that give the driver what our own code never would."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from dataclasses import dataclass, field

from migrate.kfd import uapi
from migrate.kfd.file import KfdFile
from tests.conformance.kit import GTT, VRAM

INVALID = uapi.KFD_INVALID_FD


@dataclass
class Image:
    """A checkpointed process: buckets and private data as the driver wrote them."""

    devices: list[tuple[int, int]]  # (user_gpu_id, actual_gpu_id)
    bos: list[bytes]  # kfd_criu_bo_bucket
    priv_data: bytes
    num_objects: int
    contents: list[bytes | None] = field(default_factory=list)

    def bo(self, index: int) -> uapi.kfd_criu_bo_bucket:
        """A copy of a bucket."""
        return uapi.kfd_criu_bo_bucket.from_buffer_copy(self.bos[index])


def criu(file: KfdFile, op: int, **fields: int) -> uapi.kfd_ioctl_criu_args:
    """One operation; the argument afterwards. Raises OSError."""
    args = uapi.kfd_ioctl_criu_args(op=op, **fields)
    file.ioctl(uapi.AMDKFD_IOC_CRIU_OP, args)
    return args


def errno_of(file: KfdFile, op: int, **fields: int) -> int:
    """errno of one operation, 0 if it worked."""
    try:
        criu(file, op, **fields)
    except OSError as error:
        return error.errno or errno.EIO
    return 0


def process_info(file: KfdFile) -> uapi.kfd_ioctl_criu_args:
    """PROCESS_INFO: the counts."""
    return criu(file, uapi.KFD_CRIU_OP_PROCESS_INFO)


def unpause(file: KfdFile) -> None:
    """UNPAUSE."""
    criu(file, uapi.KFD_CRIU_OP_UNPAUSE)


def resume(file: KfdFile, pid: int) -> None:
    """RESUME."""
    criu(file, uapi.KFD_CRIU_OP_RESUME, pid=pid)


class Buffers:
    """Room for a CHECKPOINT, and the fields that say so."""

    def __init__(self, counts: uapi.kfd_ioctl_criu_args) -> None:
        self.devices = (uapi.kfd_criu_device_bucket * counts.num_devices)()
        self.bos = (uapi.kfd_criu_bo_bucket * counts.num_bos)()
        self.priv_data = ctypes.create_string_buffer(counts.priv_data_size)
        for bucket in self.bos:
            bucket.dmabuf_fd = INVALID
        self.fields = {
            "devices": ctypes.addressof(self.devices),
            "bos": ctypes.addressof(self.bos),
            "priv_data": ctypes.addressof(self.priv_data),
            "priv_data_size": counts.priv_data_size,
            "num_devices": counts.num_devices,
            "num_bos": counts.num_bos,
            "num_objects": counts.num_objects,
        }

    def close(self) -> None:
        """Close the dmabufs."""
        for bucket in self.bos:
            if bucket.dmabuf_fd != INVALID:
                os.close(bucket.dmabuf_fd)
                bucket.dmabuf_fd = INVALID


def checkpoint(file: KfdFile, counts: uapi.kfd_ioctl_criu_args) -> Image:
    """CHECKPOINT of a paused process, with the contents of its BOs."""
    buffers = Buffers(counts)
    criu(file, uapi.KFD_CRIU_OP_CHECKPOINT, **buffers.fields)
    try:
        contents = [
            read_dmabuf(bucket.dmabuf_fd, bucket.size) if bucket.dmabuf_fd != INVALID else None
            for bucket in buffers.bos
        ]
    finally:
        buffers.close()
    return Image(
        devices=[(bucket.user_gpu_id, bucket.actual_gpu_id) for bucket in buffers.devices],
        bos=[bytes(bucket) for bucket in buffers.bos],
        priv_data=buffers.priv_data.raw,
        num_objects=counts.num_objects,
        contents=contents,
    )


def dump(file: KfdFile) -> Image:
    """PROCESS_INFO, CHECKPOINT, UNPAUSE."""
    counts = process_info(file)
    try:
        return checkpoint(file, counts)
    finally:
        unpause(file)


def read_dmabuf(fd: int, size: int) -> bytes:
    """What is in a BO."""
    with mmap.mmap(fd, size) as memory:
        return memory[:]


def write_dmabuf(fd: int, data: bytes) -> None:
    """Fill a BO."""
    with mmap.mmap(fd, len(data)) as memory:
        memory[:] = data


@dataclass
class Restored:
    """Offsets and dmabufs by BO."""

    offsets: list[int]
    dmabufs: list[int]
    devices: list[tuple[int, int]]

    def close(self) -> None:
        """Close the dmabufs."""
        for fd in self.dmabufs:
            if fd != INVALID:
                os.close(fd)
        self.dmabufs = []


class RestoreRefused(OSError):
    """RESTORE's errno; ``left`` dmabuf fds it had left open (they are closed now)."""

    left = 0


def restore(file: KfdFile, image: Image, drm_fds: list[int], **changed: int) -> Restored:
    """RESTORE *image* as it stands, device by device with *drm_fds*; fills the BOs.

    *changed* overrides fields of the argument. Raises RestoreRefused.
    """
    devices = (uapi.kfd_criu_device_bucket * max(1, len(image.devices)))()
    for index, (user, actual) in enumerate(image.devices):
        devices[index] = uapi.kfd_criu_device_bucket(user, actual, drm_fds[index], 0)
    bos = (uapi.kfd_criu_bo_bucket * max(1, len(image.bos)))()
    for index in range(len(image.bos)):
        bos[index] = image.bo(index)
        bos[index].dmabuf_fd = INVALID
    priv_data = ctypes.create_string_buffer(image.priv_data, len(image.priv_data))
    fields = {
        "devices": ctypes.addressof(devices),
        "bos": ctypes.addressof(bos),
        "priv_data": ctypes.addressof(priv_data),
        "priv_data_size": len(image.priv_data),
        "num_devices": len(image.devices),
        "num_bos": len(image.bos),
        "num_objects": image.num_objects,
    }
    fields.update(changed)
    done = [bos[index] for index in range(len(image.bos))]
    try:
        criu(file, uapi.KFD_CRIU_OP_RESTORE, **fields)
    except OSError as error:
        refused = RestoreRefused(error.errno, error.strerror)
        for bucket in done:
            if bucket.dmabuf_fd != INVALID:
                os.close(bucket.dmabuf_fd)
                refused.left += 1
        raise refused from error
    for bucket, data in zip(done, image.contents, strict=False):
        if data is not None and bucket.dmabuf_fd != INVALID:
            write_dmabuf(bucket.dmabuf_fd, data)
    return Restored(
        offsets=[bucket.restored_offset for bucket in done],
        dmabufs=[bucket.dmabuf_fd for bucket in done],
        devices=image.devices,
    )


def has_contents(bucket: uapi.kfd_criu_bo_bucket) -> bool:
    """Whether the driver gives a dmabuf fd for it."""
    return bool(bucket.alloc_flags & (VRAM | GTT))
