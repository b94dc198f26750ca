"""Warnings: what a person should know and what forbids nothing. Their codes are stable, too."""

from __future__ import annotations

from migrate.model import Value
from migrate.preflight.findings import Finding


class Note(Value):
    """One kind of warning: ``reason`` is its code."""

    reason: str
    meaning: str
    advice: str

    def finding(self, message: str) -> Finding:
        """The warning itself."""
        return Finding(reason=self.reason, message=message, advice=self.advice)


CGROUP_PATH = Note(
    reason="CGROUP_PATH",
    meaning="The destination has no cgroup of the process's path, whose limits would hold there.",
    advice="Start the service or slice at the destination, if its limits are wanted.",
)
CLOCK_SKEW = Note(
    reason="CLOCK_SKEW",
    meaning="The clocks of both hosts differ by more than two seconds.",
    advice="Run a time service (chrony, systemd-timesyncd) on both; timers may fire early or late.",
)
FILE_OTHER = Note(
    reason="FILE_OTHER",
    meaning="A library or module that the program is started with again differs over there.",
    advice="Install the same packages on both hosts, if the program depends on their versions.",
)
LOW_MEMORY = Note(
    reason="LOW_MEMORY",
    meaning="The destination's host memory will be nearly used up while the bytes wait in staging.",
    advice="Free host memory on the destination; other programs there may be slowed down.",
)
MONOTONIC_CLOCK = Note(
    reason="MONOTONIC_CLOCK",
    meaning="The destination was booted later, and its kernel can't give a process a clock of its"
    " own: CLOCK_MONOTONIC goes back.",
    advice="Run a kernel with CONFIG_TIME_NS there; else what sleeps until a time of that clock"
    " sleeps too long.",
)
DOWNTIME_LIMIT = Note(
    reason="DOWNTIME_LIMIT",
    meaning="The predicted downtime is above --max-downtime.",
    advice="Give a longer --max-downtime or more --max-rounds, or migrate when it writes less.",
)
LINK_UNMEASURED = Note(
    reason="LINK_UNMEASURED",
    meaning="The link and the memory could not be sampled, so that the prediction is a guess.",
    advice="The message says why. Nothing else is wrong.",
)

NOTES = (
    *(CGROUP_PATH, CLOCK_SKEW, MONOTONIC_CLOCK, FILE_OTHER, LOW_MEMORY, DOWNTIME_LIMIT),
    LINK_UNMEASURED,
)
