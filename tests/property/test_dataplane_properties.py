"""Codecs are exact, messages come back, parsers refuse or agree, runs join to the whole."""

from __future__ import annotations

import contextlib
import os
import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from migrate.dataplane import messages
from migrate.dataplane.access import MemoryAccess
from migrate.dataplane.chunks import address_of, chunk_count, digest, is_zero_at, zero_digest
from migrate.dataplane.codecs import Decoder, Encoder
from migrate.dataplane.frame import Direction, Kind, Lane, Opener, Sealer, parse_prefix
from migrate.dataplane.keys import Hello, check_hello, pack_greeting, pack_hello, parse_hello
from migrate.dataplane.memory import BytesAccess
from migrate.dataplane.messages import Codec, ObjectInfo, ObjectKind, Run
from migrate.dataplane.scan import SpanScan
from migrate.dataplane.source import Round, SourceObject, Span
from migrate.errors import FrameRejected, MigrateError, ProtocolMismatch

CHUNK = 64 << 10
unhurried = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
packing = st.sampled_from([Codec.ZSTD, Codec.PLANES2_ZSTD, Codec.PLANES4_ZSTD])
data = st.one_of(
    st.binary(min_size=1, max_size=5000),
    st.builds(lambda unit, n: unit * n, st.binary(min_size=1, max_size=9), st.integers(1, 3000)),
)


@unhurried
@given(codec=packing, raw=data, level=st.integers(1, 5))
def test_codecs_are_exact(codec: Codec, raw: bytes, level: int) -> None:
    payload = Encoder().encode(codec, memoryview(raw), level)
    out = bytearray(len(raw))
    Decoder().decode(codec, payload, memoryview(out))
    assert out == raw


@unhurried
@given(codec=packing, raw=data, noise=st.binary(max_size=20), at=st.integers(0, 5000))
def test_a_damaged_payload_is_refused_or_gives_as_many_bytes(
    codec: Codec, raw: bytes, noise: bytes, at: int
) -> None:
    payload = bytearray(Encoder().encode(codec, memoryview(raw)))
    at %= len(payload)
    payload[at : at + len(noise)] = noise
    out = bytearray(len(raw) + 16)
    with contextlib.suppress(FrameRejected):
        Decoder().decode(codec, memoryview(payload), memoryview(out)[: len(raw)])
    assert not any(out[len(raw) :])


@unhurried
@given(raw=data, wrong=st.integers(-3, 3).filter(bool))
def test_a_payload_of_another_length_is_refused(raw: bytes, wrong: int) -> None:
    payload = Encoder().encode(Codec.ZSTD, memoryview(raw))
    with pytest.raises(FrameRejected):
        Decoder().decode(Codec.ZSTD, payload, memoryview(bytearray(max(0, len(raw) + wrong))))


runs = st.builds(
    Run,
    object_id=st.integers(0, 2**32 - 1),
    codec=st.sampled_from(Codec),
    offset=st.integers(0, 2**64 - 1),
    length=st.integers(0, 2**32 - 1),
    digests=st.binary(max_size=64),
)


@unhurried
@given(run=runs)
def test_runs_come_back(run: Run) -> None:
    assert Run.parse(run.pack()) == run


@unhurried
@given(
    run=runs,
    size=st.integers(0, 2**22),
    payload=st.integers(0, 2**20),
)
def test_a_run_that_passes_lies_inside_its_object(run: Run, size: int, payload: int) -> None:
    info = ObjectInfo(id=run.object_id, kind=ObjectKind.VRAM, size=size, chunk=CHUNK)
    try:
        run.check(info, payload)
    except FrameRejected:
        return
    assert run.offset % CHUNK == 0
    assert 0 < run.length <= size - run.offset


@unhurried
@given(meta=st.binary(max_size=60), length=st.integers(0, 2**20))
def test_every_parser_takes_any_bytes(meta: bytes, length: int) -> None:
    parsers = (
        Run.parse,
        messages.parse_declare,
        messages.parse_ack,
        messages.parse_welcome,
        messages.parse_forget,
        messages.parse_state_request,
        lambda m: messages.parse_state(m, length),
    )
    for parse in parsers:
        with contextlib.suppress(FrameRejected):
            parse(meta)
    reason, _ = messages.parse_refuse(meta)
    assert isinstance(reason, str)


@unhurried
@given(prefix=st.binary(max_size=40))
def test_any_prefix_is_parsed_or_refused(prefix: bytes) -> None:
    try:
        parsed = parse_prefix(prefix)
    except (FrameRejected, ProtocolMismatch):
        return
    assert parsed.pack() == prefix


