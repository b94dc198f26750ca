"""When to stop pre-copy: a pure function of what the rounds showed.

Pre-copy shortens the freeze only while a round sends less than the one before. KFD
has no dirty log, so what is known of the future is the last round: what changed
during it is about what will have changed when the process is stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

from migrate.model import Value
from migrate.report import Round


class Decision(StrEnum):
    """What to do after a round."""

    AGAIN = "again"
    STOP_AND_COPY = "stop-and-copy"


class Costs(Value):
    """Rates behind a prediction, in bytes a second, and fixed seconds.

    ``link``: changed bytes sent. ``scan``: all bytes read and hashed. ``placement``: all
    bytes written into buffers and read back. ``fixed``: stop, checkpoint, engine, handover.
    """

    link: float
    scan: float
    placement: float
    fixed: float


class Verdict(Value):
    """A decision, why, and the downtime in seconds predicted if it were now."""

    decision: Decision
    why: str
    predicted_downtime: float


NO_PROGRESS = 0.9  # a round that sends more than this share of the one before is no progress


def predict(changed: int, total: int, costs: Costs) -> float:
    """Seconds of downtime if *changed* of *total* bytes differ when the process stops."""
    return costs.fixed + changed / costs.link + total / costs.scan + total / costs.placement


def decide(
    rounds: Sequence[Round], costs: Costs, *, max_downtime: float, max_rounds: int
) -> Verdict:
    """Whether another round pays. *rounds* holds at least one.

    The first round sends everything, so only from the second on is there a dirty rate;
    before it the prediction assumes that a tenth changed.
    """
    last = rounds[-1]
    changed = last.changed if len(rounds) > 1 else last.scanned // 10
    predicted = predict(changed, last.scanned, costs)

    def verdict(decision: Decision, why: str) -> Verdict:
        return Verdict(decision=decision, why=why, predicted_downtime=predicted)

    if len(rounds) >= max_rounds:
        return verdict(Decision.STOP_AND_COPY, f"{max_rounds} rounds are the limit")
    if len(rounds) == 1:
        return verdict(Decision.AGAIN, "one round shows no dirty rate yet")
    if predicted <= max_downtime:
        return verdict(Decision.STOP_AND_COPY, "the predicted downtime is within the limit")
    if last.changed >= NO_PROGRESS * max(1, rounds[-2].changed):
        return verdict(Decision.STOP_AND_COPY, "another round would not make it shorter")
    return verdict(Decision.AGAIN, "each round still sends less")
