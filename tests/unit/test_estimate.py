"""What earlier migrations teach the prediction."""

from __future__ import annotations

from migrate.orchestrator.convergence import predict
from migrate.orchestrator.estimate import MAX_FINAL, Known
from migrate.orchestrator.figures import FIXED_GUESS, PLACEMENT_GUESS
from migrate.report import Downtime, End, Report, Round
from migrate.status import Owner, Status

SIZE = 1 << 30


def a_round(number: int, seconds: float, *, frozen: bool = False) -> Round:
    return Round(
        number=number,
        frozen=frozen,
        objects=1,
        scanned=SIZE,
        changed=0,
        zero=0,
        unchanged=SIZE,
        wire=0,
        seconds=seconds,
    )


def moved(
    *live: float, delta: float = 0.1, build: float = 0.1, placing: float = 1.0
) -> Report:  # fmt: skip
    """A completed migration whose live rounds took so many seconds."""
    down = Downtime(
        seconds=delta + build + placing,
        stop=0.0,
        checkpoint=0.0,
        delta=delta,
        build=build,
        placement=placing / 2,
        read_back=placing / 2,
        engine=0.0,
        handover=0.0,
    )
    rounds = [a_round(number, seconds) for number, seconds in enumerate(live, 1)]
    return Report(
        id="m",
        status=Status.COMPLETED,
        owner=Owner.DESTINATION,
        running="destination",
        source=End(host="a", pid=1),
        destination=End(host="b", pid=2),
        downtime=down,
        rounds=(*rounds, a_round(len(live) + 1, delta, frozen=True)),
    )


def test_nothing_known_is_a_guess() -> None:
    costs = Known(precopy=True, snapshot=0.25).costs
    assert costs.fixed == FIXED_GUESS + 0.25
    assert (costs.placement, costs.final) == (PLACEMENT_GUESS, 1.0)


def test_those_that_copied_alike_are_asked_and_the_others_only_where_there_is_none() -> None:
    stopped, live = moved(build=0.5), moved(2.0, 0.5, build=0.125)
    assert Known([stopped, live], precopy=True).costs.fixed == 0.125
    assert Known([live, stopped], precopy=False).costs.fixed == 0.5
    assert Known([stopped], precopy=True).costs.fixed == 0.5


def test_one_that_met_a_busy_machine_does_not_count_for_more_than_the_others() -> None:
    usual = moved(2.0, 0.5, delta=0.25, build=0.125, placing=0.5)
    busy = moved(2.0, 0.5, delta=0.5, build=4.0, placing=8.0)
    costs = Known([busy, usual, usual], precopy=True).costs
    assert costs == Known([usual], precopy=True).costs
    assert costs.placement == SIZE / 0.5


def test_the_final_round_is_told_from_the_last_live_one() -> None:
    usual = moved(2.0, 0.5, delta=0.25, build=0.125, placing=0.5)
    costs = Known([usual], precopy=True).costs
    assert costs.final == 0.5
    assert predict(usual.rounds[:-1], costs) == 0.125 + 0.25 + 0.5
    # After one round only there is none to tell from: half of what it took, as without.
    assert predict(usual.rounds[:1], costs) == 0.125 + 1.0 + 0.5
    assert Known([moved(2.0, delta=0.25)], precopy=True).costs.final == 1.0
    assert Known([moved(2.0, 0.001, delta=9.0)], precopy=True).costs.final == MAX_FINAL
