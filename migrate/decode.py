"""Documents to values: msgspec, for programs of many threads.

msgspec 0.22 learns a type when it first decodes to it, and hands what it has learnt by then to
every thread that decodes to the type meanwhile: four threads and a nested type end a process by
SIGSEGV within a second (``tests/unit/test_decode.py``), and two RPCs at once after an agent's
start may. So a type is learnt under a lock, and all of us decode here.
"""

from __future__ import annotations

import threading
from typing import TypeVar

import msgspec

T = TypeVar("T")

_lock = threading.RLock()  # a finalizer may run, and decode, while a type is learnt
_learnt: set[object] = set()


def from_json(data: bytes | str, kind: type[T]) -> T:
    """Raises msgspec.DecodeError, of which ValidationError is one."""
    _learn(kind)
    return msgspec.json.decode(data, type=kind)


def from_msgpack(data: bytes | memoryview, kind: type[T]) -> T:
    """Raises msgspec.DecodeError, of which ValidationError is one."""
    _learn(kind)
    return msgspec.msgpack.decode(data, type=kind)


def from_toml(data: bytes, kind: type[T]) -> T:
    """Raises msgspec.DecodeError, of which ValidationError is one."""
    _learn(kind)
    return msgspec.toml.decode(data, type=kind)


def convert(value: object, kind: type[T]) -> T:
    """What is decoded but not typed yet. Raises msgspec.ValidationError."""
    _learn(kind)
    return msgspec.convert(value, kind)


def _learn(kind: object) -> None:
    """Have msgspec know a type, and all that it is made of."""
    if kind not in _learnt:
        with _lock:
            msgspec.msgpack.Decoder(kind)
            _learnt.add(kind)
