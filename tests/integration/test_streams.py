"""Objects through real streams: sender → channel → receiver → staging → target → verified."""

from __future__ import annotations

import gc
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest

from migrate.dataplane.access import MemoryAccess
from migrate.dataplane.channel import Channel, MemoryListener, TcpListener, connect_tcp
from migrate.dataplane.chooser import FixedChooser, Packed
from migrate.dataplane.codecs import Encoder
from migrate.dataplane.frame import MAX_PAYLOAD
from migrate.dataplane.intake import Intake
from migrate.dataplane.memory import BytesAccess, MmapAccess
from migrate.dataplane.messages import ObjectInfo, ObjectKind
from migrate.dataplane.receiver import Receiver, Session
from migrate.dataplane.scan import LENT, SpanScan, What
from migrate.dataplane.sender import Sender
from migrate.dataplane.source import Span
from migrate.dataplane.stream import SourceStream
from migrate.errors import (
    Cancelled,
    FrameRejected,
    InsufficientMemory,
    MigrationFailed,
    StreamBroken,
    VerificationFailed,
)

CHUNK = 64 << 10
MIB = 1 << 20


@dataclass
class Rig:
    """A receiver with one session, and senders to it."""

    receiver: Receiver
    session: Session
    connect: Callable[[int], Channel]
    secret: bytes
    epochs: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    senders: list[Sender] = field(default_factory=list)

    def sender(self, **options: object) -> Sender:
        arguments: dict[str, object] = {"reconnect_timeout": 10.0, **options}
        connect = arguments.pop("connect", self.connect)
        sender = Sender(
            connect,  # type: ignore[arg-type]
            self.secret,
            self.session.id,
            lambda: next(self.epochs),
            **arguments,  # type: ignore[arg-type]
        )
        self.senders.append(sender)
        return sender


@pytest.fixture(params=["tcp", "memory"])
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    listener: TcpListener | MemoryListener
    connect: Callable[[int], Channel]
    if request.param == "tcp":
        tcp = listener = TcpListener("127.0.0.1")

        def connect(stream: int) -> Channel:
            return connect_tcp("127.0.0.1", tcp.port)
    else:
        memory = listener = MemoryListener()

        def connect(stream: int) -> Channel:
            return memory.connect()

    receiver = Receiver(listener)
    receiver.start()
    session_id, secret = os.urandom(16), os.urandom(32)
    session = receiver.open_session(session_id, secret, 64 * MIB)
    rig = Rig(receiver, session, connect, secret)
    yield rig
    for sender in rig.senders:
        sender.close()
    receiver.close()


def memfd_of(content: bytes) -> int:
    fd = os.memfd_create("object", os.MFD_CLOEXEC)
    os.pwrite(fd, content, 0)
    return fd


