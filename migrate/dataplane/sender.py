"""The source's end of the chunk streams: rounds over objects, manifest of the last one."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from migrate.dataplane import keys
from migrate.dataplane.access import MemoryAccess
from migrate.dataplane.channel import Channel
from migrate.dataplane.chooser import AdaptiveChooser, Chooser
from migrate.dataplane.frame import AeadFactory
from migrate.dataplane.messages import ObjectInfo
from migrate.dataplane.pacer import Pacer
from migrate.dataplane.source import Progress, Round, SourceObject
from migrate.dataplane.stats import RoundStats
from migrate.dataplane.stream import MIN_WINDOW, Refusal, SourceStream, StreamOptions
from migrate.errors import FrameRejected, StreamBroken, VerificationFailed

EpochSource = Callable[[], int]
PROGRESS_INTERVAL = 0.1  # seconds


class Sender:
    """Sends objects to one session of a receiver.

    ``connect(stream)`` opens a channel (raises OSError). ``epochs()`` gives a number greater
    than any it gave before, durable before it returns, restarts of the agent included: it is
    what keeps a key and nonce from coming twice. ``bandwidth_limit`` and ``window`` (of each
    stream) are bytes a second and bytes.
    """

    def __init__(
        self,
        connect: Callable[[int], Channel],
        secret: bytes,
        session_id: bytes,
        epochs: EpochSource,
        *,
        streams: int = 2,
        bandwidth_limit: float | None = None,
        window: int = 16 << 20,
        reconnect_timeout: float = 30.0,
        chooser: Chooser | None = None,
        aead: AeadFactory = AESGCM,
    ) -> None:
        if not 1 <= streams <= keys.MAX_STREAMS:
            raise ValueError(f"1 to {keys.MAX_STREAMS} streams")
        options = StreamOptions(
            session_id=session_id,
            secret=secret,
            window=max(window, MIN_WINDOW),
            reconnect_timeout=reconnect_timeout,
        )
        self._reconnect_timeout = reconnect_timeout
        pacer = Pacer(bandwidth_limit)
        chooser = chooser or AdaptiveChooser(streams, len(os.sched_getaffinity(0)))
        self.chooser = chooser
        lock = threading.Lock()

        def next_epoch() -> int:
            with lock:
                return epochs()

        self._streams = [
            SourceStream(
                index,
                connect=connect,
                next_epoch=next_epoch,
                options=options,
                pacer=pacer,
                chooser=chooser,
                aead=aead,
            )
            for index in range(streams)
        ]
        self._objects: dict[int, SourceObject] = {}
        self._dropped: set[int] = set()
        self._last: tuple[int, ...] = ()
        self._last_began: float | None = None

    def send_round(
        self,
        objects: Sequence[tuple[ObjectInfo, MemoryAccess]],
        progress: Progress | None = None,
        cancel: threading.Event | None = None,
    ) -> RoundStats:
        """Bring the destination's staging to what the objects hold now.

        Returns when all is acknowledged. ``progress(scanned, total)`` is called from this
        thread about ten times a second. Raises Cancelled, StreamBroken, MigrationFailed
        (memory that can't be read), or what the destination refused with.
        """
        began = time.monotonic()
        sources = [(self._source(info), access) for info, access in objects]
        for source, _ in sources:
            source.seen.forget_run(0, source.seen.count)
        forget = sorted(self._dropped & self._objects.keys())
        round_ = Round(sources, forget, cancel or threading.Event())
        self._run(round_, progress)
        for object_id in forget:
            del self._objects[object_id]
        self._last = tuple(info.id for info, _ in objects)
        since = began - self._last_began if self._last_began is not None else 0.0
        self._last_began = began
        return round_.counters.stats(time.monotonic() - began, since)

    def resume(self, cancel: threading.Event | None = None) -> None:
        """For a sender made anew for a session under way: learn what the destination holds.

        What it states is not sent again where it is still the same. Raises as ``send_round``.
        """
        deadline = time.monotonic() + self._reconnect_timeout
        while True:
            self._run(Round([], [], cancel or threading.Event()), None)  # opens every stream
            try:
                for info, first, count, state in self._streams[0].state(len(self._streams)):
                    self._source(info).held.load(first, count, state)
                return
            except Refusal as refusal:
                raise refusal.error from None
            except (OSError, EOFError, FrameRejected) as error:
                self._streams[0].close()
                if time.monotonic() > deadline:
                    raise StreamBroken(
                        f"the destination does not state what it holds: {error}"
                    ) from error

    def _source(self, info: ObjectInfo) -> SourceObject:
        if info.id in self._dropped:
            raise ValueError(f"object id {info.id} was dropped and is not used again")
        source = self._objects.get(info.id)
        if source is None:
            source = self._objects[info.id] = SourceObject(info)
        elif source.info != info:
            raise ValueError(f"object {info.id} changed from {source.info} to {info}")
        return source

    def _run(self, round_: Round, progress: Progress | None) -> None:
        def work(stream: SourceStream) -> None:
            try:
                stream.run(round_)
            except Refusal as refusal:
                round_.fail(refusal.error)
            except BaseException as error:
                round_.fail(error)

        threads = [
            threading.Thread(target=work, args=(s,), name="data-send", daemon=True)
            for s in self._streams
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(PROGRESS_INTERVAL)
                if progress is not None:
                    progress(round_.counters.stats(0.0).scanned, round_.total)
        if round_.error is not None:
            raise round_.error

    def drop_object(self, object_id: int) -> None:
        """The object is gone: the destination frees it with the next round. Idempotent."""
        self._dropped.add(object_id)

    def manifest(self) -> dict[int, tuple[int, bytes]]:
        """Size and digests (16 bytes a chunk) of the objects of the last round, as it read them.

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

    def close(self) -> None:
        """Drop the connections. Idempotent."""
        for stream in self._streams:
            stream.close()
