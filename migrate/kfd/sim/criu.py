"""AMDKFD_IOC_CRIU_OP and its RESUME, after kfd_chardev.c of Linux 6.1."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from migrate.kfd import uapi
from migrate.kfd.sim import callers, scheduler, svm
from migrate.kfd.sim.criu_dump import checkpoint, process_info, unpause
from migrate.kfd.sim.criu_restore import restore
from migrate.kfd.sim.faults import Fault
from migrate.kfd.sim.process import SimProcess, error

if TYPE_CHECKING:
    from migrate.kfd.sim.device import Host

RESUME_DELAY = 0.002  # seconds until the worker that RESUME schedules has run


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


def resume(host: Host, process: SimProcess, caller: callers.Caller, args: Any) -> None:
    """criu_resume(): says 0 once a worker is scheduled; the queues start later."""
    target = _find(host, caller, args.pid)
    if target is None:
        raise error(errno.ESRCH)
    svm.resume(target)
    if not target.has_vm:
        raise host.oops(f"amdgpu_amdkfd_criu_resume: process {target.pid} has no VM")
    if not target.block_mmu_notifications:
        raise error(errno.EINVAL)
    target.block_mmu_notifications = False
    if host.faults.strike(Fault.RESUME_DEAD):
        return
    worker = threading.Timer(RESUME_DELAY, _resume_worker, (host, target))
    worker.daemon = True
    worker.start()


def _find(host: Host, caller: callers.Caller, pid: int) -> SimProcess | None:
    for number, target in host.processes.items():
        if not target.dead and callers.pid_as_seen_by(caller.pid, number) == pid:
            return target
    return None


def _resume_worker(host: Host, target: SimProcess) -> None:
    """amdgpu_amdkfd_restore_userptr_worker(): starts the queues of whoever made the VM.

    That is a tracer, if it made the RESTORE through a stolen file. Then the process's own
    queues never start; the tracer's do, if it has KFD state itself, and if it has that
    without a VM, the kernel follows a NULL pointer.
    """
    with host.lock:
        assert target.vm_maker is not None
        pid, start = target.vm_maker
        process = host.processes.get(pid)
        if process is None or process.start_time != start or process.dead or host.broken:
            return
        try:
            scheduler.restore(host, process)
        except OSError as failure:
            host.log(f"process {process.pid}: queues could not be resumed: {failure}")
