"""What a check found."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterable
from enum import StrEnum

import msgspec

from migrate.errors import MigrateError
from migrate.model import HostPaths, Value

SCHEMA = "migrate.doctor/1"
UNSEEN_ERRORS = (OSError, MigrateError, ValueError, KeyError, subprocess.SubprocessError)


class Status(StrEnum):
    """``ok``; ``warn``: works, less well; ``fail``: no migration; ``unseen``: nobody knows."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"
    UNSEEN = "unseen"


class Finding(Value):
    """One thing: what was seen, what it limits, how to mend it; ``data`` for machines."""

    name: str
    status: Status
    found: str
    limits: str = ""
    mend: str = ""
    data: dict[str, int | float | str | bool | None] = msgspec.field(default_factory=dict)


class Patient(Value):
    """The host that is looked at. ``simulated`` ones share this machine's kernel and CRIU."""

    paths: HostPaths
    simulated: bool = False
    peer: str = ""  # host:port of another agent
    measure: Callable[[], float] | None = None  # bytes a second to it; raises MigrateError


class Report(Value):
    """All findings of a host."""

    host: str
    findings: tuple[Finding, ...]
    schema: str = SCHEMA

    @property
    def worst(self) -> Status:
        """``fail``, ``warn`` or ``ok``; what is unseen counts as a warning."""
        found = {finding.status for finding in self.findings}
        if Status.FAIL in found:
            return Status.FAIL
        return Status.WARN if found & {Status.WARN, Status.UNSEEN} else Status.OK


Check = Callable[[Patient], Iterable[Finding]]


def unseen(name: str, why: object, mend: str = "") -> Finding:
    """A finding about something that can't be looked at from here."""
    return Finding(
        name=name,
        status=Status.UNSEEN,
        found=f"not seen: {why}",
        limits="Nothing is known about it; a migration may still work.",
        mend=mend,
    )


def perform(name: str, check: Check, patient: Patient) -> list[Finding]:
    """The findings of *check*; one that says so if it can't look."""
    try:
        return list(check(patient))
    except UNSEEN_ERRORS as error:
        return [unseen(name, error)]
