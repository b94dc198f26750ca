"""Frames in a file: the chunk stream of one sender to nobody, and back into staging.

The same frames as on the wire (:mod:`.frame`), of one lane, with a key of the file's own. What
is superseded by a later round stays in the file; reading applies all in order.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from migrate.dataplane import keys, messages
from migrate.dataplane.access import Buffer, MemoryAccess
from migrate.dataplane.channel import Check, Truncated, never
from migrate.dataplane.chooser import AdaptiveChooser
from migrate.dataplane.chunks import chunk_count
from migrate.dataplane.codecs import Encoder
from migrate.dataplane.frame import MAX_PAYLOAD, Direction, Kind, Lane, Opener, Sealer
from migrate.dataplane.intake import Intake
from migrate.dataplane.messages import Codec, ObjectInfo, Run
from migrate.dataplane.scan import SpanScan
from migrate.dataplane.session import Session
from migrate.dataplane.source import (
    Coming,
    Forget,
    Manifest,
    ObjectBook,
    Progress,
    Round,
    SourceObject,
)
from migrate.dataplane.stats import RoundStats
from migrate.dataplane.wire import FrameReader, FrameWriter
from migrate.errors import Cancelled, InsufficientDisk

LANE = Lane(direction=Direction.TO_DESTINATION, stream=0, epoch=1)
_REPORT = 16  # spans between calls of ``progress``


def _key(secret: bytes) -> bytes:
    return keys.lane_key(secret, b"migrate/1 file", LANE.direction, LANE.stream, LANE.epoch)


class FileChannel:
    """A file as a ``Channel`` of one direction: written or read from its start."""

    def __init__(self, path: Path, *, write: bool) -> None:
        self.check: Check = never
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL if write else os.O_RDONLY
        self._fd = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        self.position = 0  # bytes written or read

    def send(self, buffers: Sequence[Buffer]) -> None:
        """See Channel. Raises InsufficientDisk where the file system is full."""
        for buffer in buffers:
            rest = memoryview(buffer)
            while rest:
                try:
                    count = os.write(self._fd, rest)
                except OSError as error:
                    raise InsufficientDisk(f"the image can't be written: {error}") from error
                rest = rest[count:]
                self.position += count

    def receive_into(self, view: memoryview) -> None:
        """See Channel."""
        self.check()
        got = 0
        while got < len(view):
            count = os.readv(self._fd, [view[got:]])
            if not count:
                if got:
                    raise Truncated(f"the file ends after {got} of {len(view)} bytes")
                raise EOFError
            got += count
        self.position += got

    def sync(self) -> None:
        """Make what was written durable. Raises InsufficientDisk."""
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise InsufficientDisk(f"the image can't be written: {error}") from error

    def abort(self) -> None:
        """See Channel: nothing blocks here."""

    def close(self) -> None:
        """See Channel."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class FileSender:
    """What a ``Sender`` is to a destination, to a file: rounds over objects, a manifest."""

    def __init__(self, path: Path, secret: bytes) -> None:
        self._channel = FileChannel(path, write=True)
        self._writer = FrameWriter(self._channel, Sealer(_key(secret), LANE))
        self._encoder = Encoder()
        self._chooser = AdaptiveChooser(1, 1)
        self._book = ObjectBook()
        self._declared: set[int] = set()
        self.origins: dict[bytes, tuple[int, int]] = {}
        self.buffer = memoryview(bytearray(MAX_PAYLOAD))  # for the scan
        self.round: Round

    @property
    def frames(self) -> int:
        """Frames written so far."""
        return self._writer.sequence

    def send_round(
        self,
        objects: Sequence[tuple[ObjectInfo, MemoryAccess]],
        progress: Progress | None = None,
        cancel: threading.Event | None = None,
        coming: Coming | None = None,
        *,
        still: bool = False,
    ) -> RoundStats:
        """As ``Sender.send_round``; what it returns for is written, not yet durable.

        *still* is not relied on: nobody would notice before the image is restored.
        """
        began = time.monotonic()
        sources, forget = self._book.begin(objects)
        stop = cancel or threading.Event()
        self.round = Round(sources, forget, stop, growing=coming is not None)
        self.origins.clear()
        if coming is not None:
            self._book.feed(self.round, coming)
        try:
            self._write_all(progress)
        except Cancelled:
            raise self.round.error or Cancelled("the migration was cancelled") from None
        except BaseException as error:
            self.round.fail(error)  # whatever brings more objects is to end
            raise
        since = self._book.ended(list(self.round.objects), forget, began)
        return self.round.counters.stats(time.monotonic() - began, since)

    def _write_all(self, progress: Progress | None) -> None:
        number = 0
        while not self.round.is_over():
            item = self.round.take()
            if item is None:
                self.round.await_more()
                continue
            self.round.check()
            if isinstance(item, Forget):
                self._writer.write(Kind.FORGET, messages.pack_forget(item.object_id))
                continue
            source = self.round.objects[item.object_id]
            self._declare(source)
            SpanScan(self, source, self.round.access[item.object_id], item).run()
            self.round.settled(source)
            if progress is not None and number % _REPORT == 0:
                progress(self.round.counters.stats(0.0).scanned, self.round.total)
            number += 1

    def give_up(self, object_id: int) -> None:
        """As ``Sender.give_up``."""
        self.round.gone.add(object_id)

    def drop_object(self, object_id: int) -> None:
        """As ``Sender.drop_object``."""
        self._book.dropped.add(object_id)

    def manifest(self) -> Manifest:
        """As ``Sender.manifest``."""
        return self._book.manifest()

    def sync(self) -> None:
        """Make all frames durable. Raises InsufficientDisk."""
        self._channel.sync()

    def close(self) -> None:
        """Close the file. Idempotent."""
        self._channel.close()

    # ------------------------------------------------------------ what the scan finds

    def send_zeros(self, source: SourceObject, offset: int, length: int) -> None:
        """See RunSink."""
        first, count = offset // source.info.chunk, chunk_count(length, source.info.chunk)
        digests = source.held.zero_digests(first, count)
        self._write(source, offset, length, Codec.ZERO, b"", digests)

    def send_duplicate(
        self,
        source: SourceObject,
        offset: int,
        length: int,
        digests: bytes,
        origin: tuple[int, int],
    ) -> None:
        """See RunSink."""
        self._write(source, offset, length, Codec.DUPLICATE, b"", digests, origin)

    def send_run(self, source: SourceObject, offset: int, raw: memoryview, digests: bytes) -> None:
        """See RunSink."""
        run = self._chooser.encode(self._encoder, source.info, raw)
        began = time.monotonic()
        self._write(source, offset, len(raw), run.codec, run.payload, digests)
        self._chooser.sent(run, time.monotonic() - began)

    def _declare(self, source: SourceObject) -> None:
        if source.info.id not in self._declared:
            self._writer.write(Kind.DECLARE, messages.pack_declare(source.info))
            self._declared.add(source.info.id)

    def _write(
        self,
        source: SourceObject,
        offset: int,
        length: int,
        codec: Codec,
        payload: Buffer,
        digests: bytes,
        origin: tuple[int, int] = (0, 0),
    ) -> None:
        run = Run(
            object_id=source.info.id,
            codec=codec,
            offset=offset,
            length=length,
            digests=b"" if codec is Codec.ZERO else digests,
            origin=origin,
        )
        wire = self._writer.write(Kind.DATA, run.pack(), payload)
        source.held.set_run(offset // source.info.chunk, digests)
        self.round.counters.add(wire=wire)
        self.round.counters.sent(codec, length, len(payload))


class _Nobody(FrameWriter):
    """Answers to a file."""

    def __init__(self) -> None:
        """Nothing is behind it."""

    def write(self, kind: Kind, meta: Buffer = b"", payload: Buffer = b"") -> int:
        """Nothing."""
        return 0


def read_frames(path: Path, secret: bytes, session: Session, check: Check = never) -> int:
    """Put what a file holds into the session's staging. The number of its frames.

    *check* is asked at each frame. Raises FrameRejected for anything altered, EOFError with a
    message where a frame is cut off, OSError.
    """
    channel = FileChannel(path, write=False)
    channel.check = check
    reader = FrameReader(channel, Opener(_key(secret), LANE))
    try:
        Intake(session, reader, _Nobody()).run()
    except Truncated as error:
        raise EOFError(f"frame {reader.sequence} is cut off: {error}") from error
    except EOFError:
        return reader.sequence
    finally:
        channel.close()
    raise AssertionError("an intake ends by an error")
