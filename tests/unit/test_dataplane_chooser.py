"""The codec policy: pure figures in, an option out; and how the figures are measured."""

from __future__ import annotations

import os

import numpy as np
import pytest

from migrate.dataplane.chooser import (
    FIRST_PAUSE,
    LAST_PAUSE,
    MEMORY,
    OPTIONS,
    RAW,
    SAMPLES,
    SETTLING,
    SHORT_PAUSE,
    TRIAL,
    WINDOW,
    AdaptiveChooser,
    Figure,
    FixedChooser,
    LinkMeter,
    Option,
    Pace,
    Trials,
    choose,
    predict,
)
from migrate.dataplane.codecs import Encoder
from migrate.dataplane.messages import Codec, ObjectInfo, ObjectKind

ZSTD, PLANES = OPTIONS[0], OPTIONS[2]
FIGURES = {ZSTD: Figure(speed=900e6, ratio=1.28), PLANES: Figure(speed=500e6, ratio=1.46)}
INFO = ObjectInfo(id=1, kind=ObjectKind.VRAM, size=1 << 20)


@pytest.mark.parametrize(
    ("link", "threads", "chosen"),
    [
        (None, 2, RAW),  # nothing is known of the link: raw measures it
        (125e6, 2, PLANES),  # 1 Gbit/s
        (625e6, 2, PLANES),  # 5 Gbit/s: 912 by the link, 1000 by the encoder
        (1250e6, 2, ZSTD),  # 10 Gbit/s: planes are slower than raw
        (3125e6, 2, RAW),  # 25 Gbit/s: both are
        (625e6, 1, ZSTD),  # one core
    ],
)
def test_choice(link: float | None, threads: int, chosen: Option) -> None:
    assert choose(FIGURES, link, threads) == chosen


def test_a_gain_below_the_margin_is_not_worth_it() -> None:
    assert choose({ZSTD: Figure(speed=1e12, ratio=1.04)}, 1e9, 2) == RAW
    assert choose({ZSTD: Figure(speed=1e12, ratio=1.06)}, 1e9, 2) == ZSTD


def test_an_option_in_use_stays_unless_another_promises_clearly_more() -> None:
    figures = {ZSTD: Figure(speed=1e12, ratio=1.3), PLANES: Figure(speed=1e12, ratio=1.4)}
    assert choose(figures, 1e9, 2) == PLANES
    assert choose(figures, 1e9, 2, ZSTD) == ZSTD
    figures[PLANES] = Figure(speed=1e12, ratio=1.5)
    assert choose(figures, 1e9, 2, ZSTD) == PLANES
    assert choose({ZSTD: Figure(speed=1e12, ratio=1.04)}, 1e9, 2, ZSTD) == RAW


def test_nothing_measured_is_raw() -> None:
    assert choose({}, 1e6, 2) == RAW
    assert predict(Figure(speed=10.0, ratio=2.0), 100.0, 2) == 20.0


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def feed(meter: LinkMeter, clock: Clock, rate: float, busy: float, windows: int) -> None:
    for _ in range(windows * 10):
        clock.now += WINDOW / 10
        meter.sent(int(rate * WINDOW / 10), busy * WINDOW / 10)


def test_a_saturated_link_is_measured() -> None:
    clock = Clock()
    meter = LinkMeter(1, clock)
    feed(meter, clock, 125e6, 1.0, 3)
    assert meter.rate == pytest.approx(125e6, rel=0.15)


@pytest.mark.parametrize("streams", [1, 2])
def test_a_link_of_which_a_run_takes_longer_than_a_pause_is_measured(streams: int) -> None:
    """2 MiB/s in all: ``--bandwidth 2``."""
    clock = Clock()
    meter = LinkMeter(streams, clock)
    for _ in range(20):
        clock.now += 1.0
        meter.sent(2 << 20, float(streams))
    before = meter.rate
    assert before == pytest.approx(2 << 20, rel=0.3)
    clock.now += 100.0
    for _ in range(2 * streams):
        clock.now += 1.0
        meter.sent(2 << 20, float(streams))
    assert meter.rate == pytest.approx(before, rel=0.1), "a pause is no part of it"


def test_an_idle_link_is_not_taken_for_a_slow_one() -> None:
    clock = Clock()
    meter = LinkMeter(1, clock)
    feed(meter, clock, 1e6, 0.01, 5)
    assert meter.rate is None
    feed(meter, clock, 1e9, 1.0, 5)
    feed(meter, clock, 1e6, 0.01, 5)
    assert meter.rate is not None
    assert meter.rate > 0.8e9


