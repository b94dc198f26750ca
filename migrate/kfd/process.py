"""The five CRIU operations of one KFD process, as typed calls.

Dump:     process_info (pauses the queues) -> checkpoint -> unpause, all from the thread
          that traces the target.
Restore:  restore, run by the new process itself -> memory is written through the
          returned dmabufs -> resume, from any capable process with its own /dev/kfd.

Order and errors: kfd_chardev.c of Linux 6.1. An errno becomes a MigrateError that names
the operation.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from migrate.errors import (
    CheckpointFailed,
    KfdUnavailable,
    MigrateError,
    MissingCapability,
    NotKfdProcess,
    ObjectsChanged,
    ProcessExited,
    RestoreFailed,
    SchedulerHang,
)
from migrate.kfd import uapi
from migrate.kfd.checkpoint import (
    BoBucket,
    DeviceBucket,
    KfdCheckpoint,
    ProcessCounts,
    RestoreProof,
    check_checkpoint,
    check_counts,
    without_bos,
)
from migrate.kfd.file import KfdFile
from migrate.kfd.guards import check_drm_fds, identify, refuse_duplicates
from migrate.kfd.ioctl import (
    alloc_memory,
    free_memory,
    get_process_apertures,
    import_dmabuf,
    map_memory,
)
from migrate.kfd.marshal import close_all
from migrate.kfd.usermem import GuardedBuffer

__all__ = [
    "BoBucket",
    "Checkpointed",
    "DeviceBucket",
    "KfdCheckpoint",
    "KfdProcess",
    "ProcessCounts",
    "RestoreProof",
    "Restored",
    "resume",
]

_PAGE = 4096
_FILLER = uapi.KFD_IOC_ALLOC_MEM_FLAGS_GTT | uapi.KFD_IOC_ALLOC_MEM_FLAGS_WRITABLE

# ---------------------------------------------------------------- what is returned


class _Dmabufs:
    """dmabuf fds, one per BO that has contents; owned, close-on-exec.

    They are live, keep freed VRAM allocated, and outlive the process: close them.
    """

    def __init__(self, dmabufs: list[int | None]) -> None:
        self.dmabufs = dmabufs

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all fds; a second close does nothing. Set an item to None to keep its fd."""
        fds = [fd for fd in self.dmabufs if fd is not None]
        self.dmabufs = [None] * len(self.dmabufs)
        close_all(fds)


class Checkpointed(_Dmabufs):
    """What CHECKPOINT returned; ``dmabufs`` has an item for each of ``checkpoint.bos``."""

    def __init__(self, checkpoint: KfdCheckpoint, dmabufs: list[int | None]) -> None:
        super().__init__(dmabufs)
        self.checkpoint = checkpoint


class Restored(_Dmabufs):
    """What RESTORE returned, per BO: the offset to mmap it at (0: userptr), and its dmabuf."""

    def __init__(
        self, proof: RestoreProof, restored_offsets: tuple[int, ...], dmabufs: list[int | None]
    ) -> None:
        super().__init__(dmabufs)
        self.proof = proof
        self.restored_offsets = restored_offsets


# ---------------------------------------------------------------- operations


