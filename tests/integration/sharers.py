"""Processes that share a GPU buffer, each with handles of its own, and check that it is one.

    python -m tests.integration.sharers --log LOG --until FILE [--handles N] [--child]

The writer's GPU adds 1 to the buffer's first word at each step, through each of its handles in
turn: its own, a second one on the same GPU, a third on the next GPU (imports, by IMPORT_DMABUF;
the node must have EXPORT_DMABUF and, for the third, imports on another GPU). With --child a
second process has one more handle; its GPU copies the word into memory of its own. Both write
what they see to their logs (LOG, LOG.child), a line each: the writer the number of its steps,
which is what is in the buffer if all handles are of one. At the end they free all handles, which
fails for a handle that is not there, and say "ok".
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import msgspec

from migrate.engine.runtime import Runtime
from migrate.kfd import uapi
from migrate.kfd.ioctl import alloc_memory, free_memory, import_dmabuf, map_memory, unmap_memory
from migrate.kfd.sim.opcodes import AddKernargs, CopyKernargs, Opcode
from migrate.model import Value
from scenarios.workloads import device
from scenarios.workloads.device import Bo, Queue

SIZE = 1 << 20  # bytes of the shared buffer
PACKETS = 64
POINTERS = PACKETS * 64
KERNARGS = 8 << 10
SIGNALS = 16 << 10
RESULT = 32 << 10
MEMORY = 64 << 10
SAVE_AREA = 64 << 10
PACE = 0.002  # seconds between steps


class Offer(Value):
    """What a child is told of the buffer: an fd it inherits, and where its GPU has it."""

    dmabuf: int
    gpu: int  # index
    offset: int


class Record(Value):
    """All of a process's state. ``handles`` are of the shared buffer, the first one its own."""

    log: str
    until: str
    handles_wanted: int
    child: bool
    offer: Offer | None = None
    gpus: tuple[int, ...] = ()
    handles: tuple[Bo, ...] = ()
    offset: int = 0  # of the shared buffer in its GPU's render node
    memory: Bo | None = None
    save_area: Bo | None = None
    doorbells: Bo | None = None
    queue: Queue | None = None
    child_pid: int = 0
    parent: int = 0  # pid of the writer when this process began, in a child
    step: int = 0  # packets that are done
    seen: int = 0
    at: int = 0  # bytes of the log


class Lost(SystemExit):
    """The handles are not of one buffer, or the processes of no tree."""


