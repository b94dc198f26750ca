"""The ``Peer`` seam over gRPC: what one agent asks of another."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TypeVar

import grpc
import msgspec

from migrate.decode import from_json
from migrate.errors import MigrateError, PeerLost, ProtocolMismatch
from migrate.inventory import TlsFiles, split_address
from migrate.model import GpuMap
from migrate.orchestrator.handover import Answer
from migrate.orchestrator.peer import (
    Examined,
    GrantReply,
    PeerState,
    PreparedReply,
    Reservation,
    Session,
)
from migrate.orchestrator.plan import PROTOCOL, Move, RestoreOrder
from migrate.preflight.facts import Facts
from migrate.preflight.findings import Findings
from migrate.report import DestinationFigures
from migrate.rpc import tls
from migrate.rpc.errors import translated
from migrate.rpc.pb import peer_pb2, peer_pb2_grpc

SHORT = 10.0  # seconds: calls that only look or write a record
RESTORE_BASE = 120.0  # seconds, or --patience if that is more; and so many bytes a second at least:
RESTORE_RATE = 50e6

S = TypeVar("S", bound=msgspec.Struct)


class GrpcPeer:
    """A destination agent, dialled by *source*'s agent. Calls raise MigrateError.

    The connection is made at the first call and again after it broke.
    """

    def __init__(
        self,
        name: str,
        address: str,
        files: TlsFiles,
        *,
        source: str,
        source_address: str,
        store_id: str,
    ) -> None:
        self.name = name
        self.address = address
        self._files = files
        self._source = source
        self._source_address = source_address
        self._store_id = store_id
        self._patience = RESTORE_BASE
        self._channel: grpc.Channel | None = None

    def examine(self, move: Move, facts: Facts, sample: int) -> Examined:
        """Ask what speaks against it. Raises AgentUnreachable, CertificateRejected ..."""
        self.close()
        self._channel = tls.connect(self.address, self.name, self._files)
        request = peer_pb2.ExamineRequest(
            protocol=PROTOCOL,
            engine=move.engine,
            needs=msgspec.json.encode(move.needs),
            topology=msgspec.json.encode(move.topology),
            options=msgspec.json.encode(move.options),
            facts=msgspec.json.encode(facts),
            sample=sample,
        )
        with self._lost():
            reply = self._stub().Examine(request, timeout=max(3 * SHORT, move.options.patience))
        host, _ = split_address(self.address)
        session = Session(
            data_address=reply.data_host or host,
            data_port=reply.data_port,
            session_id=reply.session_id,
            session_secret=reply.session_secret,
        )
        return Examined(
            findings=_decoded(reply.findings, Findings),
            gpu_map=_decoded(reply.gpu_map, GpuMap) if reply.gpu_map else None,
            clock=reply.clock,
            session=session if reply.session_id else None,
        )

    def reserve(self, migration: str, move: Move, ahead: bytes = b"") -> Reservation:
        """Ask for room. Raises AgentUnreachable, CertificateRejected, NoGpuMap and the like."""
        self.close()
        self._patience = max(RESTORE_BASE, move.options.patience)
        self._channel = tls.connect(self.address, self.name, self._files)
        request = peer_pb2.ReserveRequest(
            protocol=PROTOCOL,
            migration=migration,
            source=self._source,
            source_address=self._source_address,
            source_store_id=self._store_id,
            engine=move.engine,
            needs=msgspec.json.encode(move.needs),
            topology=msgspec.json.encode(move.topology),
            options=msgspec.json.encode(move.options),
            ahead=ahead,
        )
        with self._lost():
            reply = self._stub().Reserve(request, timeout=RESTORE_BASE)
        host, _ = split_address(self.address)
        return Reservation(
            store_id=reply.store_id,
            gpu_map=_decoded(reply.gpu_map, GpuMap),
            data_address=reply.data_host or host,
            data_port=reply.data_port,
            session_id=reply.session_id,
            session_secret=reply.session_secret,
        )

    def restore(
        self, migration: str, order: RestoreOrder, manifest: Mapping[int, bytes]
    ) -> PreparedReply:
        """Build, place, verify and hold the copy."""
        request = peer_pb2.RestoreRequest(
            migration=migration, order=msgspec.msgpack.encode(order), manifest=dict(manifest)
        )
        total = sum(item.size for item in order.objects)
        with self._lost():
            reply = self._stub().Restore(request, timeout=self._patience + total / RESTORE_RATE)
        return PreparedReply(
            store_id=reply.store_id,
            token=reply.token,
            figures=_decoded(reply.figures, DestinationFigures),
        )

    def grant(self, migration: str, token: bytes) -> GrantReply:
        """Give the process away. Safe to repeat."""
        with self._lost():
            reply = self._stub().Grant(
                peer_pb2.GrantRequest(migration=migration, token=token), timeout=SHORT
            )
        return _answer(reply)

    def revoke(self, migration: str, token: bytes) -> GrantReply:
        """Ask a suspect copy back; it is dead before the answer. Safe to repeat."""
        with self._lost():
            reply = self._stub().Revoke(
                peer_pb2.RevokeRequest(migration=migration, token=token), timeout=3 * SHORT
            )
        return _answer(reply)

    def cancel(self, migration: str, reason: str) -> bool:
        """End an attempt that was not granted. False: it is owned over there."""
        with self._lost():
            reply = self._stub().Cancel(
                peer_pb2.CancelRequest(migration=migration, reason=reason), timeout=3 * SHORT
            )
        return bool(reply.cancelled)

    def query(self, migration: str) -> PeerState:
        """Ask what the other journal says."""
        with self._lost():
            reply = self._stub().Query(peer_pb2.QueryRequest(migration=migration), timeout=SHORT)
        return PeerState(
            state=reply.state, store_id=reply.store_id, token=reply.token, life=reply.life
        )

    def close(self) -> None:
        """Drop the connection; the next call makes another."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def _stub(self) -> peer_pb2_grpc.PeerStub:
        if self._channel is None:
            self._channel = tls.open_channel(self.address, self.name, self._files)
        return peer_pb2_grpc.PeerStub(self._channel)

    def _lost(self) -> AbstractContextManager[None]:
        def explain(text: str) -> MigrateError:
            return PeerLost(f"{self.name} at {self.address} does not answer: {text}")

        return translated(explain)


def _answer(reply: peer_pb2.GrantReply) -> GrantReply:
    return GrantReply(
        answer=Answer(peer_pb2.GrantReply.Answer.Name(reply.answer)),
        store_id=reply.store_id,
        message=reply.message,
        figures=_decoded(reply.figures, DestinationFigures),
    )


def _decoded(data: bytes, kind: type[S]) -> S:
    try:
        return from_json(data, kind)
    except (msgspec.DecodeError, ValueError) as error:
        raise ProtocolMismatch(f"the peer's {kind.__name__} can't be read: {error}") from error
