"""How a chunk stream's connection proves itself, and the keys it then uses. Pure, no I/O.

The destination speaks first, so that a recorded hello is worth nothing later::

    greeting  24 bytes  magic "MIGG", version u16, zero u16, nonce 16        destination → source
    hello     88 bytes  magic "MIGH", version u16, stream u16, epoch u64, previous epoch u64,
                        session id 16, nonce 16, HMAC-SHA256 over greeting + the 56 before it

The session secret (32 random bytes) comes over the mTLS control channel. Keys::

    HKDF-SHA256(secret, salt = both nonces, info = "migrate/1" label direction stream epoch)

The epoch is journaled by the source before use and only grows, so keys differ even if the
nonces came again; the destination's nonce makes them differ even if the journal is lost.
"""

from __future__ import annotations

import hmac
import struct
from hashlib import sha256

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from migrate.dataplane.frame import Direction
from migrate.errors import FrameRejected, ProtocolMismatch
from migrate.model import Value

VERSION = 1
SECRET_SIZE = 32
SESSION_ID_SIZE = 16
NONCE_SIZE = 16
MAX_STREAMS = 64
_GREETING = struct.Struct(">4sHH16s")
_HELLO = struct.Struct(">4sHHQQ16s16s")
_MAC = 32
GREETING_SIZE = _GREETING.size
HELLO_SIZE = _HELLO.size + _MAC


class Hello(Value):
    """Who connects: stream number, connection epoch, session, fresh nonce.

    ``previous`` is the epoch of the connection whose frames the source has not seen
    acknowledged, 0 for none; the WELCOME says how many of them stand.
    """

    stream: int
    epoch: int
    previous: int
    session_id: bytes
    nonce: bytes


def pack_greeting(nonce: bytes) -> bytes:
    """The 24 bytes the destination sends on every new connection."""
    return _GREETING.pack(b"MIGG", VERSION, 0, nonce)


def parse_greeting(data: bytes) -> bytes:
    """The destination's nonce. Raises FrameRejected or ProtocolMismatch."""
    magic, version, _, nonce = _GREETING.unpack(data)
    if magic != b"MIGG":
        raise FrameRejected("the data port is not one of migrate: no greeting")
    if version != VERSION:
        raise ProtocolMismatch(f"stream version {version}, this release speaks {VERSION}")
    return bytes(nonce)


def pack_hello(hello: Hello, greeting: bytes, secret: bytes) -> bytes:
    """The 88 bytes that authenticate a connection to the session of *secret*."""
    body = _HELLO.pack(
        b"MIGH",
        VERSION,
        hello.stream,
        hello.epoch,
        hello.previous,
        hello.session_id,
        hello.nonce,
    )
    return body + _mac(body, greeting, secret)


def parse_hello(data: bytes) -> Hello:
    """Read a hello without trusting it: ``check_hello`` comes next. Raises FrameRejected."""
    fields = _HELLO.unpack(data[: _HELLO.size])
    magic, version, stream, epoch, previous, session_id, nonce = fields
    if magic != b"MIGH":
        raise FrameRejected("connection without a hello")
    if version != VERSION:
        raise ProtocolMismatch(f"stream version {version}, this release speaks {VERSION}")
    if stream >= MAX_STREAMS:
        raise FrameRejected(f"stream number {stream}, at most {MAX_STREAMS} are allowed")
    return Hello(stream=stream, epoch=epoch, previous=previous, session_id=session_id, nonce=nonce)


def check_hello(data: bytes, greeting: bytes, secret: bytes) -> None:
    """Raises FrameRejected if *data* was not made with *secret* for this *greeting*."""
    body = data[: _HELLO.size]
    if not hmac.compare_digest(data[_HELLO.size :], _mac(body, greeting, secret)):
        raise FrameRejected("a connection's hello fails authentication")


def _mac(body: bytes, greeting: bytes, secret: bytes) -> bytes:
    key = _hkdf(secret, b"", b"migrate/1 hello")
    return hmac.digest(key, greeting + body, sha256)


def lane_key(secret: bytes, nonces: bytes, direction: Direction, stream: int, epoch: int) -> bytes:
    """The AES-256 key of one lane; *nonces* is the greeting's then the hello's."""
    info = b"migrate/1 lane" + struct.pack(">BHQ", direction, stream, epoch)
    return _hkdf(secret, nonces, info)


def _hkdf(secret: bytes, salt: bytes, info: bytes) -> bytes:
    return HKDF(algorithm=SHA256(), length=32, salt=salt, info=info).derive(secret)
