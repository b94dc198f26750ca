"""A training loop on the KFD ABI alone, whose digest shows if anything was lost.

    python -m scenarios.workloads.train --steps 200 --vram 64MiB --log LOG --result RESULT

Weights (bf16) and optimizer state (fp32) in the VRAM of all its GPUs, work by AQL
queues with several steps in flight, waits by events in a thread of their own, a
persistent kernel on a queue of its own, results through userptrs. Every step links a
digest of the GPUs' memory with the CPU's; at the end all VRAM is hashed into the chain.
A run that was moved must end with the digest of one that never was.

It uses the reexec engine's runtime: each method ``_do_*`` is one operation, takes a
record, and returns the next one; all of them may be repeated from their middle.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import msgspec
import xxhash

from migrate.decode import convert
from migrate.engine.runtime import SIGNAL, Runtime, view
from migrate.errors import MigrateError, UsageError
from scenarios.workloads import contents, device, steps
from scenarios.workloads.contents import CHUNK
from scenarios.workloads.device import Bo, Event, Queue
from scenarios.workloads.record import DEPTH, SLOTS, Config, Record

replace = msgspec.structs.replace
SAVE_AREA_SIZE = 64 << 10
RESULTS_SIZE = 4096
HISTORY_SIZE = 1 << 20  # bytes of CPU memory that every step writes into
HISTORY_ADDRESS_BO = "history"
Made = Bo | Queue | Event


class Waiter(threading.Thread):
    """Sits in WAIT_EVENTS and tells the main thread. Owns no state: see Runtime."""

    def __init__(self, runtime: Runtime, events: Sequence[Event]) -> None:
        super().__init__(name="waiter", daemon=True)
        self._runtime = runtime
        self._events = events
        self.told = threading.Event()
        self._ended = False
        self.error: OSError | None = None

    def run(self) -> None:
        """Until the process ends."""
        signal.pthread_sigmask(signal.SIG_BLOCK, {SIGNAL})  # it is the main thread's
        while self.error is None and not self._ended:
            try:
                device.wait_events(self._runtime, self._events)
            except InterruptedError:
                continue
            except OSError as error:
                self.error = error
            self.told.set()

    def end(self) -> None:
        """End the thread."""
        self._ended = True
        while self.is_alive():
            device.set_event(self._runtime, self._events[0])
            self.join(0.1)

    def wait_until(self, reached: Callable[[], bool]) -> None:
        """Return when *reached* is true, looking again at each event. Raises OSError."""
        while True:
            self.told.clear()
            if self.error is not None:
                raise self.error
            if reached():
                return
            self.told.wait()


class Training:
    """The program: ``advance`` does one operation and returns the next record."""

    def __init__(self, runtime: Runtime, config: Config) -> None:
        self._runtime = runtime
        self._plan = _plan(config)
        self.waiter: Waiter | None = None
        self._words: contents.Words | None = None
        self._packets: tuple[tuple[int, int], list[steps.Packet]] = ((-1, -1), [])
        self.log = os.open(config.log, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def advance(self, record: Record) -> Record | None:
        """The record after one more operation, None at the end."""
        operation: Callable[[Record], Record | None] = getattr(self, f"_do_{record.phase}")
        return operation(record)

    # ------------------------------------------------------------ set-up

    def _do_setup(self, record: Record) -> Record:
        if not record.gpu_ids:
            return self._open(record)
        if record.made < len(self._plan):
            name, make = self._plan[record.made]
            with self._runtime.indivisible():
                made = make(self._runtime, record)
                kind = {Bo: "bos", Queue: "queues", Event: "events"}[type(made)]
                known: dict[str, Made] = {**getattr(record, kind), name: made}
                record = replace(record, made=record.made + 1, **{kind: known})
                self._runtime.commit(record)
            return record
        return replace(record, phase="fill")

    def _open(self, record: Record) -> Record:
        wanted = record.config.gpus
        with self._runtime.indivisible():
            gpu_ids = device.open_gpus(self._runtime)
            if len(gpu_ids) < wanted:
                raise UsageError(f"--gpus {wanted}: this host shows {len(gpu_ids)}")
            record = replace(record, gpu_ids=gpu_ids[:wanted])
            self._runtime.commit(record)
        return record

    def _do_fill(self, record: Record) -> Record:
        chunks = _chunks(record)
        if record.filled == len(chunks):
            return replace(record, phase="start")
        address, length = chunks[record.filled]
        if self._words is None:
            self._words = contents.words_of(record.config.weights, record.config.seed)
        contents.fill(view(address, length), self._words, record.filled)
        return replace(record, filled=record.filled + 1)

    def _do_start(self, record: Record) -> Record:
        """The persistent kernels, and what the loop begins with."""
        self._words = None
        gpus = record.config.gpus
        for gpu in range(gpus):
            base = record.bos[f"queues{gpu}"].address
            if device.load_u64(record.queues[f"counter{gpu}"].write_pointer) == 0:
                device.prepare_signal(steps.counter_signal(record, gpu), record.events[f"gpu{gpu}"])
            packet = steps.counter_packet(record, gpu).encode(base + steps.COUNTER_KERNARGS)
            device.submit(record.queues[f"counter{gpu}"], 0, packet)
        seed = struct.pack("<Q", record.config.seed)
        return replace(
            record,
            phase="train",
            written=(0,) * gpus,
            counters=(0,) * gpus,
            recent=(xxhash.xxh3_128_digest(seed),),
            started=time.time(),
            fds=count_fds(),
        )

    # ------------------------------------------------------------ the loop

    def _do_train(self, record: Record) -> Record:
        ended = self._is_enough(record)
        if record.done < record.step and self._is_step_done(record):
            return self._complete(record)
        if record.packet or (not ended and record.step - record.done < DEPTH):
            return self._submit(record)
        if record.done < record.step:
            self._wait(record).wait_until(lambda: self._is_step_done(record))
            return record
        return replace(record, phase="stop", steps=record.done)

    @staticmethod
    def _is_enough(record: Record) -> bool:
        if record.config.seconds is not None:
            return time.time() - record.started >= record.config.seconds
        if record.config.until is not None:
            return Path(record.config.until).exists()
        return record.step >= record.config.steps

    def _submit(self, record: Record) -> Record:
        """Begin a step, or submit one packet of it."""
        if not record.packet:
            return _begin(record)
        at = (record.step, record.gpu)
        if self._packets[0] != at:
            self._packets = (at, steps.packets(record, record.gpu))
        packets = self._packets[1]
        steps.submit(record, record.gpu, packets[record.packet - 1])
        written = list(record.written)
        written[record.gpu] += 1
        record = replace(record, written=tuple(written), packet=record.packet + 1)
        if record.packet <= len(packets):
            return record
        if record.gpu + 1 < record.config.gpus:
            return replace(record, gpu=record.gpu + 1, packet=1)
        return replace(record, step=record.step + 1, gpu=0, packet=0)

    @staticmethod
    def _is_step_done(record: Record) -> bool:
        slot = record.done % SLOTS
        return all(
            device.is_done(steps.step_signal(record, slot, gpu, steps.STEP_SIGNAL))
            for gpu in range(record.config.gpus)
        )

    def _wait(self, record: Record) -> Waiter:
        if self.waiter is None:
            self.waiter = Waiter(self._runtime, tuple(record.events.values()))
            self.waiter.start()
        return self.waiter

    def _complete(self, record: Record) -> Record:
        """Take the oldest step's results into the chain, CPU memory, and the log."""
        slot = record.done % SLOTS
        results = b"".join(
            bytes(view(steps.result(record, gpu, slot), 8)) for gpu in range(record.config.gpus)
        )
        link = struct.pack("<Q", record.done) + results
        digest = xxhash.xxh3_128_digest(record.digest + link)
        history = record.bos["results0"].address + RESULTS_SIZE
        device.store(history + record.done * 16 % HISTORY_SIZE, digest)
        line = f"{record.done} {digest.hex()}\n".encode()
        os.pwrite(self.log, line, record.log_offset)
        if record.config.pace:
            time.sleep(record.config.pace)
        return replace(
            record,
            done=record.done + 1,
            recent=(*record.recent[-DEPTH:], digest),
            log_offset=record.log_offset + len(line),
            counters=_counters(record),
        )

    # ------------------------------------------------------------ the end

    def _do_stop(self, record: Record) -> Record:
        """End the persistent kernels; a count lost or doubled on the way shows now."""
        for gpu in range(record.config.gpus):
            memory = record.bos[f"queues{gpu}"].address
            device.store_u64(memory + steps.STOP, 1)
            signal = steps.counter_signal(record, gpu)
            self._wait(record).wait_until(partial(device.is_done, signal))
            counter = device.load_u64(memory + steps.COUNTER)
            iterations = device.load_u64(memory + steps.ITERATIONS)
            if counter != iterations:
                raise Corrupted(f"GPU {gpu}: counter {counter} after {iterations} iterations")
        return replace(record, phase="hash", counters=_counters(record))

    def _do_hash(self, record: Record) -> Record:
        chunks = [*_chunks(record), *_cpu_chunks(record)]
        if record.hashed == len(chunks):
            return replace(record, phase="report")
        address, length = chunks[record.hashed]
        link = xxhash.xxh3_128_digest(view(address, length))
        digest = xxhash.xxh3_128_digest(record.digest + link)
        return replace(record, recent=(digest,), hashed=record.hashed + 1)

    def _do_report(self, record: Record) -> None:
        if self.waiter is not None:
            self.waiter.end()
            self.waiter = None
        os.ftruncate(self.log, record.log_offset)
        os.fsync(self.log)
        report = {
            "digest": record.digest.hex(),
            "steps": record.steps,
            "pids": record.pids,
            "gpu_ids": record.gpu_ids,
            "actual_gpu_ids": device.visible_gpus(self._runtime),
            "handles": {name: bo.handle for name, bo in record.bos.items()},
            "queue_ids": {name: queue.queue_id for name, queue in record.queues.items()},
            "event_ids": {name: event.event_id for name, event in record.events.items()},
            "counters": record.counters,
            "fds_at_start": record.fds,
            "fds_at_end": count_fds(),
        }
        target = Path(record.config.result)
        part = target.with_name(f"{target.name}.part")
        part.write_text(json.dumps(report, indent=1))
        part.replace(target)


