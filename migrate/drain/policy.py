"""By what rules a drain starts, tries again and stops. Frozen values and pure functions."""

from __future__ import annotations

from collections.abc import Collection
from enum import StrEnum

from migrate.errors import by_reason
from migrate.model import Value


class Policy(Value):
    """Limits and patience. Times are seconds.

    ``per_host``: migrations at a time that a host takes part in, ``per_link``: from one host
    to one other. ``attempts`` for each process; the wait before the next doubles from
    ``backoff`` to ``backoff_limit``. After ``pause_after`` failures in a row nothing is
    started for ``pause``; then one is tried alone, and if that fails the drain stops.
    ``patience``: how long an agent may be away, or an owner unknown.
    """

    per_host: int = 4
    per_link: int = 2
    attempts: int = 3
    backoff: float = 5.0
    backoff_limit: float = 60.0
    pause_after: int = 3
    pause: float = 30.0
    patience: float = 300.0

    def wait_after(self, attempt: int) -> float:
        """Seconds between failed attempt number *attempt* (from 1 on) and the next."""
        return float(min(self.backoff * 2 ** (attempt - 1), self.backoff_limit))

    def room(self, source: str, destination: str, active: Collection[str]) -> bool:
        """Whether one more may go to *destination*; *active*: destinations of those under way."""
        there = sum(1 for host in active if host == destination)
        return (
            source != destination
            and len(active) < self.per_host
            and there < min(self.per_host, self.per_link)
        )


class Verdict(StrEnum):
    """What a failed attempt means for the process."""

    GONE = "gone"  # it ended by itself: nothing is left to move
    NEVER = "never"  # it can't be migrated as it is: another attempt would fail the same way
    ELSEWHERE = "elsewhere"  # that destination can't take it
    AGAIN = "again"


PROCESS = range(30, 50)  # groups of exit codes: see migrate.errors
DESTINATION = range(50, 70)
ENDED = frozenset({"NO_SUCH_PROCESS", "NOT_A_KFD_PROCESS", "PROCESS_EXITED"})
# Somebody aborted it: that is a wish, not a fault.
WISHED = frozenset({"CANCELLED", "PERMISSION_REFUSED", "USAGE", "SAME_HOST"})


def verdict(reason: str) -> Verdict:
    """What to do after a failure with this reason code."""
    if reason in ENDED:
        return Verdict.GONE
    code = by_reason(reason).exit_code
    if reason in WISHED or (code in PROCESS and reason != "ALREADY_TRACED"):
        return Verdict.NEVER
    return Verdict.ELSEWHERE if code in DESTINATION else Verdict.AGAIN


class Breaker:
    """Failures in a row: pauses what begins, then lets one try, then stops for good."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._failures = 0
        self._until = 0.0
        self._probing = False
        self.stopped = False

    @property
    def paused(self) -> bool:
        """Whether it has had enough, at least for a while."""
        return self._failures >= self._policy.pause_after

    def may_start(self, now: float, active: int) -> bool:
        """Whether one more may begin at *now* with *active* under way."""
        if self.stopped:
            return False
        if not self.paused:
            return True
        if now < self._until or active:
            return False
        self._probing = True
        return True

    def succeeded(self) -> None:
        """One came to its destination."""
        self._failures, self._probing = 0, False

    def failed(self, now: float) -> None:
        """One failed, in a way that may be the next one's too."""
        self._failures += 1
        if self._probing:
            self.stopped = True
        elif self._failures == self._policy.pause_after:
            self._until = now + self._policy.pause
