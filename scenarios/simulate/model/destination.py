"""What can happen next at the destination."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

from migrate.orchestrator.handover import (
    Built,
    CancelCame,
    CopyDied,
    DestinationEvent,
    DestinationHandover,
    Done,
    Failed,
    FirstResumeFailed,
    GrantCame,
    Kill,
    Reply,
    Resolved,
    Restarted,
    RevokeCame,
    SeenAlive,
    SeenSuspect,
    Start,
    Write,
)
from migrate.status import DestinationState, SourceState
from scenarios.simulate.model.policy import POLICY
from scenarios.simulate.model.source import said
from scenarios.simulate.model.world import (
    ENDS_COPY,
    TOKEN,
    DestinationDisk,
    DestinationHost,
    Item,
    Step,
    World,
    store_of,
)

UNGRANTED = frozenset(
    {DestinationState.RESERVED, DestinationState.RESTORING, DestinationState.PREPARED}
)
NEVER_RAN = frozenset({DestinationState.REFUSED, DestinationState.ABORTED})
OWNS = frozenset(
    {
        DestinationState.OWNED,
        DestinationState.CONFIRMED,
        DestinationState.REVOKING,
        DestinationState.OWNED_DEAD,
    }
)
NOT_GRANTED = frozenset({SourceState.UNDOING, SourceState.ROLLED_BACK})


@cache
def tell(
    memory: DestinationDisk, event: DestinationEvent
) -> tuple[tuple[Item, ...], DestinationDisk]:
    """The machine's answer to an event, and its memory afterwards."""
    machine = DestinationHandover(*memory)
    effects = machine.on(event)
    assert machine.state == memory.state, "on() must not move the state"
    after = DestinationDisk(machine.state, machine.token, machine.hold, machine.suspect)
    return effects, after


@cache
def wrote(memory: DestinationDisk, record: Write) -> DestinationDisk:
    """The machine's memory after a record is durable."""
    machine = DestinationHandover(*memory)
    machine.wrote(record)
    return DestinationDisk(machine.state, machine.token, machine.hold, machine.suspect)


def steps(world: World) -> Iterator[Step]:
    """Every transition of the destination's agent, copy and journal."""
    here = world.destination
    if here.up:
        if here.queue:
            yield from _perform(world)
        elif here.building:
            yield from _build(world)
        else:
            yield from _deliver(world)
            yield from _upkeep(world)
        yield Step("the destination's agent is killed", _put(world, _crashed(here)), False)
    else:
        yield from _down(world)
    if here.copy in ("held", "runs"):
        dead = here._replace(copy="gone")
        yield Step(
            "the destination's host crashes and loses its copy",
            _put(world, _crashed(dead), broken="destination-host"),
            False,
        )
        yield Step("the destination's copy dies", _put(world, dead, broken="copy"), False)


def _put(
    world: World, destination: DestinationHost, *send: tuple[object, ...], broken: str = ""
) -> World:
    network = world.network.union(send) if send else world.network
    marks = world.broken | {broken} if broken else world.broken
    return world._replace(destination=destination, network=network, broken=marks)


def _crashed(here: DestinationHost) -> DestinationHost:
    # A copy under construction ends with the agent that builds it.
    return here._replace(up=False, memory=here.disk, queue=(), building=False)


def _present(here: DestinationHost) -> bool:
    return here.copy in ("held", "runs")


def _down(world: World) -> Iterator[Step]:
    here = world.destination
    event = Restarted(copy_present=_present(here))
    back = here._replace(up=True, memory=here.disk, queue=(event,) if here.disk.state else ())
    if not POLICY.remembers_refused and here.disk.state in NEVER_RAN:
        back = back._replace(memory=DestinationDisk(None), queue=())
    yield Step("the destination's agent restarts and reads its journal", _put(world, back))
    if "destination-host" not in world.broken:
        off = here._replace(copy="gone" if _present(here) else here.copy)
        yield Step(
            "the destination's host goes off", _put(world, off, broken="destination-host"), False
        )
    if here.epoch == 0:
        empty = DestinationDisk(None)
        lost = here._replace(disk=empty, memory=empty, epoch=1)
        yield Step(
            "the destination's journal is lost",
            _put(world, lost, broken="destination-journal"),
            False,
        )


# ------------------------------------------------------------ what comes in


def _deliver(world: World) -> Iterator[Step]:
    for message in world.network:
        step = _delivered(world, message)
        if step is not None:
            yield step
    other = world.source
    fenced = not other.up and other.copy == "gone" and "source-host" in world.broken
    if fenced and world.destination.copy == "held" and not world.resolved:
        told = (Resolved(source_owns=False, fenced="source"),)
        if tell(world.destination.memory, told[0])[0]:
            yield Step(
                "the operator fenced the source and gives the process to the destination",
                _queue(world, *told)._replace(resolved="destination"),
                False,
            )


def _queue(world: World, *items: object) -> World:
    return _put(world, world.destination._replace(queue=items))  # type: ignore[arg-type]


