"""Mapping and eviction of queues, after kfd_device_queue_manager.c (cpsch) of Linux 6.1."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from migrate.kfd.sim.engine import Engine
from migrate.kfd.sim.faults import Fault

if TYPE_CHECKING:
    from migrate.kfd.sim.device import Gpu, Host
    from migrate.kfd.sim.process import DeviceData, SimProcess


def execute_queues(host: Host, gpu: Gpu) -> None:
    """execute_queues_cpsch(): unmap all, map what is active.

    Raises OSError: ETIME if the scheduler hangs now, EIO ever after.
    """
    if gpu.hws_hang:
        raise _error(errno.EIO)
    if host.faults.peek(Fault.SCHEDULER_HANG) in {0, 1, gpu.gpu_id}:
        host.faults.spend(Fault.SCHEDULER_HANG)
        raise _hang(host, gpu)
    if gpu.engine is None:
        gpu.engine = Engine(host, gpu)
        gpu.engine.start()
    gpu.engine.kick()


def _hang(host: Host, gpu: Gpu) -> OSError:
    gpu.hws_hang = True
    host.log(f"gpu {gpu.gpu_id:#x}: The cp might be in an unrecoverable state")
    return _error(errno.ETIME)


def evict_device(host: Host, device: DeviceData) -> None:
    """evict_process_queues_cpsch(): nothing of the process runs there afterwards.

    Raises OSError: ETIME, EIO.
    """
    device.evicted += 1
    if device.evicted > 1:
        return
    if device.gpu.hws_hang:
        raise _error(errno.EIO)
    if not device.queues:
        return
    execute_queues(host, device.gpu)
    host.wait_engines(device.process)
    for queue in device.queues:
        queue.evictions += 1
        if queue.running is None:
            continue
        if not queue.can_preempt_waves:  # and the wave never ends by itself
            raise _hang(host, device.gpu)
        queue.saved_state = queue.running.save()
        queue.running = None
    for bo in device.handles.values():
        if bo.backing is not None:
            bo.backing.forget_window()


def restore_device(host: Host, device: DeviceData) -> None:
    """restore_process_queues_cpsch(). Raises OSError(EIO); without a VM the kernel oopses."""
    if device.drm_file is None:
        raise host.oops(f"restore_process_queues_cpsch: gpu {device.gpu.gpu_id:#x} has no VM")
    if device.evicted == 0:
        return
    if device.evicted > 1:
        device.evicted -= 1
        return
    device.evicted = 0
    for queue in device.queues:
        queue.idle = False  # the hardware reads the write pointer anew
    if device.queues:
        execute_queues(host, device.gpu)


def evict(host: Host, process: SimProcess) -> None:
    """kfd_process_evict_queues(). Raises OSError, after undoing a partial eviction."""
    done: list[DeviceData] = []
    error: OSError | None = None
    for device in process.devices:
        error = None
        try:
            evict_device(host, device)
        except OSError as failure:
            error = failure
            if failure.errno != errno.EIO:
                for other in process.devices[: len(done)]:
                    _restore_quietly(host, other)
                raise
        done.append(device)
    if error is not None:
        raise error


def restore(host: Host, process: SimProcess) -> None:
    """kfd_process_restore_queues(): all of them; raises the first OSError."""
    error: OSError | None = None
    for device in process.devices:
        try:
            restore_device(host, device)
        except OSError as failure:
            if host.broken:
                raise
            error = error or failure
    if error is not None:
        raise error


def _restore_quietly(host: Host, device: DeviceData) -> None:
    try:
        restore_device(host, device)
    except OSError:
        host.log("Failed to restore queues")


def _error(number: int) -> OSError:
    return OSError(number, os.strerror(number))