def test_a_link_that_became_faster_or_slower_is_noticed() -> None:
    clock = Clock()
    meter = LinkMeter(1, clock)
    feed(meter, clock, 1e8, 1.0, 5)
    feed(meter, clock, 2e9, 0.1, 2)
    assert meter.rate == pytest.approx(2e9, rel=0.15)
    feed(meter, clock, 1e8, 1.0, 20)
    assert meter.rate == pytest.approx(1e8, rel=0.15)


PROMISE = 1.5e9


class Stream:
    """Runs of *size* bytes through one stream, at speeds that are told."""

    def __init__(self, trials: Trials, size: int = 2 << 20, link: float = 1e12) -> None:
        self._trials = trials
        self._size = size
        self._link = link

    def runs(self, count: int, option: Option, rate: float) -> int:
        """So many of an option, until it is left alone; those that were done."""
        for done in range(count):
            if self._trials.is_resting(option):
                return done
            self._trials.began(self._size)
            self._trials.ended(
                option, self._size, self._size / rate, promise=PROMISE, link=self._link
            )
        return count


def rested(trials: Trials, option: Option) -> int:
    """Bytes by raw until it is not left alone any more."""
    count = 0
    while trials.is_resting(option):
        trials.began(1 << 20)
        trials.ended(RAW, 1 << 20, (1 << 20) / 1e9, promise=0.0, link=1e12)
        count += 1 << 20
    return count


def test_an_option_that_brings_less_than_raw_is_left_alone_longer_each_time() -> None:
    trials = Trials(1)
    stream = Stream(trials)
    stream.runs(5, RAW, 1e9)
    assert stream.runs(50, PLANES, 0.9e9) == SETTLING + TRIAL
    assert not trials.is_resting(ZSTD), "if it still promises enough"
    assert trials.strain == pytest.approx(0.9e9 / PROMISE)
    assert rested(trials, PLANES) == FIRST_PAUSE
    assert trials.strain == 1.0
    assert stream.runs(50, PLANES, 0.9e9) == SETTLING + TRIAL
    assert rested(trials, PLANES) == 2 * FIRST_PAUSE
    for _ in range(9):
        stream.runs(50, PLANES, 0.9e9)
        pause = rested(trials, PLANES)
    assert pause == LAST_PAUSE


def test_an_option_that_brings_more_stays_and_is_compared_anew_when_it_no_longer_does() -> None:
    trials = Trials(1)
    stream = Stream(trials)
    stream.runs(5, RAW, 1e9)
    assert stream.runs(500, PLANES, 1.1e9) == 500
    assert stream.runs(500, PLANES, 0.3e9) < 2 * MEMORY
    assert rested(trials, PLANES) == SHORT_PAUSE
    # The link became slower, for raw runs too.
    stream.runs(3 * MEMORY, RAW, 0.2e9)
    assert stream.runs(500, PLANES, 0.3e9) == 500


def test_options_that_take_turns_are_judged_together() -> None:
    trials = Trials(1)
    stream = Stream(trials)
    stream.runs(5, RAW, 1e9)
    done = 0
    while not any(trials.is_resting(option) for option in OPTIONS):
        done += stream.runs(1, OPTIONS[done % len(OPTIONS)], 0.5e9)
    assert done == SETTLING + TRIAL


def test_the_first_runs_of_an_option_wait_for_what_went_before_and_do_not_count() -> None:
    trials = Trials(2)
    stream = Stream(trials)
    stream.runs(9, RAW, 1e9)
    stream.runs(2 * SETTLING, PLANES, 0.1e9)
    assert stream.runs(100, PLANES, 1.2e9) == 100


def test_raw_is_not_taken_to_be_faster_than_the_link() -> None:
    """After a codec that used less than a limit allows, raw runs do not wait for a while."""
    trials = Trials(1)
    stream = Stream(trials, link=1e8)
    stream.runs(20, RAW, 1e8)
    stream.runs(100, ZSTD, 0.5e8)
    stream.runs(20, RAW, 1e10)
    assert stream.runs(100, PLANES, 1.1e8) == 100


def test_a_pace_is_that_of_all_runs_together() -> None:
    pace = Pace(1)
    for seconds in (1e-9, 1.0, 3.0):
        pace.ran(2 << 20, seconds)
    assert pace.rate == pytest.approx(1 << 20)
    for _ in range(10 * MEMORY):
        pace.ran(2 << 20, 4.0)
    assert pace.rate == pytest.approx(1 << 19, rel=0.01)


