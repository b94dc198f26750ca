"""When to stop pre-copy, and what to do where it does not help: a pure function of the rounds.

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
    THROTTLE = "throttle"  # again, the workload's queues paused half of the time
    STOP_AND_COPY = "stop-and-copy"
    STAY = "stay"  # give up: the process goes on where it is


class Costs(Value):
    """What a prediction takes as known beside the rounds.

    ``placement``: bytes a second at which buffers are written and read back. ``fixed``:
    seconds of the checkpoint, the new process and the handover. ``final``: time of the final
    round as a share of the last live one's, beside which the process runs and is looked at.
    """

    placement: float
    fixed: float
    final: float = 1.0


class Policy(Value):
    """What the user allows. ``max_downtime`` in seconds.

    ``throttle``: the workload may be slowed down. ``or_stay``: rather stay than be stopped
    for longer than ``max_downtime``.
    """

    max_downtime: float
    max_rounds: int
    throttle: bool = False
    or_stay: bool = False


class Verdict(Value):
    """A decision, why, and the downtime in seconds predicted if it were now."""

    decision: Decision
    why: str
    predicted_downtime: float


NO_PROGRESS = 0.9  # a round that sends more than this share of the one before is no progress


def predict(rounds: Sequence[Round], costs: Costs) -> float:
    """Seconds of downtime if the process were stopped now. *rounds* holds at least one.

    The final round looks at as much as the last one did and sends about as much; the first
    round sent everything, which no later one does.
    """
    last = rounds[-1]
    final_round = last.seconds * costs.final if len(rounds) > 1 else last.seconds / 2
    return costs.fixed + final_round + last.scanned / costs.placement


def decide(
    rounds: Sequence[Round], costs: Costs, policy: Policy, *, throttled: bool = False
) -> Verdict:
    """Whether another round pays, and what else. *rounds* holds at least one.

    The first round sends everything, so only from the second on is there a dirty rate. With
    *throttled* the last round ran with the workload slowed down already.
    """
    last = rounds[-1]
    predicted = predict(rounds, costs)

    def verdict(decision: Decision, why: str) -> Verdict:
        return Verdict(decision=decision, why=why, predicted_downtime=predicted)

    def no_use(why: str) -> Verdict:
        """Further rounds as they are do not help."""
        if predicted <= policy.max_downtime:
            return verdict(Decision.STOP_AND_COPY, why)
        if policy.or_stay:
            return verdict(Decision.STAY, f"{why}, and the downtime would be over the limit")
        return verdict(Decision.STOP_AND_COPY, why)

    if len(rounds) >= policy.max_rounds:
        return no_use(f"{policy.max_rounds} rounds are the limit")
    if len(rounds) == 1:
        return verdict(Decision.AGAIN, "one round shows no dirty rate yet")
    if predicted <= policy.max_downtime:
        return verdict(Decision.STOP_AND_COPY, "the predicted downtime is within the limit")
    if last.changed >= NO_PROGRESS * rounds[-2].changed:
        if policy.throttle and not throttled:
            return verdict(Decision.THROTTLE, "no progress: the workload is slowed down")
        return no_use("another round would not make it shorter")
    if throttled:
        return verdict(Decision.THROTTLE, "each round still sends less")
    return verdict(Decision.AGAIN, "each round still sends less")
