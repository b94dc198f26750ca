"""The processes that conformance tests dump and restore; they run in children."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from migrate.kfd import uapi
from migrate.kfd.sim.opcodes import AddKernargs, CounterKernargs, FillKernargs, Opcode
from tests.conformance import image as raw
from tests.conformance.hosts import DEADLINE, Link
from tests.conformance.image import Image
from tests.conformance.kit import (
    AQL,
    DOORBELL,
    DOORBELL_SLICE,
    GTT,
    PAGE,
    USERPTR,
    VRAM,
    WRITABLE,
    Buffer,
    Process,
    Queue,
)

ADDED = 7  # by each ADD packet


@dataclass
class Layout:
    """Where things are in a target: survives a move, since addresses and ids do."""

    buffers: dict[str, Buffer]
    queues: list[tuple[int, uapi.kfd_ioctl_create_queue_args]]  # (gpu_id, arguments)
    event_id: int
    gpu_ids: list[int]


class Target:
    """A process with work on every GPU: a counter on the first, adds on the last."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.buffers: dict[str, Buffer] = {}
        self.queues: list[Queue] = []
        self.event_id = 0

    def build(self) -> None:
        p = self.process
        p.prepare_queues()
        first, last = p.gpu_ids[0], p.gpu_ids[-1]
        self.buffers = {
            "pointers": p.pointers,
            "kernargs": p.kernargs,
            "signals": p.signals,
            "event_page": p.event_page,
            "counter": p.alloc(first, PAGE),
            "work": p.alloc(last, 16 * PAGE),
            "doorbell": p.alloc(first, DOORBELL_SLICE, DOORBELL | WRITABLE),
        }
        self.queues = [p.create_queue(first, 0), p.create_queue(last, 1)]
        self.buffers |= {f"ring{n}": queue.ring for n, queue in enumerate(self.queues)}
        self.event_id = p.create_event()
        p.create_event(uapi.KFD_IOC_EVENT_MEMORY)

    @property
    def layout(self) -> Layout:
        return Layout(
            buffers={name: replace(b, memory=None) for name, b in self.buffers.items()},
            queues=[(queue.gpu_id, queue.args) for queue in self.queues],
            event_id=self.event_id,
            gpu_ids=self.process.gpu_ids,
        )

    # ------------------------------------------------------------ what tests ask for

    def where(self) -> Layout:
        """The layout as it is by now."""
        return self.layout

    def start_counter(self, queue: int = 0) -> None:
        """The persistent kernel; what is behind it in the ring has to wait."""
        at = self.buffers["counter"].address + 64 * queue
        self.queues[queue].submit(Opcode.COUNTER, CounterKernargs(at, at + 8, at + 16))

    def counter(self, queue: int = 0) -> int:
        return self.buffers["counter"].word(8 * queue)

    def counter_moves(self, queue: int = 0) -> bool:
        start = self.counter(queue)
        return wait_until(lambda: self.counter(queue) > start)

    def counter_stays(self) -> bool:
        return stays(self.counter)

    def stop_counter(self, queue: int = 0) -> tuple[int, int]:
        """(counter, iterations the kernel itself counted)."""
        index = self.queues[queue].read_index
        self.buffers["counter"].word(8 * queue + 1, 1)
        assert wait_until(lambda: self.queues[queue].read_index > index)
        return self.counter(queue), self.buffers["counter"].word(8 * queue + 2)

    def indexes(self) -> list[tuple[int, int]]:
        """(read, write) of each queue."""
        return [(queue.read_index, queue.write_index) for queue in self.queues]

    def available(self) -> int:
        return self.process.available(self.process.gpu_ids[0])

    def add(self) -> int:
        """One ADD packet over the work buffer, waited for by an event; the first word."""
        work = self.buffers["work"]
        kernargs = AddKernargs(work.address, work.address, work.size // 8, ADDED)
        signal = self.process.signal(1, self.event_id)
        self.queues[1].submit(Opcode.ADD, kernargs, signal)
        assert self.process.wait([self.event_id]) == uapi.KFD_IOC_WAIT_RESULT_COMPLETE
        assert self.process.signal_value(signal) == 0
        return work.word(0)

    def submit_adds(self, count: int) -> None:
        """Packets that nobody waits for."""
        work = self.buffers["work"]
        for _ in range(count):
            kernargs = AddKernargs(work.address, work.address, work.size // 8, ADDED)
            self.queues[1].submit(Opcode.ADD, kernargs)

    def wait_adds(self) -> int:
        queue = self.queues[1]
        assert wait_until(lambda: queue.read_index == queue.write_index)
        return self.buffers["work"].word(0)

    def work(self) -> int:
        return self.buffers["work"].word(0)

    def fill(self, value: int) -> None:
        work = self.buffers["work"]
        self.process.run(self.queues[1], Opcode.FILL, FillKernargs(work.address, work.size, value))

    def alloc_aql(self) -> None:
        """Memory for an AQL ring: what is asked for is twice what there is."""
        flags = GTT | AQL | WRITABLE
        self.buffers["aql"] = self.process.alloc(self.process.gpu_ids[-1], 4 * PAGE, flags)

    def fill_aql(self, value: int) -> bytes:
        """Fill it through both of its mappings on the GPU; the values found in memory."""
        aql = self.buffers["aql"]
        for half in range(2):
            at = aql.address + half * aql.size
            kernargs = FillKernargs(at, aql.size // 2, value + half)
            self.process.run(self.queues[1], Opcode.FILL, kernargs)
        return aql.read(0, 4)

    def alloc(self) -> None:
        self.buffers["extra"] = self.process.alloc(self.process.gpu_ids[0], PAGE)

    def alloc_vram(self, size: int) -> None:
        self.process.alloc(self.process.gpu_ids[0], size, gpus=[], mapped=False)

    def free(self) -> None:
        extra = self.buffers.pop("extra")
        assert extra.memory is not None
        extra.memory.close()
        self.process.unmap(extra, self.process.gpu_ids)
        self.process.free(extra)

    def new_event(self) -> int:
        return self.process.create_event()

    def new_queue(self, number: int) -> int:
        """errno of a CREATE_QUEUE on the first GPU."""
        try:
            self.process.create_queue(self.process.gpu_ids[0], number)
        except OSError as error:
            return error.errno or -1
        return 0

    def handles(self) -> dict[str, int]:
        return {name: buffer.handle for name, buffer in self.buffers.items()}


def wait_until(condition: Callable[[], bool]) -> bool:
    """Whether *condition* came true in time."""
    end = time.monotonic() + DEADLINE
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.001)
    return True


def stays(read: Callable[[], object], seconds: float = 0.1) -> bool:
    """Whether a value does not change for a while."""
    value = read()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if read() != value:
            return False
        time.sleep(0.005)
    return True


def serve(link: Link, target: Target) -> None:
    """Do what the test asks for: (method, arguments...)."""
    while True:
        name, *arguments = link.hear()
        link.say(getattr(target, name)(*arguments))


def target(link: Link, *, userptr: bool = False) -> None:
    """A target from scratch; says its layout first."""
    found = Target(Process(link.paths))
    found.build()
    if userptr:
        memory = ctypes.create_string_buffer(2 * PAGE)
        start = (ctypes.addressof(memory) + PAGE - 1) // PAGE * PAGE
        p = found.process
        found.buffers["user"] = p.alloc(p.gpu_ids[0], PAGE, USERPTR | WRITABLE, user=start)
    link.say(found.layout)
    serve(link, found)


def idle(link: Link) -> None:
    """A process with VMs and nothing in them."""
    process = Process(link.paths)
    link.say(process.gpu_ids)
    link.hear()


def without_kfd(link: Link) -> None:
    """A process that never opens the device."""
    link.say()
    link.hear()


def without_vm(link: Link) -> None:
    """A process that opened the device and acquired no VM."""
    process = Process(link.paths, acquire=False)
    link.say(process.kfd.fileno())
    link.hear()


# ---------------------------------------------------------------- restored


def open_nodes(link: Link, image: Image) -> tuple[Process, list[int]]:
    """Fresh device and render nodes; the fds in the order of the image's devices."""
    process = Process(link.paths, acquire=False)
    minors = dict(process.gpus)
    for _, actual in image.devices:
        if actual in minors:
            process.render[actual] = process.open_render(actual)
    fds = [
        process.render[actual].fileno() if actual in process.render else -1
        for _, actual in image.devices
    ]
    return process, fds


def revive(link: Link, image: Image, layout: Layout) -> Target:
    """RESTORE in this process, contents and mappings included; queues still stopped."""
    process, fds = open_nodes(link, image)
    done = raw.restore(process.kfd, image, fds)
    done.close()
    return adopt_restored(process, image, layout, done)


def adopt_restored(process: Process, image: Image, layout: Layout, done: raw.Restored) -> Target:
    """The target of *layout* in a process whose RESTORE has worked."""
    actual_of = dict(image.devices)
    offsets = {image.bo(n).addr: (n, offset) for n, offset in enumerate(done.offsets)}
    target = Target(process)
    for name, buffer in layout.buffers.items():
        number, offset = offsets[buffer.address]
        memory = None
        if buffer.flags & (VRAM | GTT):
            gpu = actual_of[image.bo(number).gpu_id]
            memory = process.render[gpu].mmap(offset, buffer.size)
        target.buffers[name] = replace(buffer, memory=memory)
    process.pointers = target.buffers["pointers"]
    process.kernargs = target.buffers["kernargs"]
    process.signals = target.buffers["signals"]
    process.event_page = target.buffers["event_page"]
    process.continue_at(PAGE // 2)
    for n, (gpu_id, args) in enumerate(layout.queues):
        if gpu_id not in process.doorbells:
            offset = uapi.KFD_MMAP_TYPE_DOORBELL | uapi.KFD_MMAP_GPU_ID(actual_of[gpu_id])
            process.doorbells[gpu_id] = process.kfd.mmap(offset, DOORBELL_SLICE)
        target.queues.append(Queue(process, gpu_id, target.buffers[f"ring{n}"], args))
    target.event_id = layout.event_id
    process.gpus = {user: 0 for user, _ in image.devices}
    return target


def restored(link: Link, image: Image, layout: Layout) -> None:
    """A target that comes from an image; says 'restored' before its queues run."""
    found = revive(link, image, layout)
    link.say(os.getpid())
    serve(link, found)


class Attempts(NamedTuple):
    """errno of a RESTORE, of a second, good one, and how many dmabuf fds the first left open."""

    first: int
    second: int
    left: int = 0


def try_restore(link: Link, image: Image, options: dict[str, Any]) -> Attempts:
    """A RESTORE with *options*, and a second, correct one in the same process.

    Options: ``fields`` overrides fields of the argument; ``null`` names pointers to be
    NULL; ``fds`` says which fd each device gets ('own', 'first', 'closed', 'kfd');
    ``acquire`` first acquires the VM of the first GPU; ``good`` is the correct image.
    """
    good: Image = options.get("good", image)
    process, fds = open_nodes(link, image)
    choice = options.get("fds", ["own"] * len(fds))
    special = {"first": fds[0] if fds else -1, "closed": 1 << 20, "kfd": process.kfd.fileno()}
    given = [special.get(name, fd) for name, fd in zip(choice, fds, strict=True)]
    if options.get("acquire"):
        actual = good.devices[0][1]
        file = process.open_render(actual)
        args = uapi.kfd_ioctl_acquire_vm_args(drm_fd=file.fileno(), gpu_id=actual)
        process.kfd.ioctl(uapi.AMDKFD_IOC_ACQUIRE_VM, args)
    fields = dict.fromkeys(options.get("null", ()), 0) | options.get("fields", {})
    first, left = _restore_errno(process, image, given, fields)
    for actual in process.gpus:
        process.render[actual] = process.open_render(actual)
    fresh = [process.render[actual].fileno() for _, actual in good.devices]
    second, _ = _restore_errno(process, good, fresh, {})
    link.say(Attempts(first, second, left))
    link.hear()
    return Attempts(first, second, left)


def _restore_errno(
    process: Process, image: Image, fds: list[int], fields: dict[str, int]
) -> tuple[int, int]:
    """(errno, dmabuf fds left in the buckets); no fd is left elsewhere."""
    before = len(os.listdir("/proc/self/fd"))
    try:
        raw.restore(process.kfd, image, fds, **fields).close()
    except raw.RestoreRefused as error:
        assert len(os.listdir("/proc/self/fd")) == before, "fds were left behind"
        return error.errno or -1, error.left
    return 0, 0
