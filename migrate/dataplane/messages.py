"""What the meta of a frame says, by kind. Pure, no I/O; every parser refuses all it can't read.

Integers are big endian. An object is addressed by its u32 id, never reused in a migration.
A chunk is the hash grain of its object: chunk *i* covers bytes ``[i * chunk, (i + 1) * chunk)``
and the last one may be shorter.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Self

from migrate.dataplane.chunks import DIGEST_SIZE, MAX_CHUNK, MIN_CHUNK, chunk_count
from migrate.dataplane.frame import MAX_PAYLOAD
from migrate.errors import FrameRejected
from migrate.model import Value

MAX_OBJECT_SIZE = 1 << 48  # bytes; the address space of a GPU
MAX_ZERO_RUN = 1 << 30  # bytes that one frame may declare zero
MAX_DIGESTS = MAX_PAYLOAD // MIN_CHUNK


class ObjectKind(IntEnum):
    """What an object is, for figures and messages only."""

    VRAM = 1
    GTT = 2
    CPU = 3
    BLOB = 4


class Codec(IntEnum):
    """How a run of chunks travels."""

    ZERO = 0  # no payload: every byte is zero
    RAW = 1
    ZSTD = 2
    PLANES2_ZSTD = 3  # bytes of 2-byte values apart, then zstd
    PLANES4_ZSTD = 4
    DUPLICATE = 5  # no payload: as chunks that came before on the same connection


class ObjectInfo(Value):
    """An object as both sides know it. *size* in bytes."""

    id: int
    kind: ObjectKind
    size: int
    chunk: int = 1 << 18


_DECLARE = struct.Struct(">IBBHQI")
_DATA = struct.Struct(">IBBHQI")
_ORIGIN = struct.Struct(">IQ")
_PAIR = struct.Struct(">QQ")
_ONE = struct.Struct(">I")
_SEQ = struct.Struct(">Q")
STATE_CHUNKS = 1 << 15  # chunks that one STATE frame tells of; 17 bytes each


def _unpack(layout: struct.Struct, meta: bytes, what: str) -> tuple[int, ...]:
    if len(meta) != layout.size:
        raise FrameRejected(f"{what} of {len(meta)} bytes, not {layout.size}")
    return layout.unpack(meta)


def pack_declare(info: ObjectInfo) -> bytes:
    """Meta of DECLARE."""
    return _DECLARE.pack(info.id, info.kind, 0, 0, info.size, info.chunk)


def parse_declare(meta: bytes) -> ObjectInfo:
    """Meta of DECLARE. Raises FrameRejected."""
    id_, kind, _, _, size, chunk = _unpack(_DECLARE, meta, "DECLARE")
    if not MIN_CHUNK <= chunk <= MAX_CHUNK or chunk & (chunk - 1):
        raise FrameRejected(f"object {id_} with chunks of {chunk} bytes")
    if size > MAX_OBJECT_SIZE:
        raise FrameRejected(f"object {id_} of {size} bytes")
    try:
        return ObjectInfo(id=id_, kind=ObjectKind(kind), size=size, chunk=chunk)
    except ValueError:
        raise FrameRejected(f"object {id_} of unknown kind {kind}") from None


class Run(Value):
    """Meta of DATA: *length* raw bytes of an object from *offset*, a whole number of chunks.

    ``digests`` are those of its chunks, 16 bytes each; empty for ZERO. ``origin`` of a
    DUPLICATE: object and offset of the bytes it is to be made of, which the source sent before
    on this connection and in this round, so that nobody changes them meanwhile.
    """

    object_id: int
    codec: Codec
    offset: int
    length: int
    digests: bytes = b""
    origin: tuple[int, int] = (0, 0)

    def pack(self) -> bytes:
        """Meta of DATA."""
        head = _DATA.pack(self.object_id, self.codec, 0, 0, self.offset, self.length)
        if self.codec is Codec.DUPLICATE:
            head += _ORIGIN.pack(*self.origin)
        return head + self.digests

    @classmethod
    def parse(cls, meta: bytes) -> Self:
        """Meta of DATA; what needs the object's size is checked by ``check``."""
        if len(meta) < _DATA.size:
            raise FrameRejected(f"DATA of {len(meta)} bytes, at least {_DATA.size} are due")
        id_, codec, _, _, offset, length = _DATA.unpack(meta[: _DATA.size])
        try:
            known = Codec(codec)
        except ValueError:
            raise FrameRejected(f"unknown codec {codec}") from None
        at, origin = _DATA.size, (0, 0)
        if known is Codec.DUPLICATE:
            at += _ORIGIN.size
            if len(meta) < at:
                raise FrameRejected(f"DUPLICATE of {len(meta)} bytes, at least {at} are due")
            number, start = _ORIGIN.unpack(meta[_DATA.size : at])
            origin = (number, start)
        return cls(
            object_id=id_,
            codec=known,
            offset=offset,
            length=length,
            digests=meta[at:],
            origin=origin,
        )

    def check(self, info: ObjectInfo, payload_length: int) -> None:
        """Refuse a run that is not whole chunks inside the object. Raises FrameRejected."""
        where = f"object {self.object_id}, bytes {self.offset:#x} + {self.length:#x}"
        end = self.offset + self.length
        if not self.length or end > info.size:
            raise FrameRejected(f"frame outside its object: {where} of {info.size:#x}")
        if self.offset % info.chunk or (end % info.chunk and end != info.size):
            raise FrameRejected(f"frame that is not whole chunks: {where}")
        if self.codec is Codec.ZERO:
            if payload_length or self.digests or self.length > MAX_ZERO_RUN:
                raise FrameRejected(f"malformed zero frame: {where}")
            return
        wanted = chunk_count(self.length, info.chunk) * DIGEST_SIZE
        bare = self.codec is Codec.DUPLICATE
        if self.length > MAX_PAYLOAD or len(self.digests) != wanted or bare != (not payload_length):
            raise FrameRejected(f"malformed data frame: {where}")
        if self.codec is Codec.RAW and payload_length != self.length:
            raise FrameRejected(f"raw frame of {payload_length} bytes: {where}")


