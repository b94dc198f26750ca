"""``migrate ca``: an authority of one's own, and certificates by it."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import click

from migrate.cli.settings import Settings
from migrate.rpc.ca import LIFETIME, Role, create_ca, issue, load_ca

FOLDER = click.Path(file_okay=False, path_type=Path)


@click.group("ca")
def ca_command() -> None:
    """Make certificates for agents and people.

    Whoever has ca.key can let anybody in: keep it off the hosts.
    """


@ca_command.command("init")
@click.argument("folder", type=FOLDER)
@click.pass_obj
def init(settings: Settings, folder: Path) -> None:
    """Make an authority in FOLDER: ca.crt, which everybody needs, and ca.key."""
    authority = create_ca(folder)
    if settings.output.json:
        settings.output.document({"ca": str(authority.path)})
    else:
        settings.output.text(f"Made {authority.path} and its key")


@ca_command.command("issue")
@click.argument("folder", type=FOLDER)
@click.argument("name")
@click.option(
    "--role",
    type=click.Choice([role.value for role in Role]),
    required=True,
    help="agent for a host; viewer, operator or admin for a person or program.",
)
@click.option(
    "--host", "hosts", multiple=True, metavar="HOST", help="Another name or address of the host."
)
@click.option(
    "--days", type=click.IntRange(1, 3650), default=LIFETIME.days, show_default=True, help="Valid."
)
@click.option("--out", type=FOLDER, help="Where NAME.crt and NAME.key go (default: FOLDER).")
@click.pass_obj
def issue_command(
    settings: Settings,
    folder: Path,
    name: str,
    *,
    role: str,
    hosts: tuple[str, ...],
    days: int,
    out: Path | None,
) -> None:
    """Make a key and a certificate for NAME by the authority in FOLDER.

    For an agent NAME is the host's name, as in inventories. The key's file is for its owner
    alone (mode 0600). A pair of the same name is replaced; a running agent follows.
    """
    files = issue(
        load_ca(folder),
        name,
        Role(role),
        out or folder,
        hosts=hosts,
        lifetime=timedelta(days=days),
    )
    if settings.output.json:
        settings.output.document(files)
    else:
        settings.output.text(f"Made {files.cert} and {files.key}")
