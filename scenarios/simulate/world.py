"""One schedule: two hosts, one migration, what the seed wants to go wrong, and the healing."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec

from agents.resolving import resolve
from migrate import faults as fault_points
from migrate.errors import JournalUnusable, MigrateError, UnknownMigration, UsageError
from migrate.faults import InjectedFault
from migrate.model import Value
from migrate.orchestrator.plan import Options
from migrate.status import DestinationState, SourceState
from scenarios.simulate.faults import Faults
from scenarios.simulate.judge import Judge
from scenarios.simulate.network import Network
from scenarios.simulate.nodes import WATCHDOG, Agent, Node
from scenarios.simulate.processes import Copy
from scenarios.simulate.scheduler import Scheduler

HEALING = (2.0, 15.0, 60.0)  # seconds of the run until nothing goes wrong any more
PATIENCE = 900.0  # seconds after which a healed run that has not ended counts as stuck
LOOK = 5.0  # seconds between looks


class Outcome(Value):
    """What came of a schedule."""

    seed: int
    double: int = 0
    lost: int = 0
    stuck: int = 0
    bugs: int = 0
    why: str = ""
    operator: bool = False
    moved: bool = False
    faults: dict[str, int] = {}  # noqa: RUF012 - msgspec copies it
    seconds: float = 0.0
    points: int = 0
    story: tuple[str, ...] = ()

    @property
    def bad(self) -> bool:
        """Whether an invariant was broken."""
        return bool(self.double or self.lost or self.stuck or self.bugs)


class World:
    """Everything of one schedule."""

    def __init__(self, seed: int, scheduler: Scheduler, folder: Path) -> None:
        self.seed = seed
        self.scheduler = scheduler
        self.random = random.Random(f"world {seed}")
        self.story: list[str] = []
        self.resolved = ""
        self.holds = self.random.random() < 0.4  # --hold-source
        self.idles = self.random.random() < 0.1  # the process does so little that none is missed
        self.points = 0
        self.folder = folder
        self.network = Network(self)
        self.judge = Judge(self)
        self.faults = Faults(self, random.Random(f"faults {seed}"))
        self.nodes = {name: Node(self, name, folder / name) for name in ("a", "b")}
        self.source: Copy = self.nodes["a"].new_copy("source", 0)

    # ------------------------------------------------------------ for seams

    def tell(self, text: str) -> None:
        """A line of the story."""
        self.story.append(f"{self.scheduler.now:9.4f}  {text}")

    def point(self, _node: Node, what: str) -> None:
        """A moment at which something may go wrong; then a dead agent's thread ends."""
        self.scheduler.check()
        self.points += 1
        self.faults.point(what)
        self.scheduler.check()

    def named_point(self, name: str) -> None:
        """``migrate.faults.point``: the drivers' own moments."""
        if self.scheduler.current.life is not None:
            self.scheduler.check()
            self.faults.point(name)
            self.scheduler.check()

    def destination_copies(self) -> list[Copy]:
        """All copies that were ever begun at the destination."""
        return list(self.nodes["b"].copies.values())

    # ------------------------------------------------------------ what faults do

    def agent_died(self, node: Node) -> None:
        """Something starts it again, sooner or later or only when all heals; and a watchdog."""
        if self.random.random() < 0.7:
            self.scheduler.later(self.random.choice((0.05, 1.0, 8.0)), node.start_agent)
        if self.random.random() < 0.8:
            self.scheduler.later(WATCHDOG, node.watchdog)

    def pause(self, node: Node, seconds: float) -> None:
        """The whole host stands still."""
        self.tell(f"{node.name}: the host stands still for {seconds} s")
        self.scheduler.pause(node.name, seconds)

    def switch_off(self, node: Node) -> None:
        """The host never comes back."""
        node.crash_host()
        node.off_for_good = True
        self.tell(f"{node.name}: the host is off for good")

    def abort(self) -> None:
        """An operator asks the source's agent for an abort."""
        agent = self.nodes["a"].agent
        if agent is None:
            return
        for migration in agent.sources._live.values():
            self.scheduler.start("operator", agent, migration.abort)

    def fence_and_resolve(self, owner: str) -> None:
        """An impatient operator switches a host off for good and has the other one decide.

        That one may refuse, because nothing has to be decided or its disk is full: then nothing
        must have changed.
        """
        node, fenced = self.nodes[owner], "b" if owner == "a" else "a"
        if node.agent is None or not node.agent.serves or self.resolved:
            return
        self.switch_off(self.nodes[fenced])
        side = "source" if owner == "a" else "destination"

        def refused() -> None:
            self.tell("the operator is refused")
            self.resolved = ""

        self.resolved = side
        self._resolve(node.agent, owner, fenced, refused)

    # ------------------------------------------------------------ the run

    def run(self) -> Outcome:
        """Run it to its end. Called with the director's baton."""
        fault_points.point = self.named_point
        for node in self.nodes.values():
            node.start_agent()
        self.scheduler.sleep(0.5)
        self._begin()
        self.scheduler.sleep(self.random.choice(HEALING))
        self._heal()
        verdict, operator = self._until_end(), False
        if verdict == "operator":
            operator = True
            verdict = self._operate()
        if verdict != "ended" and not self.judge.found:
            self.judge._broken("stuck", f"LIVENESS: {verdict}")
        return self._outcome(operator)

    def _begin(self) -> None:
        agent = self.nodes["a"].agent
        if agent is None:
            return
        options = Options(precopy=self.random.random() < 0.3, max_rounds=2, patience=15.0)
        options = msgspec.structs.replace(options, hold_source=self.holds)

        def start() -> None:
            try:
                agent.sources.start(self.source.ref.pid, "b", "b:1", options, "")
            except MigrateError as error:
                self.tell(f"the migration does not begin: {error}")

        self.scheduler.start("operator run", agent, start)

    def _heal(self) -> None:
        self.tell("--- nothing goes wrong any more")
        self.faults.healed = True
        self.network.cut.clear()
        self.scheduler.unpause()
        for node in self.nodes.values():
            node.start_agent()

    def _until_end(self) -> str:
        """Until it has ended; an operator is called only when nothing else can come."""
        until = self.scheduler.now + PATIENCE
        verdict, since = "", 0
        while self.scheduler.now < until:
            self.scheduler.sleep(LOOK)
            last, verdict = verdict, self.judge.verdict()
            since = since + 1 if verdict == last else 0
            if self.judge.found or self.scheduler.failure is not None:
                break
            if since >= (2 if verdict == "ended" else 16) and verdict in ("ended", "operator"):
                break
        return verdict

    def _operate(self) -> str:
        """An operator makes sure of the facts, fences a host for real, and decides."""
        here, there = self.nodes["a"], self.nodes["b"]
        said = here.recorded.get("source")
        copies = [c for c in self.destination_copies() if c.alive]
        runs = any(c.tasks_run for c in copies)
        if here.agent is not None and said == SourceState.GRANTED:
            self.resolved = "destination" if runs else "source"
            if not runs:
                self.switch_off(there)
            known = there.recorded.get("destination") is not None
            if runs and self.holds and there.agent is not None and known:
                self._resolve(there.agent, "b", "a")
            else:
                self._resolve(here.agent, *(("b", "a") if runs else ("a", "b")))
        elif here.agent is not None and said == SourceState.DEVICE:
            self.resolved = "given up"  # nobody has a copy any more
            next(iter(here.agent.sources._live.values())).abort()
        elif there.agent is not None and copies and not runs:
            if there.recorded.get("destination") != DestinationState.PREPARED:
                return "ended" if self.faults.happened["journal lost"] else "a copy stands still"
            self.resolved = "destination"
            self.switch_off(here)
            self._resolve(there.agent, "b", "a")
        else:
            return "ended"  # a journal was lost: nothing is left that could be asked
        self.tell(f"the operator decides: {self.resolved}")
        return self._until_end()

    def _resolve(
        self,
        agent: Agent,
        owner: str,
        fenced: str,
        refused: Callable[[], None] = lambda: None,
    ) -> None:
        def act() -> None:
            sources, destinations = agent.sources, agent.destinations
            migration = next(iter(agent.journal.migrations()), "none")
            try:
                resolve(
                    agent.node.name, sources, destinations, migration, owner=owner, fenced=fenced
                )
            except (UsageError, UnknownMigration, JournalUnusable) as error:
                self.tell(f"{agent.node.name}: no decision: {error}")
                refused()
            except (InjectedFault, MigrateError):  # the decision stands; who stays behind is judged
                self.tell(f"{agent.node.name}: decided; the rest fails now, and is gone on with")

        self.scheduler.start("operator", agent, act)

    def _outcome(self, operator: bool) -> Outcome:
        failure = self.scheduler.failure
        if failure is not None:
            self.judge.bug(f"{type(failure).__name__}: {failure}")
        for node in self.nodes.values():
            if node.agent is not None:
                node._end_agent("the run is over", None)
            if node.watch is not None:
                self.scheduler.kill(node.watch)
        self.scheduler.drain()
        shutil.rmtree(self.folder)
        kinds = [kind for kind, _ in self.judge.found]
        return Outcome(
            seed=self.seed,
            double=int("double" in kinds),
            lost=int("lost" in kinds),
            stuck=int("stuck" in kinds),
            bugs=int("bug" in kinds),
            why="; ".join(why for _, why in self.judge.found[:1]),
            operator=operator,
            moved=any(c.ran for c in self.destination_copies()),
            faults=dict(self.faults.happened),
            seconds=self.scheduler.now,
            points=self.points,
            story=tuple(self.story),
        )
