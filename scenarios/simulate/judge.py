"""The invariants, looked at whenever a copy changes, and once more at the end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from agents.watchdog import notes
from migrate.orchestrator.handover import Answer
from migrate.status import DestinationState, SourceState

if TYPE_CHECKING:
    from scenarios.simulate.processes import Copy
    from scenarios.simulate.world import World

MAY_HAVE_RUN = frozenset(
    {DestinationState.OWNED, DestinationState.CONFIRMED, DestinationState.OWNED_DEAD}
)
TAKEN_BACK = frozenset({DestinationState.REVOKING, DestinationState.REVOKED})


class Judge:
    """Collects what is broken: (double | lost | stuck | bug, why)."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.found: list[tuple[str, str]] = []
        self.owned_was_answered = False
        self.refused_was_answered = False
        self.revoked_was_answered = False
        self.granted = False

    def bug(self, why: str) -> None:
        """An exception that is no MigrateError."""
        self._broken("bug", why)

    def _broken(self, kind: str, why: str) -> None:
        self.world.tell(f"*** {kind}: {why}")
        self.found.append((kind, why))

    def answered(self, answer: Answer) -> None:
        """The destination's agent answered a grant."""
        self.world.tell(f"b: answers {answer}")
        if answer is Answer.OWNED:
            self.owned_was_answered = True
            if not any(c.alive for c in self.world.destination_copies()):
                self._broken("lost", "SEEN-ALIVE: OWNED is answered of a copy that is dead")
            said = self.world.nodes["b"].recorded.get("destination")
            if self.world.holds and said != DestinationState.CONFIRMED:
                self._broken("lost", f"CONFIRMED-STAYS: OWNED is answered, {said} is journaled")
            if self.revoked_was_answered:
                self._broken("lost", "CONFIRMED-STAYS: OWNED is answered after REVOKED")
        if answer is Answer.REFUSED:
            self.refused_was_answered = True
        if answer is Answer.REVOKED:
            self.revoked_was_answered = True
            if any(c.alive for c in self.world.destination_copies()):
                self._broken("double", "REVOKED-DEAD: REVOKED is answered of a copy that lives")

    def recorded(self, kind: str, state: str) -> None:
        """A record is durable."""
        if kind == "source" and state == SourceState.GRANTED:
            self.granted = True

    # ------------------------------------------------------------ at every change

    def saw(self, copy: Copy, what: str) -> None:
        """Something of a copy changed."""
        world = self.world
        world.tell(f"{copy.node.name}: {copy.role}'s copy: {what}")
        source, others = world.source, world.destination_copies()
        active = source.alive and (source.tasks_run or source.queues_run)
        if active and any(c.may_run for c in others):
            self._broken("double", "ONE-RUNS: both copies may run")
        if world.resolved:
            return
        again = copy is source and what == "let run"
        if again and any(c.ran for c in others) and not self.revoked_was_answered:
            self._broken("double", "NO-REPLAY: the source runs again though the copy ran")
        if copy is not source and what in ("let run", "RESUME"):
            if copy.image_stints != source.stints:
                self._broken("double", "NO-STALE: the copy runs though the source ran after it")
            state = copy.node.recorded.get("destination")
            if state not in MAY_HAVE_RUN:
                self._broken("double", f"REFUSED-STAYS: the copy runs, its journal says {state}")
        if again:
            state = copy.node.recorded.get("source")
            given_back = self.refused_was_answered or self.revoked_was_answered
            if self.granted and not given_back:
                self._broken("double", "NO-TIMEOUT: the source undoes and nobody said REFUSED")
            noted = bool(notes(copy.node.disk.folder))  # the watchdog's own record
            if state == SourceState.DEVICE and self._may_be_granted() and not noted:
                self._broken("double", "WRITE-FIRST: the source runs again and no record says so")
            if state in (SourceState.GRANTED, SourceState.RELEASING):
                self._broken("double", f"NO-TIMEOUT: the source runs, its journal says {state}")

    def _may_be_granted(self) -> bool:
        other = self.world.nodes["b"].recorded.get("destination")
        return other in (DestinationState.RESTORING, DestinationState.PREPARED)

    def gone(self, copy: Copy) -> None:
        """A copy ended; ``death`` says by whom."""
        world = self.world
        world.tell(f"{copy.node.name}: {copy.role}'s copy is gone ({copy.death})")
        if copy.death != "driver" or world.resolved:
            return
        if copy is world.source:
            if not self.owned_was_answered:
                self._broken("lost", "NEVER-NONE: the source ended its copy without an OWNED")
        elif copy.ran:
            self._ended_what_ran(copy)

    def _ended_what_ran(self, copy: Copy) -> None:
        """Only a suspect copy is ended, for a source that kept its own, and on record."""
        world = self.world
        if not world.holds or copy.node.recorded.get("destination") not in TAKEN_BACK:
            self._broken("lost", "OWNED-STAYS: the destination ended a copy that ran")
        elif self.owned_was_answered:
            self._broken("lost", "CONFIRMED-STAYS: a copy was ended after OWNED was answered")
        elif not copy.looked_suspect:
            self._broken("lost", "REVOKED-DEAD: a copy was ended that was not suspect")

    # ------------------------------------------------------------ at the end

    def verdict(self) -> str:
        """ended, operator, or what is still missing."""
        world = self.world
        source, others = world.source, world.destination_copies()
        here, there = world.nodes["a"], world.nodes["b"]
        said = here.recorded.get("source")
        if any(n.agent is None and not n.off_for_good for n in world.nodes.values()):
            return "an agent is not up"
        if here.agent is not None and here.agent.sources._running():
            asks = said == SourceState.DEVICE and not source.alive and there.off_for_good
            if (said == SourceState.GRANTED or asks) and self._excused():
                return "operator"
            return f"the source is not done: {said}"
        running = [c for c in (source, *others) if c.alive and c.tasks_run]
        held = [c for c in (source, *others) if c.alive and not (c.tasks_run and c.queues_run)]
        if held:
            if self._excused():
                return "operator"
            return f"{held[0].role}'s copy stands still ({said}, {there.recorded})"
        if len(running) == 1:
            return self._agreed(running[0], said)
        if not running and not self._a_copy_died():
            return "no copy is left"
        return "ended"

    def _agreed(self, copy: Copy, said: str | None) -> str:
        """The journals must say what runs."""
        if self.world.resolved or self._excused() or self.world.nodes["a"].off_for_good:
            return "ended"
        agent = self.world.nodes["a"].agent
        for live in agent.sources._live.values() if agent is not None else ():
            said = live.side.machine.state  # an end may go unrecorded while a disk is full
        mine = copy is self.world.source
        undone = said in (None, SourceState.ROLLED_BACK, SourceState.UNDOING)
        given = said in (SourceState.DONE, SourceState.RELEASING)
        return "ended" if (undone if mine else given) else f"{copy.role} runs, {said} is journaled"

    def _excused(self) -> bool:
        """A host, a journal or a copy was really lost: an operator may be needed."""
        world = self.world
        lost = ("journal lost", "host off for good", "host fenced and resolved")
        return (
            any(world.faults.happened[kind] for kind in lost)
            or any(c.death in ("host", "itself") for c in world.destination_copies())
            or world.source.death in ("host", "itself")
        )

    def _a_copy_died(self) -> bool:
        world = self.world
        return any(
            c.death in ("host", "itself") for c in (world.source, *world.destination_copies())
        )
