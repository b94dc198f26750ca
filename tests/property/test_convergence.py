"""When pre-copy stops: a pure function, so every promise of it can be tried on any history."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from migrate.orchestrator.convergence import Costs, Decision, Policy, decide, predict
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
    verdict = decide(rounds(*history), COSTS, Policy(max_downtime=limit, max_rounds=most))
    assert verdict.why
    if len(history) >= most:
        assert verdict.decision is Decision.STOP_AND_COPY


@given(HISTORIES, st.floats(0, 10))
@example([0, 0], 0.0)  # nothing changes: no round can do better
def test_another_round_is_made_only_where_the_last_one_helped(
    history: list[int], limit: float
) -> None:
    verdict = decide(rounds(*history), COSTS, Policy(max_downtime=limit, max_rounds=100))
    if verdict.decision is Decision.AGAIN and len(history) > 1:
        assert history[-1] < history[-2]
        assert verdict.predicted_downtime > limit


@given(HISTORIES)
def test_the_prediction_counts_every_byte_and_the_fixed_part(history: list[int]) -> None:
    found = rounds(*history)
    assert predict(found, COSTS) >= COSTS.fixed + found[-1].scanned / COSTS.placement


def test_a_prediction_within_the_limit_stops_at_once() -> None:
    verdict = decide(rounds(100, 50), COSTS, Policy(max_downtime=5.0, max_rounds=100))
    assert (verdict.decision, verdict.why) == (
        Decision.STOP_AND_COPY,
        "the predicted downtime is within the limit",
    )


def test_one_round_is_never_enough_to_judge() -> None:
    verdict = decide(rounds(0), COSTS, Policy(max_downtime=1e9, max_rounds=100))
    assert verdict.decision is Decision.AGAIN


def test_no_progress_stops() -> None:
    verdict = decide(rounds(1000, 500, 499), COSTS, Policy(max_downtime=0.0, max_rounds=100))
    assert verdict.why == "another round would not make it shorter"


@given(HISTORIES, st.floats(0, 10), st.integers(1, 12), st.booleans())
def test_who_would_rather_stay_is_never_stopped_for_longer(
    history: list[int], limit: float, most: int, throttle: bool
) -> None:
    policy = Policy(max_downtime=limit, max_rounds=most, throttle=throttle, or_stay=True)
    verdict = decide(rounds(*history), COSTS, policy)
    if verdict.decision is Decision.STOP_AND_COPY:
        assert verdict.predicted_downtime <= limit


@given(HISTORIES, st.floats(0, 10), st.booleans(), st.booleans())
def test_nobody_stays_or_is_slowed_down_who_did_not_allow_it(
    history: list[int], limit: float, throttle: bool, or_stay: bool
) -> None:
    policy = Policy(max_downtime=limit, max_rounds=5, throttle=throttle, or_stay=or_stay)
    verdict = decide(rounds(*history), COSTS, policy)
    assert verdict.decision is not Decision.THROTTLE or throttle
    assert verdict.decision is not Decision.STAY or or_stay


def test_a_workload_that_writes_faster_than_the_link_is_slowed_down_once() -> None:
    policy = Policy(max_downtime=0.0, max_rounds=9, throttle=True)
    assert decide(rounds(9, 9), COSTS, policy).decision is Decision.THROTTLE
    helped = decide(rounds(9, 9, 4), COSTS, policy, throttled=True)
    assert helped.decision is Decision.THROTTLE
    assert decide(rounds(9, 9, 9), COSTS, policy, throttled=True).decision is Decision.STOP_AND_COPY
