"""Which codec a run travels by: measured codec speed against measured link speed.

The policy is ``predict`` and ``choose``, pure functions of figures. The rest measures: the
speed and ratio of a codec on an object by small samples and by the runs it really encodes,
the link by how fast bytes go out while sending is what we wait for.

What is promised is then tried: a destination that can't unpack as fast, or cores that have other
work, look like a slow link from here, and a slow link speaks for the codec. So the runs of an
option are timed as a whole, encoded and sent; an option under which less gets through than by
raw runs is left alone for a while, longer each time. For as long the others' speeds are believed
no more than its was: what slowed one down (the strain) slows all down.

While the link is not what we wait for, all that is known is that it is at least as fast as
what went out. The estimate then creeps up by 1% a window, so that a link that became faster
is found out, at little cost where it did not.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from typing import Protocol

import msgspec

from migrate.dataplane.codecs import Encoder
from migrate.dataplane.messages import Codec, ObjectInfo
from migrate.model import Value

_log = logging.getLogger(__name__)
MARGIN = 1.05  # a codec must promise this much more than raw
STAY = 1.1  # and this much more than the one that is in use
WINDOW = 0.05  # seconds of a link measurement
SATURATED = 0.5  # part of the streams' time spent sending that makes the link the bottleneck
CREEP = 1.01
# Bytes of a sample. zstd codes blocks of 128 KiB, each by itself: of byte planes a sample has one
# each, or it shows neither how they differ nor how fast the noise among them goes.
SAMPLES = {
    Codec.ZSTD: 64 << 10,
    Codec.PLANES2_ZSTD: 2 * (128 << 10),
    Codec.PLANES4_ZSTD: 4 * (128 << 10),
}
SMALLEST = 32 << 10  # bytes of one, of an object that is not worth more
SAMPLE_CREEP = 1.1  # how much faster than its runs a sample may make a codec look
FIRST_SAMPLES = 4  # of an object, of its first runs: its parts may differ
FIRST_INTERVAL, LAST_INTERVAL = 16, 256  # runs between those after
HOPELESS = 0.8  # of what raw brings: an object of which no option promises more is left alone
WEIGHT = 0.25  # of a new measurement in an average
KEPT_DECISIONS = 64
EVIDENCE = 1 << 20  # bytes of runs that are timed together, at least
SETTLING = 2  # runs of each stream after a change that still wait for what went before
TRIAL = 2  # runs of each stream that are then timed
MEMORY = 16  # runs that a pace remembers
FIRST_PAUSE, LAST_PAUSE = 256 << 20, 2 << 30  # bytes that a rejected option is left alone
SHORT_PAUSE = 16 << 20  # bytes by raw, to compare with anew, when what was good is no more
LARGE = 8 << 20  # bytes of an object that whole samples are taken of


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


def choose(
    figures: Mapping[Option, Figure],
    link: float | None,
    threads: int,
    current: Option = RAW,
) -> Option:
    """The option of the highest prediction; raw unless one beats it by ``MARGIN``.

    The *current* one stays unless another beats it by ``STAY``. An unknown link is as good as
    an endless one: raw, which is how it gets measured.
    """
    if link is None or not figures:
        return RAW
    promised = {option: predict(figure, link, threads) for option, figure in figures.items()}
    best = max(promised, key=lambda option: promised[option])
    if promised[best] < STAY * promised.get(current, 0.0):
        best = current
    return best if promised[best] > link * MARGIN else RAW


def is_hopeless(figures: Mapping[Option, Figure], link: float | None, threads: int) -> bool:
    """Whether every option promises so much less than raw that samples are a waste."""
    return link is not None and all(
        predict(figure, link, threads) < link * HOPELESS for figure in figures.values()
    )


class Packed(Value):
    """A run as it travels; the payload is shorter than the raw bytes unless it is RAW."""

    codec: Codec
    payload: memoryview
    option: Option  # that was chosen, also if it made nothing smaller
    size: int  # bytes that it stands for
    seconds: float = 0.0  # that encoding took


class Chooser(Protocol):
    """Encodes runs; shared by the streams of a sender, thread-safe."""

    def encode(self, encoder: Encoder, info: ObjectInfo, raw: memoryview) -> Packed:
        """What is to be sent for a run."""

    def sent(self, run: Packed, seconds: float) -> None:
        """A run took that long to send, waiting for room included."""


class FixedChooser:
    """One option for everything; raw where it does not make a run smaller."""

    def __init__(self, option: Option = RAW) -> None:
        self._option = option

    def encode(self, encoder: Encoder, info: ObjectInfo, raw: memoryview) -> Packed:
        """See Chooser."""
        return pack(encoder, self._option, raw)

    def sent(self, run: Packed, seconds: float) -> None:
        """See Chooser."""


def pack(encoder: Encoder, option: Option, raw: memoryview) -> Packed:
    """Encode, or leave it where nothing is won."""
    codec, payload = option.codec, raw
    if codec is not Codec.RAW:
        payload = encoder.encode(codec, raw, option.level)
        if len(payload) >= len(raw):
            codec, payload = Codec.RAW, raw
    return Packed(codec=codec, payload=payload, option=option, size=len(raw))


class Pace:
    """Raw bytes a second that one stream brings; the first *settling* runs are left out.

    Runs are counted by ``EVIDENCE``: short ones together make one.
    """

    def __init__(self, settling: int = 0) -> None:
        self.rate: float | None = None
        self.runs = -settling  # that are counted
        self._size, self._seconds = 0, 0.0  # of short ones

    def __str__(self) -> str:
        return "unknown" if self.rate is None else f"{self.rate / 1e6:.0f} MB/s"

    def ran(self, size: int, seconds: float) -> None:
        """A run of *size* raw bytes was encoded and sent in so many seconds."""
        self._size += size
        self._seconds += seconds
        if self._size < EVIDENCE:
            return
        new = self._size / max(self._seconds, 1e-9)
        self._size, self._seconds = 0, 0.0
        self.runs += 1
        if self.runs > 0:
            weight = max(1 / self.runs, 1 / MEMORY)
            self.rate = new if self.rate is None else slowed(self.rate, new, weight)


class LinkMeter:
    """The link's speed in bytes a second, by windows of what ``streams`` threads send."""

    def __init__(self, streams: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._streams = streams
        self._clock = clock
        self._restart(clock())
        self._last = self._began  # when something was sent
        self.rate: float | None = None

    def sent(self, count: int, seconds: float) -> None:
        """Bytes that took so long to send."""
        now = self._clock()
        if now - seconds - self._last > 10 * WINDOW:  # a pause between rounds tells nothing
            self._restart(now - seconds)
        self._last = now
        self._bytes += count
        self._busy += seconds
        self._runs += 1
        # Of a slow link one run of each stream is longer than a window, and began before it.
        if now - self._began >= WINDOW and self._runs >= 2 * self._streams:
            self._measure(now - self._began)
            self._restart(now)

    def _restart(self, now: float) -> None:
        self._began, self._bytes, self._busy, self._runs = now, 0, 0.0, 0

    def _measure(self, wall: float) -> None:
        rate = self._bytes / wall
        if self._busy >= SATURATED * wall * self._streams:
            self.rate = rate if self.rate is None else average(self.rate, rate)
        elif self.rate is not None:
            self.rate = max(self.rate * CREEP, rate)


def average(old: float, new: float) -> float:
    """The old value moved towards the new one."""
    return old + WEIGHT * (new - old)


def slowed(old: float, new: float, weight: float = WEIGHT) -> float:
    """The same of speeds and ratios: times average, as what counts is what all takes together."""
    return 1 / (1 / old + weight * (1 / new - 1 / old))


class _Subject:
    """What is known of one object's data."""

    def __init__(self) -> None:
        self.figures: dict[Option, Figure] = {}
        self.measured: Counter[Option] = Counter()
        self.proven: set[Option] = set()  # speed known from whole runs
        self.option = RAW
        self.samples = 0
        self.interval = FIRST_INTERVAL
        self.until_sample = 0
        self.judged: float | None = -1.0  # the link when it was last decided


class _Rest:
    """For how many more bytes an option is left alone, and what part of its promise it kept."""

    def __init__(self, left: int, kept: float = 1.0) -> None:
        self.left = left
        self.kept = kept


class Trials:
    """Whether encoded runs bring more than raw ones, and what is left alone. Not thread-safe."""

    def __init__(self, streams: int) -> None:
        self._streams = streams
        self._raw = Pace(streams)  # what goes into empty buffers tells nothing
        self._most = 0.0  # that a stream can carry of raw runs, as they measured the link
        self._renew()
        self._pauses: dict[Option, int] = {}  # how long each was left alone the last time, in bytes
        self._resting: dict[Option, _Rest] = {}

    def _renew(self) -> None:
        self._encoded = Pace(SETTLING * self._streams)  # by whatever options
        self._won = False  # they were better than raw, once

    def began(self, size: int) -> None:
        """One more run, of whatever option and so many bytes."""
        for option, rest in list(self._resting.items()):
            rest.left -= size
            if rest.left <= 0:
                del self._resting[option]

    def is_resting(self, option: Option) -> bool:
        """Whether it is left alone now."""
        return option in self._resting

    @property
    def strain(self) -> float:
        """What part of their speeds the options are believed, by those that are left alone."""
        return min((rest.kept for rest in self._resting.values()), default=1.0)

    def ended(
        self, option: Option, size: int, seconds: float, *, promise: float, link: float
    ) -> None:
        """A run of *size* raw bytes took so long to encode and to send.

        *promise*: raw bytes a second, of all streams together, for which the option was chosen.
        *link*: bytes a second. Raw runs bring no more, but for a moment, where those before
        them used less than a limit allows.
        """
        if option == RAW:
            self._raw.ran(size, seconds)
            self._most = link / self._streams
        elif option not in self._resting:  # the last runs of one that was just rejected
            self._encoded.ran(size, seconds)
            self._judge(option, promise)

    def _judge(self, option: Option, promise: float) -> None:
        ours, raw = self._encoded, self._raw
        if ours.rate is None or ours.runs < TRIAL * self._streams:
            return
        if raw.rate is None:
            pause = self._compare_anew()
        elif ours.rate > min(raw.rate, self._most):
            self._won = True
            self._pauses.clear()
            return
        elif self._won:
            pause = self._compare_anew()
        else:
            pause = min(2 * self._pauses.get(option, FIRST_PAUSE // 2), LAST_PAUSE)
            self._pauses[option] = pause
            kept = min(1.0, ours.rate * self._streams / promise)
            self._resting[option] = _Rest(pause, kept)
        _log.debug("%s rests for %d bytes: %s, raw %s a stream", option, pause, ours, raw)
        self._renew()

    def _compare_anew(self) -> int:
        """With what raw is now: all options rest for a moment."""
        for option in OPTIONS:
            self._resting.setdefault(option, _Rest(SHORT_PAUSE))
        return SHORT_PAUSE


class AdaptiveChooser:
    """The chooser of production. *threads*: encoders that run at once (streams, or cores).

    Runs are timed by *clock*, samples by what a thread has *spent*: they are so short that
    waiting for a core or for the interpreter would be most of it.
    """

    def __init__(
        self,
        streams: int,
        threads: int,
        clock: Callable[[], float] = time.perf_counter,
        spent: Callable[[], float] = time.thread_time,
    ) -> None:
        self._threads = max(1, min(streams, threads))
        self._clock = clock
        self._spent = spent
        self._lock = threading.Lock()
        self._meter = LinkMeter(streams)
        self._trials = Trials(streams)
        self._promises: dict[Option, float] = {}  # for which each was chosen the last time
        self._subjects: dict[int, _Subject] = {}
        self.decisions: deque[Decision] = deque(maxlen=KEPT_DECISIONS)

    @property
    def link(self) -> float | None:
        """The link's measured speed in bytes a second."""
        return self._meter.rate

    def encode(self, encoder: Encoder, info: ObjectInfo, raw: memoryview) -> Packed:
        """See Chooser."""
        with self._lock:
            subject = self._subjects.setdefault(info.id, _Subject())
            self._trials.began(len(raw))
            due = self._meter.rate is not None and subject.until_sample <= 0
            subject.samples += due
            subject.until_sample = self._pause(subject) if due else subject.until_sample - 1
            if not due and subject.option is RAW and subject.judged == self._meter.rate:
                return pack(encoder, RAW, raw)  # nothing is new
        if due:
            self._sample(encoder, subject, raw, len(raw) if info.size >= LARGE else len(raw) // 8)
        with self._lock:
            option = self._decide(info, subject, due)
        began = self._clock()
        run = pack(encoder, option, raw)
        if option is RAW:
            return run
        seconds = self._clock() - began
        subject.proven.add(option)
        self._learn(subject, option, len(raw), len(run.payload), seconds)
        return msgspec.structs.replace(run, seconds=seconds)

    def sent(self, run: Packed, seconds: float) -> None:
        """See Chooser."""
        with self._lock:
            self._meter.sent(len(run.payload), seconds)
            self._trials.ended(
                run.option,
                run.size,
                run.seconds + seconds,
                promise=self._promises.get(run.option, 0.0),
                link=self._meter.rate or 0.0,
            )

    def _sample(self, encoder: Encoder, subject: _Subject, raw: memoryview, most: int) -> None:
        """Try the options on parts of a run, of *most* bytes each."""
        for option in OPTIONS:
            if option == subject.option:
                continue  # measured by the runs themselves
            size = min(SAMPLES[option.codec], max(most, SMALLEST))
            start = max(0, (len(raw) - size) // 2) & ~7
            part = raw[start : start + size]
            if not encoder.has_done(option.codec, option.level):  # it makes its buffers then
                encoder.encode(option.codec, part[:SMALLEST], option.level)
            began = self._spent()
            packed = len(encoder.encode(option.codec, part, option.level))
            seconds = self._spent() - began
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
            subject.measured[option] += 1
            # The first ones count alike: an object's parts differ.
            weight = max(1 / subject.measured[option], WEIGHT)
            old = subject.figures.get(option, new)
            subject.figures[option] = Figure(
                speed=slowed(old.speed, new.speed, weight),
                ratio=slowed(old.ratio, new.ratio, weight),
            )

    def _decide(self, info: ObjectInfo, subject: _Subject, sampled: bool) -> Option:
        link, strain = self._meter.rate, self._trials.strain
        figures = {
            o: Figure(speed=f.speed * strain, ratio=f.ratio)
            for o, f in subject.figures.items()
            if not self._trials.is_resting(o)
        }
        option = choose(figures, link, self._threads, subject.option)
        subject.judged = link
        if option != subject.option:
            if link is not None and option in figures:
                self._promises[option] = predict(figures[option], link, self._threads)
            subject.option = option
            subject.interval = FIRST_INTERVAL
            decision = Decision(
                object_id=info.id,
                option=str(option),
                link=link,
                threads=self._threads,
                figures={str(o): f for o, f in subject.figures.items()},
            )
            self.decisions.append(decision)
            _log.debug("%s", decision)
        elif sampled:
            if is_hopeless(subject.figures, link, self._threads):
                subject.interval = LAST_INTERVAL
            elif subject.samples > FIRST_SAMPLES:
                subject.interval = min(2 * subject.interval, LAST_INTERVAL)
            subject.until_sample = self._pause(subject)
        return option

    @staticmethod
    def _pause(subject: _Subject) -> int:
        few = subject.samples < FIRST_SAMPLES and subject.interval == FIRST_INTERVAL
        return 0 if few else subject.interval
