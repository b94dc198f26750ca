"""What came of a drill: its verdict, and the times a picture is drawn of."""

from __future__ import annotations

import msgspec

from migrate.journal import Record
from migrate.model import Value
from migrate.status import SourceState, owner_of
from scenarios.drills.drill import Drill
from scenarios.drills.watch import Look, spans

SCHEMA = "migrate.drills/1"


class Span(Value):
    """A stretch of a lane, in seconds from the start of the command."""

    lane: str
    start: float
    end: float
    text: str


class Mark(Value):
    """Something that happened at one moment."""

    at: float
    text: str


class Outcome(Value):
    """One drill as it went. ``problems`` is empty if all was as expected.

    ``exit`` and ``reason`` of the command, ``source`` and ``destination`` the journals' last
    states, ``runs`` where the process was. ``seconds``: of the whole drill.
    """

    drill: Drill
    problems: tuple[str, ...]
    seconds: float
    exit: int | None = None
    reason: str = ""
    source: str = ""
    destination: str = ""
    owner: str = ""
    runs: str = ""
    migration: str = ""
    digest: str = ""
    log: str = ""  # what the agents said, of a drill that failed
    spans: tuple[Span, ...] = ()
    marks: tuple[Mark, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether all was as expected."""
        return not self.problems


class Results(Value):
    """All of a run. ``seconds`` by the wall."""

    outcomes: tuple[Outcome, ...]
    seconds: float
    passed: int
    failed: int
    schema: str = SCHEMA


def states(records: list[Record], migration: str, kind: str) -> list[tuple[float, str]]:
    """Wall time and state of each record of one side."""
    return [
        (record.wall, str(msgspec.json.decode(record.data)["state"]))
        for record in records
        if record.migration == migration and record.kind == kind
    ]


def lanes(
    source: list[tuple[float, str]],
    destination: list[tuple[float, str]],
    looks: list[Look],
    pid: int,
    began: float,
    ended: float,
) -> tuple[Span, ...]:
    """What the picture shows, lane by lane."""
    found: list[Span] = []

    def add(lane: str, start: float, end: float, text: str) -> None:
        start, end = max(start, began), min(end, ended)
        if end >= start:
            found.append(Span(lane=lane, start=start - began, end=end - began, text=text))

    for lane, steps in (("source", source), ("destination", destination)):
        ends = [start for start, _ in steps[1:]] + [ended]
        for (start, state), end in zip(steps, ends, strict=False):
            add(lane, start, end, state)
    for number in sorted({seen.pid for seen in looks}):
        lane = "process at the source" if number == pid else "copy at the destination"
        for start, end, state in spans(looks, number):
            add(lane, start, end, state)
    owners: list[tuple[float, str]] = [(began, "source")]
    for start, state in source:
        owner = str(owner_of(SourceState(state)))
        if owner != owners[-1][1]:
            owners.append((start, owner))
    for (start, owner), (end, _) in zip(owners, [*owners[1:], (ended, "")], strict=True):
        add("owner", start, end, owner)
    return tuple(found)
