"""How a command talks to an agent: by its name in the inventory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from migrate.errors import AgentUnreachable, MigrateError, ProtocolMismatch
from migrate.inventory import Host, Inventory, TlsFiles
from migrate.rpc.errors import translated
from migrate.rpc.explain import explain_failure
from migrate.rpc.pb.agent_pb2_grpc import AgentStub
from migrate.rpc.tls import open_channel


@contextmanager
def agent(inventory: Inventory, name: str) -> Iterator[AgentStub]:
    """The agent of host *name*; calls made inside raise MigrateError.

    Raises UnknownHost at once, AgentUnreachable or CertificateRejected at the first call.
    """
    host = inventory.host(name)
    with (
        open_channel(host.address, host.name, inventory.tls) as channel,
        translated(lambda said: _explained(said, host, inventory.tls)),
    ):
        yield AgentStub(channel)


def _explained(said: str, host: Host, files: TlsFiles) -> MigrateError:
    """*said* is a gRPC status code and its details, of a failure that has no MigrateError."""
    code = said.partition(":")[0]
    if code == "UNAVAILABLE":
        return explain_failure(host.address, host.name, files)
    if code == "DEADLINE_EXCEEDED":
        return AgentUnreachable(f"{host.name} at {host.address} did not answer in time")
    if code == "UNIMPLEMENTED":
        return ProtocolMismatch(f"the agent of {host.name} does not know this call")
    return MigrateError(f"the agent of {host.name} failed: {said}")
