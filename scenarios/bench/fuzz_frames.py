"""Mutated frames against the receiving side: ``python -m scenarios.bench.fuzz_frames``.

Two attackers, in turn: one on the wire, who changes, cuts, repeats and swaps sealed frames; and
an authenticated peer gone mad, whose frames are sealed rightly and hold mutated contents.
After each frame: only the errors meant for it came out, and no byte of staging that the table
calls known has changed except by a frame that was accepted with a right digest.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import sys
import time
from collections import Counter

from migrate.dataplane.channel import memory_pair, never
from migrate.dataplane.chunks import digest
from migrate.dataplane.frame import (
    PREFIX_SIZE,
    Direction,
    Kind,
    Lane,
    Opener,
    Sealer,
)
from migrate.dataplane.intake import Intake
from migrate.dataplane.messages import (
    Codec,
    ObjectInfo,
    ObjectKind,
    Run,
    pack_declare,
    pack_forget,
)
from migrate.dataplane.session import Session
from migrate.dataplane.wire import FrameReader, FrameWriter
from migrate.errors import MigrateError

CHUNK = 64 << 10
INFO = ObjectInfo(id=1, kind=ObjectKind.VRAM, size=3 * CHUNK + 100, chunk=CHUNK)
KEY = bytes(32)
ALLOWED = (MigrateError, EOFError, ConnectionError)


class NotHeld(Exception):
    """The receiver did what it must not."""


class Source:
    """Bytes that end: what the reader gets from the wire."""

    def __init__(self, data: bytes) -> None:
        self.check = never
        self._data = memoryview(data)

    def receive_into(self, view: memoryview) -> None:
        """See Channel."""
        if not len(self._data):
            raise EOFError
        if len(self._data) < len(view):
            self._data = self._data[:0]
            raise ConnectionError("cut")
        view[:] = self._data[: len(view)]
        self._data = self._data[len(view) :]

    def send(self, buffers: object) -> None:
        """Acknowledgements go nowhere."""

    def abort(self) -> None:
        """See Channel."""

    close = abort


class Fuzz:
    """One receiver session that outlives all attacks."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self.outcomes: Counter[str] = Counter()
        self._epoch = 0
        self._noise = self._rng.randbytes(CHUNK)
        self._start()

    def _start(self) -> None:
        self.session = Session(bytes(16), bytes(32), 1 << 20)
        self._feed(self._frames([(Kind.DECLARE, pack_declare(INFO), b"")]))
        self._feed(self._frames([self._good_run()]))

    def _lane(self) -> Lane:
        return Lane(direction=Direction.TO_DESTINATION, stream=0, epoch=self._epoch)

    def _frames(self, parts: list[tuple[Kind, bytes, bytes]]) -> bytes:
        self._epoch += 1
        sealer = Sealer(KEY, self._lane())
        return b"".join(bytes(b) for part in parts for b in sealer.seal(*part))

    def _good_run(self) -> tuple[Kind, bytes, bytes]:
        data = self._noise[:-8] + self._rng.randbytes(8)
        index = self._rng.randrange(3)
        run = Run(
            object_id=1,
            codec=Codec.RAW,
            offset=index * CHUNK,
            length=CHUNK,
            digests=digest(data),
        )
        return Kind.DATA, run.pack(), data

    def _duplicate(self) -> tuple[Kind, bytes, bytes]:
        """Of a chunk that may be there or not, to a place that may be the same."""
        first, second = self._rng.randrange(4), self._rng.randrange(3)
        known = self.session.staging.get(1).table.get(min(first, 2))
        run = Run(
            object_id=1,
            codec=Codec.DUPLICATE,
            offset=second * CHUNK,
            length=CHUNK,
            digests=known or self._rng.randbytes(16),
            origin=(self._rng.choice((1, 1, 1, 2)), first * CHUNK),
        )
        return Kind.DATA, run.pack(), b""

    def _feed(self, data: bytes) -> int:
        """Give bytes to a new connection of the session; returns the frames accepted."""
        channel = Source(data)
        reader = FrameReader(channel, Opener(KEY, self._lane()))
        back, _ = memory_pair(1 << 20)
        lane = Lane(direction=Direction.TO_SOURCE, stream=0, epoch=self._epoch)
        intake = Intake(self.session, reader, FrameWriter(back, Sealer(KEY, lane)))
        try:
            intake.run()
        except ALLOWED as error:
            self.outcomes[type(error).__name__] += 1
        return intake.placed

    def on_the_wire(self) -> None:
        """A frame changed by somebody without the key: nothing of it may be accepted."""
        sealed = bytearray(self._frames([self._good_run()]))
        before = self._known()
        mutated = self._mutate(sealed)
        accepted = self._feed(bytes(mutated))
        if accepted and not mutated.startswith(sealed):
            raise NotHeld("a forged frame was accepted")
        self._check(before)

    def by_a_mad_peer(self) -> None:
        """A frame sealed with the key, its contents mutated."""
        makers = (self._good_run, self._duplicate, self._declare, self._forget)
        kind, meta, payload = self._rng.choice(makers)()
        if self._rng.random() < 0.8:
            meta = bytes(self._mutate(bytearray(meta)))[:1000]
        if self._rng.random() < 0.5:
            payload = bytes(self._mutate(bytearray(payload)))[: 1 << 20]
        if self._rng.random() < 0.1:
            kind = self._rng.choice(list(Kind))
        before = self._known()
        self._feed(self._frames([(kind, meta, payload)]))
        self._check(before)
        if self.session.refusal is not None or not self._is_declared():
            self.outcomes["session refused"] += 1
            self.session.close()
            self._start()

    def _declare(self) -> tuple[Kind, bytes, bytes]:
        return Kind.DECLARE, pack_declare(INFO), b""

    def _forget(self) -> tuple[Kind, bytes, bytes]:
        return Kind.FORGET, pack_forget(9), b""

    def _mutate(self, data: bytearray) -> bytearray:
        rng = self._rng
        way = rng.randrange(6)
        head = min(len(data), PREFIX_SIZE + 80)
        if way == 0 and data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        elif way == 1 and data:
            del data[rng.randrange(len(data)) :]
        elif way == 2:
            at = rng.randrange(head + 1)
            data[at : at + rng.randrange(9)] = rng.randbytes(rng.randrange(9))
        elif way == 3 and data:
            data[rng.randrange(head)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
        elif way == 4:
            data += data[: rng.randrange(200)]
        else:
            at, length = rng.randrange(head + 1), rng.randrange(1, 9)
            data[at : at + length] = b"\xff" * len(data[at : at + length])
        return data

    def _is_declared(self) -> bool:
        return 1 in {o.id for o in self.session.staging.objects()}  # or a mad peer forgot it

    def _known(self) -> dict[int, bytes]:
        """Digest by chunk, of the bytes themselves, where the table says it is known."""
        if not self._is_declared():
            return {}
        staged = self.session.staging.get(1)
        return {
            index: found
            for index in range(staged.table.count)
            if (found := staged.table.get(index)) is not None
        }

    def _check(self, before: dict[int, bytes]) -> None:
        if not self._is_declared():
            return
        staged = self.session.staging.get(1)
        for index, found in self._known().items():
            data = staged.memory[index * CHUNK : (index + 1) * CHUNK]
            if digest(data) != found:
                raise NotHeld(f"chunk {index} is called known and is not")
            if before.get(index) != found and data[:64] not in (self._noise[:64], bytes(64)):
                raise NotHeld(f"chunk {index} holds what nobody sent")

    def run(self, count: int) -> None:
        """*count* mutated frames, half by each attacker."""
        for number in range(count):
            if number % 2:
                self.by_a_mad_peer()
            else:
                self.on_the_wire()


def main(arguments: list[str] | None = None) -> int:
    """The command line; prints one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1_000_000, help="frames")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    began = time.monotonic()
    fuzz = Fuzz(options.seed)
    fuzz.run(min(1000, options.count))
    early = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fuzz.run(max(0, options.count - 1000))
    late = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = {
        "frames": options.count,
        "seed": options.seed,
        "seconds": round(time.monotonic() - began, 1),
        "outcomes": dict(fuzz.outcomes),
        "max_rss_kib_after_1000": early,
        "max_rss_kib": late,
    }
    sys.stdout.write(json.dumps(result, indent=2) + "\n")
    return 0 if late < early * 1.2 + 10_000 else 1


if __name__ == "__main__":
    sys.exit(main())
