"""A job for the virtual hosts: a plain program on the KFD ABI, without any runtime of ours.

    python -m tests.lab.gpu_job --port PORT [--gpus N] [--vram BYTES] [--log FILE] [--child]
        [--hog SECONDS] [--ballast MIB] [--trace PAGES]

Each step adds numbers drawn from a digest to a buffer in the VRAM of every GPU, takes what
came of it (through a userptr) into the digest, and so depends on every step before it: what
``chain`` computes without a GPU must be what the job says. Persistent kernels count on
queues of their own. A thread sits in WAIT_EVENTS, one in accept, one reads a pipe; another
pipe always holds the last steps; a deleted file and a log are written at each step. With
``--child`` a second process does the same and tells its steps to the first one by a pipe.
``--gpus 0``: no GPU at all. With ``--hog`` a thread takes 90% of the first GPU's VRAM that is
free, gives it back, waits until it is free again, and so on; that it can't have it is an error.
``--ballast`` is memory that is written once. ``--trace``: at each step the first GPU leaves its
word in the next page of memory that no CPU writes.

It answers who asks at its port: ``status``, ``verify`` (all of its memory) or ``finish``
(verify, stop the kernels and compare their counts with the memory, then end). Answers come
between steps.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import hashlib
import json
import mmap
import os
import queue
import select
import socket
import struct
import tempfile
import threading
import time
import traceback
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from migrate.kfd.sim.aql import amd_signal
from migrate.kfd.sim.opcodes import AddKernargs, CopyKernargs, Opcode
from migrate.model import HostPaths
from tests.conformance.kit import PAGE, USERPTR, WRITABLE, Buffer, Process, Queue

PACKETS = 4  # that add, in each step and GPU; one more copies the result out
DELAYED = 8  # steps that are always in the pipe
LINE = struct.Struct("<Q16s")  # what a child tells: step, digest
WORD = 2**64
HUGE = 2 << 20  # VRAM is handed out in pieces of it


def pause(seconds: float) -> None:
    """A sleep that a move does not stretch.

    time.sleep waits for a time of CLOCK_MONOTONIC, which is another one on each host.
    """
    select.select([], [], [], seconds)


def first_digest(seed: int) -> bytes:
    """What the chain begins with."""
    return hashlib.blake2b(seed.to_bytes(8, "little"), digest_size=16).digest()


def drawn(digest: bytes, gpu: int) -> int:
    """What each packet of the next step adds on that GPU."""
    return int.from_bytes(hashlib.blake2b(digest + bytes([gpu]), digest_size=7).digest(), "little")


def link(digest: bytes, step: int, words: list[int]) -> bytes:
    """The digest after *step*, which left *words* on the GPUs."""
    text = digest + struct.pack(f"<Q{len(words)}Q", step, *words)
    return hashlib.blake2b(text, digest_size=16).digest()


def chain(seed: int, gpus: int) -> Iterator[str]:
    """The digest before the first step, after it, after the second, and so on for ever."""
    digest, words, step = first_digest(seed), [0] * gpus, 0
    while True:
        yield digest.hex()
        words = [(word + PACKETS * drawn(digest, gpu)) % WORD for gpu, word in enumerate(words)]
        digest = link(digest, step, words)
        step += 1


def private_memory(size: int) -> mmap.mmap:
    """Zeros in pages of their own."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    memory.write(bytes(size))
    return memory


class KeptKernargs(Process):
    """As Process, whose kernargs are used anew after a while, but for those of page 0."""

    kept = False

    def kernarg(self, kernargs: ctypes.Structure | None) -> int:
        if self.kept and self._kernarg_at == 0:
            self._kernarg_at = PAGE
        return super().kernarg(kernargs)


