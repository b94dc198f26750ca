"""The destination's end of the chunk streams.

One accepting thread, one thread a connection. A connection is nobody until its hello is
authenticated: it gets 5 s, a few hundred bytes of memory, and is dropped without a word.
What is placed in staging is acknowledged; what an authenticated peer does wrong ends the
session with a REFUSE that says why.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from migrate.dataplane import keys, messages
from migrate.dataplane.channel import Channel, Listener
from migrate.dataplane.frame import AeadFactory, Direction, Kind, Lane, Opener, Sealer
from migrate.dataplane.intake import Intake
from migrate.dataplane.session import TAKEOVER_TIMEOUT, Session
from migrate.dataplane.wire import FrameReader, FrameWriter, deadline
from migrate.errors import AgentBusy, FrameRejected, MigrateError, by_reason

__all__ = ["Receiver", "Session"]

_log = logging.getLogger(__name__)
HELLO_TIMEOUT = 5.0  # seconds
MAX_STRANGERS = 64  # connections that have not proved themselves


class Receiver:
    """Accepts connections for the sessions opened on it."""

    def __init__(self, listener: Listener, *, aead: AeadFactory = AESGCM) -> None:
        self._listener = listener
        self._aead = aead
        self._lock = threading.Lock()
        self._sessions: dict[bytes, Session] = {}
        self._strangers = threading.BoundedSemaphore(MAX_STRANGERS)
        self._connections: set[_Connection] = set()
        self._closed = False
        self._thread = threading.Thread(target=self._accept, name="data-accept", daemon=True)

    def start(self) -> None:
        """Begin to accept."""
        self._thread.start()

    def open_session(self, session_id: bytes, secret: bytes, quota: int) -> Session:
        """A session that streams may join. Raises AgentBusy if the id is in use."""
        if len(session_id) != keys.SESSION_ID_SIZE or len(secret) != keys.SECRET_SIZE:
            raise ValueError("session id is 16 bytes, secret 32")
        session = Session(session_id, secret, quota)
        with self._lock:
            if session_id in self._sessions:
                raise AgentBusy(f"data session {session_id.hex()} exists")
            self._sessions[session_id] = session
        return session

    def find(self, session_id: bytes) -> Session | None:
        """The open session of that id."""
        with self._lock:
            return self._sessions.get(session_id)

    def close_session(self, session_id: bytes) -> None:
        """End its streams, free its staging. Idempotent."""
        with self._lock:
            session = self._sessions.pop(session_id, None)
        if session is not None:
            session.close()

    def close(self) -> None:
        """Stop accepting, end every session. Idempotent."""
        with self._lock:
            self._closed = True
            sessions, connections = list(self._sessions), list(self._connections)
        self._listener.close()
        for connection in connections:
            connection.channel.abort()
        for session_id in sessions:
            self.close_session(session_id)
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(TAKEOVER_TIMEOUT)
        for connection in connections:
            connection.ended.wait(TAKEOVER_TIMEOUT)

    def _accept(self) -> None:
        while True:
            try:
                channel = self._listener.accept()
            except OSError as error:
                if self._closed:
                    return
                _log.warning("accept on the data port: %s", error)
                threading.Event().wait(0.1)  # EMFILE and the like: do not spin
                continue
            if not self._strangers.acquire(blocking=False):
                channel.close()
                continue
            connection = _Connection(channel, self, self._aead, self._strangers.release)
            with self._lock:
                if self._closed:
                    channel.close()
                    return
                self._connections.add(connection)
            connection.start()

    def _gone(self, connection: _Connection) -> None:
        with self._lock:
            self._connections.discard(connection)


class _Connection:
    """One connection, from its greeting to its end, on its own thread."""

    def __init__(
        self, channel: Channel, receiver: Receiver, aead: AeadFactory, known: Callable[[], None]
    ) -> None:
        self.channel = channel
        self.ended = threading.Event()
        self._intake: Intake | None = None  # while it runs: its buffers are large
        self._placed = 0  # by it, once it has ended
        self._receiver = receiver
        self._aead = aead
        self._known = known
        self._thread = threading.Thread(target=self._run, name="data-receive", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def placed(self) -> int:
        intake = self._intake
        return self._placed if intake is None else intake.placed

    def _run(self) -> None:
        session: Session | None = None
        try:
            try:
                session, hello, nonces, placed = self._handshake()
            finally:
                self._known()
            self._serve(session, hello, nonces, placed)
        except (EOFError, OSError) as error:
            _log.debug("data connection ended: %s", repr(error))
        except MigrateError as error:
            if session is not None:
                session.rejected += 1
            _log.warning("data connection dropped: %s", str(error))
        except Exception:
            _log.exception("data connection dropped by a bug")
        finally:
            self.channel.close()
            self._placed = self.placed
            self._intake = None  # the session remembers its connections
            self.ended.set()
            self._receiver._gone(self)

    def _handshake(self) -> tuple[Session, keys.Hello, bytes, int]:
        nonce = os.urandom(keys.NONCE_SIZE)
        greeting = keys.pack_greeting(nonce)
        data = bytearray(keys.HELLO_SIZE)
        with deadline(self.channel, HELLO_TIMEOUT):
            self.channel.send([greeting])
            self.channel.receive_into(memoryview(data))
        hello = keys.parse_hello(bytes(data))
        session = self._receiver.find(hello.session_id)
        if session is None:
            raise FrameRejected("a connection for a session that is not open here")
        keys.check_hello(bytes(data), greeting, session.secret)
        return session, hello, nonce + hello.nonce, session.attach(hello, self)

    def _serve(self, session: Session, hello: keys.Hello, nonces: bytes, placed: int) -> None:
        lanes = [
            Lane(direction=d, stream=hello.stream, epoch=hello.epoch)
            for d in (Direction.TO_DESTINATION, Direction.TO_SOURCE)
        ]
        inward, outward = (
            keys.lane_key(session.secret, nonces, lane.direction, lane.stream, lane.epoch)
            for lane in lanes
        )
        reader = FrameReader(self.channel, Opener(inward, lanes[0], aead=self._aead))
        writer = FrameWriter(self.channel, Sealer(outward, lanes[1], aead=self._aead))
        intake = self._intake = Intake(session, reader, writer)
        if session.refusal is not None:
            reason, message = session.refusal
            intake.refuse(by_reason(reason)(message))
            return
        writer.write(Kind.WELCOME, messages.pack_welcome(hello.previous, placed))
        intake.run()
