"""``migrate ca``: an authority of one's own, and certificates by it."""

from __future__ import annotations

import contextlib
import os
import threading
from datetime import timedelta
from pathlib import Path

import click

from migrate.cli.settings import Settings, configure_logging
from migrate.errors import UsageError
from migrate.inventory import split_address
from migrate.rpc import book, tokens
from migrate.rpc.ca import (
    LIFETIME,
    Role,
    create_ca,
    issue,
    load_ca,
    revoke,
    sign_request,
    write_file,
)

FOLDER = click.Path(file_okay=False, path_type=Path)
FILE = click.Path(dir_okay=False, path_type=Path)
ROLE = click.Choice([role.value for role in Role])


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
    type=ROLE,
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


@ca_command.command("sign")
@click.argument("folder", type=FOLDER)
@click.argument("name")
@click.argument("request", type=FILE)
@click.option("--role", type=ROLE, default=Role.AGENT.value, show_default=True)
@click.option("--host", "hosts", multiple=True, metavar="HOST", help="Another name or address.")
@click.option(
    "--days", type=click.IntRange(1, 3650), default=LIFETIME.days, show_default=True, help="Valid."
)
@click.option("--out", type=FILE, help="The certificate (default: beside REQUEST).")
@click.pass_obj
def sign_command(
    settings: Settings,
    folder: Path,
    name: str,
    request: Path,
    *,
    role: str,
    hosts: tuple[str, ...],
    days: int,
    out: Path | None,
) -> None:
    """Answer a signing REQUEST of NAME, made by `migrate agent csr` where the key stays.

    Name, role and hosts are what is said here; what the request says of them counts for
    nothing.
    """
    target = out or request.with_suffix(".crt")
    try:
        data = request.read_bytes()
    except OSError as error:
        raise UsageError(f"can't read {request}: {error.strerror}") from error
    certificate = sign_request(
        load_ca(folder), data, name, Role(role), hosts=hosts, lifetime=timedelta(days=days)
    )
    try:
        write_file(target, certificate, 0o644)
    except OSError as error:
        raise UsageError(f"can't write {target}: {error.strerror}") from error
    if settings.output.json:
        settings.output.document({"cert": str(target)})
    else:
        settings.output.text(f"Made {target}")


@ca_command.command("token")
@click.argument("folder", type=FOLDER)
@click.argument("name")
@click.option("--host", "hosts", multiple=True, metavar="HOST", help="Another name or address.")
@click.option(
    "--minutes",
    type=click.IntRange(1, 1440),
    default=int(tokens.LIFETIME.total_seconds() // 60),
    show_default=True,
    help="How long it may be used.",
)
@click.option("--out", type=FILE, help="Write it to a file of mode 0600 instead of stdout.")
@click.pass_obj
def token_command(
    settings: Settings,
    folder: Path,
    name: str,
    *,
    hosts: tuple[str, ...],
    minutes: int,
    out: Path | None,
) -> None:
    """Make a token with which the host NAME may enrol, once (`migrate agent enroll`).

    Whoever has it can be that host: hand it over by a way that you trust, as a file or on
    stdin, not on a command line.
    """
    token = tokens.create(load_ca(folder), name, hosts, lifetime=timedelta(minutes=minutes))
    if out is not None:
        try:
            write_file(out, token.text().encode() + b"\n", 0o600)
        except OSError as error:
            raise UsageError(f"can't write {out}: {error.strerror}") from error
        settings.output.note(f"Made {out}")
    if settings.output.json:
        settings.output.document({"file": str(out)} if out else {"token": token.text()})
    elif out is None:
        click.echo(token.text())


@ca_command.command("serve")
@click.argument("folder", type=FOLDER)
@click.option("--listen", default="0.0.0.0:7602", show_default=True, metavar="HOST:PORT")
@click.option("--ready-fd", type=int, hidden=True, help="Gets the address when it answers.")
@click.pass_obj
def serve_command(settings: Settings, folder: Path, *, listen: str, ready_fd: int | None) -> None:
    """Answer hosts that enrol with a token, until Ctrl-C.

    The authority's key has to be here for it: run it while hosts enrol, and not for ever.
    """
    from migrate.rpc.enrolment import EnrolmentServer  # noqa: PLC0415 - nobody else needs http

    configure_logging(max(1, settings.output.verbose))
    with EnrolmentServer(load_ca(folder), split_address(listen)) as server:
        address = f"{split_address(listen)[0]}:{server.server_port}"
        if ready_fd is not None:
            os.write(ready_fd, f"{address}\n".encode())
            os.close(ready_fd)
        settings.output.note(f"Enrolment at {address}; Ctrl-C ends it")
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        with contextlib.suppress(KeyboardInterrupt):
            thread.join()
        server.shutdown()


@ca_command.command("revoke")
@click.argument("folder", type=FOLDER)
@click.argument("certificate", metavar="NAME|SERIAL")
@click.pass_obj
def revoke_command(settings: Settings, folder: Path, certificate: str) -> None:
    """Revoke every certificate of NAME, or the one of a SERIAL number.

    Then copy FOLDER/ca.crl beside ca.crt of every agent and client: they follow at once.
    """
    ca = load_ca(folder)
    serials = revoke(ca, certificate)
    if settings.output.json:
        settings.output.document({"crl": str(ca.crl_path), "serials": serials})
    else:
        settings.output.text(f"Revoked {len(serials)}; now copy {ca.crl_path} to every host")


@ca_command.command("list")
@click.argument("folder", type=FOLDER)
@click.pass_obj
def list_command(settings: Settings, folder: Path) -> None:
    """List the certificates that the authority in FOLDER has issued."""
    load_ca(folder)
    issued = book.read(folder)
    if settings.output.json:
        settings.output.document(issued)
    else:
        settings.output.table(
            ("NAME", "ROLE", "UNTIL", "SERIAL"),
            ((i.name, i.role, f"{i.until:%Y-%m-%d %H:%M}", i.serial) for i in issued),
        )
