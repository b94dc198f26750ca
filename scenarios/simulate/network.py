"""The ``Peer`` seam over a network that loses, doubles, delays and reorders.

A call is two messages. What runs at the other host is what its gRPC servicer does; a
caller that waited long enough gets PeerLost and does not know what happened over there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar, cast

from migrate.errors import MigrateError, PeerLost
from migrate.orchestrator.destination import SourceRecord
from migrate.orchestrator.handover import Answer
from migrate.orchestrator.peer import (
    Examined,
    GrantReply,
    PeerState,
    PreparedReply,
    Reservation,
)
from migrate.orchestrator.plan import Move, RestoreOrder
from migrate.preflight.facts import Facts
from migrate.report import DestinationFigures
from scenarios.simulate.scheduler import Task

if TYPE_CHECKING:
    from scenarios.simulate.nodes import Agent, Node
    from scenarios.simulate.world import World

T = TypeVar("T")
SHORT, LONG = 10.0, 30.0  # seconds until a call is given up


class Call:
    """One call under way."""

    def __init__(self, waiter: Task) -> None:
        self.waiter = waiter
        self.over = False
        self.result: Any = None
        self.error: MigrateError | None = None


class Network:
    """Which way is cut, and how messages travel."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.cut: dict[tuple[str, str], float] = {}  # until when

    def send(self, source: str, target: str, what: str, deliver: Callable[[], None]) -> None:
        """One message: it comes once, or twice, late, or never."""
        world = self.world
        if self.cut.get((source, target), 0.0) > world.scheduler.now:
            return
        fate = world.faults.message(source)
        if fate == "lost":
            world.tell(f"{what} is lost")
            return
        delay = world.random.uniform(0.0002, 0.02)
        if fate == "late":
            delay += world.random.uniform(0.5, 30.0)
            world.tell(f"{what} is {delay:.1f} s late")
        world.scheduler.later(delay, deliver)
        if fate == "doubled":
            world.tell(f"{what} comes twice")
            world.scheduler.later(delay + world.random.uniform(0.0, 20.0), deliver)


class SimulatedPeer:
    """``Peer``: the other agent, as *agent* reaches it."""

    def __init__(self, name: str, agent: Agent) -> None:
        self.name = name
        self.agent = agent

    # ------------------------------------------------------------ the calls

    def examine(self, move: Move, facts: Facts, sample: int) -> Examined:
        """See Peer. A simulated host takes no sample."""
        del sample
        caller = self.agent.node.name
        return self._call(
            "Examine",
            LONG,
            lambda there: there.destinations.examine(caller, move, facts, 0),
        )

    def reserve(self, migration: str, move: Move, ahead: bytes = b"") -> Reservation:
        """See Peer."""
        source = SourceRecord(
            name=self.agent.node.name, address="a:1", store_id=self.agent.journal.store_id
        )

        def handle(there: Agent) -> Reservation:
            gpu_map, (address, port), session_id, secret = there.destinations.reserve(
                migration, source, move, ahead
            )
            return Reservation(
                store_id=there.journal.store_id,
                gpu_map=gpu_map,
                data_address=address,
                data_port=port,
                session_id=session_id,
                session_secret=secret,
            )

        return self._call("Reserve", LONG, handle)

    def restore(
        self, migration: str, order: RestoreOrder, manifest: Mapping[int, bytes]
    ) -> PreparedReply:
        """See Peer."""
        return self._call(
            "Restore",
            LONG,
            lambda there: there.destinations.get(migration).restore(order, manifest),
        )

    def grant(self, migration: str, token: bytes) -> GrantReply:
        """See Peer."""

        return self._call("Grant", SHORT, lambda there: _answer(there, migration, token, "grant"))

    def revoke(self, migration: str, token: bytes) -> GrantReply:
        """See Peer."""
        return self._call("Revoke", LONG, lambda there: _answer(there, migration, token, "revoke"))

    def cancel(self, migration: str, reason: str) -> bool:
        """See Peer."""

        def handle(there: Agent) -> bool:
            found = there.destinations.find(migration)
            return found.cancel() if found is not None else True

        return self._call("Cancel", LONG, handle)

    def query(self, migration: str) -> PeerState:
        """See Peer."""
        caller = self.agent.node.name

        def handle(there: Agent) -> PeerState:
            store = there.journal.store_id
            if there.sources.destination_of(migration) == caller:
                state = there.sources.state(migration) or ""
                return PeerState(state=state, store_id=store, token=b"")
            found = there.destinations.find(migration)
            if found is None:
                return PeerState(state="", store_id=store, token=b"")
            state = found.machine.state or ""
            return PeerState(state=state, store_id=store, token=found.machine.token)

        return self._call("Query", SHORT, handle)

    # ------------------------------------------------------------ two messages

    def _call(self, name: str, timeout: float, handle: Callable[[Agent], T]) -> T:
        world, here = self.agent.node.world, self.agent.node
        there = world.nodes[self.name]
        scheduler = world.scheduler
        world.point(here, f"send: {name}")
        scheduler.check()
        call = Call(scheduler.current)
        agent = self.agent

        def refused() -> None:
            if not call.over and not agent.dead:
                call.over, call.error = True, PeerLost(f"{name}: connection refused")
                scheduler.wake(call.waiter)

        def arrive() -> None:
            if there.off_for_good:
                return
            if there.agent is None or not there.agent.serves:
                world.network.send(there.name, here.name, f"the refusal of {name}", refused)
                return
            scheduler.start(
                f"{there.name} {name}",
                there.agent,
                lambda: self._handle(there, call, name, handle),
            )

        def expire() -> None:
            if not call.over and not agent.dead:
                call.over, call.error = True, PeerLost(f"{name}: no answer in {timeout:g} s")
                scheduler.wake(call.waiter)

        world.network.send(here.name, there.name, f"{here.name}'s {name}", arrive)
        scheduler.later(timeout, expire)
        while not call.over:
            scheduler.block()
        if call.error is not None:
            raise call.error
        return cast(T, call.result)

    def _handle(
        self, there: Node, call: Call, name: str, handle: Callable[[Agent], object]
    ) -> None:
        world = there.world
        result, error = None, None
        assert there.agent is not None
        try:
            result = handle(there.agent)
        except MigrateError as raised:
            error = raised
        except (RuntimeError, AssertionError) as raised:
            world.judge.bug(f"{name} raised {type(raised).__name__}: {raised}")
            error = PeerLost(str(raised))

        def answer() -> None:
            if not call.over and not self.agent.dead:
                call.over, call.result, call.error = True, result, error
                world.scheduler.wake(call.waiter)

        world.network.send(there.name, self.agent.node.name, f"the answer to {name}", answer)


def _answer(there: Agent, migration: str, token: bytes, what: str) -> GrantReply:
    """What the servicer answers to a Grant or a Revoke."""
    found = there.destinations.find(migration)
    if found is not None:
        reply = found.grant(token) if what == "grant" else found.revoke(token)
        there.node.world.judge.answered(reply.answer)
        return reply
    return GrantReply(
        answer=Answer.NO_RECORD,
        store_id=there.journal.store_id,
        message="no record",
        figures=DestinationFigures(),
    )
