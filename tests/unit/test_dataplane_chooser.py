"""The codec policy: pure figures in, an option out; and how the figures are measured."""

from __future__ import annotations

import os

import numpy as np
import pytest

from migrate.dataplane.chooser import (
    OPTIONS,
    RAW,
    SAMPLE,
    WINDOW,
    AdaptiveChooser,
    Figure,
    FixedChooser,
    LinkMeter,
    Option,
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
    assert packed[0] in (Codec.PLANES2_ZSTD, Codec.PLANES4_ZSTD)
    assert len(packed[1]) < 0.75 * len(floats)
    noise = memoryview(bytearray(os.urandom(1 << 20)))
    other = ObjectInfo(id=2, kind=ObjectKind.VRAM, size=1 << 20)
    assert chooser.encode(encoder, other, noise)[0] is Codec.RAW
    decision = chooser.decisions[-1]
    assert decision.object_id == 1
    assert "link 1 MB/s" in str(decision)
    assert "zstd-1" in str(decision)


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
        self._clock.now += 10.0 if len(raw) > SAMPLE else 1e-5
        return super().encode(codec, raw, level)


def test_a_codec_that_proved_slow_is_not_taken_again_for_a_fast_sample() -> None:
    clock = SlowRuns()
    chooser = AdaptiveChooser(2, 2, clock)
    chooser._meter.rate = 1e6  # a run of 1 MiB takes 1 s raw, 10 s encoded
    encoder = SlowEncoder(clock)
    floats = brain_floats()
    sent = [chooser.encode(encoder, INFO, floats)[0] for _ in range(100)]
    assert sent[0] is not Codec.RAW
    assert sent.count(Codec.RAW) > 85
    assert set(sent[-60:]) == {Codec.RAW}


def test_an_endless_link_is_raw_and_nothing_is_encoded() -> None:
    chooser = AdaptiveChooser(2, 2)
    floats = brain_floats()
    codec, payload = chooser.encode(Encoder(), INFO, floats)
    assert (codec, len(payload)) == (Codec.RAW, len(floats))
    assert not chooser.decisions


def test_a_fixed_codec_that_wins_nothing_gives_way_to_raw() -> None:
    noise = memoryview(bytearray(os.urandom(1 << 16)))
    assert FixedChooser(ZSTD).encode(Encoder(), INFO, noise)[0] is Codec.RAW
    assert FixedChooser(ZSTD).encode(Encoder(), INFO, memoryview(bytes(1 << 16)))[0] is Codec.ZSTD
