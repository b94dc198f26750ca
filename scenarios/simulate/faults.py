"""What goes wrong in one schedule, all of it drawn from the seed before it begins."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

from migrate import faults as points
from migrate.orchestrator.destination import LOOKS

if TYPE_CHECKING:
    from scenarios.simulate.nodes import Node
    from scenarios.simulate.world import World

# Moments of a run: how many named points a run without faults passes, and names worth a try.
USUAL_POINTS = 60
NAMED = (
    *points.POINTS,
    "send: Grant",
    "send: Restore",
    "send: Cancel",
    "send: Query",
    "send: Revoke",
    "engine: RESUME",
    "engine: thaw",
    "engine: kill",
)
ENGINE = ("freeze", "thaw", "kill", "build", "resume", "open kfd", "unpause", "pause", "stream")
KINDS: dict[str, int] = {  # weights
    "agent killed": 10,
    "agent killed at a write": 8,
    "restart storm": 3,
    "host crashed": 3,
    "host paused": 3,
    "host off for good": 1,
    "journal lost": 1,
    "disk full": 4,
    "messages lost": 4,
    "messages doubled": 3,
    "messages late": 3,
    "partition": 4,
    "partition one way": 4,
    "clock jump": 1,
    "engine fails": 10,
    "agent killed, its engine fails": 5,
    "step fails": 3,
    "queues never start": 3,
    "alive and looks suspect": 1,
    "copy dies": 2,
    "agent down, then its copy dies": 2,
    "abort": 5,
    "host fenced and resolved": 2,
}


class Faults:
    """The plan of one schedule, and what of it happened."""

    def __init__(self, world: World, rng: random.Random) -> None:
        self.world = world
        self.random = rng
        self.happened: Counter[str] = Counter()
        self.healed = False
        self._at_point: dict[int, list[Callable[[], None]]] = {}
        self._at_name: dict[tuple[str, int], list[Callable[[], None]]] = {}
        self._writes: dict[tuple[str, int], str] = {}
        self._written: Counter[str] = Counter()
        self._engine: dict[str, tuple[int, int]] = {}  # from which to which time it fails
        self._tried: Counter[str] = Counter()
        self._full: dict[str, float] = {}
        self._rates: dict[str, float] = {}
        self._seen: Counter[str] = Counter()
        self._passed = 0
        kinds, weights = list(KINDS), list(KINDS.values())
        for kind in rng.choices(kinds, weights, k=rng.choice((0, 1, 1, 2, 2, 3, 4, 6))):
            self._plan(kind)

    # ------------------------------------------------------------ the plan

    def _node(self) -> str:
        return self.random.choice(("a", "b"))

    def _plan(self, kind: str) -> None:
        rng, node = self.random, self._node()
        match kind:
            case "agent killed at a write":
                how = rng.choice(("before", "after", "torn"))
                self._writes[(node, rng.randint(1, 20 if node == "a" else 8))] = how
            case "engine fails":
                first = rng.choice((0, 0, 0, 1, 2))
                self._engine[rng.choice(ENGINE)] = (first, first + rng.choice((1, 1, 2, 3, 1000)))
            case "queues never start":
                self._engine[kind] = (0, 1)
            case "alive and looks suspect":
                self._engine[kind] = (0, LOOKS)
            case "messages lost" | "messages doubled" | "messages late":
                self._rates[kind.split()[1]] = rng.choice((0.05, 0.2, 0.5))
            case _:
                self._when(self._action(kind, node))

    def _when(self, action: Callable[[], None]) -> None:
        """At a number of a point or at a named one."""
        rng = self.random
        if rng.random() < 0.5:
            self._at_point.setdefault(rng.randint(1, USUAL_POINTS), []).append(action)
        else:
            moment = (rng.choice(NAMED), rng.choice((1, 1, 1, 2)))
            self._at_name.setdefault(moment, []).append(action)

    def _action(self, kind: str, name: str) -> Callable[[], None]:
        world, rng = self.world, self.random
        seconds = rng.choice((0.5, 3.0, 12.0, 40.0))
        times = rng.randint(2, 6)

        def node() -> Node:
            return world.nodes[name]

        def cut(*pairs: tuple[str, str]) -> None:
            world.tell(f"cut for {seconds} s: {pairs}")
            for pair in pairs:
                world.network.cut[pair] = world.scheduler.now + seconds

        def fill() -> None:
            self._full[name] = world.scheduler.now + seconds
            world.tell(f"{name}: the disk is full for {seconds} s")

        def storm(left: int = times) -> None:
            if left and not self.healed:
                node().kill_agent("in a storm of restarts")
                world.scheduler.later(rng.uniform(0.01, 0.3), node().start_agent)
                world.scheduler.later(rng.uniform(0.3, 1.5), lambda: storm(left - 1))

        def jump() -> None:
            node().clock_offset += rng.uniform(10.0, 4000.0)

        def die() -> None:
            copies = [c for c in node().copies.values() if c.alive]
            if copies:
                world.tell(f"{name}: the copy dies by itself")
                node().end_copy(copies[-1], "itself")

        def fade() -> None:
            node().kill_agent("and stays down for a while")
            world.scheduler.later(rng.uniform(4.0, 12.0), die)

        def limp() -> None:
            node().kill_agent("and its engine fails")
            broken = rng.choice(ENGINE)
            self._engine[broken] = (self._tried[broken], self._tried[broken] + rng.randint(1, 3))

        def fail() -> None:
            raise points.InjectedFault("a step fails")

        other = "b" if name == "a" else "a"
        actions: dict[str, Callable[[], None]] = {
            "agent killed": lambda: node().kill_agent("out of the blue"),
            "agent killed, its engine fails": limp,
            "restart storm": storm,
            "host crashed": lambda: node().crash_host(),
            "host paused": lambda: world.pause(node(), seconds),
            "host off for good": lambda: world.switch_off(node()),
            "journal lost": lambda: node().lose_journal(),
            "disk full": fill,
            "partition": lambda: cut((name, other), (other, name)),
            "partition one way": lambda: cut((name, other)),
            "clock jump": jump,
            "copy dies": die,
            "agent down, then its copy dies": fade,
            "abort": world.abort,
            "host fenced and resolved": lambda: world.fence_and_resolve(name),
            "step fails": fail,
        }

        def act() -> None:
            if not self.healed:
                self.happened[kind] += 1
                actions[kind]()

        return act

    # ------------------------------------------------------------ asked by the simulation

    def point(self, name: str) -> None:
        """A moment has come."""
        self._passed += 1
        self._seen[name] += 1
        for action in self._at_point.pop(self._passed, ()):
            action()
        for action in self._at_name.pop((name, self._seen[name]), ()):
            action()

    def crash_at_write(self, node: Node) -> str:
        """before, after, torn or nothing, at this write of this host."""
        self._written[node.name] += 1
        how = self._writes.pop((node.name, self._written[node.name]), "")
        if how and not self.healed:
            self.happened[f"agent killed at a write ({how})"] += 1
            return how
        return ""

    def disk_full(self, node: Node) -> bool:
        """Whether it is now."""
        full = self._full.get(node.name, 0.0) > self.world.scheduler.now
        return full and not self.healed

    def message(self, _source: str) -> str:
        """lost, doubled, late or nothing."""
        if self.healed:
            return ""
        for fate, rate in self._rates.items():
            if self.random.random() < rate:
                self.happened[f"message {fate}"] += 1
                return fate
        return ""

    def fails(self, _node: Node, kind: str) -> bool:
        """Whether an operation of the engine fails now."""
        number = self._tried[kind]
        self._tried[kind] += 1
        first, end = self._engine.get(kind, (0, 0))
        if not first <= number < end or self.healed:
            return False
        self.happened[f"engine: {kind}"] += 1
        return True