class KfdProcess:
    """The KFD side of one process, through a file whose ioctls act on that process.

    *pid* is the process in our pid namespace. *paused* says that the journal has a pause
    of it that was not undone. *before_pause* is called before PROCESS_INFO and may refuse
    (``guards.refuse_gpus_without_vm``).
    """

    def __init__(
        self,
        file: KfdFile,
        pid: int,
        *,
        paused: bool = False,
        before_pause: Callable[[int], None] | None = None,
    ) -> None:
        self.file = file
        self.pid = pid
        self._paused = paused
        self._before_pause = before_pause
        self._counts: ProcessCounts | None = None
        self._restore_tried = False

    @property
    def is_paused(self) -> bool:
        """Whether we paused its queues and did not undo it."""
        return self._paused

    def process_info(self) -> ProcessCounts:
        """Pause all queues and count what there is.

        Raises CheckpointFailed (also if it is paused already: a second pause and one
        UNPAUSE leave queues evicted for ever on some kernels), SchedulerHang,
        NotKfdProcess, MissingCapability, ProcessExited, GpuWithoutVm.
        """
        if self._paused:
            raise CheckpointFailed(f"PROCESS_INFO of process {self.pid}: it is paused already")
        if self._before_pause is not None:
            self._before_pause(self.pid)
        args = uapi.kfd_ioctl_criu_args(op=uapi.KFD_CRIU_OP_PROCESS_INFO)
        with self._errors("PROCESS_INFO", CheckpointFailed):
            self.file.ioctl(uapi.AMDKFD_IOC_CRIU_OP, args)
        self._paused = True
        self._counts = ProcessCounts(
            num_devices=args.num_devices,
            num_bos=args.num_bos,
            num_objects=args.num_objects,
            priv_data_size=args.priv_data_size,
            pid=args.pid,
        )
        return self._counts

    def checkpoint(self) -> Checkpointed:
        """Describe the paused process; repeatable. The caller closes the dmabufs.

        Raises CheckpointFailed (also without process_info before), ObjectsChanged if
        objects came or went since process_info: unpause then, and start again.
        """
        counts = self._counts
        if counts is None:
            raise CheckpointFailed(f"CHECKPOINT of process {self.pid} without PROCESS_INFO")
        check_counts(counts)
        with ExitStack() as stack:
            devices, bos, priv_data = (
                stack.enter_context(GuardedBuffer(length))
                for length in (
                    counts.num_devices * ctypes.sizeof(uapi.kfd_criu_device_bucket),
                    counts.num_bos * ctypes.sizeof(uapi.kfd_criu_bo_bucket),
                    counts.priv_data_size,
                )
            )
            args = uapi.kfd_ioctl_criu_args(
                devices=devices.address,
                bos=bos.address,
                priv_data=priv_data.address,
                priv_data_size=counts.priv_data_size,
                num_devices=counts.num_devices,
                num_bos=counts.num_bos,
                num_objects=counts.num_objects,
                pid=counts.pid,
                op=uapi.KFD_CRIU_OP_CHECKPOINT,
            )
            with self._errors("CHECKPOINT", CheckpointFailed, {errno.EINVAL: ObjectsChanged}):
                self.file.ioctl(uapi.AMDKFD_IOC_CRIU_OP, args)
            bo_buckets = _bo_buckets(bos)
            dmabufs = _take_dmabufs(bo_buckets)
            checkpoint = KfdCheckpoint(
                pid=counts.pid,
                devices=tuple(
                    DeviceBucket(user_gpu_id=d.user_gpu_id, actual_gpu_id=d.actual_gpu_id)
                    for d in _device_buckets(devices)
                ),
                bos=tuple(_bo(bucket) for bucket in bo_buckets),
                num_objects=counts.num_objects,
                priv_data=bytes(priv_data.view),
            )
        return Checkpointed(checkpoint, dmabufs)

    def unpause(self) -> None:
        """Let the queues run again.

        Raises CheckpointFailed, also if they were not paused; after a failure it still
        counts as paused.
        """
        args = uapi.kfd_ioctl_criu_args(op=uapi.KFD_CRIU_OP_UNPAUSE)
        with self._errors("UNPAUSE", CheckpointFailed):
            self.file.ioctl(uapi.AMDKFD_IOC_CRIU_OP, args)
        self._paused = False
        self._counts = None

    def unpause_if_paused(self) -> bool:
        """For recovery: as ``unpause``, but False if the kernel says it is not paused."""
        args = uapi.kfd_ioctl_criu_args(op=uapi.KFD_CRIU_OP_UNPAUSE)
        done = True
        with self._errors("UNPAUSE", CheckpointFailed):
            try:
                self.file.ioctl(uapi.AMDKFD_IOC_CRIU_OP, args)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                done = False
        self._paused = False
        self._counts = None
        return done

    def restore(
        self,
        checkpoint: KfdCheckpoint,
        gpu_map: Mapping[int, int],
        drm_fds: Mapping[int, int],
        render_minors: Mapping[int, int],
        left_out: Collection[int] = (),
    ) -> Restored:
        """Make all BOs, queues and events in the new process; queues stay stopped.

        *gpu_map*: new actual gpu_id by the checkpoint's actual gpu_id. *drm_fds*: an open
        render node by new actual gpu_id, numbers in the process where the ioctl runs.
        *render_minors*: what the topology says of them. *left_out*: indices of BOs that are
        made by ``share`` afterwards; they have neither offset nor dmabuf in the result.
        *checkpoint* comes from a peer and is checked whole before the kernel sees it.

        Raises RestoreFailed, MissingCapability, ProcessExited. After a refusal by the
        kernel the process is of no use any more; a second attempt is refused here. No fd
        is left open: the kernel leaves the BOs' dmabufs if it fails after them.
        """
        check_checkpoint(checkpoint)
        devices = _new_devices(checkpoint, gpu_map, drm_fds)
        check_drm_fds(self.pid, {gpu: drm_fds[gpu] for _, gpu, _ in devices}, render_minors)
        proof = RestoreProof(process=identify(self.pid))
        made = without_bos(checkpoint, left_out)
        if self._restore_tried:
            raise RestoreFailed(f"RESTORE of process {self.pid} a second time")
        self._restore_tried = True
        with ExitStack() as stack:
            device_array = (uapi.kfd_criu_device_bucket * len(devices))(
                *(uapi.kfd_criu_device_bucket(*device) for device in devices)
            )
            bo_array = (uapi.kfd_criu_bo_bucket * len(made.bos))(*(_bucket(bo) for bo in made.bos))
            priv_data = stack.enter_context(GuardedBuffer(len(made.priv_data)))
            priv_data.view[:] = made.priv_data
            args = uapi.kfd_ioctl_criu_args(
                devices=ctypes.addressof(device_array),
                bos=ctypes.addressof(bo_array),
                priv_data=priv_data.address,
                priv_data_size=len(made.priv_data),
                num_devices=len(devices),
                num_bos=len(made.bos),
                num_objects=made.num_objects,
                op=uapi.KFD_CRIU_OP_RESTORE,
            )
            try:
                with self._errors("RESTORE", RestoreFailed):
                    self.file.ioctl(uapi.AMDKFD_IOC_CRIU_OP, args)
            except MigrateError as error:
                _close_leftovers(bo_array)
                self._refuse_other_gpus(len(devices), error)
                raise
            dmabufs = _take_dmabufs(list(bo_array))
            offsets = tuple(bucket.restored_offset for bucket in bo_array)
            restored = Restored(proof, offsets, dmabufs)
            try:
                _check_sizes(self.pid, made, dmabufs)
            except MigrateError:
                restored.close()
                raise
        return _in_place(restored, len(checkpoint.bos), left_out)

    def share(self, checkpoint: KfdCheckpoint, dmabufs: Mapping[int, int]) -> None:
        """Make the BOs that RESTORE left out: imports of *dmabufs*, under their old handles.

        *dmabufs*: an fd of this process by bucket index. To be called between RESTORE and
        RESUME, when nothing else of the process asks for handles.

        Raises RestoreFailed, ProcessExited; then the process is of no use any more.
        """
        private = checkpoint.private()
        wanted: dict[int, list[tuple[int, int]]] = defaultdict(list)  # GPU: (handle, index)
        for index in dmabufs:
            wanted[checkpoint.bos[index].gpu_id].append((private.bos[index].idr_handle, index))
        with ExitStack() as given, self._errors("IMPORT_DMABUF", RestoreFailed):
            numbers = {fd: self.file.give_fd(fd) for fd in dict.fromkeys(dmabufs.values())}
            for number in numbers.values():
                given.callback(self.file.close_given, number)
            for gpu_id, places in wanted.items():
                self._import(gpu_id, checkpoint, sorted(places), dmabufs, numbers)
        # Nothing was mapped so far: freeing a BO takes the process's eviction fence from it.
        with self._errors("MAP_MEMORY_TO_GPU", RestoreFailed):
            for gpu_id, places in wanted.items():
                for handle, index in places:
                    gpus = private.bos[index].mapped_gpuids
                    if gpus:
                        map_memory(self.file, uapi.MAKE_HANDLE(gpu_id, handle), gpus)

    def _import(
        self,
        gpu_id: int,
        checkpoint: KfdCheckpoint,
        places: list[tuple[int, int]],
        dmabufs: Mapping[int, int],
        numbers: Mapping[int, int],
    ) -> None:
        """Import at each of *places* (handle and bucket index, ascending) of one GPU.

        IMPORT_DMABUF takes no handle: it gives the lowest that is free (idr_alloc() from 0
        in kfd_process_device_create_obj_handle()). So the lower ones are taken by a page
        each until all imports have theirs.
        """
        fillers: list[int] = []
        for handle, index in places:
            address = checkpoint.bos[index].addr
            while True:
                filler = alloc_memory(self.file, gpu_id, address, _PAGE, _FILLER).handle
                if uapi.GET_IDR_HANDLE(filler) >= handle:
                    break
                fillers.append(filler)
            free_memory(self.file, filler)
            got = import_dmabuf(self.file, gpu_id, address, numbers[dmabufs[index]])
            if got != uapi.MAKE_HANDLE(gpu_id, handle):
                raise RestoreFailed(
                    f"IMPORT_DMABUF of process {self.pid}: the BO at {address:#x} has the handle"
                    f" {uapi.GET_IDR_HANDLE(got)}, not {handle}"
                )
        for filler in fillers:
            free_memory(self.file, filler)

    def _refuse_other_gpus(self, wanted: int, error: MigrateError) -> None:
        """Why RESTORE may have failed: it says EINVAL unless it restores all visible GPUs."""
        try:
            seen = len(get_process_apertures(self.file))
        except OSError:
            return
        if seen != wanted:
            raise RestoreFailed(
                f"RESTORE of process {self.pid}: {seen} GPUs are visible to it, {wanted} were to"
                " the one that was checkpointed"
            ) from error

    @contextmanager
    def _errors(
        self,
        operation: str,
        kind: type[MigrateError],
        special: Mapping[int, type[MigrateError]] | None = None,
    ) -> Iterator[None]:
        """Turn the kernel's errno into a MigrateError."""
        try:
            yield
        except OSError as error:
            raise _failure(operation, self.pid, error, kind, special or {}) from error