class Gpus:
    """What the job has of KFD: two queues and a buffer on each GPU."""

    def __init__(self, count: int, vram: int, trace: int = 0) -> None:
        p = self.process = KeptKernargs(HostPaths())
        p.prepare_queues()
        self.ids = p.gpu_ids[:count]
        if len(self.ids) < count:
            raise SystemExit(f"{count} GPUs wanted, {len(p.gpu_ids)} seen")
        memory = ctypes.create_string_buffer(2 * PAGE)
        self.results = (ctypes.addressof(memory) + PAGE - 1) // PAGE * PAGE
        self._memory = memory
        self.traced = 0
        self.results_bo = p.alloc(self.ids[0], PAGE, USERPTR | WRITABLE, user=self.results)
        self.trace: dict[int, int] = {}  # what is in its pages, by page
        self.trace_pages = trace
        if trace:
            self.trace_memory = private_memory(trace * PAGE)
            at = ctypes.addressof(ctypes.c_char.from_buffer(self.trace_memory))
            size = len(self.trace_memory)
            self.trace_bo = p.alloc(self.ids[0], size, USERPTR | WRITABLE, user=at)
        self.weights = [p.alloc(gpu, vram) for gpu in self.ids]
        self.counters: list[Buffer] = []
        self.work: list[Queue] = []
        self.counting: list[Queue] = []
        for index, gpu in enumerate(self.ids):
            self.counting.append(p.create_queue(gpu, 2 * index))
            self.work.append(p.create_queue(gpu, 2 * index + 1))
            self.counters.append(p.start_counter(self.counting[-1], gpu))
        p.kept = True  # those of the persistent kernels
        self.events = [p.create_event() for _ in self.ids]
        self.told = threading.Event()
        threading.Thread(target=self._wait_for_ever, name="waiter", daemon=True).start()

    def _wait_for_ever(self) -> None:
        while True:
            with contextlib.suppress(InterruptedError):
                self.process.wait(self.events, 0xFFFFFFFF, wait_for_all=False)
                self.told.set()

    def step(self, digest: bytes) -> list[int]:
        """One step on every GPU; the first word of each buffer after it."""
        for gpu in range(len(self.ids)):
            self._submit(gpu, drawn(digest, gpu))
        while not all(self._signal(gpu).value == 0 for gpu in range(len(self.ids))):
            self.told.wait()  # for ever, if the event does not come
            self.told.clear()
        words = ctypes.cast(self.results, ctypes.POINTER(ctypes.c_uint64))
        if self.trace_pages:
            self.trace[self._next_traced()] = words[0]
        return [words[gpu] for gpu in range(len(self.ids))]

    def _next_traced(self) -> int:
        """The page of this step: each in turn."""
        return self.traced % self.trace_pages

    def _signal_at(self, gpu: int) -> int:
        return gpu * ctypes.sizeof(amd_signal)

    def _signal(self, gpu: int) -> amd_signal:
        raw = self.process.signals.read(self._signal_at(gpu), ctypes.sizeof(amd_signal))
        return amd_signal.from_buffer_copy(raw)

    def _submit(self, gpu: int, value: int) -> None:
        p, weights = self.process, self.weights[gpu]
        mailbox = p.event_page.address + 8 * self.events[gpu]
        fresh = amd_signal(kind=1, value=1, event_id=self.events[gpu], event_mailbox_ptr=mailbox)
        p.signals.write(self._signal_at(gpu), bytes(fresh))
        add = AddKernargs(weights.address, weights.address, weights.size // 8, value)
        for _ in range(PACKETS):
            self.work[gpu].submit(Opcode.ADD, add)
        if gpu == 0 and self.trace_pages:
            self.traced += 1
            page = self.trace_bo.address + self._next_traced() * PAGE
            self.work[gpu].submit(Opcode.COPY, CopyKernargs(page, weights.address, 8))
        copy = CopyKernargs(self.results_bo.address + 8 * gpu, weights.address, 8)
        self.work[gpu].submit(Opcode.COPY, copy, p.signals.address + self._signal_at(gpu))

    def hog(self, kept: float) -> Iterator[int]:
        """Take 90% of the VRAM that is free now, give it back: rounds so far. Never ends."""
        p, gpu = self.process, self.ids[0]
        size = p.available(gpu) * 9 // 10 // HUGE * HUGE
        rounds = 0
        while True:
            buffer = p.alloc(gpu, size)
            assert buffer.memory is not None
            buffer.word(0, rounds)
            buffer.word(size // 8 - 1, ~rounds % WORD)
            pause(kept)
            if (buffer.word(0), buffer.word(size // 8 - 1)) != (rounds, ~rounds % WORD):
                raise AssertionError(f"what the hog wrote in round {rounds} is gone")
            buffer.memory.close()
            p.unmap(buffer, p.gpu_ids)
            p.free(buffer)
            rounds += 1
            yield rounds
            # Who looks at a buffer while it is freed keeps its memory for a moment, no longer.
            while p.available(gpu) < size:
                pause(kept)

    def verify(self) -> None:
        """All of a buffer is what its first word is; the counters go on; the trace is whole."""
        for page, word in self.trace.items():
            found = int.from_bytes(self.trace_memory[page * PAGE : page * PAGE + 8], "little")
            if found != word:
                raise AssertionError(f"page {page} of the trace has {found}, not {word}")
        for buffer in self.weights:
            first = buffer.read(0, 8)
            if buffer.read(0, buffer.size) != first * (buffer.size // 8):
                raise AssertionError(f"the buffer at {buffer.address:#x} is torn")
        before = self.count()
        end = time.monotonic() + 60
        while any(now <= then for now, then in zip(self.count(), before, strict=True)):
            if time.monotonic() > end:
                raise AssertionError(f"counters stand still: {before}")
            time.sleep(0.01)

    def count(self) -> list[int]:
        """What the persistent kernels counted."""
        return [buffer.word(0) for buffer in self.counters]

    def pointers(self) -> list[int]:
        """Where this process has words that GPUs write: all read pointers, and what is counted."""
        pointers = self.process.pointers.memory
        assert pointers is not None
        queues = (*self.work, *self.counting)
        read = [pointers.address + 16 * queue.queue_id for queue in queues]
        return read + [buffer.memory.address for buffer in self.counters if buffer.memory]

    def stop_counters(self) -> None:
        """The kernel's own register and the memory agree: nothing was lost or repeated."""
        for counting, buffer in zip(self.counting, self.counters, strict=True):
            before = counting.read_index
            buffer.word(1, 1)
            end = time.monotonic() + 60
            while counting.read_index == before:
                if time.monotonic() > end:
                    raise AssertionError("a persistent kernel does not end")
                time.sleep(0.01)
            if buffer.word(0) != buffer.word(2):
                raise AssertionError(f"{buffer.word(0)} counted, {buffer.word(2)} iterations")


class Request:
    """What somebody at the port asked."""

    def __init__(self, request: str) -> None:
        self.request = request
        self.answer: queue.Queue[dict[str, Any]] = queue.Queue()
        self.sent = threading.Event()


class Job:
    """The loop and what hangs on it."""

    def __init__(self, options: argparse.Namespace, seed: int, tell: int = -1) -> None:
        self.seed = seed
        self.pace: float = options.pace
        self.gpus = Gpus(options.gpus, options.vram, options.trace) if options.gpus else None
        self.ballast = os.urandom(options.ballast << 20)
        self.ballast_sum = zlib.crc32(self.ballast)
        self.step = 0
        self.digest = first_digest(seed)
        self.tell = tell
        self.child_step = -1
        self.hogged = 0
        self.error = ""
        self.requests: queue.Queue[Request] = queue.Queue()
        self.pipe = os.pipe()
        self.log = (
            os.open(options.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            if options.log
            else -1
        )
        self.deleted = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - for ever

    def listen(self, port: int) -> None:
        """Answer on 127.0.0.1, in a thread."""
        listener = socket.create_server(("127.0.0.1", port))
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            connection, _ = listener.accept()
            with connection, connection.makefile("rw") as stream:
                request = Request(stream.readline().strip())
                self.requests.put(request)
                stream.write(json.dumps(request.answer.get()) + "\n")
            request.sent.set()

    def hear_child(self, pipe: int, seed: int, gpus: int) -> None:
        """Read the child's steps in a thread; they must be those of its chain, one by one."""

        def read() -> None:
            expected = chain(seed, gpus)
            next(expected)
            with os.fdopen(pipe, "rb", buffering=0) as stream:
                while line := stream.read(LINE.size):
                    step, digest = LINE.unpack(line)
                    if step != self.child_step + 1 or digest.hex() != next(expected):
                        self.error = f"child: step {step} after {self.child_step}"
                    self.child_step = step

        threading.Thread(target=read, name="reader", daemon=True).start()

    def hog(self, kept: float) -> None:
        """Take and free VRAM, in a thread."""
        assert self.gpus is not None
        rounds = self.gpus.hog(kept)

        def work() -> None:
            try:
                for self.hogged in rounds:
                    pass
            except (OSError, AssertionError) as error:
                self.error = f"hog, after {self.hogged} rounds: {error}"

        threading.Thread(target=work, name="hog", daemon=True).start()

    def run(self) -> None:
        """Until told to finish."""
        while True:
            try:
                if self._answer():
                    return
                self._step()
            except Exception:
                self.error = self.error or traceback.format_exc()
                time.sleep(0.1)

    def _step(self) -> None:
        if self.error:
            time.sleep(0.1)
            return
        words = self.gpus.step(self.digest) if self.gpus else []
        self.digest = link(self.digest, self.step, words)
        os.write(self.pipe[1], self.step.to_bytes(8, "little"))
        if self.step >= DELAYED:
            late = int.from_bytes(os.read(self.pipe[0], 8), "little")
            assert late == self.step - DELAYED, f"pipe: step {late} in step {self.step}"
        if self.step:
            step, _ = LINE.unpack(os.pread(self.deleted.fileno(), LINE.size, 0))
            assert step == self.step - 1, f"deleted file: {step} in step {self.step}"
        line = LINE.pack(self.step, self.digest)
        os.pwrite(self.deleted.fileno(), line, 0)
        if self.log >= 0:
            os.write(self.log, f"{self.step} {self.digest.hex()}\n".encode())
        if self.tell >= 0:
            os.write(self.tell, line)
        self.step += 1
        pause(self.pace)

    def _answer(self) -> bool:
        """Answer who asked; whether that was the end."""
        try:
            asked = self.requests.get_nowait()
        except queue.Empty:
            return False
        try:
            if self.gpus and asked.request in {"verify", "finish"}:
                self.gpus.verify()
            if zlib.crc32(self.ballast) != self.ballast_sum:
                raise AssertionError("the ballast is torn")
            if self.gpus and asked.request == "finish":
                self.gpus.stop_counters()
        except AssertionError as error:
            self.error = str(error)
        asked.answer.put(self._status())
        if asked.request == "finish":
            asked.sent.wait()
        return asked.request == "finish"

    def _status(self) -> dict[str, Any]:
        return {
            "pid": os.getpid(),
            "step": self.step,
            "digest": self.digest.hex(),
            "seed": self.seed,
            "gpu_ids": self.gpus.ids if self.gpus else [],
            "counters": self.gpus.count() if self.gpus else [],
            "pointers": self.gpus.pointers() if self.gpus else [],
            "child_step": self.child_step,
            "hogged": self.hogged,
            "threads": len(os.listdir("/proc/self/task")),
            "fds": len(os.listdir("/proc/self/fd")) - 1,
            "error": self.error,
        }


def main() -> None:
    """The job."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--vram", type=int, default=8 << 20, help="bytes on each GPU")
    parser.add_argument("--pace", type=float, default=0.1, help="seconds between steps")
    parser.add_argument("--log")
    parser.add_argument("--child", action="store_true")
    parser.add_argument("--hog", type=float, metavar="SECONDS", help="to keep 90%% of the VRAM")
    parser.add_argument("--ballast", type=int, default=0, metavar="MIB")
    parser.add_argument("--trace", type=int, default=0, metavar="PAGES")
    options = parser.parse_args()
    if options.child:
        _tree(options)
        return
    job = Job(options, options.seed)
    if options.hog is not None:
        job.hog(options.hog)
    job.listen(options.port)
    job.run()


def _tree(options: argparse.Namespace) -> None:
    """Parent and child, each with /dev/kfd of its own; the child's port is the next one."""
    reading, writing = os.pipe()
    pid = os.fork()
    seed = options.seed + bool(not pid)
    if pid == 0:
        os.close(reading)
        if options.log:
            options.log = str(Path(options.log).with_suffix(".child"))
    else:
        os.close(writing)
    job = Job(options, seed, writing if pid == 0 else -1)
    if pid:
        job.hear_child(reading, seed + 1, options.gpus)
    job.listen(options.port + bool(not pid))
    job.run()
    if pid:
        os.waitpid(pid, 0)


if __name__ == "__main__":
    main()
