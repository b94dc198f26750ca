"""The simulated GPU's command processor: one thread a GPU, which runs the queues' packets.

A packet is run with the engine's ``busy`` set to its queue and the node's lock released;
everything that must not race with GPU work (eviction, the end of a process) waits until
``busy`` is another queue. So work always stops at a packet boundary, and kernels that
may run for ever stop between two of their steps.
"""

from __future__ import annotations

import struct
import threading
import time
from typing import TYPE_CHECKING

import numpy as np

from migrate.kfd import uapi
from migrate.kfd.sim import kernels
from migrate.kfd.sim.aql import (
    PACKET_SIZE,
    PacketType,
    amd_signal,
    barrier_and_packet,
    kernel_dispatch_packet,
)
from migrate.kfd.sim.memory import GpuFault
from migrate.kfd.sim.queues import Queue, QueueFormat, QueueType

if TYPE_CHECKING:
    from migrate.kfd.sim.device import Gpu, Host
    from migrate.kfd.sim.process import SimProcess

POLL_BUSY = 0.0002  # seconds between looks at the doorbells while there was work lately
POLL_STEPPING = 0.001  # between two steps of kernels that run for ever, while others are run
POLL_IDLE = 0.005
POLL_ASLEEP = 0.02
SOON = 0.01
LATELY = 0.05
LONG_AGO = 2.0
PACKETS_AT_ONCE = 64  # of one queue, before another one's turn


