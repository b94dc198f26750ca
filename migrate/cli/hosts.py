"""``migrate hosts``: the inventory, and what each agent says of itself."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import click
import msgspec

from migrate.cli.output import Output, error_document, size
from migrate.cli.settings import Settings
from migrate.client import agent
from migrate.decode import from_json
from migrate.errors import MigrateError, ProtocolMismatch
from migrate.inventory import Host, Inventory
from migrate.model import Value
from migrate.rpc.pb.agent_pb2 import InfoReply, InfoRequest
from migrate.topology.model import Topology

SCHEMA = "migrate.hosts/1"
TIMEOUT = 5.0  # seconds an agent has for its answer
AT_ONCE = 16  # agents asked at a time


class GpuRow(Value):
    """One GPU; sizes in bytes, ``free_vram`` None where the agent did not say."""

    gpu_id: int
    gfx: str
    vram: int
    free_vram: int | None


class HostRow(Value):
    """One host; ``error`` says why its agent did not answer."""

    name: str
    address: str
    state: str  # "ready", or the reason code of the error
    version: str = ""
    engine: str = ""
    gpus: tuple[GpuRow, ...] = ()
    error: dict[str, str | int] | None = None


@click.command("hosts")
@click.argument("names", nargs=-1, metavar="[HOST]...")
@click.pass_obj
def hosts_command(settings: Settings, names: tuple[str, ...]) -> None:
    """List the hosts of the inventory, or those named, and their agents.

    An agent that does not answer is part of the list, with the reason.
    """
    inventory = settings.inventory
    hosts = tuple(inventory.host(name) for name in names) or inventory.all_hosts()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        rows = list(pool.map(lambda host: survey(inventory, host), hosts))
    if settings.output.json:
        settings.output.document({"schema": SCHEMA, "hosts": rows})
    else:
        render(settings.output, rows)


def survey(inventory: Inventory, host: Host) -> HostRow:
    """Ask one agent. A failure becomes part of the row."""
    try:
        with agent(inventory, host.name) as stub:
            info = stub.Info(InfoRequest(), timeout=TIMEOUT)
        return HostRow(
            name=host.name,
            address=host.address,
            state="ready",
            version=info.version,
            engine=info.engine,
            gpus=_gpus(info),
        )
    except MigrateError as error:
        return HostRow(
            name=host.name, address=host.address, state=error.reason, error=error_document(error)
        )


def _gpus(info: InfoReply) -> tuple[GpuRow, ...]:
    try:
        topology = from_json(info.topology, Topology)
    except msgspec.DecodeError as error:
        raise ProtocolMismatch(f"the agent's topology can't be read: {error}") from error
    return tuple(
        GpuRow(
            gpu_id=node.gpu_id,
            gfx=node.gfx,
            vram=node.vram_bytes,
            free_vram=info.free_vram.get(node.gpu_id),
        )
        for node in topology.gpus
    )


def render(output: Output, rows: list[HostRow]) -> None:
    """The table, then why hosts are missing."""
    if not rows:
        output.text("The inventory has no hosts.")
        return
    output.table(
        ("NAME", "ADDRESS", "STATE", "VERSION", "ENGINE", ">GPUS", "TARGET", ">VRAM FREE"),
        (
            (
                row.name,
                row.address,
                row.state,
                row.version,
                row.engine,
                len(row.gpus) if row.error is None else "",
                ",".join(sorted({gpu.gfx for gpu in row.gpus})),
                size(sum(gpu.free_vram or 0 for gpu in row.gpus)) if row.gpus else "",
            )
            for row in rows
        ),
    )
    for row in rows:
        if row.error is not None:
            output.note(f"{row.name}: {row.error['message']}. {row.error['advice']}")
