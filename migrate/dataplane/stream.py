"""One chunk stream of the source: scan, seal, send, and what to do when the wire is cut.

What was sent and not acknowledged is remembered as ranges, not as bytes: after a cut the
destination says how many frames of the old connection stand, the rest is read, hashed and
sealed anew. So memory is bounded by the buffers whatever the window is, and a retransmission
never repeats a key and nonce.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator

from migrate.dataplane import keys, messages
from migrate.dataplane.channel import Channel, never
from migrate.dataplane.chooser import Chooser
from migrate.dataplane.chunks import DIGEST_SIZE, chunk_count
from migrate.dataplane.codecs import Encoder
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
from migrate.dataplane.messages import Codec, ObjectInfo, Run
from migrate.dataplane.pacer import Pacer
from migrate.dataplane.scan import SpanScan
from migrate.dataplane.source import Forget, Item, Round, SourceObject, Span
from migrate.dataplane.wire import FrameReader, FrameWriter, deadline
from migrate.errors import FrameRejected, MigrateError, StreamBroken, by_reason
from migrate.model import Value

ANSWER_TIMEOUT = 30.0  # seconds the destination may take to answer
MAX_FRAMES_IN_FLIGHT = 1024
MIN_WINDOW = 4 << 20  # bytes; twice what the destination places between acknowledgements


class StreamOptions(Value):
    """What every stream of a sender shares. Sizes in bytes, times in seconds."""

    session_id: bytes
    secret: bytes
    window: int = 16 << 20
    reconnect_timeout: float = 30.0


class Sent(Value):
    """A frame on its way."""

    sequence: int
    item: Item | None  # to do again if it is lost; None: DECLARE and SYNC, done again anyway
    digests: bytes
    wire: int
    payload: int


class SourceStream:
    """Stream *index*. One thread at a time uses it; the connection outlives rounds."""

    def __init__(
        self,
        index: int,
        *,
        connect: Callable[[int], Channel],
        next_epoch: Callable[[], int],
        options: StreamOptions,
        pacer: Pacer,
        chooser: Chooser,
        aead: AeadFactory,
    ) -> None:
        self._index = index
        self._connect = connect
        self._next_epoch = next_epoch
        self._options = options
        self._pacer = pacer
        self._chooser = chooser
        self._aead = aead
        self._encoder = Encoder()
        self.buffer = memoryview(bytearray(MAX_PAYLOAD))  # for the scan
        self._channel: Channel | None = None
        self._reader: FrameReader
        self._writer: FrameWriter
        self._epoch = 0  # of the connection that ``_pending`` belongs to
        self._pending: deque[Sent] = deque()
        self._in_flight = 0
        self._todo: deque[Item] = deque()  # lost in a cut
        self._declared: set[int] = set()
        self.origins: dict[bytes, tuple[int, int]] = {}  # of this round and connection
        self._failing_since: float | None = None
        self.round: Round

    def run(self, round_: Round) -> None:
        """Work on the round until all that this stream took is acknowledged.

        Raises MigrateError; the stream is then closed.
        """
        self.round = round_
        self.origins.clear()
        self._failing_since = None
        try:
            while not self._attempt():
                pass
        except BaseException:
            self.close()
            raise
        finally:
            if self._channel is not None:
                self._channel.check = never

    def close(self) -> None:
        """Drop the connection. What is in flight counts as lost. Idempotent."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def _attempt(self) -> bool:
        """Go on until the round is done (True) or the wire is cut (False)."""
        try:
            if self._channel is None:
                self._open()
            assert self._channel is not None
            self._channel.check = self.round.check
            while True:
                while (item := self._next_item()) is not None:
                    self.round.check()
                    self._send_item(item)
                self._flush()
                if self.round.is_over():
                    return True
                self.round.await_more()
        except (OSError, EOFError, FrameRejected) as error:
            self.close()
            self._cut(error)
            return False

    def _cut(self, error: Exception) -> None:
        """Wait a moment before the next attempt, or give up. Raises StreamBroken."""
        now = time.monotonic()
        if self._failing_since is None:
            self._failing_since = now
        failing = now - self._failing_since
        if failing > self._options.reconnect_timeout:
            raise StreamBroken(
                f"stream {self._index} made no progress for {failing:.0f} s:"
                f" {error or type(error).__name__}"
            ) from error
        self.round.counters.add(reconnects=1)
        self.round.wait(min(0.5, failing / 4))

    # ------------------------------------------------------------ connection

    def _open(self) -> None:
        """Connect, prove who we are, learn what stands. Raises OSError, EOFError."""
        epoch = self._next_epoch()
        channel = self._channel = self._connect(self._index)
        channel.check = self.round.check
        with deadline(channel, ANSWER_TIMEOUT):
            greeting = bytearray(keys.GREETING_SIZE)
            channel.receive_into(memoryview(greeting))
            hello = keys.Hello(
                stream=self._index,
                epoch=epoch,
                previous=self._epoch,
                session_id=self._options.session_id,
                nonce=os.urandom(keys.NONCE_SIZE),
            )
            nonces = keys.parse_greeting(bytes(greeting)) + hello.nonce
            channel.send([keys.pack_hello(hello, bytes(greeting), self._options.secret)])
            self._make_lanes(channel, epoch, nonces)
            placed = self._welcome()
        self._settle(placed)
        self._requeue()
        self._epoch = epoch
        self._declared.clear()
        self.origins.clear()

    def _make_lanes(self, channel: Channel, epoch: int, nonces: bytes) -> None:
        def key(lane: Lane) -> bytes:
            return keys.lane_key(
                self._options.secret, nonces, lane.direction, lane.stream, lane.epoch
            )

        outward = Lane(direction=Direction.TO_DESTINATION, stream=self._index, epoch=epoch)
        inward = Lane(direction=Direction.TO_SOURCE, stream=self._index, epoch=epoch)
        self._writer = FrameWriter(channel, Sealer(key(outward), outward, aead=self._aead))
        self._reader = FrameReader(channel, Opener(key(inward), inward, aead=self._aead))

    def _welcome(self) -> int:
        meta = self._receive(Kind.WELCOME)
        previous, placed = messages.parse_welcome(meta)
        if previous != self._epoch:
            raise FrameRejected(f"welcome of epoch {previous}, asked for {self._epoch}")
        return placed

    def _receive(self, wanted: Kind) -> bytes:
        """The meta of the next frame, which is to be of one kind."""
        prefix, meta = self._next_frame()
        if prefix.kind is not wanted:
            raise FrameRejected(f"{prefix.kind.name} came where {wanted.name} is due")
        return meta

    def _next_frame(self) -> tuple[Prefix, bytes]:
        """Raises what the destination refuses with, as a Refusal."""
        prefix, meta = self._reader.next()
        if prefix.kind is Kind.REFUSE:
            reason, message = messages.parse_refuse(meta)
            raise Refusal(by_reason(reason)(message))
        return prefix, meta

    def state(self, streams: int) -> Iterator[tuple[ObjectInfo, int, int, bytes]]:
        """What the destination holds, of whatever sender: object, first chunk, count, export.

        To be read to its end, on an open stream with nothing in flight. Raises OSError,
        EOFError, FrameRejected.
        """
        assert self._channel is not None
        self._send(Kind.STATE_REQUEST, messages.pack_state_request(streams), b"", None)
        while self._pending:
            with deadline(self._channel, ANSWER_TIMEOUT):
                prefix, meta = self._next_frame()
                if prefix.kind is not Kind.STATE:
                    self._settle(messages.parse_ack(meta))
                    continue
                info, first, count = messages.parse_state(meta, prefix.payload_length)
                payload = bytearray(prefix.payload_length)
                self._reader.payload(prefix, memoryview(payload))
            yield info, first, count, bytes(payload)

    # ------------------------------------------------------------ acknowledgement

    def _settle(self, placed: int) -> None:
        """Frames below *placed* stand: the destination holds their chunks."""
        while self._pending and self._pending[0].sequence < placed:
            sent = self._pending.popleft()
            self._in_flight -= sent.wire
            if sent.item is not None:  # a DECLARE that stands is no progress: each attempt has it
                self._failing_since = None
            if isinstance(sent.item, Span):
                source = self.round.objects.get(sent.item.object_id)
                if source is not None:
                    source.held.set_run(sent.item.offset // source.info.chunk, sent.digests)
                    self.round.settled(source)

    def _requeue(self) -> None:
        """What was in flight and does not stand is to be done again."""
        for sent in self._pending:
            if sent.item is not None:
                self._todo.append(sent.item)
                self.round.counters.add(resent=sent.payload)
        self._pending.clear()
        self._in_flight = 0

    def _next_item(self) -> Item | None:
        return self._todo.popleft() if self._todo else self.round.take()

    def _await_ack(self) -> None:
        assert self._channel is not None
        with deadline(self._channel, ANSWER_TIMEOUT):
            meta = self._receive(Kind.ACK)
        self._settle(messages.parse_ack(meta))

    def _flush(self) -> None:
        if not self._pending:
            return
        self._send(Kind.SYNC, b"", b"", None)
        while self._pending:
            self._await_ack()

    # ------------------------------------------------------------ sending

    def _send(
        self,
        kind: Kind,
        meta: bytes,
        payload: memoryview | bytes,
        item: Item | None,
        digests: bytes = b"",
    ) -> None:
        """Send one frame within the window and remember it.

        If this raises, *item* is either pending or to be done again: never lost.
        """
        size = len(payload) + len(meta)
        try:
            self._await_room(size)
        except BaseException:
            if item is not None:
                self._todo.append(item)
            raise
        sent = Sent(
            sequence=self._writer.sequence,
            item=item,
            digests=digests,
            wire=size,
            payload=len(payload),
        )
        self._pending.append(sent)  # first: half a frame is in flight too
        self._in_flight += size
        wire = self._writer.write(kind, meta, payload)
        self.round.counters.add(wire=wire)

    def _await_room(self, size: int) -> None:
        while self._pending and (
            self._in_flight + size > self._options.window
            or len(self._pending) >= MAX_FRAMES_IN_FLIGHT
        ):
            self._await_ack()
        self._pacer.take(size, self.round.wait)

    def _send_item(self, item: Item) -> None:
        if isinstance(item, Forget):
            self._send(Kind.FORGET, messages.pack_forget(item.object_id), b"", item)
            return
        source = self.round.objects.get(item.object_id)
        if source is None:
            return  # lost in a cut of an earlier round, and gone since
        scan = SpanScan(self, source, self.round.access[item.object_id], item)
        try:
            if not source.info.size:
                self._declare(source, item)
            scan.run()
        except (OSError, EOFError, FrameRejected):
            rest = scan.rest()
            if rest is not None:
                self._todo.append(rest)
            raise

    def _declare(self, source: SourceObject, item: Item | None = None) -> None:
        """Once a connection, before the first run of the object."""
        if source.info.id not in self._declared:
            self._send(Kind.DECLARE, messages.pack_declare(source.info), b"", item)
            self._declared.add(source.info.id)

    def _send_data(
        self,
        source: SourceObject,
        run: Run,
        payload: memoryview | bytes,
        item: Span,
        digests: bytes,
    ) -> None:
        try:
            self._declare(source)
        except BaseException:
            self._todo.append(item)
            raise
        self._send(Kind.DATA, run.pack(), payload, item, digests)

    def send_zeros(self, source: SourceObject, offset: int, length: int) -> None:
        """Declare whole chunks zero."""
        chunk = source.info.chunk
        first, count = offset // chunk, chunk_count(length, chunk)
        source.held.forget_run(first, count)
        run = Run(object_id=source.info.id, codec=Codec.ZERO, offset=offset, length=length)
        item = counted(source, offset, length)
        self._send_data(source, run, b"", item, source.held.zero_digests(first, count))
        self.round.counters.sent(Codec.ZERO, length, 0)

    def send_duplicate(
        self,
        source: SourceObject,
        offset: int,
        length: int,
        digests: bytes,
        origin: tuple[int, int],
    ) -> None:
        """Say that whole chunks are as those of *origin*."""
        source.held.forget_run(offset // source.info.chunk, len(digests) // DIGEST_SIZE)
        run = Run(
            object_id=source.info.id,
            codec=Codec.DUPLICATE,
            offset=offset,
            length=length,
            digests=digests,
            origin=origin,
        )
        self._send_data(source, run, b"", counted(source, offset, length), digests)
        self.round.counters.sent(Codec.DUPLICATE, length, 0)

    def send_run(self, source: SourceObject, offset: int, raw: memoryview, digests: bytes) -> None:
        """Send whole chunks."""
        chunk = source.info.chunk
        source.held.forget_run(offset // chunk, len(digests) // DIGEST_SIZE)
        packed = self._chooser.encode(self._encoder, source.info, raw)
        codec = packed.codec
        run = Run(
            object_id=source.info.id, codec=codec, offset=offset, length=len(raw), digests=digests
        )
        item = counted(source, offset, len(raw))
        began = time.monotonic()
        self._send_data(source, run, packed.payload, item, digests)
        self._chooser.sent(packed, time.monotonic() - began)
        self.round.counters.sent(codec, len(raw), len(packed.payload))


def counted(source: SourceObject, offset: int, length: int) -> Span:
    """A range to do again if its frame is lost."""
    end = offset + length
    return Span(object_id=source.info.id, offset=offset, length=length, fresh_from=end)


class Refusal(Exception):
    """The destination ended the session; carries the error to raise."""

    def __init__(self, error: MigrateError) -> None:
        super().__init__(str(error))
        self.error = error
