"""Breadth-first search over all states, and the check that an end can always be reached."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import msgspec

from migrate.model import Value
from migrate.orchestrator.handover import Answer
from migrate.status import DestinationState
from scenarios.simulate.model import destination, rules, source
from scenarios.simulate.model.world import (
    STALE,
    DestinationDisk,
    DestinationHost,
    Message,
    Step,
    World,
    store_of,
)


class Bound(Value):
    """At most *broken* of these may happen for good: a host crashes and loses its copy (source,
    destination), a journal comes back empty (source, destination), a copy dies by itself.

    Crashes and restarts of agents, full disks, failing steps, lost, doubled, late and
    reordered messages are not bounded. ``hold``: with a kept source.
    """

    broken: int = 0
    hold: bool = False


class Found(Value):
    """The result. ``story`` is the shortest way to the first violation."""

    states: int
    transitions: int
    depth: int
    violation: str = ""
    story: tuple[str, ...] = ()
    stuck: int = 0


def start(*, hold: bool = False) -> World:
    """The source is about to freeze; a stale grant and stale answers are on the way."""
    stale: set[Message] = {("grant", STALE)}
    if hold:
        stale.add(("revoke", STALE))
    stale |= {("answer", answer, STALE, store_of(0)) for answer in (Answer.OWNED, Answer.REFUSED)}
    disk = DestinationDisk(DestinationState.RESERVED, hold=hold)
    there = DestinationHost(disk=disk, memory=disk)
    return World(network=frozenset(stale), destination=there)


def steps(world: World, bound: Bound) -> Iterator[Step]:
    """All transitions within the bound."""
    for step in (*source.steps(world), *destination.steps(world)):
        if len(step.world.broken) <= bound.broken and step.world != world:
            yield step


class Search:
    """All reachable states, numbered in the order in which they were found."""

    def __init__(self, bound: Bound) -> None:
        self.bound = bound
        self.numbers: dict[World, int] = {}
        self.worlds: list[World] = []
        self.parents: list[int] = []
        self.names: list[str] = []
        self.backwards: list[list[int]] = []  # healthy steps into each state
        self.transitions = 0

    def run(self) -> Found:
        """Search until all is seen or an invariant is broken."""
        self._add(start(hold=self.bound.hold), -1, "start")
        at = 0
        while at < len(self.worlds):
            world = self.worlds[at]
            for step in steps(world, self.bound):
                self.transitions += 1
                number = self.numbers.get(step.world)
                broken = rules.violations(world, step)
                if number is None:
                    number = self._add(step.world, at, step.name)
                if broken:
                    return self._found(broken[0], at, step.name)
                if step.healthy:
                    self.backwards[number].append(at)
            at += 1
        return self._liveness()

    def _add(self, world: World, parent: int, name: str) -> int:
        number = self.numbers[world] = len(self.worlds)
        self.worlds.append(world)
        self.parents.append(parent)
        self.names.append(name)
        self.backwards.append([])
        return number

    def _liveness(self) -> Found:
        """From every state, with no new fault, an end can be reached."""
        good = bytearray(len(self.worlds))
        todo = deque(
            n for n, w in enumerate(self.worlds) if rules.is_end(w) or rules.needs_operator(w)
        )
        for number in todo:
            good[number] = 1
        while todo:
            for before in self.backwards[todo.popleft()]:
                if not good[before]:
                    good[before] = 1
                    todo.append(before)
        stuck = len(good) - sum(good)
        if stuck:
            first = good.index(0)
            found = self._found("LIVENESS: no end can be reached without a new fault", first, "")
            return msgspec.structs.replace(found, stuck=stuck)
        return self._found("", 0, "")

    def _found(self, violation: str, at: int, last: str) -> Found:
        story = [last] if last else []
        length = self._depth(len(self.worlds) - 1)
        while at >= 0 and violation:
            story.append(self.names[at])
            at = self.parents[at]
        return Found(
            states=len(self.worlds),
            transitions=self.transitions,
            depth=length,
            violation=violation,
            story=tuple(reversed(story)),
        )

    def _depth(self, at: int) -> int:
        depth = 0
        while self.parents[at] >= 0:
            at, depth = self.parents[at], depth + 1
        return depth
