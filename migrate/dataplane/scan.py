"""The scan of one span: hash, compare, and join neighbouring changed chunks to runs.

Live memory changes under us: a piece is copied once to a private buffer, and that copy is
what is hashed and what is sent, so a digest is always one of the very bytes it travels with.
"""

from __future__ import annotations

from typing import Protocol

from migrate.dataplane.access import MemoryAccess
from migrate.dataplane.chunks import address_of, digest, is_zero_at
from migrate.dataplane.source import Round, SourceObject, Span, read


class RunSink(Protocol):
    """Where runs go: a stream. Each is pending there, or noted to be done again, once called."""

    buffer: memoryview
    round: Round

    def send_zeros(self, source: SourceObject, offset: int, length: int) -> None:
        """Declare whole chunks zero."""

    def send_run(self, source: SourceObject, offset: int, raw: memoryview, digests: bytes) -> None:
        """Send whole chunks."""


class SpanScan:
    """One span on its way through one stream."""

    def __init__(
        self, sink: RunSink, source: SourceObject, access: MemoryAccess, span: Span
    ) -> None:
        self._sink = sink
        self._source = source
        self._access = access
        self._span = span
        self._end = span.offset + span.length
        self._done = span.offset  # all before it was given to the sink or needs no sending
        self._fresh_from = span.fresh_from  # chunks from here on are not counted yet
        self._zero_from = self._zero_to = -1  # zero chunks not yet declared

    def run(self) -> None:
        """Raises OSError and EOFError of the wire, MigrationFailed of the memory."""
        buffer = self._sink.buffer
        address = address_of(buffer)
        for offset in range(self._span.offset, self._end, len(buffer)):
            piece = buffer[: min(len(buffer), self._end - offset)]
            read(self._source.info, self._access, offset, piece)
            self._piece(offset, piece, address)
        self._flush_zeros()

    def rest(self) -> Span | None:
        """What is left to do after a cut."""
        if self._done >= self._end:
            return None
        return Span(
            object_id=self._span.object_id,
            offset=self._done,
            length=self._end - self._done,
            fresh_from=self._fresh_from,
        )

    def _piece(self, offset: int, piece: memoryview, address: int) -> None:
        source, chunk = self._source, self._source.info.chunk
        run_from = -1  # changed chunks not yet sent
        run_digests = bytearray()
        for at in range(0, len(piece), chunk):
            part = piece[at : at + chunk]
            index = (offset + at) // chunk
            is_zero = is_zero_at(address + at, len(part))
            found = source.seen.zero_digests(index, 1) if is_zero else digest(part)
            source.seen.set_run(index, found)
            differs = source.held.get(index) != found
            self._count(offset + at, len(part), differs, is_zero)
            if differs and not is_zero:
                if run_from < 0:
                    run_from = at
                run_digests += found
                continue
            if run_from >= 0:
                self._send_run(offset + run_from, piece[run_from:at], run_digests)
                run_from, run_digests = -1, bytearray()
            if differs:
                self._zero(offset + at, len(part))
        if run_from >= 0:
            self._send_run(offset + run_from, piece[run_from:], run_digests)
        if self._zero_from < 0:
            self._done = offset + len(piece)

    def _count(self, offset: int, length: int, differs: bool, is_zero: bool) -> None:
        if offset < self._fresh_from:
            return
        self._fresh_from = offset + length
        self._sink.round.counters.scanned(length, differs, is_zero)

    def _send_run(self, offset: int, raw: memoryview, digests: bytearray) -> None:
        self._flush_zeros()
        self._done = offset + len(raw)
        self._sink.send_run(self._source, offset, raw, bytes(digests))

    def _zero(self, offset: int, length: int) -> None:
        if self._zero_to != offset:
            self._flush_zeros()
            self._zero_from = offset
        self._zero_to = offset + length

    def _flush_zeros(self) -> None:
        if self._zero_from < 0:
            return
        start, end = self._zero_from, self._zero_to
        self._zero_from = self._zero_to = -1
        self._done = end
        self._sink.send_zeros(self._source, start, end - start)
