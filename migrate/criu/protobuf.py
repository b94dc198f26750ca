"""The protobuf wire format, as far as CRIU's RPC needs it (proto2, no groups).

By hand, because the .proto of CRIU's RPC is CRIU's own and differs from version to
version, and the few messages that we say fit on a page (``migrate.criu.rpc``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

Scalar = int | bool | str | bytes
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_U64 = (1 << 64) - 1


def encode(fields: Mapping[int, Scalar | Iterable[Scalar]]) -> bytes:
    """A message of these fields by number; a list or tuple is a repeated field."""
    out = bytearray()
    for number, value in fields.items():
        values = value if isinstance(value, list | tuple) else (value,)
        for one in values:
            out += _encode_one(number, one)
    return bytes(out)


def _encode_one(number: int, value: object) -> bytes:
    if isinstance(value, int):
        return _varint(number << 3 | _VARINT) + _varint(value & _U64)
    data = value.encode() if isinstance(value, str) else value
    assert isinstance(data, bytes)
    return _varint(number << 3 | _BYTES) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


class Message:
    """A decoded message: values by field number, the last of a field counts (protobuf)."""

    def __init__(self, fields: Mapping[int, list[int | bytes]]) -> None:
        self._fields = fields

    def integer(self, number: int, default: int = 0) -> int:
        """A varint field as a signed number. ValueError if it is of another type."""
        value = self._fields.get(number, [default])[-1]
        if not isinstance(value, int):
            raise ValueError(f"field {number} is no number")
        return value - (1 << 64) if value >> 63 else value

    def data(self, number: int) -> bytes:
        """A bytes field, empty if it is not there. ValueError if it is of another type."""
        value = self._fields.get(number, [b""])[-1]
        if not isinstance(value, bytes):
            raise ValueError(f"field {number} is a number")
        return value

    def text(self, number: int) -> str:
        """A string field."""
        return self.data(number).decode(errors="replace")

    def message(self, number: int) -> Message | None:
        """A field that is a message, None if it is not there."""
        return decode(self.data(number)) if number in self._fields else None


def decode(data: bytes) -> Message:
    """Raises ValueError for what is no message."""
    fields: dict[int, list[int | bytes]] = {}
    at = 0
    while at < len(data):
        key, at = _read_varint(data, at)
        value: int | bytes
        kind = key & 7
        if kind == _VARINT:
            value, at = _read_varint(data, at)
        elif kind in (_FIXED64, _FIXED32):
            size = 8 if kind == _FIXED64 else 4
            value, at = int.from_bytes(_slice(data, at, size), "little"), at + size
        elif kind == _BYTES:
            length, at = _read_varint(data, at)
            value, at = _slice(data, at, length), at + length
        else:
            raise ValueError(f"wire type {kind}")
        fields.setdefault(key >> 3, []).append(value)
    return Message(fields)


def _slice(data: bytes, at: int, length: int) -> bytes:
    if at + length > len(data):
        raise ValueError("the message is cut short")
    return data[at : at + length]


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise ValueError("a number is cut short or too long")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value & _U64, at
