"""``migrate agent``: the daemon of a host."""

from __future__ import annotations

import importlib
from pathlib import Path

import click

from migrate.cli.settings import Settings, configure_logging

EXAMPLE = """\b
name = "node1"              # as in its certificate and in inventories
listen = "0.0.0.0:7601"     # control channel (mTLS)
advertise = "node1:7601"    # what other agents dial
data_listen = "0.0.0.0:0"   # chunk streams
allow_from = ["node2"]      # whose agents may send processes here
[tls]
ca = "ca.pem"
cert = "node1.pem"
key = "node1.key"
"""


@click.group("agent")
def agent_command() -> None:
    """The daemon of a host."""


@agent_command.command("serve", epilog=f"An example of the file:\n\n{EXAMPLE}")
@click.option(
    "--config",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("/etc/migrate/agent.toml"),
    show_default=True,
    help="Configuration (TOML).",
)
@click.option("--ready-fd", type=int, hidden=True, help="Gets the address when it answers.")
@click.pass_obj
def serve(settings: Settings, config: Path, ready_fd: int | None) -> None:
    """Run the agent until SIGTERM."""
    # The log of a daemon tells what it did; -v and -vv tell more.
    configure_logging(max(1, settings.output.verbose))
    # agents is a layer above the command line: named here, imported only when it is run.
    load_config = importlib.import_module("agents.config").load_config
    importlib.import_module("agents.daemon").serve(load_config(config), ready_fd)
