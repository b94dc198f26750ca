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
from migrate.dataplane.codecs import Decoder
from migrate.dataplane.frame import (
    MAX_PAYLOAD,
    AeadFactory,
    Direction,
    Kind,
    Lane,
    Opener,
    Prefix,
    Sealer,
)
from migrate.dataplane.messages import Codec, Run
from migrate.dataplane.staging import Staging
from migrate.dataplane.wire import FrameReader, FrameWriter, deadline
from migrate.errors import (
    AgentBusy,
    Cancelled,
    FrameRejected,
    InsufficientMemory,
    MigrateError,
)

_log = logging.getLogger(__name__)
HELLO_TIMEOUT = 5.0  # seconds
TAKEOVER_TIMEOUT = 10.0  # seconds for a stream's older connection to end
ACK_BYTES = 2 << 20  # payload bytes placed between acknowledgements
ACK_FRAMES = 64
MAX_STRANGERS = 64  # connections that have not proved themselves


class _StreamState:
    """One stream of a session across its connections."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.placed: dict[int, int] = {}  # frames placed, by epoch
        self.epoch = 0
        self.connection: _Connection | None = None


class Session:
    """What one migration receives. *quota* in bytes caps all objects together."""

    def __init__(self, session_id: bytes, secret: bytes, quota: int) -> None:
        self.id = session_id
        self.secret = secret
        self.staging = Staging(quota)
        self.refusal: MigrateError | None = None
        self.rejected = 0  # frames and hellos that failed a check
        self.closed = False
        self._lock = threading.Lock()
        self._streams: dict[int, _StreamState] = {}

    def attach(self, hello: keys.Hello, connection: _Connection) -> int:
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

    def refuse(self, error: MigrateError) -> None:
        """Nothing more is accepted; the source is told why."""
        self.refusal = self.refusal or error

    def close(self) -> None:
        """End the streams and free staging. Idempotent."""
        with self._lock:
            self.closed = True
        self.retire(0)
        self.staging.close()


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
        self.placed = 0  # frames whose effect stands
        self._receiver = receiver
        self._aead = aead
        self._known = known
        self._thread = threading.Thread(target=self._run, name="data-receive", daemon=True)

    def start(self) -> None:
        self._thread.start()

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
        intake = _Intake(session, reader, writer, self)
        if session.refusal is not None:
            intake.refuse(session.refusal)
            return
        writer.write(Kind.WELCOME, messages.pack_welcome(hello.previous, placed))
        intake.run()


class WireError(Exception):
    """The connection failed in the middle of a frame; carries the error."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


class _Intake:
    """The frames of one authenticated connection, put into staging."""

    def __init__(
        self, session: Session, reader: FrameReader, writer: FrameWriter, connection: _Connection
    ) -> None:
        self._session = session
        self._reader = reader
        self._writer = writer
        self._connection = connection
        self._packed = memoryview(bytearray(MAX_PAYLOAD))
        self._decoder = Decoder()
        self._unacked_bytes = 0
        self._unacked_frames = 0

    def run(self) -> None:
        """Until the peer ends or errs. Raises EOFError, OSError, MigrateError."""
        while True:
            prefix, meta = self._reader.next()
            try:
                self._handle(prefix, meta)
            except WireError as error:
                raise error.cause from error
            except MigrateError as error:
                self.refuse(error)
                raise
            except Exception as error:  # a bug: the source must not try for ever
                self.refuse(MigrateError(f"the destination failed: {error!r}"))
                raise
            self._connection.placed = self._reader.sequence
            self._acknowledge(prefix)

    def refuse(self, error: MigrateError) -> None:
        """Tell the source why, now or when it connects again."""
        self._session.refuse(error)
        try:
            self._writer.write(Kind.REFUSE, messages.pack_refuse(error.reason, error.message))
        except OSError as cut:
            _log.debug("could not send the refusal: %s", cut)

    def _handle(self, prefix: Prefix, meta: bytes) -> None:
        kind = prefix.kind
        if self._session.closed:
            raise Cancelled("the destination closed the session")
        if self._session.refusal is not None:
            raise self._session.refusal
        if kind is Kind.DATA:
            self._store(Run.parse(meta), prefix)
            return
        if prefix.payload_length:
            raise FrameRejected(f"{kind.name} with a payload")
        if kind is Kind.DECLARE:
            self._declare(meta)
        elif kind is Kind.FORGET:
            self._session.staging.forget(messages.parse_forget(meta))
        elif kind is Kind.STATE_REQUEST:
            self._session.retire(max(1, messages.parse_state_request(meta)))
            for info, first, state in self._session.staging.state():
                self._writer.write(Kind.STATE, messages.pack_state(info, first), state)
        elif kind is not Kind.SYNC:
            raise FrameRejected(f"{kind.name} is not for the destination")

    def _declare(self, meta: bytes) -> None:
        try:
            self._session.staging.declare(messages.parse_declare(meta))
        except OSError as error:  # ENOMEM
            raise InsufficientMemory(f"no memory for staging: {error}") from error

    def _store(self, run: Run, prefix: Prefix) -> None:
        staged = self._session.staging.get(run.object_id)
        run.check(staged.info, prefix.payload_length)
        if run.codec is Codec.ZERO:
            staged.store_zeros(run.offset, run.length)
            return
        target = staged.begin(run.offset, run.length)
        if run.codec is Codec.RAW:
            self._payload(prefix, target)
        else:
            packed = self._packed[: prefix.payload_length]
            self._payload(prefix, packed)
            self._decoder.decode(run.codec, packed, target)
        staged.commit(run.offset, run.length, run.digests)

    def _payload(self, prefix: Prefix, into: memoryview) -> None:
        """A payload that does not open was altered on the wire: a cut, not a refusal."""
        try:
            self._reader.payload(prefix, into)
        except (EOFError, OSError, FrameRejected) as error:
            raise WireError(error) from error

    def _acknowledge(self, prefix: Prefix) -> None:
        self._unacked_bytes += prefix.payload_length
        self._unacked_frames += 1
        due = self._unacked_bytes >= ACK_BYTES or self._unacked_frames >= ACK_FRAMES
        if due or prefix.kind in (Kind.SYNC, Kind.STATE_REQUEST):
            self._writer.write(Kind.ACK, messages.pack_ack(self._connection.placed))
            self._unacked_bytes = self._unacked_frames = 0