class Sharer:
    """One operation a call; each may be repeated from its middle."""

    def __init__(self, runtime: Runtime, record: Record) -> None:
        self.runtime = runtime
        self.log = os.open(record.log, os.O_CREAT | os.O_WRONLY, 0o600)

    def advance(self, record: Record) -> Record | None:
        made = self._make(record)
        if made is not None:
            return made
        if Path(record.until).exists():
            self._end(record)
            return None
        if record.parent and os.getppid() != self.runtime.pid_now(record.parent):
            raise Lost("sharers: the parent is gone")
        time.sleep(PACE)
        return self._step(record)

    # ------------------------------------------------------------ what there is

    def _make(self, record: Record) -> Record | None:
        """The next thing that is still missing, in an indivisible step."""
        runtime = self.runtime
        with runtime.indivisible():
            changed: dict[str, object]
            if not record.gpus:
                changed = {"gpus": device.open_gpus(runtime)}
            elif record.memory is None:
                gpu = record.gpus[0]
                flags = device.GTT
                changed = {"memory": device.allocate(runtime, gpu, MEMORY, flags, record.gpus)}
            elif record.save_area is None:
                changed = {
                    "save_area": device.allocate(runtime, record.gpus[0], SAVE_AREA, device.GTT)
                }
            elif record.doorbells is None:
                changed = {
                    "doorbells": device.allocate(
                        runtime, record.gpus[0], device.DOORBELL_SLICE, device.DOORBELL
                    )
                }
            elif record.queue is None:
                memory = record.memory
                changed = {
                    "queue": device.create_queue(
                        *(runtime, memory, memory.address, PACKETS),
                        *(record.save_area, record.doorbells),
                    )
                }
            elif len(record.handles) < record.handles_wanted:
                changed = self._share(record)
            elif record.child and not record.child_pid:
                changed = {"child_pid": self._start_child(record)}
            else:
                return None
            record = msgspec.structs.replace(record, **changed)
            runtime.commit(record)
            return record

    def _share(self, record: Record) -> dict[str, object]:
        number = len(record.handles)
        if record.offer is not None:
            offer = record.offer
            bo = self._import(record, record.gpus[offer.gpu], offer.dmabuf)
            self.runtime.map(bo.gpu_id, offer.offset, SIZE, bo.address)
            os.close(offer.dmabuf)
            return {"handles": (bo,), "offset": offer.offset}
        if not number:
            return self._own(record)
        dmabuf = self._export(record)
        bo = self._import(record, record.gpus[number // 2], dmabuf)
        os.close(dmabuf)
        return {"handles": (*record.handles, bo)}

    def _own(self, record: Record) -> dict[str, object]:
        gpu, address = record.gpus[0], self.runtime.reserve(SIZE)
        made = alloc_memory(self.runtime.kfd, gpu, address, SIZE, device.VRAM)
        map_memory(self.runtime.kfd, made.handle, record.gpus)
        self.runtime.map(gpu, made.mmap_offset, SIZE, address)
        bo = Bo(gpu_id=gpu, handle=made.handle, address=address, size=SIZE, flags=device.VRAM)
        return {"handles": (bo,), "offset": made.mmap_offset}

    def _export(self, record: Record) -> int:
        args = uapi.kfd_ioctl_export_dmabuf_args(
            handle=record.handles[0].handle, flags=os.O_CLOEXEC
        )
        self.runtime.kfd.ioctl(uapi.AMDKFD_IOC_EXPORT_DMABUF, args)
        return int(args.dmabuf_fd)

    def _import(self, record: Record, gpu: int, dmabuf: int) -> Bo:
        address = self.runtime.reserve(SIZE)
        # Its handle is not the next of all: there is a free one below it.
        gap = alloc_memory(self.runtime.kfd, gpu, address, 4096, device.GTT).handle
        handle = import_dmabuf(self.runtime.kfd, gpu, address, dmabuf)
        free_memory(self.runtime.kfd, gap)
        map_memory(self.runtime.kfd, handle, record.gpus)
        return Bo(gpu_id=gpu, handle=handle, address=address, size=SIZE, flags=0)

    def _start_child(self, record: Record) -> int:
        dmabuf = self._export(record)
        offer = Offer(dmabuf=dmabuf, gpu=0, offset=record.offset)
        command = [sys.executable, "-m", "tests.integration.sharers"]
        command += ["--log", f"{record.log}.child", "--until", record.until]
        command += ["--offer", msgspec.json.encode(offer).decode()]
        child = subprocess.Popen(command, pass_fds=[dmabuf], stdin=subprocess.DEVNULL)
        os.close(dmabuf)
        return child.pid

    # ------------------------------------------------------------ steps

    def _step(self, record: Record) -> Record:
        memory, queue = record.memory, record.queue
        assert memory is not None
        assert queue is not None
        slot = record.step % PACKETS
        signal = memory.address + SIGNALS + slot * device.SIGNAL_SIZE
        if device.load_u64(queue.write_pointer) <= record.step:
            device.prepare_signal(signal)
        kernargs = memory.address + KERNARGS + 64 * slot
        shared = record.handles[record.step % len(record.handles)].address
        if record.offer is None:
            device.store(kernargs, AddKernargs(shared, shared, 1, 1))
            packet = device.dispatch(Opcode.ADD, kernargs, signal)
        else:
            device.store(kernargs, CopyKernargs(memory.address + RESULT, shared, 8))
            packet = device.dispatch(Opcode.COPY, kernargs, signal)
        device.submit(queue, record.step, packet)
        while not device.is_done(signal):
            time.sleep(0.001)
        return self._look(record)

    def _look(self, record: Record) -> Record:
        """What the buffer holds now: by the first handle's mapping, or by the GPU's copy."""
        assert record.memory is not None
        done, mapped = record.step + 1, device.load_u64(record.handles[0].address)
        seen = mapped
        if record.offer is None and mapped != done:
            raise Lost(f"sharers: {done} steps, and the buffer holds {mapped}")
        if record.offer is not None:
            seen = device.load_u64(record.memory.address + RESULT)
            if not record.seen <= seen <= mapped:
                raise Lost(f"sharers: saw {record.seen}, then {seen}, mapped is {mapped}")
        return self._say(msgspec.structs.replace(record, step=done, seen=seen), str(seen))

    def _end(self, record: Record) -> None:
        for bo in record.handles:
            self.runtime.unmap(bo.address)
            unmap_memory(self.runtime.kfd, bo.handle, record.gpus)
            free_memory(self.runtime.kfd, bo.handle)
        self._say(record, "ok")

    def _say(self, record: Record, line: str) -> Record:
        text = f"{line}\n".encode()
        os.pwrite(self.log, text, record.at)
        return msgspec.structs.replace(record, at=record.at + len(text))


def main() -> None:
    runtime = Runtime.start()
    record = runtime.state(Record)
    if record is None:
        parser = argparse.ArgumentParser()
        parser.add_argument("--log", required=True)
        parser.add_argument("--until", required=True)
        parser.add_argument("--handles", type=int, default=1)
        parser.add_argument("--child", action="store_true")
        parser.add_argument("--offer", default="null")
        options = parser.parse_args()
        record = Record(
            log=options.log,
            until=options.until,
            handles_wanted=options.handles,
            child=options.child,
            offer=msgspec.json.decode(options.offer, type=Offer | None),
            parent=os.getppid() if options.offer != "null" else 0,
        )
    runtime.commit(record)
    runtime.drive(record, Sharer(runtime, record).advance)


if __name__ == "__main__":
    main()