class Corrupted(Exception):
    """The GPU's or CPU's memory is not what the program left there."""


def _begin(record: Record) -> Record:
    """Draw what the step does and prepare its signals, before any packet of it."""
    slot = record.step % SLOTS
    for gpu in range(record.config.gpus):
        device.prepare_signal(steps.step_signal(record, slot, gpu, steps.OUTBOX_SIGNAL))
        event = record.events[f"gpu{gpu}"]
        device.prepare_signal(steps.step_signal(record, slot, gpu, steps.STEP_SIGNAL), event)
    rng, draws = steps.draw(record)
    return replace(record, rng=rng, draws=draws, gpu=0, packet=1)


def _counters(record: Record) -> tuple[int, ...]:
    """What the persistent kernels count. Raises Corrupted if one went back."""
    found = tuple(
        device.load_u64(record.bos[f"queues{gpu}"].address + steps.COUNTER)
        for gpu in range(record.config.gpus)
    )
    if any(now < before for now, before in zip(found, record.counters, strict=True)):
        raise Corrupted(f"a counter went back: {record.counters} then {found}")
    return found


def count_fds() -> int:
    """Open files of this process. Exact while no other thread is in an ioctl."""
    return len(os.listdir("/proc/self/fd")) - 1  # the folder itself


# ---------------------------------------------------------------- what is made, and in what order

