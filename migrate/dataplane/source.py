"""The source's side of objects: what the destination holds, and the work of one round."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence

from migrate.dataplane.access import MemoryAccess
from migrate.dataplane.chunks import ChunkTable
from migrate.dataplane.messages import ObjectInfo
from migrate.dataplane.stats import Counters
from migrate.errors import Cancelled, MigrationFailed
from migrate.model import Value

SPAN = 4 << 20  # bytes of an object that one stream takes at a time


class SourceObject:
    """An object across rounds.

    ``held`` is what the destination acknowledged and nothing else was sent over since;
    ``seen`` is what was hashed in the round under way, the manifest's only source, so that a
    chunk a round left out is missing in it and not silently an old one.
    """

    def __init__(self, info: ObjectInfo) -> None:
        self.info = info
        self.held = ChunkTable(info.size, info.chunk)
        self.seen = ChunkTable(info.size, info.chunk)


class Span(Value):
    """Whole chunks of an object to scan: *length* bytes from *offset*.

    Chunks below ``fresh_from`` were counted before and lost in a cut.
    """

    object_id: int
    offset: int
    length: int
    fresh_from: int = 0


class Forget(Value):
    """Tell the destination that an object is gone."""

    object_id: int


Item = Span | Forget


class Round:
    """What the streams of one round share. Spans are handed out once, in order."""

    def __init__(
        self,
        objects: Sequence[tuple[SourceObject, MemoryAccess]],
        forget: Sequence[int],
        cancel: threading.Event,
    ) -> None:
        self.objects = {o.info.id: o for o, _ in objects}
        self.access = {o.info.id: access for o, access in objects}
        self.total = sum(o.info.size for o, _ in objects)
        self.counters = Counters()
        self._cancel = cancel
        self._failed = threading.Event()
        self.error: BaseException | None = None
        self._lock = threading.Lock()
        self._items = _items(objects, forget)

    def take(self) -> Item | None:
        """The next piece of work, None if all of it was handed out."""
        with self._lock:
            return next(self._items, None)

    def check(self) -> None:
        """Raises Cancelled if the round is not to go on."""
        if self._cancel.is_set():
            raise Cancelled("the migration was cancelled")
        if self._failed.is_set():
            raise Cancelled("another stream failed")

    def wait(self, seconds: float) -> None:
        """Sleep, but not through a cancel."""
        self._cancel.wait(seconds)
        self.check()

    def fail(self, error: BaseException) -> None:
        """Keep the first error; the other streams end at their next check."""
        with self._lock:
            if self.error is None:
                self.error = error
        self._failed.set()


def _items(
    objects: Sequence[tuple[SourceObject, MemoryAccess]], forget: Sequence[int]
) -> Iterator[Item]:
    for object_id in forget:
        yield Forget(object_id=object_id)
    for source, _ in objects:
        for offset in range(0, max(source.info.size, 1), SPAN):
            length = min(SPAN, source.info.size - offset)
            yield Span(object_id=source.info.id, offset=offset, length=length)


def read(info: ObjectInfo, access: MemoryAccess, offset: int, into: memoryview) -> None:
    """Read a piece of an object's memory. Raises MigrationFailed naming it."""
    try:
        access.read(offset, into)
    except OSError as error:
        raise MigrationFailed(
            f"object {info.id} ({info.kind.name}) can't be read at {offset:#x}: {error}",
            advice="The process freed this memory, or ended, while it was being copied. Try again.",
        ) from error


Progress = Callable[[int, int], None]
