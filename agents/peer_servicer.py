"""The gRPC servicer for other agents: each may speak of its own migrations and no others.

That the caller is an agent is checked before a method is entered (``migrate.rpc.guard``), which
also makes a status of a MigrateError.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TypeVar

import grpc
import msgspec

from agents.destination import Destinations
from agents.source import Sources
from migrate.decode import from_json
from migrate.errors import (
    PermissionRefused,
    ProtocolMismatch,
    UnknownMigration,
)
from migrate.journal import Journal
from migrate.orchestrator.checks import check_names, decoded_order
from migrate.orchestrator.destination import DestinationMigration, SourceRecord
from migrate.orchestrator.handover import Answer
from migrate.orchestrator.peer import GrantReply
from migrate.orchestrator.plan import PROTOCOL, Move, Needs, Options
from migrate.preflight.facts import Facts
from migrate.report import DestinationFigures
from migrate.rpc.pb import peer_pb2, peer_pb2_grpc
from migrate.rpc.tls import peer_certificate, peer_identity
from migrate.topology.model import Topology

S = TypeVar("S", bound=msgspec.Struct)


def parsed(data: bytes, kind: type[S]) -> S:
    """A JSON document of a peer. Raises ProtocolMismatch."""
    try:
        return from_json(data, kind)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise ProtocolMismatch(f"{kind.__name__} can't be read: {error}") from error


class PeerServicer(peer_pb2_grpc.PeerServicer):
    """What a source may ask of this host, and what a destination may ask back."""

    def __init__(
        self,
        journal: Journal,
        sources: Sources,
        destinations: Destinations,
        allow_from: Collection[str],
    ) -> None:
        self._journal = journal
        self._sources = sources
        self._destinations = destinations
        self._allow_from = allow_from

    def Reserve(
        self, request: peer_pb2.ReserveRequest, context: grpc.ServicerContext
    ) -> peer_pb2.ReserveReply:
        """Make room for a process, if the caller may send one here."""
        caller = self._sender(context, request.protocol)
        if caller != request.source:
            raise PermissionRefused(f"{caller} can't speak for {request.source[:64]!r}")
        check_names(
            request.migration, request.source, request.source_address, request.source_store_id
        )
        source = SourceRecord(
            name=caller,
            address=request.source_address,
            store_id=request.source_store_id,
            serial=f"{peer_certificate(context).serial_number:x}",
        )
        gpu_map, (data_host, data_port), session_id, secret = self._destinations.reserve(
            request.migration,
            source,
            _move(request),
            request.ahead,
        )
        return peer_pb2.ReserveReply(
            store_id=self._journal.store_id,
            gpu_map=msgspec.json.encode(gpu_map),
            data_host=data_host,
            data_port=data_port,
            session_id=session_id,
            session_secret=secret,
        )

    def Examine(
        self, request: peer_pb2.ExamineRequest, context: grpc.ServicerContext
    ) -> peer_pb2.ExamineReply:
        """Everything that speaks against a migration to here."""
        found = self._destinations.examine(
            self._sender(context, request.protocol),
            _move(request),
            parsed(request.facts, Facts),
            request.sample,
        )
        session = found.session
        return peer_pb2.ExamineReply(
            findings=msgspec.json.encode(found.findings),
            gpu_map=msgspec.json.encode(found.gpu_map) if found.gpu_map is not None else b"",
            clock=found.clock,
            data_host=session.data_address if session is not None else "",
            data_port=session.data_port if session is not None else 0,
            session_id=session.session_id if session is not None else b"",
            session_secret=session.session_secret if session is not None else b"",
        )

    def Restore(
        self, request: peer_pb2.RestoreRequest, context: grpc.ServicerContext
    ) -> peer_pb2.RestoreReply:
        """Build, place, verify and hold the copy."""
        found = self._find(request.migration, context)
        if found is None:
            raise UnknownMigration(f"no migration {request.migration!r} is known here")
        order = decoded_order(request.order)
        prepared = found.restore(order, dict(request.manifest))
        return peer_pb2.RestoreReply(
            store_id=prepared.store_id,
            token=prepared.token,
            figures=msgspec.json.encode(prepared.figures),
        )

    def Grant(
        self, request: peer_pb2.GrantRequest, context: grpc.ServicerContext
    ) -> peer_pb2.GrantReply:
        """Take the process, or refuse it for ever. No record is not a refusal."""
        found = self._find(request.migration, context)
        return _reply(self._no_record() if found is None else found.grant(request.token))

    def Revoke(
        self, request: peer_pb2.RevokeRequest, context: grpc.ServicerContext
    ) -> peer_pb2.GrantReply:
        """Give a suspect copy back to a source that kept its own."""
        found = self._find(request.migration, context)
        return _reply(self._no_record() if found is None else found.revoke(request.token))

    def Cancel(
        self, request: peer_pb2.CancelRequest, context: grpc.ServicerContext
    ) -> peer_pb2.CancelReply:
        """End an attempt that was not granted."""
        found = self._find(request.migration, context)
        cancelled = found is None or found.cancel()
        return peer_pb2.CancelReply(cancelled=cancelled, store_id=self._journal.store_id)

    def Query(
        self, request: peer_pb2.QueryRequest, context: grpc.ServicerContext
    ) -> peer_pb2.QueryReply:
        """What this host's journal says, as source or as destination."""
        caller = peer_identity(context)
        reply = peer_pb2.QueryReply(store_id=self._journal.store_id)
        if self._sources.destination_of(request.migration) == caller.name:
            reply.state = self._sources.state(request.migration) or ""
            return reply
        found = self._destinations.find(request.migration)
        if found is not None and found.source.name == caller.name:
            reply.state = found.machine.state or ""
            reply.token = found.machine.token
            reply.life = found.life
        elif found is not None:
            raise PermissionRefused(f"migration {request.migration} is not {caller.name}'s")
        else:
            self._check_allowed(caller.name)
        return reply

    def _no_record(self) -> GrantReply:
        return GrantReply(
            answer=Answer.NO_RECORD,
            store_id=self._journal.store_id,
            message="this journal has no record of the migration",
            figures=DestinationFigures(),
        )

    def _sender(self, context: grpc.ServicerContext, protocol: int) -> str:
        """The calling host's name, if it may send processes here."""
        caller = peer_identity(context)
        if protocol != PROTOCOL:
            raise ProtocolMismatch(f"the source speaks protocol {protocol}, this host {PROTOCOL}")
        self._check_allowed(caller.name)
        return caller.name

    def _find(self, migration: str, context: grpc.ServicerContext) -> DestinationMigration | None:
        """The migration that a source speaks of, None if the journal has no record of it.

        Raises PermissionRefused if the caller is not the source of it, or is none at all.
        """
        caller = peer_identity(context)
        found = self._destinations.find(migration)
        if found is None:
            self._check_allowed(caller.name)
        elif found.source.name != caller.name:
            raise PermissionRefused(f"migration {migration} is not {caller.name}'s")
        return found

    def _check_allowed(self, name: str) -> None:
        if name not in self._allow_from:
            raise PermissionRefused(
                f"{name} may not send processes here",
                advice="Add the host's name to allow_from in the destination agent's"
                " configuration: an allowed source is as good as root there.",
            )


def _move(request: peer_pb2.ExamineRequest | peer_pb2.ReserveRequest) -> Move:
    return Move(
        engine=request.engine,
        needs=parsed(request.needs, Needs),
        topology=parsed(request.topology, Topology),
        options=parsed(request.options, Options),
    )


def _reply(reply: GrantReply) -> peer_pb2.GrantReply:
    return peer_pb2.GrantReply(
        answer=reply.answer.value,
        store_id=reply.store_id,
        message=reply.message,
        figures=msgspec.json.encode(reply.figures),
    )