Make = Callable[[Runtime, Record], Made]


def _plan(config: Config) -> list[tuple[str, Make]]:
    """Name and maker of each object; a maker finds those made before in the record."""
    per_gpu = config.vram // config.gpus // config.layers
    weights = per_gpu // 3 // CHUNK * CHUNK or steps.BF16_TILE * 16
    plan: list[tuple[str, Make]] = [
        ("events", _bo(0, device.EVENT_PAGE, device.GTT)),
        ("signals", _bo(0, steps.signals_size(config.gpus), device.GTT)),
    ]
    for gpu in range(config.gpus):
        plan += [
            (f"scratch{gpu}", _bo(gpu, steps.SCRATCH_SIZE, device.VRAM)),
            (f"queues{gpu}", _bo(gpu, steps.QUEUE_MEMORY_SIZE, device.GTT)),
            (f"doorbells{gpu}", _bo(gpu, device.DOORBELL_SLICE, device.DOORBELL)),
            (f"results{gpu}", _bo(gpu, RESULTS_SIZE + HISTORY_SIZE, device.USERPTR)),
            (f"save.work{gpu}", _bo(gpu, SAVE_AREA_SIZE, device.GTT)),
            (f"save.counter{gpu}", _bo(gpu, SAVE_AREA_SIZE, device.GTT)),
            (f"work{gpu}", _queue(gpu, steps.RING, steps.PACKETS, "work")),
            (f"counter{gpu}", _queue(gpu, steps.COUNTER_RING, steps.COUNTER_PACKETS, "counter")),
            (f"gpu{gpu}", _event),
        ]
        for layer in range(config.layers):
            plan += [
                (f"weights{gpu}.{layer}", _bo(gpu, weights, device.VRAM)),
                (f"optimizer{gpu}.{layer}", _bo(gpu, weights * 2, device.VRAM)),
            ]
    return plan


