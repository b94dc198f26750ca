"""What one migration receives: its streams across their connections, and its staging."""

from __future__ import annotations

import threading
from typing import Protocol

from migrate.dataplane import keys
from migrate.dataplane.channel import Channel
from migrate.dataplane.staging import Staging
from migrate.errors import Cancelled, FrameRejected, by_reason

TAKEOVER_TIMEOUT = 10.0  # seconds for a stream's older connection to end


class Connection(Protocol):
    """What a session needs of a connection."""

    channel: Channel
    ended: threading.Event

    @property
    def placed(self) -> int:
        """Frames whose effect stands."""


class _StreamState:
    """One stream of a session across its connections."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.placed: dict[int, int] = {}  # frames placed, by epoch
        self.epoch = 0
        self.connection: Connection | None = None


class Session:
    """What one migration receives. *quota* in bytes caps all objects together."""

    def __init__(self, session_id: bytes, secret: bytes, quota: int) -> None:
        self.id = session_id
        self.secret = secret
        self.staging = Staging(quota)
        self.refusal: tuple[str, str] | None = None  # reason code and message
        self.rejected = 0  # frames and hellos that failed a check
        self.closed = False
        self._lock = threading.Lock()
        self._streams: dict[int, _StreamState] = {}

    def attach(self, hello: keys.Hello, connection: Connection) -> int:
        """Make *connection* the one of its stream, the older one having ended.

        Returns the number of frames placed of the epoch ``hello.previous``. Raises
        FrameRejected if the epoch is not new.
        """
        with self._lock:
            if self.closed:
                raise FrameRejected("the session is closed")
            state = self._streams.setdefault(hello.stream, _StreamState())
        with state.lock:
            if hello.epoch <= state.epoch:
                raise FrameRejected(f"connection epoch {hello.epoch} came again")
            if state.connection is not None:
                state.connection.channel.abort()
                if not state.connection.ended.wait(TAKEOVER_TIMEOUT):
                    raise FrameRejected("the stream's older connection does not end")
                state.placed[state.epoch] = state.connection.placed
            state.connection, state.epoch = connection, hello.epoch
            state.placed = {e: n for e, n in state.placed.items() if e >= hello.previous}
            return state.placed.get(hello.previous, 0)

    def retire(self, streams: int) -> None:
        """End the connections of streams numbered *streams* and up: an older sender's."""
        with self._lock:
            old = [state for index, state in self._streams.items() if index >= streams]
        for state in old:
            with state.lock:
                if state.connection is not None:
                    state.connection.channel.abort()
                    state.connection.ended.wait(TAKEOVER_TIMEOUT)

    def refuse(self, reason: str, message: str) -> None:
        """Nothing more is accepted; the source is told why."""
        self.refusal = self.refusal or (reason, message)

    def check(self) -> None:
        """Raises if nothing more is to be accepted."""
        if self.closed:
            raise Cancelled("the destination closed the session")
        if self.refusal is not None:
            raise by_reason(self.refusal[0])(self.refusal[1])

    def close(self) -> None:
        """End the streams and free staging. Idempotent."""
        with self._lock:
            self.closed = True
        self.retire(0)
        self.staging.close()
