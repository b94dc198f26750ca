"""Frames over a channel: reads one with every check in order, and writes one."""

from __future__ import annotations

import time

from migrate.dataplane.access import Buffer
from migrate.dataplane.channel import Channel, Check
from migrate.dataplane.frame import (
    MAX_META,
    PREFIX_SIZE,
    TAG,
    Kind,
    Opener,
    Prefix,
    Room,
    Sealer,
    parse_prefix,
)

FRAME_TIMEOUT = 30.0  # seconds for the rest of a frame that has begun


class FrameReader:
    """Reads the frames of one lane into buffers of its own, as large as they came."""

    def __init__(self, channel: Channel, opener: Opener) -> None:
        self._channel = channel
        self._opener = opener
        self._prefix = memoryview(bytearray(PREFIX_SIZE))
        self._meta = memoryview(bytearray(MAX_META + TAG))
        self._payload = Room()

    @property
    def sequence(self) -> int:
        """Of the next frame: the number of frames opened."""
        return self._opener.sequence

    def next(self) -> tuple[Prefix, bytes]:
        """The next frame's prefix and authenticated meta; its payload comes by ``payload``.

        Raises EOFError at a clean end, FrameRejected, ProtocolMismatch, OSError.
        """
        self._channel.receive_into(self._prefix)
        prefix = parse_prefix(self._prefix)
        self._opener.check(prefix)
        sealed = self._meta[: prefix.meta_length + TAG]
        with deadline(self._channel, FRAME_TIMEOUT):
            self._channel.receive_into(sealed)
        return prefix, self._opener.open_checked(prefix, self._prefix, sealed)

    def payload(self, prefix: Prefix, into: memoryview) -> None:
        """Open the payload of the frame read last into *into*, of just its length."""
        sealed = self._payload.of(prefix.payload_length + TAG)
        with deadline(self._channel, FRAME_TIMEOUT):
            self._channel.receive_into(sealed)
        self._opener.open_payload(sealed, into)


class FrameWriter:
    """Writes the frames of one lane."""

    def __init__(self, channel: Channel, sealer: Sealer) -> None:
        self._channel = channel
        self._sealer = sealer

    @property
    def sequence(self) -> int:
        """Of the next frame."""
        return self._sealer.sequence

    def write(self, kind: Kind, meta: Buffer = b"", payload: Buffer = b"") -> int:
        """Seal and send; returns the bytes on the wire. Raises OSError."""
        buffers = self._sealer.seal(kind, meta, payload)
        self._channel.send(buffers)
        return sum(len(b) for b in buffers)


class deadline:  # noqa: N801 - reads as a statement
    """Within it, waits of *channel* raise TimeoutError after *seconds*."""

    def __init__(self, channel: Channel, seconds: float) -> None:
        self._channel = channel
        self._end = time.monotonic() + seconds
        self._outer: Check = channel.check

    def __enter__(self) -> None:
        self._channel.check = self._check

    def __exit__(self, *_: object) -> None:
        self._channel.check = self._outer

    def _check(self) -> None:
        self._outer()
        if time.monotonic() > self._end:
            raise TimeoutError("the peer stopped in the middle of a message")
