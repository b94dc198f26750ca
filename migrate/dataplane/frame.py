"""The frame: the unit of the chunk streams and of image files. Pure, no I/O.

Layout, all integers big endian::

    prefix   36 bytes, clear      magic "MIGF", version u16, kind u8, direction u8,
                                  stream u16, zero u16, epoch u64, sequence u64,
                                  meta_length u32, payload_length u32
    meta     meta_length + 16     AES-256-GCM, nonce 0 || sequence, AAD = prefix
    payload  payload_length + 16  AES-256-GCM, nonce 1 || sequence, AAD = prefix + sealed meta;
                                  absent if payload_length is 0

``meta`` is the message (:mod:`migrate.dataplane.messages`): object, offset, codec, chunk
digests. It is encrypted because a digest would let a listener test guesses of the contents,
and it has a tag of its own so that nothing of a payload is read for a forged header.

The nonce's first 4 bytes tell the two parts apart, the other 8 are the sequence number. A key
belongs to one direction of one stream of one connection epoch (:mod:`.keys`), a sequence
number is used once under it, so no pair of key and nonce comes twice.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from enum import IntEnum
from typing import Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from migrate.dataplane.access import Buffer
from migrate.errors import FrameRejected, ProtocolMismatch
from migrate.model import Value

MAGIC = b"MIGF"
VERSION = 1
TAG = 16  # bytes of an AES-GCM tag
MAX_META = 1024  # bytes
MAX_PAYLOAD = 2 << 20  # bytes; of 1, 2 and 4 MiB the least CPU time a byte, by 15% (measured)
_PREFIX = struct.Struct(">4sHBBHHQQII")
PREFIX_SIZE = _PREFIX.size
MAX_SEQUENCE = (1 << 64) - 1


class Kind(IntEnum):
    """What a frame's meta holds; see :mod:`migrate.dataplane.messages`."""

    WELCOME = 1  # destination → source: what was placed before this connection
    DECLARE = 2  # source → destination: an object, its kind, size and chunk size
    DATA = 3  # source → destination: a run of chunks
    ACK = 4  # destination → source: everything below a sequence number is placed
    SYNC = 5  # source → destination: answer with an ACK now
    FORGET = 6  # source → destination: an object is gone
    REFUSE = 7  # destination → source: why the session can't go on
    STATE = 8  # destination → source: digests of the chunks placed of one object
    STATE_REQUEST = 9  # source → destination: send STATE of every object, then ACK


class Direction(IntEnum):
    """Which side seals."""

    TO_DESTINATION = 0
    TO_SOURCE = 1


_KINDS = {int(kind): kind for kind in Kind}  # three times as fast as calling the class
_DIRECTIONS = {int(direction): direction for direction in Direction}


class Prefix(Value):
    """The clear part of a frame; nothing of it is trusted before meta was opened."""

    kind: Kind
    direction: Direction
    stream: int
    epoch: int
    sequence: int
    meta_length: int
    payload_length: int

    def pack(self) -> bytes:
        """The 36 bytes on the wire."""
        return _PREFIX.pack(
            MAGIC,
            VERSION,
            self.kind,
            self.direction,
            self.stream,
            0,
            self.epoch,
            self.sequence,
            self.meta_length,
            self.payload_length,
        )


def parse_prefix(data: Buffer) -> Prefix:
    """Read a prefix and check every bound, before anything is allocated for the frame.

    Raises ProtocolMismatch for another version, FrameRejected for anything else wrong.
    """
    if len(memoryview(data)) != PREFIX_SIZE:
        raise FrameRejected(f"frame prefix of {len(memoryview(data))} bytes, not {PREFIX_SIZE}")
    fields = _PREFIX.unpack(data)
    magic, version, kind, direction, stream, zero, epoch, sequence, meta, payload = fields
    if magic != MAGIC:
        raise FrameRejected(f"not a frame: starts with {magic.hex()}")
    if version != VERSION:
        raise ProtocolMismatch(f"frame version {version}, this release speaks {VERSION}")
    if meta > MAX_META or payload > MAX_PAYLOAD:
        raise FrameRejected(f"frame too long: meta {meta}, payload {payload} bytes")
    known = _KINDS.get(kind), _DIRECTIONS.get(direction)
    if known[0] is None or known[1] is None:
        raise FrameRejected(f"frame of unknown kind {kind} or direction {direction}")
    if zero:
        raise FrameRejected("frame with reserved bits set")
    return Prefix(
        kind=known[0],
        direction=known[1],
        stream=stream,
        epoch=epoch,
        sequence=sequence,
        meta_length=meta,
        payload_length=payload,
    )


class Aead(Protocol):
    """The part of ``cryptography``'s AESGCM that frames use."""

    def encrypt_into(
        self, nonce: Buffer, data: Buffer, associated_data: Buffer | None, buf: Buffer
    ) -> int:
        """Seal *data* into *buf* (16 bytes longer)."""

    def decrypt_into(
        self, nonce: Buffer, data: Buffer, associated_data: Buffer | None, buf: Buffer
    ) -> int:
        """Open *data* into *buf* (16 bytes shorter); raises InvalidTag."""