def pack_welcome(previous_epoch: int, placed: int) -> bytes:
    """Meta of WELCOME: of this stream's connection *previous_epoch*, *placed* frames stand."""
    return _PAIR.pack(previous_epoch, placed)


def parse_welcome(meta: bytes) -> tuple[int, int]:
    """Meta of WELCOME: previous epoch (0: none), frames placed of it."""
    previous_epoch, placed = _unpack(_PAIR, meta, "WELCOME")
    return previous_epoch, placed


def pack_ack(placed: int) -> bytes:
    """Meta of ACK: every frame with a sequence number below *placed* stands."""
    return _SEQ.pack(placed)


def parse_ack(meta: bytes) -> int:
    """Meta of ACK."""
    return _unpack(_SEQ, meta, "ACK")[0]


def pack_forget(object_id: int) -> bytes:
    """Meta of FORGET."""
    return _ONE.pack(object_id)


def parse_forget(meta: bytes) -> int:
    """Meta of FORGET."""
    return _unpack(_ONE, meta, "FORGET")[0]


def pack_refuse(reason: str, message: str) -> bytes:
    """Meta of REFUSE: a reason code of the error tree and its message, cut to fit."""
    return reason.encode() + b"\0" + message.encode()[:900]


def parse_refuse(meta: bytes) -> tuple[str, str]:
    """Meta of REFUSE."""
    reason, _, message = meta.partition(b"\0")
    return reason.decode(errors="replace"), message.decode(errors="replace")


def pack_state_request(streams: int) -> bytes:
    """Meta of STATE_REQUEST: how many streams the source has; older others are ended."""
    return _ONE.pack(streams)


def parse_state_request(meta: bytes) -> int:
    """Meta of STATE_REQUEST."""
    return _unpack(_ONE, meta, "STATE_REQUEST")[0]


def pack_state(info: ObjectInfo, first: int) -> bytes:
    """Meta of STATE: an object and the first chunk that the payload tells of.

    The payload is a byte for each chunk (1: placed), then 16 bytes of digest for each.
    """
    return pack_declare(info) + _SEQ.pack(first)


def parse_state(meta: bytes, payload_length: int) -> tuple[ObjectInfo, int, int]:
    """Meta of STATE: the object, the first chunk, and how many. Raises FrameRejected."""
    info = parse_declare(meta[: _DECLARE.size])
    first = _unpack(_SEQ, meta[_DECLARE.size :], "STATE")[0]
    count, rest = divmod(payload_length, 1 + DIGEST_SIZE)
    if rest or first + count > chunk_count(info.size, info.chunk):
        raise FrameRejected(f"malformed STATE of object {info.id}")
    return info, first, count