def _bo(gpu: int, size: int, flags: int) -> Make:
    def make(runtime: Runtime, record: Record) -> Bo:
        return device.allocate(runtime, record.gpu_ids[gpu], size, flags, _peers(record, flags))

    return make


def _peers(record: Record, flags: int) -> Sequence[int]:
    """Memory is mapped to every GPU: neighbours fetch from it."""
    return () if flags == device.DOORBELL else record.gpu_ids


def _queue(gpu: int, offset: int, packets: int, name: str) -> Make:
    def make(runtime: Runtime, record: Record) -> Queue:
        memory = record.bos[f"queues{gpu}"]
        return device.create_queue(
            runtime,
            memory,
            memory.address + offset,
            packets,
            record.bos[f"save.{name}{gpu}"],
            record.bos[f"doorbells{gpu}"],
        )

    return make


def _event(runtime: Runtime, record: Record) -> Event:
    return device.create_event(runtime, record.bos["events"], first=not record.events)


def _chunks(record: Record) -> list[tuple[int, int]]:
    """Address and length of all VRAM, in pieces of at most CHUNK bytes."""
    found = []
    for name, bo in record.bos.items():
        if name.startswith(("weights", "optimizer", "scratch")):
            for offset in range(0, bo.size, CHUNK):
                found.append((bo.address + offset, min(CHUNK, bo.size - offset)))
    return found


def _cpu_chunks(record: Record) -> list[tuple[int, int]]:
    return [
        (record.bos[f"results{gpu}"].address + RESULTS_SIZE, HISTORY_SIZE)
        for gpu in range(record.config.gpus)
    ]


# ---------------------------------------------------------------- command line


def size(text: str) -> int:
    """Bytes, with an optional suffix KiB, MiB or GiB."""
    for suffix, shift in (("KiB", 10), ("MiB", 20), ("GiB", 30)):
        if text.endswith(suffix):
            return int(text.removesuffix(suffix)) << shift
    return int(text)


def parse(arguments: Sequence[str] | None = None) -> Config:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train on the KFD ABI; the digest tells.")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seconds", type=float, help="train that long instead of --steps")
    parser.add_argument("--until", metavar="FILE", help="train until FILE exists")
    parser.add_argument("--vram", type=size, default=64 << 20, help="of all GPUs together")
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--pace", type=float, default=0.0, help="seconds to sleep each step")
    parser.add_argument("--delay-us", type=int, default=0, help="GPU time added to each step")
    parser.add_argument("--log", required=True, help="gets a line each step")
    parser.add_argument("--result", required=True, help="written once, at the end")
    parser.add_argument("--weights", help="safetensors file to fill the VRAM with")
    return convert(vars(parser.parse_args(arguments)), Config)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, or go on training where the predecessor was frozen."""
    runtime = Runtime.start()
    record = runtime.state(Record)
    if record is None:
        config = parse(arguments)
        record = Record(config=config, pids=(os.getpid(),), rng=config.seed or 1)
    elif runtime.restored:
        record = replace(record, pids=(*record.pids, os.getpid()))
    runtime.commit(record)
    runtime.drive(record, Training(runtime, record.config).advance)


if __name__ == "__main__":
    try:
        main()
    except (MigrateError, Corrupted, OSError) as failure:
        sys.exit(f"train: {failure}")
