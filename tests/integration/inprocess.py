"""Both halves of a migration in this process, real but for what a test breaks.

Real engines, nodes, journals, TCP streams and handover; only gRPC is left out: the source
calls its destination through ``Direct``, which a test may subclass to tamper.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from agents.destination import Destinations
from agents.source import RequestRecord
from migrate.dataplane.channel import Channel, TcpListener, connect_tcp
from migrate.dataplane.receiver import Receiver
from migrate.dataplane.sender import Sender
from migrate.errors import PeerLost
from migrate.journal import Journal
from migrate.model import ProcessRef
from migrate.orchestrator.destination import DestinationMigration, SourceRecord
from migrate.orchestrator.handover import Answer, SourceHandover
from migrate.orchestrator.host import Host
from migrate.orchestrator.peer import (
    Examined,
    GrantReply,
    Peer,
    PeerState,
    PreparedReply,
    Reservation,
)
from migrate.orchestrator.plan import Move, Options, RestoreOrder
from migrate.orchestrator.source import SourceMigration
from migrate.preflight.facts import Facts
from migrate.report import DestinationFigures, PeakMemory, Report
from tests.integration import engine_rig


class Destination:
    """Host b's half of an agent."""

    def __init__(self, host: Host) -> None:
        self.host = host
        listener = TcpListener("127.0.0.1", 0)
        self.port = listener.port  # where its streams arrive
        self.dialled = listener.port  # where sources are told to send them
        self.receiver = Receiver(listener)
        self.receiver.start()
        self.all = Destinations(host, self.receiver, ("127.0.0.1", listener.port), no_way_back)

    def close(self) -> None:
        self.receiver.close()
        self.host.journal.close()


def no_way_back(name: str, _address: str) -> Peer:
    raise PeerLost(f"{name} is not dialled in this test")


class Direct:
    """The ``Peer`` seam without a wire."""

    def __init__(self, destination: Destination, source: Host) -> None:
        self.name = destination.host.name
        self.there = destination
        self._source = source

    def copy(self, migration: str) -> DestinationMigration:
        return self.there.all.get(migration)

    def examine(self, move: Move, facts: Facts, sample: int) -> Examined:
        del sample  # its streams are the test's
        return self.there.all.examine(self._source.name, move, facts, 0)

    def reserve(self, migration: str, move: Move, ahead: bytes = b"") -> Reservation:
        store = self._source.journal.store_id
        source = SourceRecord(name=self._source.name, address="", store_id=store)
        gpu_map, (host, _), session, secret = self.there.all.reserve(migration, source, move, ahead)
        return Reservation(
            store_id=self.there.host.journal.store_id,
            gpu_map=gpu_map,
            data_address=host,
            data_port=self.there.dialled,
            session_id=session,
            session_secret=secret,
        )

    def restore(
        self, migration: str, order: RestoreOrder, manifest: Mapping[int, bytes]
    ) -> PreparedReply:
        return self.copy(migration).restore(order, manifest)

    def grant(self, migration: str, token: bytes) -> GrantReply:
        found = self.there.all.find(migration)
        return found.grant(token) if found is not None else self._no_record()

    def revoke(self, migration: str, token: bytes) -> GrantReply:
        found = self.there.all.find(migration)
        return found.revoke(token) if found is not None else self._no_record()

    def _no_record(self) -> GrantReply:
        return GrantReply(
            answer=Answer.NO_RECORD,
            store_id=self.there.host.journal.store_id,
            message="",
            figures=DestinationFigures(),
        )

    def cancel(self, migration: str, reason: str) -> bool:
        del reason
        found = self.there.all.find(migration)
        return found is None or found.cancel()

    def query(self, migration: str) -> PeerState:
        machine = self.copy(migration).machine
        store = self.there.host.journal.store_id
        return PeerState(state=machine.state or "", store_id=store, token=machine.token)


class Source:
    """Host a's half of an agent; ``sender`` and ``machine`` are what a test may replace."""

    sender: type[Sender] = Sender
    machine: type[SourceHandover] = SourceHandover

    def __init__(self, host: Host) -> None:
        self.host = host
        self.started: list[SourceMigration] = []

    def prepare(self, name: str, process: ProcessRef, peer: Peer, options: Options) -> str:
        """Make a migration, as ``Sources.start`` does; ``run`` runs it."""
        survey = self.host.engine.survey(process.pid)
        request = RequestRecord(
            survey=survey, destination=peer.name, destination_address="", options=options
        )
        self.host.journal.append(name, "request", request)
        self.started.append(
            SourceMigration(name, survey, self.host, peer, options, self._sender, self.machine())
        )
        return name

    def run(self) -> Report:
        """Run what was prepared last."""
        return self.started[-1].run()

    def _sender(self, migration: str, reservation: Reservation, options: Options) -> Sender:
        def connect(_stream: int) -> Channel:
            return connect_tcp(reservation.data_address, reservation.data_port)

        return self.sender(
            connect,
            reservation.session_secret,
            reservation.session_id,
            lambda: self.host.journal.next_number(migration, "epoch"),
            streams=options.streams,
            reconnect_timeout=options.patience,
        )


def host(name: str, simulated: engine_rig.Host) -> Host:
    return Host(
        name=name,
        paths=simulated.paths,
        journal=Journal(Path(simulated.paths.run) / "journal.db"),
        engine=simulated.engine,
        peak_memory=PeakMemory,
    )


@contextlib.contextmanager
def both(pair: list[engine_rig.Host]) -> Iterator[tuple[Host, Destination]]:
    """The source's host, and the destination."""
    source, destination = host("a", pair[0]), Destination(host("b", pair[1]))
    try:
        yield source, destination
    finally:
        destination.close()
        source.journal.close()