AeadFactory = Callable[[bytes], Aead]


class Lane(Value):
    """One direction of one stream of one connection: what a key belongs to."""

    direction: Direction
    stream: int
    epoch: int


def _nonce(part: int, sequence: int) -> bytes:
    return part.to_bytes(4, "big") + sequence.to_bytes(8, "big")


class Room:
    """A buffer that is used again and again, made and made larger when it must be."""

    def __init__(self) -> None:
        self._memory = memoryview(bytearray())

    def of(self, size: int) -> memoryview:
        """*size* bytes, with what was there before. What was given before is given up."""
        if size > len(self._memory):
            self._memory = memoryview(bytearray(size))
        return self._memory[:size]


class Sealer:
    """Seals frames of one lane in order. Not thread-safe.

    Its payload buffer is reused: what ``seal`` returns must be on its way before the
    next call.
    """

    def __init__(self, key: bytes, lane: Lane, *, aead: AeadFactory = AESGCM) -> None:
        self._aead = aead(key)
        self._lane = lane
        self._payload = Room()
        self.sequence = 0  # of the next frame

    def seal(self, kind: Kind, meta: Buffer, payload: Buffer = b"") -> list[Buffer]:
        """The buffers of one frame, to be sent in order. Lengths in bytes are checked."""
        meta, payload = memoryview(meta), memoryview(payload)
        if len(meta) > MAX_META or len(payload) > MAX_PAYLOAD or self.sequence > MAX_SEQUENCE:
            raise FrameRejected(f"frame too long: meta {len(meta)}, payload {len(payload)} bytes")
        prefix = Prefix(
            kind=kind,
            direction=self._lane.direction,
            stream=self._lane.stream,
            epoch=self._lane.epoch,
            sequence=self.sequence,
            meta_length=len(meta),
            payload_length=len(payload),
        ).pack()
        sequence = self.sequence
        self.sequence += 1  # before use: an error below must not let the nonce come again
        head = bytearray(PREFIX_SIZE + len(meta) + TAG)
        head[:PREFIX_SIZE] = prefix
        sealed_meta = memoryview(head)[PREFIX_SIZE:]
        self._aead.encrypt_into(_nonce(0, sequence), meta, prefix, sealed_meta)
        if not payload:
            return [head]
        sealed = self._payload.of(len(payload) + TAG)
        self._aead.encrypt_into(_nonce(1, sequence), payload, head, sealed)
        return [head, sealed]


class Opener:
    """Opens frames of one lane, each exactly once and in order. Not thread-safe."""

    def __init__(self, key: bytes, lane: Lane, *, aead: AeadFactory = AESGCM) -> None:
        self._aead = aead(key)
        self._lane = lane
        self._head = b""
        self.sequence = 0  # of the next frame

    def check(self, prefix: Prefix) -> None:
        """Refuse a frame of another lane, a replay and one out of order: FrameRejected."""
        lane = self._lane
        if (
            prefix.epoch != lane.epoch
            or prefix.stream != lane.stream
            or prefix.direction is not lane.direction
        ):
            raise FrameRejected(f"frame of another lane: {prefix}, expected {lane}")
        if prefix.sequence != self.sequence:
            raise FrameRejected(f"frame {prefix.sequence} came where {self.sequence} is due")

    def open_meta(self, prefix_bytes: Buffer, sealed_meta: Buffer) -> bytes:
        """The authenticated meta of the next frame. Raises FrameRejected."""
        prefix = parse_prefix(prefix_bytes)
        self.check(prefix)
        return self.open_checked(prefix, prefix_bytes, sealed_meta)

    def open_checked(self, prefix: Prefix, prefix_bytes: Buffer, sealed_meta: Buffer) -> bytes:
        """As ``open_meta``, of a prefix that was parsed and checked already."""
        sealed_meta = memoryview(sealed_meta)
        if len(sealed_meta) != prefix.meta_length + TAG:
            raise FrameRejected("truncated frame header")
        meta = bytearray(prefix.meta_length)
        self._open(_nonce(0, self.sequence), sealed_meta, bytes(prefix_bytes), meta)
        self._head = bytes(prefix_bytes) + bytes(sealed_meta)
        self.sequence += 1
        return bytes(meta)

    def open_payload(self, sealed: Buffer, into: Buffer) -> None:
        """Decrypt the payload of the frame whose meta was opened last into *into*.

        *into* may hold garbage when this raises FrameRejected.
        """
        if not self._head:
            raise FrameRejected("payload without its header")
        self._open(_nonce(1, self.sequence - 1), sealed, self._head, into)
        self._head = b""

    def _open(self, nonce: bytes, sealed: Buffer, aad: bytes, into: Buffer) -> None:
        try:
            self._aead.decrypt_into(nonce, sealed, aad, into)
        except InvalidTag:
            raise FrameRejected(
                f"frame {nonce[4:].hex()} of stream {self._lane.stream} fails authentication"
            ) from None
        except ValueError as error:
            raise FrameRejected(f"frame of wrong length: {error}") from None
