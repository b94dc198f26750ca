"""What can happen next at the source."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

from migrate.orchestrator.handover import (
    Answered,
    AskPrepared,
    Done,
    Failed,
    Held,
    Hold,
    Kill,
    Prepared,
    Resolved,
    Restarted,
    SendCancel,
    SendGrant,
    SendRevoke,
    SourceEvent,
    SourceHandover,
    Undo,
    Write,
)
from migrate.status import DestinationState, SourceState
from scenarios.simulate.model.policy import POLICY
from scenarios.simulate.model.world import Item, SourceDisk, SourceHost, Step, World, store_of

BEFORE_GRANT = frozenset({SourceState.SETUP, SourceState.ACTIVE, SourceState.DEVICE})
# A destination that says one of these holds, or held, the copy: it may be the only one.
HAS_COPY = frozenset(
    {DestinationState.PREPARED, DestinationState.OWNED, DestinationState.OWNED_DEAD}
)


@cache
def tell(memory: SourceDisk, event: SourceEvent) -> tuple[tuple[Item, ...], SourceDisk]:
    """The machine's answer to an event, and its memory afterwards."""
    machine = SourceHandover(*memory)
    effects = machine.on(event)
    assert machine.state == memory.state, "on() must not move the state"
    return effects, SourceDisk(machine.state, machine.token, machine.peer_store)


@cache
def wrote(memory: SourceDisk, record: Write) -> SourceDisk:
    """The machine's memory after a record is durable."""
    machine = SourceHandover(*memory)
    machine.wrote(record)
    return SourceDisk(machine.state, machine.token, machine.peer_store)


def steps(world: World) -> Iterator[Step]:
    """Every transition of the source's agent, copy and journal."""
    source = world.source
    if source.up:
        if source.waits:
            yield from _waiting(world)
        elif source.queue:
            yield from _perform(world)
        yield Step("the source's agent is killed", _put(world, _crashed(source)), False)
    else:
        yield from _down(world)
    if source.copy != "gone":
        dead = source._replace(copy="gone")
        yield Step(
            "the source's host crashes and loses its copy",
            _put(world, _crashed(dead), broken="source-host"),
            False,
        )
        yield Step("the source's copy dies", _put(world, dead, broken="copy"), False)


def _put(world: World, source: SourceHost, *send: tuple[object, ...], broken: str = "") -> World:
    network = world.network.union(send) if send else world.network
    marks = world.broken | {broken} if broken else world.broken
    return world._replace(source=source, network=network, broken=marks)


def _crashed(source: SourceHost) -> SourceHost:
    return source._replace(up=False, memory=source.disk, queue=(), waits="", cancelled=False)


def _down(world: World) -> Iterator[Step]:
    source = world.source
    state = source.disk.state
    event = Restarted(copy_present=source.copy != "gone")
    back = source._replace(up=True, memory=source.disk, queue=(event,) if state else ())
    yield Step("the source's agent restarts and reads its journal", _put(world, back))
    watched = state in BEFORE_GRANT or (
        not POLICY.watchdog_spares_granted and state is SourceState.GRANTED
    )
    if watched and POLICY.watchdog_records_first:
        undoing = source.disk._replace(state=SourceState.UNDOING)
        after = source._replace(disk=undoing, memory=undoing)
        yield Step("the source's watchdog journals UNDOING", _put(world, after))
    elif watched and source.copy == "frozen":
        after = source._replace(copy="runs", ran=True)
        yield Step("the source's watchdog thaws the copy", _put(world, after))
    if state in (SourceState.UNDOING, SourceState.RECLAIMED) and source.copy == "frozen":
        after = source._replace(copy="runs", ran=True)
        yield Step("the source's watchdog thaws the copy", _put(world, after))
    if source.epoch == 0:
        empty = SourceDisk(None)
        lost = source._replace(disk=empty, memory=empty, epoch=1)
        yield Step(
            "the source's journal is lost", _put(world, lost, broken="source-journal"), False
        )


# ------------------------------------------------------------ calls and their answers


def _waiting(world: World) -> Iterator[Step]:
    source = world.source
    go = source._replace(waits="")
    match source.waits:
        case "freeze":
            if source.copy == "runs":
                frozen = source._replace(copy="frozen", ran=False, waits="restore")
                yield Step(
                    "the source freezes and orders the copy", _put(world, frozen, ("restore",))
                )
            yield _fails(world, go)
        case "restore":
            yield _fails(world, go)
            for message in world.network:
                if message[0] == "prepared":
                    event = Prepared(token=message[1], store_id=message[2])  # type: ignore[arg-type]
                    yield Step(
                        "PREPARED reaches the source", _put(world, go._replace(queue=(event,)))
                    )
        case "cancel":
            yield Step("the source's cancel is not answered", _put(world, go))
            for message in world.network:
                if message[0] == "cancelled":
                    told = go._replace(cancelled=source.cancelled or bool(message[1]))
                    yield Step(f"the cancel is answered: {message[1]}", _put(world, told))
        case "grant":
            yield from _answers(world, go)
        case "query":
            yield from _told(world, go)


def _fails(world: World, go: SourceHost) -> Step:
    return Step(
        "the source fails, is aborted or waited long enough",
        _put(world, go._replace(queue=(Failed(why="x"),))),
    )


