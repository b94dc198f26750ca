"""The wire is cut, altered and repeated; senders die and come back."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator

import pytest

from migrate.dataplane.access import MemoryAccess
from migrate.dataplane.channel import Channel, TcpListener, connect_tcp
from migrate.dataplane.memory import MmapAccess
from migrate.dataplane.messages import ObjectInfo, ObjectKind
from migrate.dataplane.receiver import Receiver, Session
from migrate.dataplane.sender import Sender
from migrate.errors import StreamBroken
from scenarios.bench import cuts
from scenarios.bench.cuts import CountingAead

MIB = 1 << 20
CHUNK = 64 << 10
SECRET = bytes(range(32))
SESSION = bytes(16)


class Proxy:
    """Forwards connections; ``meddle(connection, position, data)`` may alter or end them.

    It is called with what the source sends; None ends the connection there.
    """

    def __init__(self, port: int, meddle: Callable[[int, int, bytes], bytes | None]) -> None:
        self._target = port
        self._meddle = meddle
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._server.getsockname()[1]
        self.connections = 0
        self._sockets = [self._server]
        self._threads: list[threading.Thread] = []
        self._spawn(self._accept)

    def _spawn(self, work: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=work, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._server.accept()
                self._sockets.append(near)
                far = socket.create_connection(("127.0.0.1", self._target))
                self._sockets.append(far)
                number = self.connections
                self.connections += 1
                self._spawn(self._inward, number, near, far)
                self._spawn(self._outward, near, far)

    def _inward(self, number: int, near: socket.socket, far: socket.socket) -> None:
        position = 0
        with contextlib.suppress(OSError):
            while data := near.recv(64 << 10):
                passed = self._meddle(number, position, data)
                position += len(data)
                if passed is None:
                    break
                far.sendall(passed)
        shut(near, far)
        near.close()  # with bytes unread: the source sees a reset
        far.close()

    def _outward(self, near: socket.socket, far: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := far.recv(64 << 10):
                near.sendall(data)
        shut(near, far)

    def close(self) -> None:
        shut(self._server)
        self._threads[0].join()
        shut(*self._sockets)
        for thread in self._threads:
            thread.join()
        for sock in self._sockets:
            sock.close()


def shut(*sockets: socket.socket) -> None:
    for sock in sockets:
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)


@pytest.fixture(autouse=True)
def _count_anew() -> None:
    CountingAead.used = Counter()


@pytest.fixture
def receiver() -> Iterator[tuple[int, Session]]:
    listener = TcpListener("127.0.0.1")
    receiver = Receiver(listener, aead=CountingAead)
    receiver.start()
    yield listener.port, receiver.open_session(SESSION, SECRET, 64 * MIB)
    receiver.close()


def make_sender(port: int, epochs: Iterator[int], timeout: float = 30.0) -> Sender:
    def connect(stream: int) -> Channel:
        return connect_tcp("127.0.0.1", port)

    return Sender(
        connect,
        SECRET,
        SESSION,
        lambda: next(epochs),
        window=4 * MIB,
        reconnect_timeout=timeout,
        aead=CountingAead,
    )


def random_object(size: int) -> MmapAccess:
    fd = os.memfd_create("object", os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    os.pwrite(fd, os.urandom(size), 0)
    return MmapAccess(fd, size)


def described(access: MemoryAccess) -> list[tuple[ObjectInfo, MemoryAccess]]:
    return [(ObjectInfo(id=1, kind=ObjectKind.VRAM, size=access.size, chunk=CHUNK), access)]


def assert_same(session: Session, sender: Sender, source: MmapAccess) -> None:
    target = random_object(source.size)
    session.staging.place(1, target)
    session.staging.verify(1, target, sender.manifest()[1][1])
    ours, theirs = bytearray(source.size), bytearray(source.size)
    source.read(0, memoryview(ours))
    target.read(0, memoryview(theirs))
    assert ours == theirs


@pytest.mark.parametrize("still", [False, True], ids=["copied", "in-place"])
def test_thirty_cuts_at_random_bytes(receiver: tuple[int, Session], still: bool) -> None:
    port, session = receiver
    count = 30
    rng = random.Random(7)
    budget = {n: rng.choice([rng.randrange(200), rng.randrange(3 * MIB)]) for n in range(count)}
    stored = Counter[int]()

    def meddle(connection: int, position: int, data: bytes) -> bytes | None:
        left = budget.get(connection)
        if left is None or position + len(data) <= left:
            return data
        return None

    count_commits(session, stored)
    proxy = Proxy(port, meddle)
    data = random_object(48 * MIB)
    sender = make_sender(proxy.port, itertools.count(1))
    stats = sender.send_round(described(data), still=still)
    assert proxy.connections > 20, "the cuts did not happen"
    assert stats.reconnects >= proxy.connections - 2
    assert stats.scanned == stats.changed == 48 * MIB
    assert stats.resent <= 4 * MIB * proxy.connections
    # A run that was placed was never taken in again: what is stated is not sent again.
    assert set(stored.values()) == {1}
    assert_same(session, sender, data)
    sender.close()
    proxy.close()
    assert set(CountingAead.used.values()) == {1}


def count_commits(session: Session, stored: Counter[int]) -> None:
    """Count, for each chunk, how often it is placed in staging."""
    declare = session.staging.declare

    def counting(info: ObjectInfo) -> None:
        declare(info)
        staged = session.staging.get(info.id)
        commit = staged.commit

        def commit_and_count(offset: int, length: int, digests: bytes) -> None:
            commit(offset, length, digests)
            stored.update(range(offset // CHUNK, (offset + length) // CHUNK))

        if "commit" not in vars(staged):
            staged.commit = commit_and_count  # type: ignore[method-assign]

    session.staging.declare = counting  # type: ignore[method-assign]


def test_a_flipped_byte_is_refused_and_sent_anew(receiver: tuple[int, Session]) -> None:
    port, session = receiver
    flipped: list[int] = []

    def meddle(connection: int, position: int, data: bytes) -> bytes:
        if connection < 4 and position <= 600_000 < position + len(data):
            altered = bytearray(data)
            altered[600_000 - position] ^= 0x40
            flipped.append(connection)
            return bytes(altered)
        return data

    proxy = Proxy(port, meddle)
    data = random_object(8 * MIB)
    sender = make_sender(proxy.port, itertools.count(1))
    stats = sender.send_round(described(data))
    # Most often all four; a stream that the other was much quicker than had less to send.
    assert len(flipped) >= 2
    assert session.rejected == len(flipped)
    assert stats.reconnects >= len(flipped)
    assert_same(session, sender, data)
    sender.close()
    proxy.close()


def test_a_wire_that_always_alters_ends_in_an_error(receiver: tuple[int, Session]) -> None:
    port, session = receiver

    def meddle(connection: int, position: int, data: bytes) -> bytes:
        return data if position < 88 else bytes(b ^ 1 for b in data)

    proxy = Proxy(port, meddle)
    sender = make_sender(proxy.port, itertools.count(1), timeout=0.5)
    with pytest.raises(StreamBroken, match="made no progress"):
        sender.send_round(described(random_object(MIB)))
    assert session.rejected
    assert session.staging.objects() == ()
    sender.close()
    proxy.close()


def test_a_restarted_sender_sends_only_what_is_not_held(receiver: tuple[int, Session]) -> None:
    port, session = receiver
    epochs = itertools.count(1)
    data = random_object(8 * MIB)
    first = make_sender(port, epochs)
    first.send_round(described(data))
    data.write(3 * MIB, memoryview(b"new"))
    second = make_sender(port, epochs)  # the first is not even closed: it was killed
    second.resume()
    stats = second.send_round(described(data))
    assert (stats.changed, stats.unchanged) == (CHUNK, 8 * MIB - CHUNK)
    assert_same(session, second, data)
    assert set(CountingAead.used.values()) == {1}
    first.close()
    second.close()


def test_a_sender_that_dies_in_the_middle_is_resumed(receiver: tuple[int, Session]) -> None:
    port, session = receiver
    epochs = itertools.count(1)
    stored = Counter[int]()
    count_commits(session, stored)
    dead = threading.Event()

    def meddle(connection: int, position: int, data: bytes) -> bytes | None:
        return None if position > 2 * MIB or dead.is_set() else data

    proxy = Proxy(port, meddle)
    data = random_object(16 * MIB)
    first = make_sender(proxy.port, epochs)
    cancel = threading.Event()

    def progress(scanned: int, total: int) -> None:
        if sum(stored.values()) > 32:
            dead.set()
            cancel.set()

    with contextlib.suppress(Exception):
        first.send_round(described(data), progress, cancel)
    first.close()
    second = make_sender(port, epochs)
    second.resume()
    placed = sum(session.staging.get(1).table.known)
    assert placed > 16
    stats = second.send_round(described(data))
    assert stats.unchanged == placed * CHUNK
    assert set(stored.values()) == {1}
    assert_same(session, second, data)
    assert set(CountingAead.used.values()) == {1}
    second.close()
    proxy.close()


@pytest.mark.parametrize(
    "opening",
    [b"", b"GET / HTTP/1.1\r\n\r\n" * 10, b"MIGH" + bytes(200), bytes(range(256)) * 64],
)
def test_strangers_are_dropped_and_harm_nobody(
    receiver: tuple[int, Session], opening: bytes
) -> None:
    port, session = receiver
    with socket.create_connection(("127.0.0.1", port)) as stranger:
        stranger.settimeout(30)
        with contextlib.suppress(ConnectionError):
            stranger.sendall(opening)
            if not opening:
                stranger.shutdown(socket.SHUT_WR)
            while stranger.recv(4096):
                pass
    sender = make_sender(port, itertools.count(1))
    data = random_object(MIB)
    sender.send_round(described(data))
    assert_same(session, sender, data)
    sender.close()


@pytest.mark.soak
def test_cuts_at_random_bytes_and_moments() -> None:
    """The evidence has 1,000 of them."""
    found = cuts.run(150, seed=5)
    assert cuts.is_right(found), found
    assert found.sender_restarts
