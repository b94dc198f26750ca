"""The scan of one span: hash, compare, and join neighbouring changed chunks to runs.

Live memory changes under us: a piece is copied once to a private buffer, and that copy is
what is hashed and what is sent, so a digest is always one of the very bytes it travels with.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from migrate.dataplane.access import MemoryAccess
from migrate.dataplane.chunks import DIGEST_SIZE, address_of, digest, is_zero_at
from migrate.dataplane.source import Round, SourceObject, Span, read
from migrate.errors import MigrationFailed

What = str | tuple[int, int]  # of a chunk; a tuple: the object and offset it is a duplicate of
KEPT, ZERO, SENT = "kept", "zero", "sent"


class RunSink(Protocol):
    """Where runs go: a stream. Each is pending there, or noted to be done again, once called."""

    buffer: memoryview
    round: Round

    def send_zeros(self, source: SourceObject, offset: int, length: int) -> None:
        """Declare whole chunks zero."""

    def send_run(self, source: SourceObject, offset: int, raw: memoryview, digests: bytes) -> None:
        """Send whole chunks."""

    def origin(self, digest: bytes, here: tuple[int, int]) -> tuple[int, int] | None:
        """Where the same bytes were sent before: object and offset.

        None if nowhere: then *here* they are about to be.
        """

    def send_duplicate(
        self,
        source: SourceObject,
        offset: int,
        length: int,
        digests: bytes,
        origin: tuple[int, int],
    ) -> None:
        """Say that whole chunks are as those of *origin*."""


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
            try:
                read(self._source.info, self._access, offset, piece)
            except MigrationFailed:
                if self._source.info.id not in self._sink.round.gone:
                    raise
                self._done = self._end  # nothing more of it, and nothing to do again
                break
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
        """One piece, all its chunks at once: what is done for each of them alone is dear."""
        source, chunk = self._source, self._source.info.chunk
        first = offset // chunk
        digests, zero = self._digests(piece, address, first)
        source.seen.set_run(first, digests)
        differs = source.held.differing(first, digests)
        self._count(offset, len(piece), differs, zero)
        for start, end, what in self._groups(offset, digests, differs, zero):
            at, to = start * chunk, min(end * chunk, len(piece))
            if what is ZERO:
                self._zero(offset + at, to - at)
            elif what is not KEPT:
                found = digests[start * DIGEST_SIZE : end * DIGEST_SIZE]
                self._send_run(offset + at, piece[at:to], found, what)
        if self._zero_from < 0:
            self._done = offset + len(piece)

    def _groups(
        self, offset: int, digests: bytes, differs: list[bool], zero: list[bool]
    ) -> Iterator[tuple[int, int, What]]:
        """Neighbours of which the same is to be said: first chunk, the one after, and what."""
        chunk = self._source.info.chunk
        start = 0
        what: What = KEPT
        for index, (changed, empty) in enumerate(zip(differs, zero, strict=True)):
            now: What = ZERO if empty and changed else KEPT
            if changed and not empty:
                here = (self._source.info.id, offset + index * chunk)
                found = digests[index * DIGEST_SIZE : (index + 1) * DIGEST_SIZE]
                now = self._sink.origin(found, here) or SENT
            if isinstance(what, tuple):
                joined = now == (what[0], what[1] + (index - start) * chunk)
            else:
                joined = now is what
            if not joined:
                if index > start:
                    yield start, index, what
                start, what = index, now
        yield start, len(differs), what

    def _digests(self, piece: memoryview, address: int, first: int) -> tuple[bytes, list[bool]]:
        """The digests of a piece's chunks, and which of them are zero."""
        chunk = self._source.info.chunk
        found, zero = [], []
        for index, at in enumerate(range(0, len(piece), chunk), first):
            part = piece[at : at + chunk]
            zero.append(is_zero_at(address + at, len(part)))
            found.append(self._source.seen.zero_digests(index, 1) if zero[-1] else digest(part))
        return b"".join(found), zero

    def _count(self, offset: int, length: int, differs: list[bool], zero: list[bool]) -> None:
        """Count the chunks that were not counted before a cut."""
        chunk, new = self._source.info.chunk, max(self._fresh_from - offset, 0)
        changed = zeros = 0
        for number in range(new // chunk, len(differs)):
            if differs[number]:
                size = min(chunk, length - number * chunk)
                changed += size
                zeros += size * zero[number]
        scanned = max(length - new, 0)
        self._fresh_from = max(self._fresh_from, offset + length)
        counters = self._sink.round.counters
        counters.add(scanned=scanned, changed=changed, unchanged=scanned - changed, zero=zeros)

    def _send_run(self, offset: int, raw: memoryview, digests: bytes, what: What) -> None:
        self._flush_zeros()
        self._done = offset + len(raw)
        if isinstance(what, tuple):
            self._sink.send_duplicate(self._source, offset, len(raw), digests, what)
        else:
            self._sink.send_run(self._source, offset, raw, digests)

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
