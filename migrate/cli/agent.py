"""``migrate agent``: the daemon of a host."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TextIO

import click

from migrate.cli.settings import Settings, add_shared_options, configure_logging

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


class _Group(click.Group):
    """Imports ``deploy`` when it is used: an agent has no need of SSH."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """See click."""
        return sorted({*super().list_commands(ctx), "deploy"})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """See click."""
        if cmd_name == "deploy" and cmd_name not in self.commands:
            command = importlib.import_module("migrate.cli.deploy").deploy_command
            add_shared_options(command)
            self.add_command(command)
        return super().get_command(ctx, cmd_name)


@click.group("agent", cls=_Group)
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


FOLDER = click.Path(file_okay=False, path_type=Path)


@agent_command.command("build-hook")
@click.option(
    "--out",
    type=FOLDER,
    default=Path("/run/migrate/hook"),
    show_default=True,
    help="Folder of the hook; an agent's is `hook` in its run directory.",
)
@click.option(
    "--include",
    type=FOLDER,
    default=Path("/usr/include"),
    show_default=True,
    help="Folder with criu/criu-plugin.h of the very CRIU that shall load the hook.",
)
@click.pass_obj
def build_hook(settings: Settings, out: Path, include: Path) -> None:
    """Compile the hook inside CRIU, which the criu engine needs.

    An agent does it when it starts; this is for seeing why it can't, or for another CRIU.
    """
    target = importlib.import_module("agents.hook").build_hook(out, include=include)
    settings.output.text(str(target))


@agent_command.command("enroll")
@click.argument("ca", metavar="CA_HOST:PORT")
@click.option(
    "--token-file",
    type=click.File(),
    required=True,
    help="The token by `migrate ca token`; - is stdin.",
)
@click.option(
    "--out",
    type=FOLDER,
    default=Path("/etc/migrate"),
    show_default=True,
    help="Where ca.crt, NAME.crt and NAME.key go.",
)
@click.pass_obj
def enroll(settings: Settings, ca: str, *, token_file: TextIO, out: Path) -> None:
    """Get a certificate for this host from `migrate ca serve` at CA_HOST:PORT.

    The key is made here and stays. What answers must be the authority that made the token.
    """
    enrol = importlib.import_module("migrate.rpc.enrol").enrol
    parse = importlib.import_module("migrate.rpc.tokens").parse
    files = enrol(ca, parse(token_file.read(4096)), out)
    if settings.output.json:
        settings.output.document(files)
    else:
        settings.output.text(f"Made {files.cert} and {files.key}")


@agent_command.command("csr")
@click.argument("name")
@click.option("--out", type=FOLDER, default=Path(), help="Where NAME.key and NAME.csr go.")
@click.pass_obj
def csr(settings: Settings, name: str, *, out: Path) -> None:
    """Make a key for NAME and a signing request, for `migrate ca sign` where ca.key is."""
    make_request = importlib.import_module("migrate.rpc.ca").make_request
    key, request = make_request(name, out)
    if settings.output.json:
        settings.output.document({"key": str(key), "csr": str(request)})
    else:
        settings.output.text(f"Made {key}, which stays here, and {request}")