def _delivered(world: World, message: tuple[object, ...]) -> Step | None:
    here = world.destination
    state = here.memory.state
    match message[0]:
        case "restore" if state is DestinationState.RESERVED:
            record = Write(state=DestinationState.RESTORING)
            queued = here._replace(queue=(record,), building=True)
            return Step("the order to restore reaches the destination", _put(world, queued))
        case "grant":
            return Step("a grant reaches the destination", _grant(world, message[1]))
        case "revoke":
            event = RevokeCame(token=message[1])  # type: ignore[arg-type]
            return Step("a revoke reaches the destination", _queue(world, event))
        case "cancel":
            return Step("a cancel reaches the destination", _queue(world, CancelCame(), "ack"))
        case "query":
            told = ("state", state or "", here.memory.token, store_of(here.epoch))
            return Step("the destination is asked", _put(world, here, told))
        case "said" if state in UNGRANTED:
            if message[1] in NOT_GRANTED and message[2] == store_of(0):
                return Step("the destination learns of no grant", _queue(world, CancelCame()))
    return None


def _grant(world: World, token: object) -> World:
    here = world.destination
    event = GrantCame(token=token)  # type: ignore[arg-type]
    dead = here.memory.state is DestinationState.PREPARED and not _present(here)
    if dead and POLICY.reports_a_dead_prepared_copy:
        return _queue(world, Failed(why="the copy died"), event)
    return _queue(world, event)


def _upkeep(world: World) -> Iterator[Step]:
    here = world.destination
    if here.memory.state in UNGRANTED and world.source.up:
        yield Step("the destination asks the source", _put(world, here, said(world)))
    unfinished = here.memory.state is DestinationState.OWNED and here.copy != "runs"
    ending = (DestinationState.REFUSING, DestinationState.REVOKING)
    if unfinished or here.memory.state in ending:
        event = Restarted(copy_present=_present(here))
        yield Step("the destination goes on", _queue(world, event))
    yield from _life(world)


def _life(world: World) -> Iterator[Step]:
    """What is seen of a released copy, once in a run of the agent."""
    here = world.destination
    memory = here.memory
    undecided = memory.state is DestinationState.OWNED and memory.hold and here.copy == "runs"
    if undecided and not memory.suspect:
        yield Step("the copy is seen alive", _queue(world, SeenAlive()))
        yield Step("the copy looks suspect", _queue(world, SeenSuspect()), False)
    if undecided and memory.suspect and world.source.copy == "gone" and not world.resolved:
        told = _queue(world, Resolved(source_owns=False, fenced="source"))
        text = "the operator saw the suspect copy, and that there is no other"
        yield Step(text, told._replace(resolved="destination"), False)


def _build(world: World) -> Iterator[Step]:
    here = world.destination._replace(building=False)
    built = here._replace(copy="held", queue=(Built(token=TOKEN), "prepared"))
    yield Step("the destination builds the copy", _put(world, built))
    failed = here._replace(queue=(Failed(why="build"),))
    yield Step("the destination can't build the copy", _put(world, failed), False)


# ------------------------------------------------------------ effects


def _perform(world: World) -> Iterator[Step]:
    here = world.destination
    item, rest = here.queue[0], here.queue[1:]
    go = here._replace(queue=rest)
    match item:
        case "prepared":
            yield Step("the destination says PREPARED", _put(world, go, _prepared(here)))
        case "ack":
            reply = ("cancelled", here.memory.state not in OWNS)
            yield Step("the destination acknowledges the cancel", _put(world, go, reply))
        case Write():
            yield from _write(world, item, go)
        case Kill():
            copy = "gone" if _present(here) else here.copy
            ended = go._replace(copy=copy, queue=(*rest, Done()))
            yield Step(ENDS_COPY, _put(world, ended))
        case Start():
            yield from _start(world, go)
        case Reply(answer=answer):
            told = ("answer", answer, here.memory.token, store_of(here.epoch))
            yield Step(f"the destination answers {answer}", _put(world, go, told))
        case _:
            effects, memory = tell(here.memory, item)
            after = go._replace(memory=memory, queue=(*effects, *rest))
            yield Step(f"the destination sees {type(item).__name__}", _put(world, after))


def _prepared(here: DestinationHost) -> tuple[object, ...]:
    return ("prepared", here.memory.token, store_of(here.epoch))


def _start(world: World, go: DestinationHost) -> Iterator[Step]:
    refused = go._replace(queue=(FirstResumeFailed(),))
    if not _present(go):
        yield Step(
            "the destination finds its copy dead", _put(world, go._replace(queue=(CopyDied(),)))
        )
        return
    runs = go._replace(copy="runs", ran=True)
    yield Step("the destination starts its copy", _put(world, runs))
    if go.copy == "held" or not POLICY.refuses_only_what_never_ran:
        yield Step("the first RESUME fails", _put(world, refused), False)


def _write(world: World, record: Write, go: DestinationHost) -> Iterator[Step]:
    memory = wrote(go.memory, record)
    disk = DestinationDisk(record.state, record.token, memory.hold)  # type: ignore[arg-type]
    if not POLICY.writes_are_durable:
        yield Step(
            f"the destination believes {record.state} written",
            _put(world, go._replace(memory=memory)),
        )
    yield Step(
        f"the destination journals {record.state}",
        _put(world, go._replace(memory=memory, disk=disk)),
    )
    failed = go._replace(queue=(), building=False)
    yield Step(f"the destination can't journal {record.state}", _put(world, failed), False)