def memfd(size: int, content: bytes = b"") -> MmapAccess:
    fd = os.memfd_create("object", os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    os.pwrite(fd, content, 0)
    return MmapAccess(fd, size)


def read_all(access: MemoryAccess) -> bytes:
    data = bytearray(access.size)
    access.read(0, memoryview(data))
    return bytes(data)


def info(object_id: int, access: MemoryAccess) -> ObjectInfo:
    return ObjectInfo(id=object_id, kind=ObjectKind.VRAM, size=access.size, chunk=CHUNK)


def objects(*accesses: MemoryAccess) -> list[tuple[ObjectInfo, MemoryAccess]]:
    return [(info(i, access), access) for i, access in enumerate(accesses, start=1)]


def place_and_verify(session: Session, sender: Sender, object_id: int) -> bytes:
    size, digests = sender.manifest()[object_id]
    target = memfd(size)
    session.staging.place(object_id, target)
    session.staging.verify(object_id, target, digests)
    data = read_all(target)
    target.close()
    return data


def test_rounds_bring_the_destination_to_the_last_contents(rig: Rig) -> None:
    holes = os.urandom(3 * MIB) + bytes(5 * MIB) + os.urandom(2 * MIB + 17)
    first, blob = memfd(len(holes), holes), BytesAccess(os.urandom(100))
    sender = rig.sender()
    begun = sender.send_round(objects(first, blob))
    assert begun.scanned == begun.changed == len(holes) + 100
    assert begun.zero == 5 * MIB
    assert begun.wire < len(holes) - 4 * MIB
    again = sender.send_round(objects(first, blob))
    assert (again.changed, again.wire) == (0, 0)
    first.write(7 * MIB + 5, memoryview(b"dirty"))
    last = sender.send_round(objects(first, blob))
    assert last.changed == CHUNK
    assert place_and_verify(rig.session, sender, 1) == read_all(first)
    assert place_and_verify(rig.session, sender, 2) == read_all(blob)


class Counted(MmapAccess):
    """Memory that says how much of it was copied."""

    copied = 0

    def read(self, offset: int, into: memoryview) -> None:
        super().read(offset, into)
        self.copied += len(into)


def test_what_the_destination_holds_is_looked_at_and_not_copied(rig: Rig) -> None:
    size = 9 * MIB + 17
    fd = os.memfd_create("object", os.MFD_CLOEXEC)
    os.pwrite(fd, os.urandom(2 * MIB) + bytes(MIB) + os.urandom(size - 3 * MIB), 0)
    data, sender = Counted(fd, size), rig.sender()
    sender.send_round(objects(data))
    assert data.copied == size
    data.write(5 * MIB, memoryview(b"dirty"))
    again = sender.send_round(objects(data))
    assert (again.scanned, again.changed, again.unchanged) == (size, CHUNK, size - CHUNK)
    assert data.copied == size + MAX_PAYLOAD, "one piece differs"
    assert place_and_verify(rig.session, sender, 1) == os.pread(fd, size, 0)


def test_what_stands_still_is_not_copied_but_for_its_holes(rig: Rig) -> None:
    size = 9 * MIB + 17
    fd = os.memfd_create("object", os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    os.pwrite(fd, os.urandom(4 * MIB) + bytes(MIB) + os.urandom(size - 7 * MIB), 0)
    data, sender = Counted(fd, size), rig.sender()
    begun = sender.send_round(objects(data), still=True)
    assert (begun.scanned, begun.changed, begun.zero) == (size, size, 3 * MIB + 17 - CHUNK)
    assert data.copied == MAX_PAYLOAD + MIB + 17, "the piece that holes begin in, and the last"
    assert place_and_verify(rig.session, sender, 1) == os.pread(fd, size, 0)


def test_the_last_round_of_several_may_stand_still(rig: Rig) -> None:
    data, sender = Counted(memfd_of(os.urandom(6 * MIB)), 6 * MIB), rig.sender()
    sender.send_round(objects(data))
    data.write(MIB, memoryview(os.urandom(CHUNK)))
    data.write(4 * MIB, memoryview(bytes(CHUNK)))
    data.copied = 0
    last = sender.send_round(objects(data), still=True)
    assert (last.scanned, last.changed, last.zero) == (6 * MIB, 2 * CHUNK, CHUNK)
    assert data.copied == 0
    assert place_and_verify(rig.session, sender, 1) == read_all(data)


class Meddling(FixedChooser):
    """Does something to the memory after it was hashed and before it is sealed."""

    def __init__(self, meddle: Callable[[], object]) -> None:
        super().__init__()
        self._meddle = meddle

    def encode(self, encoder: Encoder, info: ObjectInfo, raw: memoryview) -> Packed:
        self._meddle()
        return super().encode(encoder, info, raw)


@pytest.mark.parametrize(
    ("size", "still"),
    [(MIB, False), (CHUNK, True), (MIB, True)],
    ids=["live", "small", "in-place"],
)
def test_memory_that_changes_is_copied_or_else_refused(rig: Rig, size: int, still: bool) -> None:
    data = memfd(size, os.urandom(size))
    sender = rig.sender(chooser=Meddling(lambda: data.write(5, memoryview(b"written meanwhile"))))
    if still and size >= LENT:
        with pytest.raises(FrameRejected, match="the chunk at 0x0 fails its digest"):
            sender.send_round(objects(data), still=True)
    else:
        sender.send_round(objects(data), still=still)


def test_pages_that_vanish_while_they_are_sent_in_place_name_their_object(rig: Rig) -> None:
    fd = memfd_of(os.urandom(8 * MIB))
    data = MmapAccess(fd, 8 * MIB)
    sender = rig.sender(streams=1, chooser=Meddling(lambda: os.ftruncate(fd, 4096)))
    with pytest.raises(
        MigrationFailed, match=r"object 1 \(VRAM\) can't be read at 0x0: .*EFAULT|gone"
    ):
        sender.send_round(objects(data), still=True)
    data.close()


def test_what_can_not_be_mapped_is_the_memory_s_fault_and_not_the_wire_s(rig: Rig) -> None:
    data = memfd(MIB, os.urandom(MIB))
    data.close()
    with pytest.raises(MigrationFailed, match="object 1"):
        rig.sender().send_round(objects(data), still=True)


def test_a_chunk_that_became_zero_is_zero_there(rig: Rig) -> None:
    data = memfd(MIB, os.urandom(MIB))
    sender = rig.sender()
    sender.send_round(objects(data))
    data.write(CHUNK, memoryview(bytes(CHUNK)))
    assert sender.send_round(objects(data)).zero == CHUNK
    assert place_and_verify(rig.session, sender, 1) == read_all(data)


def test_what_came_before_is_not_sent_twice(rig: Rig) -> None:
    """Within one object and between two; also when the second changes in a later round."""
    same = os.urandom(MIB)
    first, second = memfd(3 * MIB, same + os.urandom(MIB) + same), memfd(MIB, same)
    sender = rig.sender(streams=1)
    begun = sender.send_round(objects(first, second))
    assert begun.codecs == {"raw": 2 * MIB, "duplicate": 2 * MIB}
    assert begun.wire < 2 * MIB + 10_000
    first.write(0, memoryview(os.urandom(MIB)))
    second.write(CHUNK, memoryview(os.urandom(CHUNK)))
    sender.send_round(objects(first, second))
    assert place_and_verify(rig.session, sender, 1) == read_all(first)
    assert place_and_verify(rig.session, sender, 2) == read_all(second)


@pytest.mark.parametrize("origin", [(1, CHUNK), (1, MIB), (1, MIB - CHUNK + 1), (9, 0)], ids=str)
def test_a_duplicate_of_what_did_not_come_is_refused(rig: Rig, origin: tuple[int, int]) -> None:
    rig.session.staging.declare(info(1, memfd(MIB)))
    staged = rig.session.staging.get(1)
    with pytest.raises(FrameRejected, match="not here|not declared"):
        staged.copy_from(rig.session.staging.get(origin[0]), origin[1], 0, CHUNK)


def test_a_duplicate_that_is_none_is_refused(rig: Rig) -> None:
    """The digest decides, not what the source says of its origin."""
    data = memfd(MIB, os.urandom(MIB))
    sender = rig.sender(streams=1)
    sender.send_round(objects(data))
    staged = rig.session.staging.get(1)
    staged.copy_from(staged, CHUNK, 0, CHUNK)
    with pytest.raises(FrameRejected, match="fails its digest"):
        staged.commit(0, CHUNK, sender.manifest()[1][1][:16])


def test_memory_touched_ahead_takes_the_same_objects(rig: Rig) -> None:
    data = memfd(4 * MIB, os.urandom(3 * MIB))
    rig.session.staging.prepare([info(1, data)])
    sender = rig.sender()
    sender.send_round(objects(data))
    rig.session.staging.prepare([info(1, data)])
    assert place_and_verify(rig.session, sender, 1) == read_all(data)


def test_an_empty_object_travels_too(rig: Rig) -> None:
    sender = rig.sender()
    sender.send_round(objects(BytesAccess(b"")))
    rig.session.staging.place(1, BytesAccess(bytearray()))
    assert rig.session.staging.verify(1, BytesAccess(b""), sender.manifest()[1][1]) == 0


def test_placing_zeros_cleans_a_dirty_target(rig: Rig) -> None:
    sender = rig.sender()
    sender.send_round(objects(memfd(MIB)))
    target = memfd(MIB, os.urandom(MIB))
    rig.session.staging.place(1, target)
    assert read_all(target) == bytes(MIB)


class SkippingScan(SpanScan):
    """The bug that verification must catch: a changed chunk is not sent."""

    def _send_run(self, offset: int, raw: memoryview, digests: bytes, what: What) -> None:
        if offset == 0 and len(raw) > CHUNK:
            return super()._send_run(offset + CHUNK, raw[CHUNK:], digests[16:], what)
        return super()._send_run(offset, raw, digests, what)


@pytest.mark.parametrize("second_round", [False, True])
def test_a_skipped_chunk_is_caught(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, second_round: bool
) -> None:
    data = memfd(MIB, os.urandom(MIB))
    sender = rig.sender()
    if second_round:
        sender.send_round(objects(data))
        data.write(0, memoryview(os.urandom(MIB)))
    monkeypatch.setattr("migrate.dataplane.stream.SpanScan", SkippingScan)
    sender.send_round(objects(data))
    with pytest.raises(VerificationFailed, match=r"object 1.* 0x0 "):
        place_and_verify(rig.session, sender, 1)


def test_a_chunk_that_was_never_read_is_missing_in_the_manifest(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(self: SourceStream, item: Span) -> None:
        original(self, Span(object_id=item.object_id, offset=0, length=item.length // 2))

    data = memfd(MIB, os.urandom(MIB))
    sender = rig.sender()
    sender.send_round(objects(data))
    original = SourceStream._send_item
    monkeypatch.setattr(SourceStream, "_send_item", half)
    sender.send_round(objects(data))
    with pytest.raises(VerificationFailed, match="0x80000 was not read"):
        sender.manifest()


def test_bytes_altered_after_placement_are_caught(rig: Rig) -> None:
    data = memfd(2 * MIB, os.urandom(2 * MIB))
    sender = rig.sender()
    sender.send_round(objects(data))
    target = memfd(2 * MIB)
    rig.session.staging.place(1, target)
    byte = bytearray(1)
    target.read(MIB + 7, memoryview(byte))
    target.write(MIB + 7, memoryview(bytes([byte[0] ^ 1])))
    with pytest.raises(VerificationFailed, match="object 1 .VRAM.: the chunk at 0x100000"):
        rig.session.staging.verify(1, target, sender.manifest()[1][1])


def test_dropped_objects_leave_staging_and_their_ids_are_not_used_again(rig: Rig) -> None:
    one, two = memfd(MIB, b"1"), memfd(MIB, b"2")
    sender = rig.sender()
    sender.send_round(objects(one, two))
    sender.drop_object(1)
    sender.send_round(objects(one, two)[1:])
    assert [o.id for o in rig.session.staging.objects()] == [2]
    assert list(sender.manifest()) == [2]
    with pytest.raises(ValueError, match="not used again"):
        sender.send_round(objects(one))


def test_more_than_was_reserved_is_refused(rig: Rig) -> None:
    with pytest.raises(InsufficientMemory, match="exceeds what was reserved"):
        rig.sender().send_round(objects(memfd(65 * MIB)))
    with pytest.raises(InsufficientMemory):  # and stays so for a new connection
        rig.sender().send_round(objects(memfd(MIB)))


def test_memory_that_vanishes_names_the_object(rig: Rig) -> None:
    data = memfd(4 * MIB, b"x")
    os.ftruncate(data._fd, MIB)
    with pytest.raises(MigrationFailed, match="object 1 .VRAM. can't be read at 0x"):
        rig.sender().send_round(objects(data))


def test_cancel_ends_a_paced_round(rig: Rig) -> None:
    cancel = threading.Event()
    sender = rig.sender(bandwidth_limit=100_000)

    def progress(scanned: int, total: int) -> None:
        cancel.set()

    with pytest.raises(Cancelled):
        sender.send_round(objects(memfd(8 * MIB, os.urandom(8 * MIB))), progress, cancel)


def test_a_wrong_secret_gets_nothing(rig: Rig) -> None:
    honest = rig.secret
    rig.secret = os.urandom(32)
    with pytest.raises(StreamBroken):
        rig.sender(reconnect_timeout=0.3).send_round(objects(memfd(MIB, b"x")))
    assert rig.session.staging.objects() == ()
    rig.secret = honest
    rig.sender().send_round(objects(memfd(MIB, b"x")))


def test_a_closed_session_breaks_the_stream(rig: Rig) -> None:
    sender = rig.sender(reconnect_timeout=0.3)
    data = memfd(MIB, b"x")
    sender.send_round(objects(data))
    rig.receiver.close_session(rig.session.id)
    data.write(0, memoryview(b"y"))
    with pytest.raises(StreamBroken):
        sender.send_round(objects(data))


def test_an_epoch_that_comes_again_is_refused(rig: Rig) -> None:
    data = memfd(MIB, b"x")
    rig.sender(streams=1).send_round(objects(data))
    rig.epochs = itertools.repeat(1)
    with pytest.raises(StreamBroken):
        rig.sender(streams=1, reconnect_timeout=0.3).send_round(objects(data))
    assert rig.session.staging.get(1).table.known == b"\1" * 16


def test_a_connection_that_ended_keeps_no_buffers(rig: Rig) -> None:
    sender, others = rig.sender(), set(map(id, left := intakes()))
    sender.send_round(objects(memfd(MIB, os.urandom(MIB))))

    def ours() -> bool:
        return any(id(one) not in others for one in intakes())

    assert ours(), "the test sees none"
    sender.close()
    deadline = time.monotonic() + 60
    while ours():
        assert time.monotonic() < deadline, "the session, which is remembered, holds them"
        time.sleep(0.01)
    assert rig.session.staging.get(1).table.known
    del left  # of tests before this one; so long nothing else has their ids


def intakes() -> list[Intake]:
    gc.collect()
    return [one for one in gc.get_objects() if isinstance(one, Intake)]


def test_undeclared_objects_are_refused(rig: Rig) -> None:
    with pytest.raises(FrameRejected, match="was not declared"):
        rig.session.staging.get(9)


def test_objects_may_come_during_the_round_and_are_let_go_as_they_stand(rig: Rig) -> None:
    sender, room, count = rig.sender(), threading.Semaphore(2), 9
    contents = [os.urandom(MIB + n * 1000) for n in range(count)]

    class Lent(BytesAccess):
        """Memory of which there are two at a time."""

        def close(self) -> None:
            super().close()
            room.release()

    def coming() -> Iterator[tuple[ObjectInfo, MemoryAccess]]:
        for number, data in enumerate(contents, start=2):
            assert room.acquire(timeout=60), "no object was acknowledged, all wait for the next"
            access = Lent(data)
            yield info(number, access), access

    first = memfd(MIB, os.urandom(MIB))
    stats = sender.send_round(objects(first), None, None, coming())
    assert stats.scanned == stats.changed == MIB + sum(map(len, contents))
    assert place_and_verify(rig.session, sender, 1) == read_all(first)
    for number, data in enumerate(contents, start=2):
        assert place_and_verify(rig.session, sender, number) == data
    assert room.acquire(timeout=0)


def test_what_fails_to_come_fails_the_round(rig: Rig) -> None:
    def coming() -> Iterator[tuple[ObjectInfo, MemoryAccess]]:
        access = BytesAccess(os.urandom(MIB))
        yield info(2, access), access
        raise MigrationFailed("it was not written")

    with pytest.raises(MigrationFailed, match="it was not written"):
        rig.sender().send_round(objects(memfd(MIB)), None, None, coming())