def resume(kfd: KfdFile, pid: int, proof: RestoreProof) -> bool:
    """Let the queues of a restored process run; False if they had been let before.

    *pid* is in the namespace of the caller of the ioctl. 0 from the kernel means that a
    worker was scheduled: queues start later. Without *proof* it is never sent: RESUME of
    a process that has no VM oopses the kernel.

    Raises RestoreFailed, ProcessExited, MissingCapability.
    """
    if proof.process.pid != pid:
        raise RestoreFailed(f"RESUME of process {pid}: RESTORE was seen of {proof.process.pid}")
    if _is_gone(pid):
        raise ProcessExited(f"RESUME of process {pid}: it is gone")
    if identify(pid) != proof.process:
        raise ProcessExited(f"RESUME of process {pid}: another process has this pid now")
    args = uapi.kfd_ioctl_criu_args(op=uapi.KFD_CRIU_OP_RESUME, pid=pid)
    try:
        kfd.ioctl(uapi.AMDKFD_IOC_CRIU_OP, args)
    except OSError as error:
        if error.errno == errno.EINVAL:  # restored it was, so it was resumed
            return False
        gone = {errno.ESRCH: ProcessExited}
        raise _failure("RESUME", pid, error, RestoreFailed, gone) from error
    return True


_ERRORS: dict[int, type[MigrateError]] = {
    errno.EACCES: MissingCapability,
    errno.ENOTTY: KfdUnavailable,
    errno.ETIME: SchedulerHang,
}


