"""How a command talks to an agent: by its name in the inventory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from migrate.inventory import Inventory
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
        translated(lambda _: explain_failure(host.address, host.name, inventory.tls)),
    ):
        yield AgentStub(channel)
