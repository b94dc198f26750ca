"""Cuts at random bytes and moments: ``python -m scenarios.bench.cuts --cuts 1000 --seed 1``.

Migrations of random memory, one after another, until so many connections were cut: each ends
after a random number of bytes in one of its directions, or after a random time. Now and then
the sender dies, too, and another one goes on. Prints one JSON document; exit code 0 if

* every migration completed and its memory was placed, read back and found right
* nothing that the receiver had stated was sent again (no chunk was placed twice)
* bytes sent again are at most window × cuts, the window of a stream being printed
* no key was used twice with one nonce, over all connections and senders
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import ClassVar

import msgspec
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from migrate.dataplane.access import Buffer, MemoryAccess
from migrate.dataplane.channel import Channel, Check, TcpListener, connect_tcp
from migrate.dataplane.memory import MmapAccess
from migrate.dataplane.messages import ObjectInfo, ObjectKind
from migrate.dataplane.receiver import Receiver, Session
from migrate.dataplane.sender import Sender
from migrate.dataplane.staging import StagedObject
from migrate.errors import Cancelled, MigrateError
from migrate.model import Value

MIB = 1 << 20
CHUNK = 64 << 10
SIZE = 24 * MIB  # bytes of a migration
WINDOW = 4 * MIB  # of a stream
CUTS_EACH = 16  # of a migration at most, or it would never end
LONGEST = 0.2  # seconds until a cut by time
RESTARTS = 4  # every so many migrations the sender dies in the middle


class Found(Value):
    """What came of it."""

    seed: int
    cuts: int
    migrations: int
    completed: int
    sender_restarts: int
    window_bytes: int
    bytes_sent_again: int
    most_allowed: int
    chunks_placed_twice: int
    key_nonce_pairs: int
    pairs_used_twice: int
    digests_wrong: int
    seconds: float


class CountingAead:
    """AES-GCM that remembers each pair of key and nonce it sealed with."""

    used: ClassVar[Counter[tuple[bytes, bytes]]] = Counter()

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._aead = AESGCM(key)

    def encrypt_into(
        self, nonce: Buffer, data: Buffer, associated_data: Buffer | None, buf: Buffer
    ) -> int:
        """See Aead."""
        self.used[(self._key, bytes(nonce))] += 1
        return self._aead.encrypt_into(nonce, data, associated_data, buf)

    def decrypt_into(
        self, nonce: Buffer, data: Buffer, associated_data: Buffer | None, buf: Buffer
    ) -> int:
        """See Aead."""
        return self._aead.decrypt_into(nonce, data, associated_data, buf)


class CutChannel:
    """A channel that ends after *outward* bytes sent, *inward* received, or *seconds*."""

    def __init__(self, channel: Channel, outward: int, inward: int, seconds: float) -> None:
        self._channel = channel
        self._outward = outward
        self._inward = inward
        self.was_cut = False
        self._timer = threading.Timer(seconds, self._cut)
        self._timer.daemon = True
        self._timer.start()

    @property
    def check(self) -> Check:
        """See Channel."""
        return self._channel.check

    @check.setter
    def check(self, check: Check) -> None:
        self._channel.check = check

    def _cut(self) -> None:
        self.was_cut = True
        self._channel.abort()

    def send(self, buffers: Sequence[Buffer]) -> None:
        """See Channel."""
        whole = b"".join(bytes(b) for b in buffers)
        if len(whole) > self._outward:
            self._channel.send([whole[: self._outward]])
            self._cut()
            raise BrokenPipeError("cut")
        self._outward -= len(whole)
        self._channel.send(buffers)

    def receive_into(self, view: memoryview) -> None:
        """See Channel."""
        if len(view) > self._inward:
            self._cut()
            raise ConnectionResetError("cut")
        self._inward -= len(view)
        self._channel.receive_into(view)

    def abort(self) -> None:
        """See Channel."""
        self._channel.abort()

    def close(self) -> None:
        """See Channel."""
        self._timer.cancel()
        self._channel.close()


class Soak:
    """All of it."""

    def __init__(self, seed: int) -> None:
        self._dice = random.Random(seed)
        self._listener = TcpListener("127.0.0.1")
        self._receiver = Receiver(self._listener, aead=CountingAead)
        self._receiver.start()
        self._left = 0  # cuts that the migration under way may still have
        self._channels: list[CutChannel] = []
        self.again = self.twice = self.completed = self.restarts = self.wrong = 0

    @property
    def cuts(self) -> int:
        """Connections that were cut so far."""
        return sum(channel.was_cut for channel in self._channels)

    def connect(self, _stream: int) -> Channel:
        """A connection that will be cut, as long as the migration has cuts left."""
        channel = connect_tcp("127.0.0.1", self._listener.port)
        if not self._left:
            return channel
        self._left -= 1
        dice, never = self._dice, 1 << 60
        outward, inward, seconds = never, never, 1e6
        match dice.randrange(5):
            case 0:
                outward = dice.randrange(400)  # in the hello or the first frames
            case 1 | 2:
                outward = dice.randrange(3 * WINDOW)
            case 3:
                inward = dice.randrange(2000)
            case _:
                seconds = dice.random() * LONGEST
        cut = CutChannel(channel, outward, inward, seconds)
        self._channels.append(cut)
        return cut

    def migrate(self, number: int) -> None:
        """One migration, from an empty session to memory that was read back."""
        session_id, secret = number.to_bytes(16, "big"), self._dice.randbytes(32)
        session = self._receiver.open_session(session_id, secret, SIZE)
        placed = Placed()
        info = ObjectInfo(id=1, kind=ObjectKind.VRAM, size=SIZE, chunk=CHUNK)
        session.staging.declare(info)
        _count(session.staging.get(1), placed)
        source = _memory(self._dice.randbytes(SIZE))
        epochs = itertools.count(1)
        self._left = CUTS_EACH
        sender = self._sender(secret, session_id, epochs)
        if number % RESTARTS == 0:
            sender = self._killed(sender, info, source, placed, secret, session_id, epochs)
        stats = sender.send_round([(info, source)])
        self.again += stats.resent
        self.twice += sum(count - 1 for count in placed.values())
        self._check(session, sender, source)
        sender.close()
        source.close()
        self._receiver.close_session(session_id)
        self.completed += 1

    def _sender(self, secret: bytes, session_id: bytes, epochs: Iterator[int]) -> Sender:
        return Sender(
            self.connect,
            secret,
            session_id,
            lambda: next(epochs),
            window=WINDOW,
            reconnect_timeout=120.0,
            aead=CountingAead,
        )

    def _killed(
        self,
        sender: Sender,
        info: ObjectInfo,
        source: MemoryAccess,
        placed: Placed,
        secret: bytes,
        session_id: bytes,
        epochs: Iterator[int],
    ) -> Sender:
        """Let the sender get somewhere, drop it, and have another one go on."""
        # Half of it at most: what is in flight then is too little for the rest of the way.
        placed.enough = self._dice.randrange(SIZE // CHUNK // 2)
        try:
            sender.send_round([(info, source)], cancel=placed.reached)
        except Cancelled:
            self.restarts += 1
        sender.close()
        another = self._sender(secret, session_id, epochs)
        another.resume()
        return another

    def _check(self, session: Session, sender: Sender, source: MmapAccess) -> None:
        target = _memory(bytes(SIZE))
        try:
            session.staging.place(1, target)
            session.staging.verify(1, target, sender.manifest()[1][1])
        except MigrateError:
            self.wrong += 1
        ours, theirs = bytearray(SIZE), bytearray(SIZE)
        source.read(0, memoryview(ours))
        target.read(0, memoryview(theirs))
        self.wrong += ours != theirs
        target.close()

    def close(self) -> None:
        """End the receiver."""
        self._receiver.close()


class Placed(Counter[int]):
    """How often each chunk was placed; ``reached`` is set once *enough* were."""

    def __init__(self) -> None:
        super().__init__()
        self.enough = SIZE
        self.reached = threading.Event()


def _count(staged: StagedObject, placed: Placed) -> None:
    """Count for each chunk how often it is placed."""
    commit = staged.commit

    def counting(offset: int, length: int, digests: bytes) -> None:
        commit(offset, length, digests)
        placed.update(range(offset // CHUNK, (offset + length) // CHUNK))
        if len(placed) >= placed.enough:
            placed.reached.set()

    staged.commit = counting  # type: ignore[method-assign]


def _memory(data: bytes) -> MmapAccess:
    fd = os.memfd_create("cuts", os.MFD_CLOEXEC)
    os.ftruncate(fd, len(data))
    os.pwrite(fd, data, 0)
    return MmapAccess(fd, len(data))


def run(cuts: int, seed: int) -> Found:
    """Migrations until so many connections were cut."""
    CountingAead.used = Counter()
    began = time.monotonic()
    soak = Soak(seed)
    numbers = itertools.count(1)
    try:
        while soak.cuts < cuts:
            soak.migrate(number := next(numbers))
    finally:
        soak.close()
    used = CountingAead.used
    return Found(
        seed=seed,
        cuts=soak.cuts,
        migrations=number,
        completed=soak.completed,
        sender_restarts=soak.restarts,
        window_bytes=WINDOW,
        bytes_sent_again=soak.again,
        most_allowed=WINDOW * soak.cuts,
        chunks_placed_twice=soak.twice,
        key_nonce_pairs=len(used),
        pairs_used_twice=sum(count > 1 for count in used.values()),
        digests_wrong=soak.wrong,
        seconds=round(time.monotonic() - began, 1),
    )


def is_right(found: Found) -> bool:
    """Whether all holds."""
    return (
        found.completed == found.migrations
        and not found.chunks_placed_twice
        and found.bytes_sent_again <= found.most_allowed
        and not found.pairs_used_twice
        and not found.digests_wrong
    )


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m scenarios.bench.cuts", description=__doc__)
    parser.add_argument("--cuts", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    found = run(options.cuts, options.seed)
    sys.stdout.write(json.dumps(msgspec.to_builtins(found), indent=2) + "\n")
    return 0 if is_right(found) else 1


if __name__ == "__main__":
    sys.exit(main())
