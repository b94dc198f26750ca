"""Which codec a run travels by: measured codec speed against measured link speed.

The policy is ``predict`` and ``choose``, pure functions of figures. The rest measures: the
speed and ratio of a codec on an object by small samples and by the runs it really encodes,
the link by how fast bytes go out while sending is what we wait for.

While the link is not what we wait for, all that is known is that it is at least as fast as
what went out. The estimate then creeps up by 1% a window, so that a link that became faster
is found out, at little cost where it did not.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Protocol

from migrate.dataplane.codecs import Encoder
from migrate.dataplane.messages import Codec, ObjectInfo
from migrate.model import Value

_log = logging.getLogger(__name__)
MARGIN = 1.05  # a codec must promise this much more than raw
WINDOW = 0.05  # seconds of a link measurement
SATURATED = 0.5  # part of the streams' time spent sending that makes the link the bottleneck
CREEP = 1.01
SAMPLE = 32 << 10  # bytes
SAMPLE_CREEP = 1.1  # how much faster than its runs a sample may make a codec look
FIRST_INTERVAL, LAST_INTERVAL = 16, 256  # runs between samples of an object
WEIGHT = 0.25  # of a new measurement in an average
KEPT_DECISIONS = 64


class Option(Value):
    """A codec and its level."""

    codec: Codec
    level: int = 0

    def __str__(self) -> str:
        return f"{self.codec.name.lower()}-{self.level}" if self.level else self.codec.name.lower()


RAW = Option(codec=Codec.RAW)
OPTIONS = (
    Option(codec=Codec.ZSTD, level=1),
    Option(codec=Codec.ZSTD, level=3),
    Option(codec=Codec.PLANES2_ZSTD, level=1),
    Option(codec=Codec.PLANES4_ZSTD, level=1),
)


class Figure(Value):
    """What an option does on some data: raw bytes a second of one thread, raw ÷ packed."""

    speed: float
    ratio: float


class Decision(Value):
    """Why an object's runs travel as they do from now on. Rates in bytes a second."""

    object_id: int
    option: str
    link: float | None
    threads: int
    figures: dict[str, Figure]

    def __str__(self) -> str:
        link = "unknown" if self.link is None else f"{self.link / 1e6:.0f} MB/s"
        shown = ", ".join(
            f"{name} {f.speed / 1e6:.0f} MB/s x{f.ratio:.2f}" for name, f in self.figures.items()
        )
        return (
            f"object {self.object_id}: {self.option} (link {link}, {self.threads} threads; {shown})"
        )


def predict(figure: Figure, link: float, threads: int) -> float:
    """Raw bytes a second through *threads* encoders and a link of *link* bytes a second.

    The socket's buffer lets one run encode while the one before is on the wire, so the
    slower of both counts.
    """
    return min(figure.speed * threads, link * figure.ratio)


def choose(figures: Mapping[Option, Figure], link: float | None, threads: int) -> Option:
    """The option of the highest prediction; raw unless one beats it by ``MARGIN``.

    An unknown link is as good as an endless one: raw, which is how it gets measured.
    """
    if link is None or not figures:
        return RAW
    best = max(figures, key=lambda option: predict(figures[option], link, threads))
    return best if predict(figures[best], link, threads) > link * MARGIN else RAW


class Chooser(Protocol):
    """Encodes runs; shared by the streams of a sender, thread-safe."""

    def encode(
        self, encoder: Encoder, info: ObjectInfo, raw: memoryview
    ) -> tuple[Codec, memoryview]:
        """The codec and the payload of a run; the payload is shorter than raw unless RAW."""

    def sent(self, payload: int, seconds: float) -> None:
        """A payload of so many bytes took that long to send, waiting for room included."""


class FixedChooser:
    """One option for everything; raw where it does not make a run smaller."""

    def __init__(self, option: Option = RAW) -> None:
        self._option = option

    def encode(
        self, encoder: Encoder, info: ObjectInfo, raw: memoryview
    ) -> tuple[Codec, memoryview]:
        """See Chooser."""
        return pack(encoder, self._option, raw)

    def sent(self, payload: int, seconds: float) -> None:
        """See Chooser."""


def pack(encoder: Encoder, option: Option, raw: memoryview) -> tuple[Codec, memoryview]:
    """Encode, or leave it where nothing is won."""
    if option.codec is Codec.RAW:
        return Codec.RAW, raw
    payload = encoder.encode(option.codec, raw, option.level)
    if len(payload) >= len(raw):
        return Codec.RAW, raw
    return option.codec, payload


