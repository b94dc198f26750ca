"""What must hold in every state, and which states are ends."""

from __future__ import annotations

from collections.abc import Iterator

from migrate.orchestrator.handover import Answer
from migrate.status import DestinationState, SourceState
from scenarios.simulate.model.world import ENDS_COPY, TOKEN, Step, World, store_of

NEVER_RUNS = frozenset(
    {DestinationState.RESERVED, DestinationState.RESTORING, DestinationState.PREPARED}
    | {DestinationState.REFUSED, DestinationState.ABORTED}
    | {DestinationState.REVOKING, DestinationState.REVOKED}
)
STANDS_STILL = frozenset({SourceState.GRANTED, SourceState.RELEASING})


def violations(before: World, step: Step) -> list[str]:
    """The invariants that a step from *before* breaks, by name."""
    after = step.world
    found = [*_of_source(before, after), *_of_destination(before, step)]
    if after.source.copy == "runs" and after.destination.copy == "runs":
        found.append("ONE-RUNS: both copies may run")
    if _gone(after) and not _gone(before) and not after.broken:
        found.append("NEVER-NONE: no copy is left and nothing broke")
    if _told(after, Answer.REVOKED):
        if after.destination.copy == "runs":
            found.append("REVOKED-DEAD: REVOKED is said of a copy that runs")
        if _told(after, Answer.OWNED):
            found.append("CONFIRMED-STAYS: both OWNED and REVOKED are said of a copy")
    return found


def _of_source(before: World, after: World) -> Iterator[str]:
    source, destination = after.source, after.destination
    if source.copy == "runs" and before.source.copy != "runs":
        if destination.ran and not after.resolved and not _told(after, Answer.REVOKED):
            yield "NO-REPLAY: the source runs again though the copy ran"
        unsure = destination.disk.state in (DestinationState.RESTORING, DestinationState.PREPARED)
        if source.disk.state is SourceState.DEVICE and unsure:
            yield "WRITE-FIRST: the source runs again and no record says so"
        if source.up and source.memory.state in STANDS_STILL:
            yield "NO-TIMEOUT: the source runs though it is granted"
    moved = source.disk.state is not before.source.disk.state and not after.resolved
    if moved and before.source.disk.state is SourceState.GRANTED:
        if source.disk.state is SourceState.RELEASING and not _told(after, Answer.OWNED):
            yield "SEEN-ALIVE: the source ends its copy and nobody said OWNED"
        if source.disk.state is SourceState.RECLAIMED and not _told(after, Answer.REVOKED):
            yield "REVOKED-DEAD: the source reclaims and nobody said REVOKED"
        if source.disk.state is SourceState.UNDOING and not _told(after, Answer.REFUSED):
            yield "NO-TIMEOUT: the source undoes and nobody said REFUSED"


def _of_destination(before: World, step: Step) -> Iterator[str]:
    source, destination = step.world.source, step.world.destination
    if destination.copy == "runs" and before.destination.copy != "runs":
        if source.ran and not step.world.resolved:
            yield "NO-STALE: the copy runs though the source ran after its image"
        if destination.disk.state in NEVER_RUNS:
            yield f"REFUSED-STAYS: the copy runs and its journal says {destination.disk.state}"
    taken_back = destination.disk.hold and destination.disk.state is DestinationState.REVOKING
    if before.destination.copy == "runs" and step.name == ENDS_COPY and not taken_back:
        yield "OWNED-STAYS: the destination ends a copy that ran"


def _told(world: World, answer: Answer) -> bool:
    return ("answer", answer, TOKEN, store_of(0)) in world.network


def _gone(world: World) -> bool:
    return world.source.copy == "gone" and world.destination.copy in ("none", "gone")


def is_end(world: World) -> bool:
    """Both agents are up, have nothing to do, and agree on the owner."""
    source, destination = world.source, world.destination
    if not (source.up and destination.up) or source.queue or destination.queue:
        return False
    if source.waits or destination.building:
        return False
    if source.disk.state is SourceState.DONE:
        ran = destination.copy == "runs" or bool(world.broken)
        return source.copy == "gone" and ran and destination.copy != "held"
    if source.disk.state is SourceState.ROLLED_BACK:
        if world.resolved == "destination" and destination.copy == "runs":
            # A fenced source that had undone comes back: it says so, and that nothing runs there.
            return source.copy == "gone"
        runs = source.copy == "runs" or bool(world.broken)
        return runs and source.copy != "frozen" and destination.copy in ("none", "gone")
    return False


def needs_operator(world: World) -> bool:
    """A host, a journal or a copy was lost, and what is known can't decide: all stand still."""
    source, destination = world.source, world.destination
    if not world.broken or not (source.up and destination.up):
        return False
    if "source-journal" in world.broken:
        return source.disk.state is None
    if "destination-journal" in world.broken and destination.disk.state is None:
        # A copy that no record tells of is left where it is, held or running.
        return source.disk.state in (SourceState.ROLLED_BACK, SourceState.DONE) or (
            source.disk.state is SourceState.GRANTED and source.waits == "grant"
        )
    waits = source.disk.state is SourceState.GRANTED and source.waits == "grant"
    # The destination's suspect copy may be the only one: nothing is asked back.
    alone = destination.memory.suspect and source.copy == "gone"
    return waits and (destination.disk.state is DestinationState.OWNED_DEAD or alone)