@unhurried
@given(
    meta=st.binary(max_size=300),
    payload=st.binary(max_size=3000),
    key=st.binary(min_size=32, max_size=32),
)
def test_frames_come_back(meta: bytes, payload: bytes, key: bytes) -> None:
    lane = Lane(direction=Direction.TO_SOURCE, stream=1, epoch=9)
    head, *rest = Sealer(key, lane).seal(Kind.ACK, meta, payload)
    opener = Opener(key, lane)
    assert opener.open_meta(bytes(head)[:36], bytes(head)[36:]) == meta
    out = bytearray(len(payload))
    for sealed in rest:
        opener.open_payload(sealed, out)
    assert out == payload


@unhurried
@given(
    stream=st.integers(0, 63),
    epoch=st.integers(1, 2**64 - 1),
    flip=st.integers(0, 88 * 8 - 1),
    secret=st.binary(min_size=32, max_size=32),
)
def test_a_hello_holds_for_its_greeting_and_secret_only(
    stream: int, epoch: int, flip: int, secret: bytes
) -> None:
    greeting, other = pack_greeting(os.urandom(16)), pack_greeting(os.urandom(16))
    hello = Hello(stream=stream, epoch=epoch, previous=1, session_id=bytes(16), nonce=bytes(16))
    packed = pack_hello(hello, greeting, secret)
    assert parse_hello(packed) == hello
    check_hello(packed, greeting, secret)
    altered = bytearray(packed)
    altered[flip // 8] ^= 1 << flip % 8
    for wrong in ((packed, other, secret), (packed, greeting, bytes(reversed(secret)) + b"x")):
        with pytest.raises(FrameRejected):
            check_hello(*wrong)
    with pytest.raises(MigrateError):
        check_hello(bytes(altered), greeting, secret)


@unhurried
@given(length=st.integers(1, 5000), at=st.one_of(st.none(), st.integers(0, 4999)))
def test_the_zero_test_sees_every_byte(length: int, at: int | None) -> None:
    block = bytearray(length)
    if at is not None:
        block[at % length] = 1
    assert is_zero_at(address_of(block), length) == (at is None)
    assert (digest(block) == zero_digest(length)) == (at is None)


class Sink:
    """Where a scan's runs go: a copy of the destination."""

    def __init__(self, round_: Round, size: int) -> None:
        self.buffer = memoryview(bytearray(4 * CHUNK))
        self.round = round_
        self.held = bytearray(os.urandom(size))
        self.sent = 0
        self.duplicates = 0
        self.origins: dict[bytes, tuple[int, int]] = {}

    def send_zeros(self, source: SourceObject, offset: int, length: int) -> None:
        self.held[offset : offset + length] = bytes(length)
        self.sent += length
        count = chunk_count(length, CHUNK)
        source.held.set_run(offset // CHUNK, source.held.zero_digests(offset // CHUNK, count))

    def send_run(self, source: SourceObject, offset: int, raw: memoryview, digests: bytes) -> None:
        assert digests == b"".join(digest(raw[at : at + CHUNK]) for at in range(0, len(raw), CHUNK))
        self.held[offset : offset + len(raw)] = raw
        self.sent += len(raw)
        source.held.set_run(offset // CHUNK, digests)

    def send_duplicate(
        self,
        source: SourceObject,
        offset: int,
        length: int,
        digests: bytes,
        origin: tuple[int, int],
    ) -> None:
        raw = bytes(self.held[origin[1] : origin[1] + length])
        self.send_run(source, offset, memoryview(raw), digests)
        self.duplicates += 1


@unhurried
@given(
    rounds=st.lists(
        st.lists(st.sampled_from([0, 1, 2, None]), min_size=11, max_size=11), min_size=1, max_size=4
    ),
    tail=st.integers(1, CHUNK),
)
def test_rounds_of_scans_keep_the_destination_the_same(
    rounds: list[list[int | None]], tail: int
) -> None:
    size = 10 * CHUNK + tail
    memory = bytearray(size)
    access: MemoryAccess = BytesAccess(memory)
    source = SourceObject(ObjectInfo(id=1, kind=ObjectKind.VRAM, size=size, chunk=CHUNK))
    round_ = Round([(source, access)], [], threading.Event())
    sink = Sink(round_, size)
    for number, fills in enumerate(rounds):
        before = bytes(memory)
        for index, fill in enumerate(fills):
            if fill is not None:
                end = min(size, (index + 1) * CHUNK)
                memory[index * CHUNK : end] = bytes([fill]) * (end - index * CHUNK)
        sink.sent = 0
        sink.origins.clear()  # as at the start of every round
        SpanScan(sink, source, access, Span(object_id=1, offset=0, length=size)).run()
        assert sink.held == memory
        if number:
            dirty = sum(
                min(CHUNK, size - at)
                for at in range(0, size, CHUNK)
                if before[at : at + CHUNK] != memory[at : at + CHUNK]
            )
            assert sink.sent == dirty