def _answers(world: World, go: SourceHost) -> Iterator[Step]:
    for message in world.network:
        if message[0] == "answer":
            event = Answered(answer=message[1], token=message[2], store_id=message[3])  # type: ignore[arg-type]
            effects = tell(go.memory, event)[0]
            asks_back = any(isinstance(effect, SendRevoke) for effect in effects)
            if effects and not (asks_back and go.copy != "frozen"):
                yield Step(
                    f"the answer {message[1]} reaches the source",
                    _put(world, go._replace(queue=(event,))),
                )
    late = Failed(why="it takes too long, or an operator aborts")
    if tell(go.memory, late)[0]:
        yield Step("the source loses its patience", _put(world, go._replace(queue=(late,))))
    yield from _operator(world, go)


def _operator(world: World, go: SourceHost) -> Iterator[Step]:
    """The operator decides after making sure: by fencing, or by seeing the copy run."""
    if go.memory.state is not SourceState.GRANTED or world.resolved:
        return
    other = world.destination
    fenced = not other.up and other.copy in ("none", "gone") and "destination-host" in world.broken
    dead = other.copy in ("none", "gone") and world.broken
    if (fenced or dead) and go.copy == "frozen":
        told = go._replace(queue=(Resolved(source_owns=True, fenced="destination"),))
        yield Step(
            "the operator fenced the destination and gives the process to the source",
            _put(world, told)._replace(resolved="source"),
            False,
        )
    # One that keeps its copy is told by the destination, which confirms first: see resolving.py.
    if other.copy == "runs" and (not other.disk.hold or other.disk.state is None):
        told = go._replace(queue=(Resolved(source_owns=False, fenced="source"),))
        yield Step(
            "the operator saw it run and gives the process to the destination",
            _put(world, told)._replace(resolved="destination"),
            False,
        )


def _told(world: World, go: SourceHost) -> Iterator[Step]:
    given_up = _put(world, go._replace(queue=(Failed(why="aborted"),)))
    yield Step("the operator gives up what the destination may hold", given_up, False)
    for message in world.network:
        if message[0] != "state":
            continue
        _, state, token, store = message
        event: SourceEvent = Failed(why="the destination holds no copy")
        if state in HAS_COPY:
            event = Prepared(token=token, store_id=store)  # type: ignore[arg-type]
        yield Step(f"the source learns of {state}", _put(world, go._replace(queue=(event,))))


# ------------------------------------------------------------ effects


def _perform(world: World) -> Iterator[Step]:
    source = world.source
    item, rest = source.queue[0], source.queue[1:]
    go = source._replace(queue=rest)
    match item:
        case Write():
            yield from _write(world, item, go)
        case Hold():
            yield _hold(world, go)
        case SendGrant(token=token):
            sent = go._replace(waits="grant")
            yield Step("the source sends the grant", _put(world, sent, ("grant", token)))
        case SendRevoke(token=token):
            sent = go._replace(waits="grant")
            yield Step("the source asks its copy back", _put(world, sent, ("revoke", token)))
        case AskPrepared():
            yield Step("the source asks", _put(world, go._replace(waits="query"), ("query",)))
        case SendCancel():
            sent = go._replace(waits="cancel")
            yield Step("the source sends the cancel", _put(world, sent, ("cancel",)))
        case Undo():
            copy = "runs" if go.copy == "frozen" else go.copy
            undone = go._replace(copy=copy, ran=True, queue=(*rest, Done()))
            yield Step("the source unpauses and thaws", _put(world, undone))
        case Kill():
            ended = go._replace(copy="gone", queue=(*rest, Done()))
            yield Step("the source ends its copy", _put(world, ended))
        case _:
            effects, memory = tell(source.memory, item)
            after = go._replace(memory=memory, queue=(*effects, *rest))
            yield Step(f"the source sees {type(item).__name__}", _put(world, after))


def _hold(world: World, go: SourceHost) -> Step:
    if go.copy == "runs" and go.memory.state is not SourceState.GRANTED:
        event: SourceEvent = Failed(why="not frozen")
        return Step("the source finds its copy running", _put(world, go._replace(queue=(event,))))
    copy = "frozen" if go.copy == "runs" else go.copy
    held = go._replace(copy=copy, queue=(*go.queue, Held()))
    return Step("the source holds its copy", _put(world, held))


def _write(world: World, record: Write, go: SourceHost) -> Iterator[Step]:
    memory = wrote(go.memory, record)
    disk = SourceDisk(record.state, record.token, record.store_id)  # type: ignore[arg-type]
    if not POLICY.writes_are_durable:
        yield Step(
            f"the source believes {record.state} written", _put(world, go._replace(memory=memory))
        )
    yield Step(
        f"the source journals {record.state}", _put(world, go._replace(memory=memory, disk=disk))
    )
    # The disk is full. (After a failed fsync nobody knows, so the agent ends: see Journal.)
    failed = _unwritten(record, memory, go)
    yield Step(f"the source can't journal {record.state}", _put(world, failed), False)


def _unwritten(record: Write, memory: SourceDisk, go: SourceHost) -> SourceHost:
    """What the driver does when a record could not be made durable."""
    if go.memory.state in BEFORE_GRANT:
        if record.state is SourceState.UNDOING and (
            go.cancelled or not POLICY.records_undo_before_thaw
        ):
            return go._replace(memory=memory)
        return go._replace(queue=(Failed(why="journal"),))
    again = Restarted(copy_present=go.copy != "gone")
    return go._replace(queue=(again,) if POLICY.retries else ())


def said(world: World) -> tuple[object, ...]:
    """What the source answers to a destination's question."""
    return ("said", world.source.disk.state, store_of(world.source.epoch))
