"""The source's side of objects: what the destination holds, and the work of one round."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from migrate.dataplane.access import MemoryAccess
from migrate.dataplane.chunks import ChunkTable
from migrate.dataplane.messages import ObjectInfo
from migrate.dataplane.stats import Counters
from migrate.errors import Cancelled, MigrationFailed, VerificationFailed
from migrate.model import Value

SPAN = 4 << 20  # bytes of an object that one stream takes at a time
_LOOK = 0.1  # seconds between looks whether a round that waits for objects was ended


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


Coming = Iterable[tuple[ObjectInfo, MemoryAccess]]  # objects that appear during a round


class Round:
    """What the streams of one round share. Spans are handed out once, in order.

    With *growing* it is not over before ``complete``: objects are added meanwhile. *still*:
    nothing writes to their memory while it lasts.
    """

    def __init__(
        self,
        objects: Sequence[tuple[SourceObject, MemoryAccess]],
        forget: Sequence[int],
        cancel: threading.Event,
        *,
        growing: bool = False,
        still: bool = False,
    ) -> None:
        self.objects = {o.info.id: o for o, _ in objects}
        self.access = {o.info.id: access for o, access in objects}
        self.total = sum(o.info.size for o, _ in objects)
        self.still = still
        self.counters = Counters()
        self._cancel = cancel
        self._failed = threading.Event()
        self.error: BaseException | None = None
        self.gone: set[int] = set()  # objects whose memory was given up during the round
        self._lock = threading.Condition()
        self._items: deque[Item] = deque(Forget(object_id=gone) for gone in forget)
        for source, _ in objects:
            self._items.extend(_spans(source))
        self._growing = growing
        self._added: set[int] = set()  # of the objects, those to be let go as they stand

    def take(self) -> Item | None:
        """The next piece of work, None if there is none now: see ``is_over``."""
        with self._lock:
            return self._items.popleft() if self._items else None

    def add(self, source: SourceObject, access: MemoryAccess) -> None:
        """One more object; its access is closed as soon as the destination has all of it."""
        with self._lock:
            self.objects[source.info.id] = source
            self.access[source.info.id] = access
            self.total += source.info.size
            self._added.add(source.info.id)
            self._items.extend(_spans(source))
            self._lock.notify_all()

    def complete(self) -> None:
        """Nothing is added any more."""
        with self._lock:
            self._growing = False
            self._lock.notify_all()

    def is_over(self) -> bool:
        """Whether all work was handed out and none can come."""
        with self._lock:
            return not self._growing and not self._items

    def await_more(self) -> None:
        """Until there is work or the round is over. Raises as ``check``.

        For a stream with nothing in flight: what is added may wait for what it has sent.
        """
        with self._lock:
            while self._growing and not self._items:
                self.check()
                self._lock.wait(_LOOK)

    def settled(self, source: SourceObject) -> None:
        """Some chunks of an object stand at the destination."""
        number = source.info.id
        if number in self._added and next(source.held.unknown(), None) is None:
            self.access[number].close()

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


def _spans(source: SourceObject) -> list[Span]:
    size = source.info.size
    return [
        Span(object_id=source.info.id, offset=offset, length=min(SPAN, size - offset))
        for offset in range(0, max(size, 1), SPAN)
    ]


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

    def feed(self, round_: Round, coming: Coming) -> threading.Thread:
        """Add what *coming* brings to the round, in a thread; what it raises fails the round."""

        def work() -> None:
            try:
                for info, access in coming:
                    round_.add(self.source(info), access)
                    round_.check()
                round_.complete()
            except BaseException as error:
                round_.fail(error)

        thread = threading.Thread(target=work, name="data-feed", daemon=True)
        thread.start()
        return thread

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
    with named(info, offset):
        access.read(offset, into)


@contextmanager
def named(info: ObjectInfo, offset: int, errors: type[OSError] = OSError) -> Iterator[None]:
    """Within it, *errors* are of an object's memory and become a MigrationFailed that names it."""
    try:
        yield
    except errors as error:
        raise MigrationFailed(
            f"object {info.id} ({info.kind.name}) can't be read at {offset:#x}: {error}",
            advice="The process freed this memory, or ended, while it was being copied. Try again.",
        ) from error


Progress = Callable[[int, int], None]  # bytes scanned, and of how many
