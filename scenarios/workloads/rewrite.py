"""A program that rewrites a share of its VRAM over and over, for measuring pre-copy.

    python -m scenarios.workloads.rewrite --vram BYTES --share 0.05 --log LOG

All of the VRAM is noise. The same first part of every buffer is written anew, as long as the
program runs, so between any two rounds longer than a pass just that share is dirty. The log
gets a line for each pass.
"""

from __future__ import annotations

import argparse
import os
import time

import msgspec
import numpy as np

from migrate.decode import convert
from migrate.engine.runtime import Runtime, view
from migrate.model import Value
from scenarios.workloads import device
from scenarios.workloads.device import Bo

BUFFER = 256 << 20  # bytes of a buffer at most
PIECE = 1 << 20
PAUSE = 0.002  # seconds between pieces: the machine is not for this program alone


class Record(Value):
    """All of the program's state. ``filled``: bytes of noise so far; ``passes`` done."""

    log: str
    vram: int
    share: float
    gpus: tuple[int, ...] = ()
    bos: tuple[Bo, ...] = ()
    filled: int = 0
    passes: int = 0
    next: int = 0  # piece of the pass under way


def noise(seed: int) -> bytes:
    """One piece that nothing compresses."""
    return np.random.default_rng(seed).integers(0, 256, PIECE, dtype=np.uint8).tobytes()


class Rewrite:
    """One operation a call; each may be repeated from its middle."""

    def __init__(self, runtime: Runtime, record: Record) -> None:
        self._runtime = runtime
        self._log = os.open(record.log, os.O_CREAT | os.O_WRONLY, 0o600)
        self._blocks = [noise(seed) for seed in range(16)]

    def advance(self, record: Record) -> Record:
        """The next operation."""
        replace = msgspec.structs.replace
        if not record.gpus:
            with self._runtime.indivisible():
                gpus = device.open_gpus(self._runtime)
                return self._commit(replace(record, gpus=gpus))
        held = sum(bo.size for bo in record.bos)
        if held < record.vram:
            size = min(BUFFER, record.vram - held)
            gpu = record.gpus[len(record.bos) % len(record.gpus)]
            with self._runtime.indivisible():
                bo = device.allocate(self._runtime, gpu, size, device.VRAM)
                return self._commit(replace(record, bos=(*record.bos, bo)))
        if record.filled < record.vram:
            self._write(record.bos, record.filled, 0)
            return replace(record, filled=record.filled + PIECE)
        return self._rewrite(record)

    def _commit(self, record: Record) -> Record:
        self._runtime.commit(record)
        return record

    def _rewrite(self, record: Record) -> Record:
        replace = msgspec.structs.replace
        hot = [
            (number, at)
            for number, bo in enumerate(record.bos)
            for at in range(0, int(bo.size * record.share), PIECE)
        ]
        if record.next >= len(hot):
            os.pwrite(self._log, b"pass\n", record.passes * 5)
            return replace(record, passes=record.passes + 1, next=0)
        number, at = hot[record.next]
        before = sum(bo.size for bo in record.bos[:number])
        self._write(record.bos, before + at, record.passes + 1)
        time.sleep(PAUSE)
        return replace(record, next=record.next + 1)

    def _write(self, bos: tuple[Bo, ...], position: int, version: int) -> None:
        """One piece at *position* of all VRAM; no two pieces are the same."""
        at = position
        for bo in bos:
            if at < bo.size:
                length = min(PIECE, bo.size - at)
                data = bytearray(self._blocks[(position // PIECE + version) % 16])
                for start in range(0, PIECE, 64 << 10):  # differs in every chunk
                    mark = (position + start) << 32 | version
                    data[start : start + 16] = mark.to_bytes(16, "little")
                view(bo.address, bo.size)[at : at + length] = data[:length]
                return
            at -= bo.size


def main() -> None:
    """The command line; runs until it is killed."""
    runtime = Runtime.start()
    record = runtime.state(Record)
    if record is None:
        parser = argparse.ArgumentParser()
        parser.add_argument("--vram", type=int, required=True)
        parser.add_argument("--share", type=float, default=0.05)
        parser.add_argument("--log", required=True)
        record = convert(vars(parser.parse_args()), Record)
    runtime.commit(record)
    program = Rewrite(runtime, record)
    while True:
        record = program.advance(record)
        runtime.commit(record)


if __name__ == "__main__":
    main()
