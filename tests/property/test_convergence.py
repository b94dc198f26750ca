"""When pre-copy stops: a pure function, so every promise of it can be tried on any history."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from migrate.orchestrator.convergence import Costs, Decision, decide, predict
from migrate.report import Round

COSTS = Costs(placement=1e9, fixed=0.3)


def rounds(*changed: int, scanned: int = 1 << 30, seconds: float = 1.0) -> list[Round]:
    return [
        Round(
            number=number,
            frozen=False,
            objects=1,
            scanned=scanned,
            changed=min(size, scanned),
            zero=0,
            unchanged=scanned - min(size, scanned),
            wire=size,
            seconds=seconds,
        )
        for number, size in enumerate(changed, 1)
    ]


HISTORIES = st.lists(st.integers(0, 1 << 30), min_size=1, max_size=12)


@given(HISTORIES, st.floats(0, 10), st.integers(1, 12))
def test_it_ends_within_the_round_limit(history: list[int], limit: float, most: int) -> None:
    verdict = decide(rounds(*history), COSTS, max_downtime=limit, max_rounds=most)
    assert verdict.why
    if len(history) >= most:
        assert verdict.decision is Decision.STOP_AND_COPY


@given(HISTORIES, st.floats(0, 10))
def test_another_round_is_made_only_where_the_last_one_helped(
    history: list[int], limit: float
) -> None:
    verdict = decide(rounds(*history), COSTS, max_downtime=limit, max_rounds=100)
    if verdict.decision is Decision.AGAIN and len(history) > 1:
        assert history[-1] < history[-2]
        assert verdict.predicted_downtime > limit


@given(HISTORIES)
def test_the_prediction_counts_every_byte_and_the_fixed_part(history: list[int]) -> None:
    found = rounds(*history)
    assert predict(found, COSTS) >= COSTS.fixed + found[-1].scanned / COSTS.placement


def test_a_prediction_within_the_limit_stops_at_once() -> None:
    verdict = decide(rounds(100, 50), COSTS, max_downtime=5.0, max_rounds=100)
    assert (verdict.decision, verdict.why) == (
        Decision.STOP_AND_COPY,
        "the predicted downtime is within the limit",
    )


def test_one_round_is_never_enough_to_judge() -> None:
    verdict = decide(rounds(0), COSTS, max_downtime=1e9, max_rounds=100)
    assert verdict.decision is Decision.AGAIN


def test_no_progress_stops() -> None:
    verdict = decide(rounds(1000, 500, 499), COSTS, max_downtime=0.0, max_rounds=100)
    assert verdict.why == "another round would not make it shorter"
