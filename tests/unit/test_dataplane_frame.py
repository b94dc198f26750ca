"""The frame format, held by a vector, and all that a receiver must refuse."""

from __future__ import annotations

import itertools

import pytest

from migrate.dataplane.frame import (
    MAX_META,
    MAX_PAYLOAD,
    PREFIX_SIZE,
    TAG,
    Direction,
    Kind,
    Lane,
    Opener,
    Sealer,
    parse_prefix,
)
from migrate.errors import FrameRejected, MigrateError, ProtocolMismatch

KEY = bytes(range(32))
LANE = Lane(direction=Direction.TO_DESTINATION, stream=3, epoch=0x0102030405060708)

# The test vector of the format: key 00..1f, stream 3, epoch 0x0102030405060708, first frame
# (sequence 0) of the lane, kind DATA, meta b"meta", payload b"payload".
VECTOR = "4d4947460001030000030000010203040506070800000000000000000000000400000007"
SEALED = "63d9c1bf791fe8cbb6d560833a68acbdca146f243457b4c6633b90655634f70ac963f3ac3a4be63f556948"


def frame(*, sealer: Sealer | None = None, payload: bytes = b"payload") -> bytes:
    sealer = sealer or Sealer(KEY, LANE)
    return b"".join(bytes(b) for b in sealer.seal(Kind.DATA, b"meta", payload))


def open_frame(data: bytes, opener: Opener | None = None) -> tuple[bytes, bytes]:
    """Reads as a receiver does: lengths only from the prefix."""
    opener = opener or Opener(KEY, LANE)
    prefix = parse_prefix(data[:PREFIX_SIZE])
    end = PREFIX_SIZE + prefix.meta_length + TAG
    meta = opener.open_meta(data[:PREFIX_SIZE], data[PREFIX_SIZE:end])
    payload = bytearray(prefix.payload_length)
    if prefix.payload_length:
        opener.open_payload(data[end : end + prefix.payload_length + TAG], payload)
    return meta, bytes(payload)


def test_vector() -> None:
    sealed = frame()
    assert sealed[:PREFIX_SIZE].hex() == VECTOR
    assert sealed[PREFIX_SIZE:].hex() == SEALED
    assert open_frame(bytes.fromhex(VECTOR + SEALED)) == (b"meta", b"payload")


def test_frames_open_once_and_in_order() -> None:
    sealer, opener = Sealer(KEY, LANE), Opener(KEY, LANE)
    first, second = frame(sealer=sealer), frame(sealer=sealer, payload=b"")
    assert open_frame(first, opener) == (b"meta", b"payload")
    with pytest.raises(FrameRejected, match="frame 0 came where 1 is due"):
        open_frame(first, opener)
    assert open_frame(second, opener) == (b"meta", b"")


def test_a_frame_that_overtakes_is_refused() -> None:
    sealer = Sealer(KEY, LANE)
    frame(sealer=sealer)
    with pytest.raises(FrameRejected, match="frame 1 came where 0 is due"):
        open_frame(frame(sealer=sealer))


@pytest.mark.parametrize(
    "lane",
    [
        Lane(direction=Direction.TO_SOURCE, stream=3, epoch=LANE.epoch),
        Lane(direction=Direction.TO_DESTINATION, stream=4, epoch=LANE.epoch),
        Lane(direction=Direction.TO_DESTINATION, stream=3, epoch=LANE.epoch + 1),
    ],
)
def test_a_frame_of_another_lane_is_refused(lane: Lane) -> None:
    with pytest.raises(FrameRejected, match="another lane"):
        open_frame(frame(sealer=Sealer(KEY, lane)))


def test_every_flipped_bit_is_refused() -> None:
    sealed = frame()
    for position, bit in itertools.product(range(len(sealed)), range(8)):
        mutated = bytearray(sealed)
        mutated[position] ^= 1 << bit
        with pytest.raises(MigrateError) as caught:
            open_frame(bytes(mutated))
        assert isinstance(caught.value, FrameRejected | ProtocolMismatch)


def test_every_truncation_is_refused() -> None:
    sealed = frame()
    for length in range(len(sealed)):
        with pytest.raises(FrameRejected):
            open_frame(sealed[:length])


def test_another_version_says_so() -> None:
    sealed = bytearray(frame())
    sealed[5] = 2
    with pytest.raises(ProtocolMismatch, match="frame version 2"):
        open_frame(bytes(sealed))


@pytest.mark.parametrize(("at", "value"), [(28, MAX_META + 1), (32, MAX_PAYLOAD + 1)])
def test_lengths_over_the_cap_are_refused_by_the_prefix_alone(at: int, value: int) -> None:
    sealed = bytearray(frame())
    sealed[at : at + 4] = value.to_bytes(4, "big")
    with pytest.raises(FrameRejected, match="too long"):
        parse_prefix(sealed[:PREFIX_SIZE])


def test_what_is_too_long_is_not_sealed() -> None:
    for meta, payload in ((bytes(MAX_META + 1), b""), (b"", bytes(MAX_PAYLOAD + 1))):
        with pytest.raises(FrameRejected, match="too long"):
            Sealer(KEY, LANE).seal(Kind.DATA, meta, payload)


def test_the_parts_of_two_frames_can_not_be_mixed() -> None:
    one, two = (
        b"".join(bytes(b) for b in Sealer(KEY, LANE).seal(Kind.DATA, meta, b"payload"))
        for meta in (b"me_a", b"me_b")
    )
    end = PREFIX_SIZE + 4 + TAG
    with pytest.raises(FrameRejected, match="authentication"):
        open_frame(one[:end] + two[end:])


def test_a_payload_without_its_header_is_refused() -> None:
    with pytest.raises(FrameRejected, match="without its header"):
        Opener(KEY, LANE).open_payload(b"x" * 20, bytearray(4))


def test_a_sequence_is_used_up_even_if_sealing_fails() -> None:
    class Failing:
        def __init__(self, key: bytes) -> None:
            pass

        def encrypt_into(self, *_: object) -> int:
            raise RuntimeError("broken")

        def decrypt_into(self, *_: object) -> int:
            raise RuntimeError("broken")

    sealer = Sealer(KEY, LANE, aead=Failing)
    with pytest.raises(RuntimeError, match="broken"):
        sealer.seal(Kind.DATA, b"meta")
    assert sealer.sequence == 1
