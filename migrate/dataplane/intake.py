"""What one authenticated connection brings, checked and put into staging."""

from __future__ import annotations

import logging

from migrate.dataplane import messages
from migrate.dataplane.codecs import Decoder
from migrate.dataplane.frame import Kind, Prefix, Room
from migrate.dataplane.messages import Codec, Run
from migrate.dataplane.session import Session
from migrate.dataplane.wire import FrameReader, FrameWriter
from migrate.errors import FrameRejected, InsufficientMemory, MigrateError

_log = logging.getLogger(__name__)
ACK_BYTES = 2 << 20  # payload bytes placed between acknowledgements
ACK_FRAMES = 64
_NOTHING = memoryview(bytearray())


class Intake:
    """The frames of one authenticated connection, put into staging."""

    def __init__(self, session: Session, reader: FrameReader, writer: FrameWriter) -> None:
        self._session = session
        self._reader = reader
        self._writer = writer
        self.placed = 0  # frames whose effect stands
        self._room = Room()
        self._packed = _NOTHING  # what came of the run under way, if it is encoded
        self._decoder = Decoder()
        self._target = _NOTHING  # where the run under way goes
        self._unacked_bytes = 0
        self._unacked_frames = 0

    def run(self) -> None:
        """Until the peer ends or errs. Raises EOFError, OSError, MigrateError.

        What fails while a payload is read was cut or altered on the wire, and the source may
        come again; what fails before or after it was said by the source itself: refused.
        """
        while True:
            prefix, meta = self._reader.next()
            try:
                run = self._begin(prefix, meta)
            except BaseException as error:
                self.failed(error)
                raise
            if run is not None:
                self._read_payload(run, prefix)
                try:
                    self._finish(run, prefix)
                except BaseException as error:
                    self.failed(error)
                    raise
            self.placed = self._reader.sequence
            self._acknowledge(prefix)

    def failed(self, error: BaseException) -> None:
        """Refuse what the source itself said wrong, and a bug here: it must not try for ever.

        Errors of the wire (OSError, EOFError), met while answering, are neither.
        """
        if isinstance(error, MigrateError):
            self.refuse(error)
        elif isinstance(error, Exception) and not isinstance(error, (OSError, EOFError)):
            self.refuse(MigrateError(f"the destination failed: {error!r}"))

    def refuse(self, error: MigrateError) -> None:
        """Tell the source why, now or when it connects again."""
        self._session.refuse(error.reason, error.message)
        try:
            self._writer.write(Kind.REFUSE, messages.pack_refuse(error.reason, error.message))
        except OSError as cut:
            _log.debug("could not send the refusal: %s", cut)

    def _begin(self, prefix: Prefix, meta: bytes) -> Run | None:
        """Check a frame and do what it says; a run is returned whose payload comes next."""
        self._session.check()
        kind = prefix.kind
        if kind is Kind.DATA:
            return self._begin_run(Run.parse(meta), prefix)
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
        return None

    def _declare(self, meta: bytes) -> None:
        try:
            self._session.staging.declare(messages.parse_declare(meta))
        except OSError as error:  # ENOMEM
            raise InsufficientMemory(f"no memory for staging: {error}") from error

    def _begin_run(self, run: Run, prefix: Prefix) -> Run | None:
        staged = self._session.staging.get(run.object_id)
        run.check(staged.info, prefix.payload_length)
        if run.codec is Codec.ZERO:
            staged.store_zeros(run.offset, run.length)
            return None
        if run.codec is Codec.DUPLICATE:
            origin = self._session.staging.get(run.origin[0])
            staged.copy_from(origin, run.origin[1], run.offset, run.length)
            staged.commit(run.offset, run.length, run.digests)
            return None
        self._target = staged.begin(run.offset, run.length)
        return run

    def _read_payload(self, run: Run, prefix: Prefix) -> None:
        self._packed = (
            self._target if run.codec is Codec.RAW else self._room.of(prefix.payload_length)
        )
        self._reader.payload(prefix, self._packed)

    def _finish(self, run: Run, prefix: Prefix) -> None:
        if run.codec is not Codec.RAW:
            self._decoder.decode(run.codec, self._packed, self._target)
        self._session.staging.get(run.object_id).commit(run.offset, run.length, run.digests)
        self._target = self._packed = _NOTHING

    def _acknowledge(self, prefix: Prefix) -> None:
        self._unacked_bytes += prefix.payload_length
        self._unacked_frames += 1
        due = self._unacked_bytes >= ACK_BYTES or self._unacked_frames >= ACK_FRAMES
        if due or prefix.kind in (Kind.SYNC, Kind.STATE_REQUEST):
            self._writer.write(Kind.ACK, messages.pack_ack(self.placed))
            self._unacked_bytes = self._unacked_frames = 0