def test_short_runs_are_judged_too_and_are_no_shorter_a_pause() -> None:
    trials = Trials(1)
    stream = Stream(trials, 64 << 10)
    stream.runs(5 * 16, RAW, 1e9)
    assert stream.runs(1000, PLANES, 0.5e9) == (SETTLING + TRIAL) * 16
    assert stream.runs(1000, RAW, 1e9) == 1000
    assert trials.is_resting(PLANES), "62 MiB of its 256"


class BusyDestination(AdaptiveChooser):
    """Sending takes as long as unpacking at the destination: encoded runs twice as long."""

    def run(self, raw: memoryview) -> Codec:
        packed = self.encode(Encoder(), INFO, raw)
        clock = self._clock
        assert isinstance(clock, Clock)
        seconds = 0.2 if packed.codec is not Codec.RAW else 0.1
        clock.now += seconds
        self.sent(packed, seconds)
        return packed.codec


def test_a_destination_that_unpacks_slowly_is_not_taken_for_a_slow_link() -> None:
    clock = Clock()
    chooser = BusyDestination(1, 1, clock)
    chooser._meter = LinkMeter(1, clock)
    floats = brain_floats()
    went = [chooser.run(floats) for _ in range(200)]
    assert any(codec is not Codec.RAW for codec in went), "it promises more, and is tried"
    assert went.count(Codec.RAW) > 180


def brain_floats() -> memoryview:
    values = np.random.default_rng(3).standard_normal(1 << 19).astype(np.float32) * 0.02
    return memoryview(bytearray((values.view(np.uint32) >> 16).astype(np.uint16).tobytes()))


class Links(AdaptiveChooser):
    """A chooser told the speed of the link."""

    def __init__(self, rate: float) -> None:
        super().__init__(2, 2)
        self._meter.rate = rate


def test_floats_on_a_slow_link_go_as_planes_and_noise_as_raw() -> None:
    chooser, encoder = Links(1e6), Encoder()
    floats = brain_floats()
    packed = [chooser.encode(encoder, INFO, floats) for _ in range(3)][-1]
    assert packed.codec in (Codec.PLANES2_ZSTD, Codec.PLANES4_ZSTD)
    assert len(packed.payload) < 0.75 * len(floats)
    noise = memoryview(bytearray(os.urandom(1 << 20)))
    other = ObjectInfo(id=2, kind=ObjectKind.VRAM, size=1 << 20)
    assert chooser.encode(encoder, other, noise).codec is Codec.RAW
    decision = chooser.decisions[-1]
    assert decision.object_id == 1
    assert "link 1 MB/s" in str(decision)
    assert "zstd-1" in str(decision)


def test_a_sample_of_planes_promises_what_a_run_of_them_gives() -> None:
    """A block of zstd that two planes share would hide that one of them repeats."""
    floats, encoder = brain_floats(), Encoder()
    for codec in (Codec.PLANES2_ZSTD, Codec.PLANES4_ZSTD):
        whole = len(floats) / len(encoder.encode(codec, floats))
        part = floats[: SAMPLES[codec]]
        assert len(part) / len(encoder.encode(codec, part)) == pytest.approx(whole, rel=0.05)
        part = floats[: 32 << 10]
        assert len(part) / len(encoder.encode(codec, part)) < 0.95 * whole


class SlowRuns:
    """A clock by which whole runs take long and samples next to nothing: a busy machine."""

    def __init__(self) -> None:
        self.now = 0.0
        self.step = 1e-6

    def __call__(self) -> float:
        self.now += self.step
        return self.now


class SlowEncoder(Encoder):
    def __init__(self, clock: SlowRuns) -> None:
        super().__init__()
        self._clock = clock

    def encode(self, codec: Codec, raw: memoryview, level: int = 1) -> memoryview:
        self._clock.now += 10.0 if len(raw) > max(SAMPLES.values()) else 1e-5
        return super().encode(codec, raw, level)


def test_a_codec_that_proved_slow_is_not_taken_again_for_a_fast_sample() -> None:
    clock = SlowRuns()
    chooser = AdaptiveChooser(2, 2, clock, clock)
    chooser._meter.rate = 1e6  # a run of 1 MiB takes 1 s raw, 10 s encoded
    encoder = SlowEncoder(clock)
    floats = brain_floats()
    sent = [chooser.encode(encoder, INFO, floats).codec for _ in range(100)]
    assert sent[0] is not Codec.RAW
    assert sent.count(Codec.RAW) > 85
    assert set(sent[-60:]) == {Codec.RAW}


