"""The scan of one span: hash, compare, and join neighbouring changed chunks to runs.

Live memory changes under us: a piece is copied once to a private buffer, and that copy is
what is hashed and what is sent, so a digest is always one of the very bytes it travels with.
Where the destination holds something already, memory that is cheap to read is looked at first
where it lies, and copied only if it differs. In a round over memory that stands still it is
not copied at all; should it change all the same, the destination refuses what fails its digest.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat
from typing import Protocol

from migrate.dataplane.access import InPlace, MemoryAccess, MemoryGone
from migrate.dataplane.chunks import DIGEST_SIZE, chunk_count, digests_of, zero_digest
from migrate.dataplane.source import Round, SourceObject, Span, named, read
from migrate.errors import MigrationFailed

What = str | tuple[int, int]  # of a chunk; a tuple: the object and offset it is a duplicate of
KEPT, ZERO, SENT = "kept", "zero", "sent"
LENT = 1 << 20  # bytes of a piece whose copy is worth saving; pages of events, which the driver
# itself may write to, are in buffers that are smaller
MAX_ORIGINS = 1 << 14  # chunks remembered to find duplicates of; some 150 bytes each


class RunSink(Protocol):
    """Where runs go: a stream. Each is pending there, or noted to be done again, once called."""

    buffer: memoryview
    round: Round
    origins: dict[bytes, tuple[int, int]]
    """Where chunks of these digests were sent, in this round and over this connection: object
    and offset. Safe to refer to: the destination has placed it when the next frame is read."""

    def send_zeros(self, source: SourceObject, offset: int, length: int) -> None:
        """Declare whole chunks zero."""

    def send_run(self, source: SourceObject, offset: int, raw: memoryview, digests: bytes) -> None:
        """Send whole chunks."""

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
        for offset in range(self._span.offset, self._end, len(buffer)):
            piece = buffer[: min(len(buffer), self._end - offset)]
            try:
                if self._is_done_in_place(offset, len(piece)):
                    continue
                read(self._source.info, self._access, offset, piece)
            except MigrationFailed:
                if self._source.info.id not in self._sink.round.gone:
                    raise
                self._done = self._end  # nothing more of it, and nothing to do again
                break
            self._piece(offset, piece)
        self._flush_zeros()

    def _is_done_in_place(self, offset: int, length: int) -> bool:
        """Do what there is to do for a piece without a copy of it, if that can be."""
        still, access = self._sink.round.still and length >= LENT, self._access
        if not isinstance(access, InPlace) or not (still or self._is_held(offset, length)):
            return False
        with named(self._source.info, offset, MemoryGone), access.lend(offset, length) as data:
            if data is None:
                return False
            if not still:
                return self._is_kept(offset, data)
            self._piece(offset, data)
            return True

    def _is_held(self, offset: int, length: int) -> bool:
        """Whether the destination holds something of all chunks of a piece."""
        chunk = self._source.info.chunk
        first, count = offset // chunk, chunk_count(length, chunk)
        return 0 not in self._source.held.known[first : first + count]

    def _is_kept(self, offset: int, data: memoryview) -> bool:
        """Whether the destination holds all of a piece as it is."""
        source, chunk, length = self._source, self._source.info.chunk, len(data)
        first, found = offset // chunk, b"".join(digests_of(data, chunk))
        differs = source.held.differing(first, found)
        if any(differs):
            return False
        source.seen.set_run(first, found)
        self._count(offset, length, differs, [False] * len(differs), plain=False)
        if self._zero_from < 0:
            self._done = offset + length
        return True

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

    def _piece(self, offset: int, piece: memoryview) -> None:
        """One piece, all its chunks at once: what is done for each of them alone is dear."""
        source, chunk = self._source, self._source.info.chunk
        first = offset // chunk
        parts = digests_of(piece, chunk)
        zero = self._zero(parts, len(piece))
        digests = b"".join(parts)
        source.seen.set_run(first, digests)
        differs = source.held.differing(first, digests)
        plain = True not in zero and False not in differs
        self._count(offset, len(piece), differs, zero, plain)
        if plain and self._all_new(offset, parts):
            self._send_run(offset, piece, digests, SENT)
        else:
            self._send_groups(offset, piece, self._groups(offset, parts, differs, zero), digests)
        if self._zero_from < 0:
            self._done = offset + len(piece)

    def _zero(self, parts: list[bytes], length: int) -> list[bool]:
        """Which chunks of a piece of *length* bytes are zero: their digests tell."""
        chunk = self._source.info.chunk
        whole = zero_digest(chunk)
        found = [part == whole for part in parts]
        if length % chunk:
            found[-1] = parts[-1] == zero_digest(length % chunk)
        return found

    def _all_new(self, offset: int, parts: list[bytes]) -> bool:
        """Whether none of these chunks was sent before; then they are about to be."""
        origins, info = self._sink.origins, self._source.info
        if len(set(parts)) < len(parts) or not origins.keys().isdisjoint(parts):
            return False
        if len(origins) < MAX_ORIGINS:
            places = range(offset, offset + len(parts) * info.chunk, info.chunk)
            origins.update(zip(parts, zip(repeat(info.id), places), strict=False))
        return True

    def _origin(self, part: bytes, here: tuple[int, int]) -> tuple[int, int] | None:
        """Where the same bytes were sent; None if nowhere: *here* they are about to be."""
        origins = self._sink.origins
        found = origins.get(part)
        if found is None and len(origins) < MAX_ORIGINS:
            origins[part] = here
        return found

    def _send_groups(
        self,
        offset: int,
        piece: memoryview,
        groups: Iterator[tuple[int, int, What]],
        digests: bytes,
    ) -> None:
        chunk = self._source.info.chunk
        for start, end, what in groups:
            at, to = start * chunk, min(end * chunk, len(piece))
            if what is ZERO:
                self._add_zeros(offset + at, to - at)
            elif what is not KEPT:
                found = digests[start * DIGEST_SIZE : end * DIGEST_SIZE]
                self._send_run(offset + at, piece[at:to], found, what)

    def _groups(
        self, offset: int, parts: list[bytes], differs: list[bool], zero: list[bool]
    ) -> Iterator[tuple[int, int, What]]:
        """Neighbours of which the same is to be said: first chunk, the one after, and what."""
        chunk = self._source.info.chunk
        start = 0
        what: What = KEPT
        for index, (changed, empty) in enumerate(zip(differs, zero, strict=True)):
            now: What = ZERO if empty and changed else KEPT
            if changed and not empty:
                here = (self._source.info.id, offset + index * chunk)
                now = self._origin(parts[index], here) or SENT
            if isinstance(what, tuple):
                joined = now == (what[0], what[1] + (index - start) * chunk)
            else:
                joined = now is what
            if not joined:
                if index > start:
                    yield start, index, what
                start, what = index, now
        yield start, len(differs), what

    def _count(
        self, offset: int, length: int, differs: list[bool], zero: list[bool], plain: bool
    ) -> None:
        """Count the chunks that were not counted before a cut; *plain*: all are to be sent."""
        chunk, new = self._source.info.chunk, max(self._fresh_from - offset, 0)
        changed = zeros = 0
        if plain and not new:
            changed = length
        else:
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

    def _add_zeros(self, offset: int, length: int) -> None:
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