class Engine(threading.Thread):
    """The command processor of one GPU."""

    def __init__(self, host: Host, gpu: Gpu) -> None:
        super().__init__(name=f"gpu-{gpu.gpu_id:x}", daemon=True)
        self._host = host
        self._gpu = gpu
        self._work = threading.Condition(host.lock)
        self._busy: Queue | None = None
        self._last_work = 0.0
        self._ended = False

    # ------------------------------------------------------------ called under the lock

    def kick(self) -> None:
        """Queues were made or mapped."""
        self._work.notify()

    def works_for(self, process: SimProcess) -> bool:
        """Whether a packet of *process* is being run at this moment."""
        return self._busy is not None and self._busy.owner.process is process

    def stop(self) -> None:
        """End the thread."""
        self._ended = True
        self._work.notify()

    # ------------------------------------------------------------ the thread

    def run(self) -> None:
        """Until stopped."""
        while True:
            with self._host.lock:
                if self._ended:
                    return
                queues = self._mapped_queues()
                if not queues:
                    self._work.wait()
                    continue
            stepping = False
            for queue in queues:
                if self._wants_look(queue):
                    stepping |= self._serve(queue)
            self._pause(stepping)

    def _pause(self, stepping: bool) -> None:
        lately = time.monotonic() - self._last_work
        if lately < POLL_BUSY:
            return
        if stepping:
            time.sleep(POLL_STEPPING if lately < SOON else POLL_IDLE)
        else:
            asleep = POLL_IDLE if lately < LONG_AGO else POLL_ASLEEP
            time.sleep(POLL_BUSY if lately < LATELY else asleep)

    def _mapped_queues(self) -> list[Queue]:
        if self._gpu.hws_hang:
            return []
        found = []
        for process in (*self._host.processes.values(), *self._host.pinned):
            device = process.device_on(self._gpu)
            if device is not None:
                found += [queue for queue in device.queues if self._is_runnable(queue)]
        return found

    def _is_runnable(self, queue: Queue) -> bool:
        return (
            queue.is_active
            and not queue.stopped
            and queue.kind == QueueType.COMPUTE
            and queue.format == QueueFormat.AQL
            and queue in queue.owner.queues
            and not self._gpu.hws_hang
        )

    @staticmethod
    def _wants_look(queue: Queue) -> bool:
        return not queue.idle or queue.owner.read_doorbell(queue) != queue.seen_doorbell

    def _serve(self, queue: Queue) -> bool:
        """Run packets of *queue*; True if a kernel of it goes on."""
        for _ in range(PACKETS_AT_ONCE):
            with self._host.lock:
                if not self._is_runnable(queue):
                    return False
                self._busy = queue
            try:
                finished = self._run_packet(queue)
            except GpuFault as fault:
                self._stop_queue(queue, fault)
                return False
            except Exception as error:  # IllegalInstruction, or a bug of ours
                self._stop_queue(queue, error)
                return False
            finally:
                with self._host.lock:
                    self._busy = None
                    self._host.engines.notify_all()
            if not finished:
                return not queue.idle
            self._last_work = time.monotonic()
        return False

    # ------------------------------------------------------------ packets

    def _run_packet(self, queue: Queue) -> bool:
        """Look at the packet at the read pointer; True if it was finished."""
        memory = queue.owner.memory
        if queue.running is None:
            queue.seen_doorbell = queue.owner.read_doorbell(queue)
            queue.idle = memory.load_u64(queue.write_pointer) <= queue.read_index
            if queue.idle:
                return False
        slot = queue.read_index % (queue.ring_size // PACKET_SIZE)
        address = queue.ring_address + slot * PACKET_SIZE
        raw = memory.read(address, PACKET_SIZE).tobytes()
        kind = raw[0]
        if kind == PacketType.INVALID:
            return False  # the header is written last: wait for it
        if not self._execute(queue, kind, raw):
            return False
        (completion,) = struct.unpack_from("<Q", raw, PACKET_SIZE - 8)
        queue.running = None
        queue.saved_state = None
        memory.write(address, _INVALID_HEADER)
        queue.read_index += 1
        memory.store_u64(queue.read_pointer, queue.read_index)
        if completion:
            self._complete(queue, completion)
        return True

    def _execute(self, queue: Queue, kind: int, raw: bytes) -> bool:
        if kind == PacketType.KERNEL_DISPATCH:
            return self._dispatch(queue, kernel_dispatch_packet.from_buffer_copy(raw))
        if kind in {PacketType.BARRIER_AND, PacketType.BARRIER_OR}:
            return self._barrier(queue, kind, barrier_and_packet.from_buffer_copy(raw))
        if kind == PacketType.VENDOR_SPECIFIC:
            return True
        raise kernels.IllegalInstruction(f"packet type {kind}")

    def _dispatch(self, queue: Queue, packet: kernel_dispatch_packet) -> bool:
        if queue.running is None:
            queue.running = kernels.start(
                queue.owner.memory, packet.kernel_object, packet.kernarg_address, queue.saved_state
            )
            queue.saved_state = None
        return queue.running is None or queue.running.step()

    @staticmethod
    def _barrier(queue: Queue, kind: int, packet: barrier_and_packet) -> bool:
        memory = queue.owner.memory
        values = [memory.load_u64(signal + _VALUE) for signal in packet.dep_signal if signal]
        if kind == PacketType.BARRIER_AND:
            return not any(values)
        return not values or not all(values)

    def _complete(self, queue: Queue, completion: int) -> None:
        memory = queue.owner.memory
        signal_ = memory.load_struct(completion, amd_signal)
        memory.store_u64(completion + _VALUE, signal_.value - 1)
        if signal_.event_mailbox_ptr:
            memory.store_u64(signal_.event_mailbox_ptr, signal_.event_id)
            with self._host.lock:
                queue.owner.process.events.signal_interrupt(signal_.event_id)
                self._host.changed.notify_all()

    # ------------------------------------------------------------ exceptions

    def _stop_queue(self, queue: Queue, error: Exception) -> None:
        process = queue.owner.process
        with self._host.lock:
            queue.stopped = True
            queue.running = None
            self._host.log(f"gpu {self._gpu.gpu_id:#x} process {process.pid}: {error!r}")
            if isinstance(error, GpuFault):
                self._signal_fault(queue, error)
            else:
                data = uapi.kfd_hsa_hw_exception_data(gpu_id=queue.owner.user_gpu_id)
                process.events.signal_exception(
                    uapi.KFD_IOC_EVENT_HW_EXCEPTION, bytes(data).ljust(32, b"\0")
                )
            self._host.changed.notify_all()

    @staticmethod
    def _signal_fault(queue: Queue, fault: GpuFault) -> None:
        """kfd_signal_vm_fault_event()."""
        data = uapi.kfd_hsa_memory_exception_data(
            va=fault.address & ~0xFFF, gpu_id=queue.owner.user_gpu_id
        )
        data.failure.NotPresent = 1
        data.failure.ReadOnly = int(fault.write)
        process = queue.owner.process
        if not process.events.signal_exception(uapi.KFD_IOC_EVENT_MEMORY, bytes(data)):
            process.send_sigsegv()


_VALUE = amd_signal.value.offset
_INVALID_HEADER = np.array([PacketType.INVALID, 0], np.uint8)