def _failure(
    operation: str,
    pid: int,
    error: OSError,
    kind: type[MigrateError],
    special: Mapping[int, type[MigrateError]],
) -> MigrateError:
    number = error.errno or errno.EIO
    if isinstance(error, ConnectionError):  # no errno of the kernel: a RemoteFile's peer is gone
        return (ProcessExited if _is_gone(pid) else kind)(f"{operation} of process {pid}: {error}")
    if number in special:
        kind = special[number]
    elif operation == "PROCESS_INFO" and number == errno.ENODEV:
        kind = NotKfdProcess
    elif number == errno.EBADF and _is_gone(pid):
        kind = ProcessExited
    elif number in _ERRORS:
        kind = _ERRORS[number]
    name = errno.errorcode.get(number, str(number))
    return kind(f"{operation} of process {pid}: {name} ({os.strerror(number)})")


def _is_gone(pid: int) -> bool:
    """Whether it does not exist or is a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


# ---------------------------------------------------------------- structs and values


def _device_buckets(buffer: GuardedBuffer) -> list[uapi.kfd_criu_device_bucket]:
    size = ctypes.sizeof(uapi.kfd_criu_device_bucket)
    array = (uapi.kfd_criu_device_bucket * (len(buffer.view) // size)).from_buffer_copy(buffer.view)
    return list(array)


def _bo_buckets(buffer: GuardedBuffer) -> list[uapi.kfd_criu_bo_bucket]:
    size = ctypes.sizeof(uapi.kfd_criu_bo_bucket)
    array = (uapi.kfd_criu_bo_bucket * (len(buffer.view) // size)).from_buffer_copy(buffer.view)
    return list(array)


def _take_dmabufs(buckets: list[uapi.kfd_criu_bo_bucket]) -> list[int | None]:
    """The dmabuf fds, made close-on-exec: the kernel hands them out without."""
    dmabufs = [None if b.dmabuf_fd == uapi.KFD_INVALID_FD else int(b.dmabuf_fd) for b in buckets]
    for fd in dmabufs:
        if fd is not None:
            os.set_inheritable(fd, False)
    return dmabufs


def _in_place(restored: Restored, count: int, left_out: Collection[int]) -> Restored:
    """The same, with an item for each of *count* BOs: nothing where one was left out."""
    kept = (index for index in range(count) if index not in left_out)
    offsets, dmabufs = [0] * count, [None] * count  # type: tuple[list[int], list[int | None]]
    for index, offset, fd in zip(kept, restored.restored_offsets, restored.dmabufs, strict=True):
        offsets[index], dmabufs[index] = offset, fd
    return Restored(restored.proof, tuple(offsets), dmabufs)


def _close_leftovers(buckets: ctypes.Array[uapi.kfd_criu_bo_bucket]) -> None:
    """RESTORE leaves dmabufs open if it fails at queues or events (criu_restore)."""
    close_all([b.dmabuf_fd for b in buckets if b.dmabuf_fd != uapi.KFD_INVALID_FD])


def _bo(bucket: uapi.kfd_criu_bo_bucket) -> BoBucket:
    return BoBucket(
        addr=bucket.addr,
        size=bucket.size,
        offset=bucket.offset,
        restored_offset=bucket.restored_offset,
        gpu_id=bucket.gpu_id,
        alloc_flags=bucket.alloc_flags,
    )


def _bucket(bo: BoBucket) -> uapi.kfd_criu_bo_bucket:
    return uapi.kfd_criu_bo_bucket(
        addr=bo.addr,
        size=_asked_size(bo),
        offset=bo.offset,
        gpu_id=bo.gpu_id,
        alloc_flags=bo.alloc_flags,
        dmabuf_fd=uapi.KFD_INVALID_FD,
    )


def _asked_size(bo: BoBucket) -> int:
    """What RESTORE must be asked for to make a BO of ``bo.size`` bytes.

    The memory of an AQL queue (KFD_IOC_ALLOC_MEM_FLAGS_AQL_QUEUE_MEM) is mapped twice in
    a row, so the driver takes half of what it is asked for. CHECKPOINT tells that half
    (amdgpu_bo_size()), and RESTORE takes it for a request and halves it again
    (amdgpu_amdkfd_gpuvm_alloc_memory_of_gpu(), Linux 6.1): rings would shrink with
    every move, and the GPU would fault at their upper half.
    """
    is_aql = bo.alloc_flags & uapi.KFD_IOC_ALLOC_MEM_FLAGS_AQL_QUEUE_MEM
    return bo.size * 2 if is_aql else bo.size


def _check_sizes(pid: int, checkpoint: KfdCheckpoint, dmabufs: list[int | None]) -> None:
    """Refuse a copy whose BOs have other sizes than at the source. Raises RestoreFailed."""
    for bo, fd in zip(checkpoint.bos, dmabufs, strict=True):
        size = bo.size if fd is None else os.lseek(fd, 0, os.SEEK_END)
        if size != bo.size:
            raise RestoreFailed(
                f"RESTORE of process {pid}: the BO at {bo.addr:#x} has {size} bytes, not {bo.size}"
            )


def _new_devices(
    checkpoint: KfdCheckpoint, gpu_map: Mapping[int, int], drm_fds: Mapping[int, int]
) -> list[tuple[int, int, int]]:
    """(user_gpu_id, new actual_gpu_id, drm_fd) of each device."""
    devices = []
    for device in checkpoint.devices:
        actual = gpu_map.get(device.actual_gpu_id)
        if actual is None:
            raise RestoreFailed(f"GPU {device.actual_gpu_id} is not in the GPU map")
        if actual not in drm_fds:
            raise RestoreFailed(f"no render node was opened for GPU {actual}")
        devices.append((device.user_gpu_id, actual, drm_fds[actual]))
    refuse_duplicates("destination GPU", (actual for _, actual, _ in devices))
    return devices
