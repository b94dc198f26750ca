"""A program that allocates and frees buffers all the time, and checks what is in them.

    python -m tests.integration.churn --log LOG --until FILE [--hold BYTES]

With --hold it has one buffer of that size instead (sparse: nothing is written to it); with
--swap FILE it fills that, frees that once FILE exists, and a little later allocates as much again.
Each line of the log is one operation; "ok" is the last one if every buffer held what was
written into it, wherever the program was moved meanwhile.
"""

from __future__ import annotations

import argparse
import errno
import os
import time
from pathlib import Path

import msgspec

from migrate.engine.runtime import Runtime, view
from migrate.model import Value
from scenarios.workloads import device
from scenarios.workloads.device import Bo

SIZES = (64 << 10, 1 << 20, 4096, 2 << 20)
LIVE = 6  # buffers at a time
PACE = 0.003  # seconds
SWAP_PAUSE = 3.0  # seconds between a free and the next allocation of the same size


class Record(Value):
    """All of the program's state. ``made``: buffers so far, the newest of ``bos`` last."""

    log: str
    until: str
    hold: int
    swap: str = ""
    swapped: bool = False
    gpus: tuple[int, ...] = ()
    bos: tuple[Bo, ...] = ()
    made: int = 0
    filled: int = 0
    offset: int = 0


def pattern(bo: Bo) -> bytes:
    return bo.address.to_bytes(8, "little") * 512


def check(bo: Bo) -> None:
    memory = view(bo.address, bo.size)
    for at in range(0, bo.size, 4096):
        if memory[at : at + 4096] != pattern(bo):
            raise SystemExit(f"churn: the buffer at {bo.address:#x} lost what was in it")


class Churn:
    """One operation a call; each may be repeated from its middle."""

    def __init__(self, runtime: Runtime, record: Record) -> None:
        self.runtime = runtime
        self.log = os.open(record.log, os.O_CREAT | os.O_WRONLY, 0o600)

    def advance(self, record: Record) -> Record | None:
        if not record.gpus:
            with self.runtime.indivisible():
                gpus = device.open_gpus(self.runtime)
                return self._commit(msgspec.structs.replace(record, gpus=gpus))
        if record.filled < record.made:
            return self._fill(record)
        if Path(record.until).exists():
            self._end(record)
            return None
        if len(record.bos) >= (1 if record.hold else LIVE):
            return self._free(record)
        return self._allocate(record)

    def _commit(self, record: Record) -> Record:
        self.runtime.commit(record)
        return record

    def _allocate(self, record: Record) -> Record:
        gpu = record.gpus[0 if record.hold else record.made % len(record.gpus)]
        size = record.hold or SIZES[record.made % len(SIZES)]
        with self.runtime.indivisible():
            try:
                bo = device.allocate(self.runtime, gpu, size, device.VRAM)
            except OSError as error:
                if not record.swapped or error.errno != errno.ENOMEM:
                    raise
                time.sleep(0.1)
                return self._say(record, "ENOMEM")
            return self._commit(
                msgspec.structs.replace(record, bos=(*record.bos, bo), made=record.made + 1)
            )

    def _fill(self, record: Record) -> Record:
        bo = record.bos[-1]
        if record.swap:
            view(bo.address, bo.size)[:] = os.urandom(bo.size)
        elif not record.hold:
            view(bo.address, bo.size)[:] = pattern(bo) * (bo.size // 4096)
        return self._say(record, f"filled {record.made}", filled=record.made)

    def _free(self, record: Record) -> Record:
        time.sleep(PACE)
        if record.hold:
            if not record.swap or record.swapped or not Path(record.swap).exists():
                return self._say(record, "holds")
            record = self._say(record, "swapping")
            with self.runtime.indivisible():
                device.free(self.runtime, record.bos[0])
                time.sleep(SWAP_PAUSE)
                return self._commit(msgspec.structs.replace(record, bos=(), swapped=True))
        oldest, *rest = record.bos
        check(oldest)
        with self.runtime.indivisible():
            device.free(self.runtime, oldest)
            return self._commit(msgspec.structs.replace(record, bos=tuple(rest)))

    def _end(self, record: Record) -> None:
        for bo in record.bos:
            if not record.hold:
                check(bo)
        self._say(record, "ok")

    def _say(self, record: Record, line: str, filled: int | None = None) -> Record:
        text = f"{line}\n".encode()
        os.pwrite(self.log, text, record.offset)
        return msgspec.structs.replace(
            record,
            offset=record.offset + len(text),
            filled=record.filled if filled is None else filled,
        )


def main() -> None:
    runtime = Runtime.start()
    record = runtime.state(Record)
    if record is None:
        parser = argparse.ArgumentParser()
        parser.add_argument("--log", required=True)
        parser.add_argument("--until", required=True)
        parser.add_argument("--hold", type=int, default=0)
        parser.add_argument("--swap", default="")
        record = msgspec.convert(vars(parser.parse_args()), Record)
    runtime.commit(record)
    runtime.drive(record, Churn(runtime, record).advance)


if __name__ == "__main__":
    main()
