"""The source's side of objects: what the destination holds, and the work of one round."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence

from migrate.dataplane.access import MemoryAccess
from migrate.dataplane.chunks import ChunkTable
from migrate.dataplane.messages import ObjectInfo
from migrate.dataplane.stats import Counters
from migrate.errors import Cancelled, MigrationFailed, VerificationFailed
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
        self.gone: set[int] = set()  # objects whose memory was given up during the round
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


Manifest = dict[int, tuple[int, bytes]]  # size and digests (16 bytes a chunk) by object id


class ObjectBook:
    """The objects of one sender across its rounds."""

    def __init__(self) -> None:
        self._objects: dict[int, SourceObject] = {}
        self.dropped: set[int] = set()
        self._last: tuple[int, ...] = ()
        self._last_began: float | None = None

    def source(self, info: ObjectInfo) -> SourceObject:
        """The object of that id, made when first met. Raises ValueError if it changed."""
        if info.id in self.dropped:
            raise ValueError(f"object id {info.id} was dropped and is not used again")
        source = self._objects.get(info.id)
        if source is None:
            source = self._objects[info.id] = SourceObject(info)
        elif source.info != info:
            raise ValueError(f"object {info.id} changed from {source.info} to {info}")
        return source

    def begin(
        self, objects: Sequence[tuple[ObjectInfo, MemoryAccess]]
    ) -> tuple[list[tuple[SourceObject, MemoryAccess]], list[int]]:
        """The objects of a new round, nothing of them seen yet, and the ids to forget."""
        sources = [(self.source(info), access) for info, access in objects]
        for source, _ in sources:
            source.seen.forget_run(0, source.seen.count)
        return sources, sorted(self.dropped & self._objects.keys())

    def ended(self, objects: Sequence[int], forgotten: Sequence[int], began: float) -> float:
        """The round is done; seconds since the one before began, 0.0 if it is the first."""
        for object_id in forgotten:
            del self._objects[object_id]
        self._last = tuple(objects)
        since = began - self._last_began if self._last_began is not None else 0.0
        self._last_began = began
        return since

    def manifest(self) -> Manifest:
        """The objects of the last round, as it read them.

        Raises VerificationFailed if the round left a chunk out.
        """
        result = {}
        for object_id in self._last:
            source = self._objects[object_id]
            missing = next(source.seen.unknown(), None)
            if missing is not None:
                at = missing * source.info.chunk
                raise VerificationFailed(f"object {object_id}: the chunk at {at:#x} was not read")
            result[object_id] = (source.info.size, bytes(source.seen.digests))
        return result


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