class CountingEncoder(Encoder):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def encode(self, codec: Codec, raw: memoryview, level: int = 1) -> memoryview:
        self.count += 1
        return super().encode(codec, raw, level)


def test_where_no_option_can_keep_up_few_samples_are_taken() -> None:
    chooser, encoder = Links(1e12), CountingEncoder()
    floats = brain_floats()
    for _ in range(200):
        assert chooser.encode(encoder, INFO, floats).codec is Codec.RAW
    assert encoder.count == 2 * len(OPTIONS), "each once, after a first time that is not measured"


def test_a_link_that_slows_down_is_answered_by_the_figures_at_hand() -> None:
    chooser, encoder = Links(1e12), CountingEncoder()
    floats = brain_floats()
    for _ in range(20):
        chooser.encode(encoder, INFO, floats)
    chooser._meter.rate = 1e6
    assert chooser.encode(encoder, INFO, floats).codec is not Codec.RAW


def test_an_object_of_different_parts_is_not_judged_by_its_first() -> None:
    noise = memoryview(bytearray(os.urandom(1 << 20)))
    chooser, encoder, floats = Links(1e6), Encoder(), brain_floats()
    assert chooser.encode(encoder, INFO, noise).option == RAW
    for _ in range(20):
        run = chooser.encode(encoder, INFO, floats)
    assert run.codec is not Codec.RAW
    ratio = chooser._subjects[1].figures[run.option].ratio
    assert ratio > 1.15, "half of what was looked at, not a quarter"


def test_samples_are_timed_without_what_their_thread_waited_for() -> None:
    class Interrupted(Encoder):
        def encode(self, codec: Codec, raw: memoryview, level: int = 1) -> memoryview:
            clock.now += 100.0
            spent.now += len(raw) / 1e9
            return super().encode(codec, raw, level)

    clock, spent = Clock(), Clock()
    chooser = AdaptiveChooser(2, 2, clock, spent)
    chooser._meter.rate = 1e8
    assert chooser.encode(Interrupted(), INFO, brain_floats()).codec is not Codec.RAW


def test_what_slowed_one_codec_down_is_expected_of_the_others() -> None:
    """Both levels of zstd promise 1.4 of a link of 1.1 GB/s; the first brings half of the link."""

    class Timed(Encoder):
        def encode(self, codec: Codec, raw: memoryview, level: int = 1) -> memoryview:
            spent.now += len(raw) / (1e9 if codec is Codec.ZSTD else 0.5e9)
            return super().encode(codec, raw, level)

    spent, link = Clock(), 1.1e9
    chooser, encoder, floats = AdaptiveChooser(2, 2, spent, spent), Timed(), brain_floats()
    chooser._meter.rate = link
    for _ in range(10):
        chooser._trials.ended(RAW, 2 << 20, (2 << 20) / (link / 2), promise=0.0, link=link)
    went = []
    for _ in range(60):
        run = chooser.encode(encoder, INFO, floats)
        went.append(run.option)
        rate = link if run.option == RAW else 0.5 * link
        promise = chooser._promises.get(run.option, 0.0)
        seconds = len(floats) / (rate / 2)
        chooser._trials.ended(run.option, len(floats), seconds, promise=promise, link=link)
    assert set(went) == {RAW, went[0]}
    assert went[0] in OPTIONS[:2]


def test_the_first_time_of_an_encoder_is_no_measure() -> None:
    class Cold(Encoder):
        def encode(self, codec: Codec, raw: memoryview, level: int = 1) -> memoryview:
            if not self.has_done(codec, level):
                clock.now += 100.0
            clock.now += len(raw) / 1e9
            return super().encode(codec, raw, level)

    clock = Clock()
    chooser = AdaptiveChooser(2, 2, clock, clock)
    chooser._meter.rate = 1e8
    assert chooser.encode(Cold(), INFO, brain_floats()).codec is not Codec.RAW


def test_an_endless_link_is_raw_and_nothing_is_encoded() -> None:
    chooser = AdaptiveChooser(2, 2)
    floats = brain_floats()
    run = chooser.encode(Encoder(), INFO, floats)
    assert (run.codec, len(run.payload)) == (Codec.RAW, len(floats))
    assert not chooser.decisions


def test_a_fixed_codec_that_wins_nothing_gives_way_to_raw() -> None:
    noise = memoryview(bytearray(os.urandom(1 << 16)))
    assert FixedChooser(ZSTD).encode(Encoder(), INFO, noise).codec is Codec.RAW
    assert (
        FixedChooser(ZSTD).encode(Encoder(), INFO, memoryview(bytes(1 << 16))).codec is Codec.ZSTD
    )
