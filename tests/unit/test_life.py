"""Proof of life: what counts as alive, idle and suspect."""

from __future__ import annotations

import pytest

from migrate.orchestrator.life import (
    ALIVE,
    IDLE,
    SUSPECT,
    Look,
    advanced,
    between,
    expected,
    judge,
    judge_by,
)
from migrate.orchestrator.plan import Activity

BUSY = Activity(seconds=2.0, cpu=1.0, packets=200)
CPU_ONLY = Activity(seconds=2.0, cpu=1.0)
QUIET = Activity(seconds=20.0, cpu=0.01, packets=1)


@pytest.mark.parametrize(
    ("ran", "cpu", "packets", "expected"),
    [
        (BUSY, 0.0, 1, ALIVE),
        (BUSY, 3.0, 0, SUSPECT),  # its threads spin, its queues never started
        (BUSY, 0.0, 0, SUSPECT),
        (CPU_ONLY, 0.5, 0, ALIVE),
        (CPU_ONLY, 0.02, 0, SUSPECT),  # no more than waking up takes
        (CPU_ONLY, 0.0, 4, ALIVE),
        (QUIET, 0.0, 0, IDLE),
        (QUIET, 0.5, 0, ALIVE),
        (Activity(), 0.0, 0, IDLE),
    ],
)
def test_judgement(ran: Activity, cpu: float, packets: int, expected: str) -> None:
    assert judge(ran, cpu=cpu, packets=packets) == expected


def test_between_two_looks() -> None:
    first = Look(at=10.0, cpu=1.0, pointers=((0x1000, 5), (0x2000, 7), (0x3000, 1)))
    last = Look(at=14.0, cpu=1.5, pointers=((0x1000, 9), (0x2000, 7), (0x4000, 100)))
    ran = between(first, last)
    assert (ran.seconds, ran.cpu, ran.packets) == (4.0, 0.5, 4)
    assert ran.pointers == last.pointers
    assert expected(ran, ran.packets) == pytest.approx(3.0)


def test_a_queue_that_was_made_anew_counts_for_nothing() -> None:
    assert advanced({1: 50}, {1: 3}) == 0


def test_pointers_that_cannot_be_read_are_not_held_against_a_copy() -> None:
    ran = Activity(seconds=2.0, cpu=1.0, packets=200, pointers=((0x1000, 200), (0x2000, 5)))
    assert judge_by(ran, {}, cpu=0.5) == ALIVE
    assert judge_by(ran, {}, cpu=0.0) == SUSPECT
    assert judge_by(ran, {0x1000: 200}, cpu=0.5) == SUSPECT
    assert judge_by(ran, {0x1000: 201}, cpu=0.0) == ALIVE
