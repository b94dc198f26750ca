"""``migrate run``: move one process."""

from __future__ import annotations

import click

from migrate.cli.check import show
from migrate.cli.following import follow
from migrate.cli.moves import leeway, move_arguments
from migrate.cli.output import Output
from migrate.cli.reporting import render
from migrate.cli.settings import Settings
from migrate.client import Client
from migrate.inventory import Inventory
from migrate.orchestrator.plan import Options
from migrate.preflight.findings import TCP_CLOSE
from migrate.report import Report

SCHEMA_STARTED = "migrate.started/1"


@click.command("run")
@move_arguments
@click.option("--no-precopy", is_flag=True, help="Stop the process first, then copy everything.")
@click.option(
    "--max-downtime",
    type=click.FloatRange(min=0),
    default=0.5,
    show_default=True,
    help="Seconds; pre-copy goes on until the prediction is below, or no longer falls.",
)
@click.option(
    "--throttle",
    is_flag=True,
    help="Where pre-copy makes no progress, let the process stand half of the time meanwhile.",
)
@click.option(
    "--or-stay",
    is_flag=True,
    help="Rather give up than stop the process for longer than --max-downtime.",
)
@click.option(
    "--max-rounds",
    type=click.IntRange(min=1, max=100),
    default=5,
    show_default=True,
    help="Pre-copy rounds at most.",
)
@click.option(
    "--bandwidth",
    type=click.FloatRange(min=0, min_open=True),
    metavar="MIB",
    help="MiB a second at most on the wire (default: no limit).",
)
@click.option(
    "--streams",
    type=click.IntRange(1, 16),
    default=2,
    show_default=True,
    help="Connections that carry memory.",
)
@click.option(
    "--patience",
    type=click.FloatRange(min=0, min_open=True),
    default=60.0,
    show_default=True,
    metavar="SECONDS",
    help="How long a cut connection may last before the migration is given up.",
)
@click.option(
    "--hold-source",
    is_flag=True,
    help="Keep the frozen source until the copy was seen alive, some seconds after it was"
    " released. A copy that does nothing though it did something before is ended and the source"
    " runs on: what it did since the freeze may be done again. Refused if it has connections.",
)
@leeway
@click.option("--dry-run", is_flag=True, help="Only check and predict, as `migrate check` does.")
@click.option(
    "--wait/--no-wait",
    default=True,
    show_default=True,
    help="Wait for the end, or print the id and return.",
)
@click.option(
    "--idempotency-key",
    default="",
    metavar="KEY",
    help="A retried command with the same key starts nothing twice.",
)
@click.pass_obj
def run_command(
    settings: Settings,
    source: str,
    destination: str,
    pid: int,
    *,
    no_precopy: bool,
    max_downtime: float,
    throttle: bool,
    or_stay: bool,
    max_rounds: int,
    bandwidth: float | None,
    streams: int,
    patience: float,
    hold_source: bool,
    gpu_map: str,
    relax: tuple[str, ...],
    tcp_close: bool,
    copy_files: tuple[str, ...],
    dry_run: bool,
    wait: bool,
    idempotency_key: str,
) -> int:
    """Move process PID from host SRC to host DST.

    The agents do it by themselves: Ctrl-C offers to cancel or to detach, and a lost
    connection harms nothing. Exit codes: see docs/exit-codes.md; 0 only if the process
    runs at DST.
    """
    options = Options(
        precopy=not no_precopy,
        max_downtime=max_downtime,
        max_rounds=max_rounds,
        throttle=throttle,
        or_stay=or_stay,
        bandwidth=None if bandwidth is None else int(bandwidth * 1024 * 1024),
        streams=streams,
        patience=patience,
        hold_source=hold_source,
        gpu_map=gpu_map,
        relax=relax,
        ways_out=(TCP_CLOSE,) if tcp_close else (),
        copy_files=copy_files,
    )
    inventory, output = settings.inventory, settings.output
    if dry_run:
        with Client(inventory) as client:
            return show(output, client.check(source, destination, pid, options=options))
    migration = start(inventory, source, destination, pid, options, idempotency_key)
    if not wait:
        if output.json:
            output.document({"schema": SCHEMA_STARTED, "id": migration})
        else:
            output.text(migration)
        return 0
    output.note(f"Migration {migration}")
    return finish(output, follow(inventory, source, migration, output))


def start(
    inventory: Inventory, source: str, destination: str, pid: int, options: Options, key: str
) -> str:
    """Start a migration; its id. Raises MigrateError."""
    with Client(inventory) as client:
        return client.run(source, destination, pid, options=options, key=key)


def finish(output: Output, report: Report) -> int:
    """Print the report; the exit code it stands for."""
    if output.json:
        output.document(report)
    else:
        render(output, report)
    return report.failure.exit_code if report.failure is not None else 0
