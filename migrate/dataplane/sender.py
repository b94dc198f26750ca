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
from migrate.dataplane.source import Coming, Manifest, ObjectBook, Progress, Round
from migrate.dataplane.stats import RoundStats
from migrate.dataplane.stream import MIN_WINDOW, Refusal, SourceStream, StreamOptions
from migrate.errors import FrameRejected, StreamBroken

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
        self._book = ObjectBook()
        self._round: Round | None = None  # under way

    def send_round(
        self,
        objects: Sequence[tuple[ObjectInfo, MemoryAccess]],
        progress: Progress | None = None,
        cancel: threading.Event | None = None,
        coming: Coming | None = None,
        *,
        still: bool = False,
    ) -> RoundStats:
        """Bring the destination's staging to what the objects hold now.

        *still*: nothing writes to them meanwhile, so that what is cheap to read is not copied
        before it is hashed and sent; if something did, the destination refuses the round.

        *coming*: more objects, each sent when it comes and its access closed when the
        destination has it. It is iterated in a thread of its own; what it raises is raised here.

        Returns when all is acknowledged. ``progress(scanned, total)`` is called from this
        thread about ten times a second. Raises Cancelled, StreamBroken, MigrationFailed
        (memory that can't be read), or what the destination refused with.
        """
        began = time.monotonic()
        sources, forget = self._book.begin(objects)
        stop = cancel or threading.Event()
        growing = coming is not None
        round_ = self._round = Round(sources, forget, stop, growing=growing, still=still)
        if coming is not None:
            self._book.feed(round_, coming)
        try:
            self._run(round_, progress)
        finally:
            self._round = None
        since = self._book.ended(list(round_.objects), forget, began)
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
                    self._book.source(info).held.load(first, count, state)
                return
            except Refusal as refusal:
                raise refusal.error from None
            except (OSError, EOFError, FrameRejected) as error:
                self._streams[0].close()
                if time.monotonic() > deadline:
                    raise StreamBroken(
                        f"the destination does not state what it holds: {error}"
                    ) from error

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
        self._book.dropped.add(object_id)

    def give_up(self, object_id: int) -> None:
        """In the round under way (from ``progress``): this object's access may be closed now.

        What was not read yet is left out, also of the manifest; a later round may bring it.
        """
        if self._round is not None:
            self._round.gone.add(object_id)

    def manifest(self) -> Manifest:
        """Size and digests (16 bytes a chunk) of the objects of the last round, as it read them.

        Raises VerificationFailed if the round left a chunk out.
        """
        return self._book.manifest()

    def close(self) -> None:
        """Drop the connections. Idempotent."""
        for stream in self._streams:
            stream.close()