class LinkMeter:
    """The link's speed in bytes a second, by windows of what ``streams`` threads send."""

    def __init__(self, streams: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._streams = streams
        self._clock = clock
        self._began = clock()
        self._bytes = 0
        self._busy = 0.0
        self.rate: float | None = None

    def sent(self, count: int, seconds: float) -> None:
        """Bytes that took so long to send."""
        now = self._clock()
        if now - self._began > 10 * WINDOW:  # a pause between rounds tells nothing
            self._restart(now)
            return
        self._bytes += count
        self._busy += seconds
        if now - self._began >= WINDOW:
            self._measure(now - self._began)
            self._restart(now)

    def _restart(self, now: float) -> None:
        self._began, self._bytes, self._busy = now, 0, 0.0

    def _measure(self, wall: float) -> None:
        rate = self._bytes / wall
        if self._busy >= SATURATED * wall * self._streams:
            self.rate = rate if self.rate is None else average(self.rate, rate)
        elif self.rate is not None:
            self.rate = max(self.rate * CREEP, rate)


def average(old: float, new: float) -> float:
    """The old value moved towards the new one."""
    return old + WEIGHT * (new - old)


class _Subject:
    """What is known of one object's data."""

    def __init__(self) -> None:
        self.figures: dict[Option, Figure] = {}
        self.proven: set[Option] = set()  # speed known from whole runs
        self.option = RAW
        self.interval = FIRST_INTERVAL
        self.until_sample = 0
        self.judged: float | None = -1.0  # the link when it was last decided


class AdaptiveChooser:
    """The chooser of production. *threads*: encoders that run at once (streams, or cores)."""

    def __init__(
        self, streams: int, threads: int, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._threads = max(1, min(streams, threads))
        self._clock = clock
        self._lock = threading.Lock()
        self._meter = LinkMeter(streams)
        self._subjects: dict[int, _Subject] = {}
        self.decisions: deque[Decision] = deque(maxlen=KEPT_DECISIONS)

    @property
    def link(self) -> float | None:
        """The link's measured speed in bytes a second."""
        return self._meter.rate

    def encode(
        self, encoder: Encoder, info: ObjectInfo, raw: memoryview
    ) -> tuple[Codec, memoryview]:
        """See Chooser."""
        with self._lock:
            subject = self._subjects.setdefault(info.id, _Subject())
            due = self._meter.rate is not None and subject.until_sample <= 0
            subject.until_sample = subject.interval if due else subject.until_sample - 1
            if not due and subject.option is RAW and subject.judged == self._meter.rate:
                return Codec.RAW, raw  # nothing is new
        if due:
            self._sample(encoder, subject, raw)
        with self._lock:
            option = self._decide(info, subject, due)
        began = self._clock()
        codec, payload = pack(encoder, option, raw)
        if option is not RAW:
            subject.proven.add(option)
            self._learn(subject, option, len(raw), len(payload), self._clock() - began)
        return codec, payload

    def sent(self, payload: int, seconds: float) -> None:
        """See Chooser."""
        with self._lock:
            self._meter.sent(payload, seconds)

    def _sample(self, encoder: Encoder, subject: _Subject, raw: memoryview) -> None:
        start = max(0, (len(raw) - SAMPLE) // 2) & ~7
        part = raw[start : start + SAMPLE]
        for option in OPTIONS:
            if option == subject.option:
                continue  # measured by the runs themselves
            began = self._clock()
            packed = len(encoder.encode(option.codec, part, option.level))
            seconds = self._clock() - began
            if option in subject.proven:
                # A short sample is rarely interrupted and knows nothing of a busy machine:
                # it may only creep back towards hope.
                hoped = subject.figures[option].speed * SAMPLE_CREEP
                seconds = max(seconds, len(part) / hoped)
            self._learn(subject, option, len(part), packed, seconds)

    def _learn(
        self, subject: _Subject, option: Option, raw: int, packed: int, seconds: float
    ) -> None:
        new = Figure(speed=raw / max(seconds, 1e-9), ratio=raw / max(packed, 1))
        with self._lock:
            old = subject.figures.get(option)
            if old is not None:
                # Times average, not speeds: what counts is how long all runs take together.
                new = Figure(
                    speed=1 / average(1 / old.speed, 1 / new.speed),
                    ratio=1 / average(1 / old.ratio, 1 / new.ratio),
                )
            subject.figures[option] = new

    def _decide(self, info: ObjectInfo, subject: _Subject, sampled: bool) -> Option:
        option = choose(subject.figures, self._meter.rate, self._threads)
        subject.judged = self._meter.rate
        if option != subject.option:
            subject.option = option
            subject.interval = FIRST_INTERVAL
            decision = Decision(
                object_id=info.id,
                option=str(option),
                link=self._meter.rate,
                threads=self._threads,
                figures={str(o): f for o, f in subject.figures.items()},
            )
            self.decisions.append(decision)
            _log.debug("%s", decision)
        elif sampled:
            subject.interval = min(subject.interval * 2, LAST_INTERVAL)
        return option
