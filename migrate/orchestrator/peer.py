"""The ``Peer`` seam: what a source says to its destination, and what comes back.

gRPC in the agents (``migrate.rpc.peer``), in memory in a simulation. A call that gets
no answer raises PeerLost; a refusal arrives as the MigrateError it was over there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from migrate.model import GpuMap, Value
from migrate.orchestrator.handover import Answer
from migrate.orchestrator.plan import Move, RestoreOrder
from migrate.preflight.facts import Facts
from migrate.preflight.findings import Findings
from migrate.report import DestinationFigures


class Session(Value):
    """Where memory may be sent to."""

    data_address: str
    data_port: int
    session_id: bytes
    session_secret: bytes


class Examined(Value):
    """What the destination found. ``session`` takes a sample; None: it takes none.

    ``clock``: seconds since 1970 over there; ``gpu_map`` None: see the blockers.
    """

    findings: Findings
    gpu_map: GpuMap | None
    clock: float
    session: Session | None = None


class Reservation(Value):
    """The destination is ready to receive."""

    store_id: str
    gpu_map: GpuMap
    data_address: str
    data_port: int
    session_id: bytes
    session_secret: bytes


class PreparedReply(Value):
    """The destination holds the copy."""

    store_id: str
    token: bytes
    figures: DestinationFigures


class GrantReply(Value):
    """The destination's answer to a grant."""

    answer: Answer
    store_id: str
    message: str
    figures: DestinationFigures


class PeerState(Value):
    """What the other journal says; ``state`` is empty if it has no record."""

    state: str
    store_id: str
    token: bytes
    life: str = ""  # what the destination saw of the released copy: see life.py


class Peer(Protocol):
    """One other agent."""

    name: str

    def examine(self, move: Move, facts: Facts, sample: int) -> Examined:
        """Ask what speaks against it; a data session for *sample* bytes comes along.

        Reserves and changes nothing. Raises AgentUnreachable, PermissionRefused and the like.
        """

    def reserve(self, migration: str, move: Move, ahead: bytes = b"") -> Reservation:
        """Ask for room; *ahead*: see ProcessEngine. Raises NoGpuMap and the like."""

    def restore(
        self, migration: str, order: RestoreOrder, manifest: Mapping[int, bytes]
    ) -> PreparedReply:
        """Build, place, verify and hold the copy."""

    def grant(self, migration: str, token: bytes) -> GrantReply:
        """Give the process away. Safe to repeat."""

    def revoke(self, migration: str, token: bytes) -> GrantReply:
        """Ask a suspect copy back, for a source that kept its own. Safe to repeat."""

    def cancel(self, migration: str, reason: str) -> bool:
        """End an attempt that was not granted. False: it is owned over there."""

    def query(self, migration: str) -> PeerState:
        """Ask what the other journal says."""
