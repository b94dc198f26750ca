"""The world of the exhaustive check: one immutable, hashable value a state.

The network is the set of all messages that were ever sent: each may be delivered at any
time, in any order, any number of times or never. So loss, duplication, reordering and
delay are unbounded, and the set is finite because no message carries a counter.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

from migrate.orchestrator.handover import (
    DestinationEffect,
    DestinationEvent,
    SourceEffect,
    SourceEvent,
)
from migrate.status import DestinationState, SourceState

ENDS_COPY = "the destination ends its copy"  # the name of a step that a rule looks for
TOKEN, STALE = b"token", b"stale"

Message: TypeAlias = tuple[object, ...]
# What an agent still has to see to; a string is a reply of a call other than Grant.
Item: TypeAlias = SourceEvent | SourceEffect | DestinationEvent | DestinationEffect | str


class SourceDisk(NamedTuple):
    """What the source's journal says; also what its machine has in memory."""

    state: SourceState | None
    token: bytes = b""
    store: str = ""


class DestinationDisk(NamedTuple):
    """What the destination's journal says; also what its machine has in memory.

    ``hold``: the source keeps its copy until ours was seen alive. ``suspect``: in memory only.
    """

    state: DestinationState | None
    token: bytes = b""
    hold: bool = False
    suspect: bool = False


class SourceHost(NamedTuple):
    """The source: agent, journal and copy.

    ``queue``: events and effects that the agent still has to see to. ``waits``: the call
    that it waits for. ``cancelled``: the destination acknowledged a cancel to this run of
    the agent. ``ran``: the copy ran since its image was taken. ``epoch``: journals lost.
    """

    up: bool = True
    disk: SourceDisk = SourceDisk(SourceState.DEVICE)
    memory: SourceDisk = SourceDisk(SourceState.DEVICE)
    queue: tuple[Item, ...] = ()
    waits: str = "freeze"
    cancelled: bool = False
    copy: str = "runs"  # runs, frozen, gone
    ran: bool = False
    epoch: int = 0


class DestinationHost(NamedTuple):
    """The destination. ``ran``: the copy ran. ``building``: RESTORE is under way."""

    up: bool = True
    disk: DestinationDisk = DestinationDisk(DestinationState.RESERVED)
    memory: DestinationDisk = DestinationDisk(DestinationState.RESERVED)
    queue: tuple[Item, ...] = ()
    building: bool = False
    copy: str = "none"  # none, held, runs, gone
    ran: bool = False
    epoch: int = 0


class World(NamedTuple):
    """One state of everything.

    ``broken``: what was really broken so far, of: source-host, destination-host,
    source-journal, destination-journal, copy. It excuses ends that need an operator.
    ``resolved``: an operator decided.
    """

    source: SourceHost = SourceHost()
    destination: DestinationHost = DestinationHost()
    network: frozenset[Message] = frozenset()
    broken: frozenset[str] = frozenset()
    resolved: str = ""


class Step(NamedTuple):
    """One transition. ``healthy``: it also happens when nothing goes wrong any more."""

    name: str
    world: World
    healthy: bool = True


def store_of(epoch: int) -> str:
    """The store id of a host's journal after it was lost *epoch* times."""
    return f"store-{epoch}"
