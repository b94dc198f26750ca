"""What one authenticated connection brings, checked and put into staging."""

from __future__ import annotations

import logging

from migrate.dataplane import messages
from migrate.dataplane.codecs import Decoder
from migrate.dataplane.frame import MAX_PAYLOAD, Kind, Prefix
from migrate.dataplane.messages import Codec, Run
from migrate.dataplane.session import Session
from migrate.dataplane.wire import FrameReader, FrameWriter
from migrate.errors import Cancelled, FrameRejected, InsufficientMemory, MigrateError

_log = logging.getLogger(__name__)
ACK_BYTES = 2 << 20  # payload bytes placed between acknowledgements
ACK_FRAMES = 64


class WireError(Exception):
    """The connection failed in the middle of a frame; carries the error."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


class Intake:
    """The frames of one authenticated connection, put into staging."""

    def __init__(self, session: Session, reader: FrameReader, writer: FrameWriter) -> None:
        self._session = session
        self._reader = reader
        self._writer = writer
        self.placed = 0  # frames whose effect stands
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
            self.placed = self._reader.sequence
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
            self._writer.write(Kind.ACK, messages.pack_ack(self.placed))
            self._unacked_bytes = self._unacked_frames = 0
