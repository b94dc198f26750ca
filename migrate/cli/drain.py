"""``migrate drain``: move every GPU process off a host."""

from __future__ import annotations

from pathlib import Path

import click
import msgspec

from migrate.cli.output import Output, duration, size
from migrate.cli.settings import Settings
from migrate.client import Client
from migrate.drain.drain import SCHEMA, Drain, Summary
from migrate.drain.placement import Plan
from migrate.drain.policy import Policy
from migrate.drain.state import StateFile, default_folder
from migrate.errors import NoPlacement, UsageError
from migrate.orchestrator.plan import Options
from migrate.report import ProcessRow

DEFAULT = Policy()


@click.command("drain")
@click.argument("host")
@click.option("--to", "to", multiple=True, metavar="HOST,HOST", help="Where processes may go.")
@click.option("--any", "anywhere", is_flag=True, help="They may go to every host there is.")
@click.option("--dry-run", is_flag=True, help="Show who would go where, and move nothing.")
@click.option(
    "--per-host",
    type=click.IntRange(min=1),
    default=DEFAULT.per_host,
    show_default=True,
    help="Migrations at a time that a host takes part in.",
)
@click.option(
    "--per-link",
    type=click.IntRange(min=1),
    default=DEFAULT.per_link,
    show_default=True,
    help="Migrations at a time from HOST to one other host.",
)
@click.option(
    "--attempts",
    type=click.IntRange(min=1, max=100),
    default=DEFAULT.attempts,
    show_default=True,
    help="Attempts for each process; the wait between them doubles.",
)
@click.option(
    "--backoff",
    type=click.FloatRange(min=0),
    default=DEFAULT.backoff,
    show_default=True,
    metavar="SECONDS",
    help="Wait after a first failed attempt.",
)
@click.option(
    "--pause-after",
    type=click.IntRange(min=1),
    default=DEFAULT.pause_after,
    show_default=True,
    help="Failures in a row after which nothing is started for --pause.",
)
@click.option(
    "--pause",
    type=click.FloatRange(min=0),
    default=DEFAULT.pause,
    show_default=True,
    metavar="SECONDS",
    help="That pause; then one is tried alone, and if it fails the drain stops.",
)
@click.option(
    "--patience",
    type=click.FloatRange(min=0, min_open=True),
    default=DEFAULT.patience,
    show_default=True,
    metavar="SECONDS",
    help="How long an agent may be away, or an owner unknown.",
)
@click.option(
    "--state",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of what a restarted drain must know (default: ~/.local/state/migrate).",
)
@click.pass_obj
def drain_command(
    settings: Settings,
    host: str,
    *,
    to: tuple[str, ...],
    anywhere: bool,
    dry_run: bool,
    per_host: int,
    per_link: int,
    attempts: int,
    backoff: float,
    pause_after: int,
    pause: float,
    patience: float,
    state: Path | None,
) -> int:
    """Move every process that uses GPUs from HOST to other hosts.

    Each goes where GPU topology and free VRAM allow; what fails is tried again, elsewhere if
    possible. Killed or interrupted, the same command goes on where it was and starts nothing
    twice. Exit code 0 only if nothing is left; 56, 83, 84 and 90: see docs/exit-codes.md.
    """
    output = settings.output
    policy = Policy(
        per_host=per_host,
        per_link=per_link,
        attempts=attempts,
        backoff=backoff,
        backoff_limit=max(backoff, DEFAULT.backoff_limit),
        pause_after=pause_after,
        pause=pause,
        patience=patience,
    )
    with Client(settings.inventory) as client:
        targets = _targets(client, host, to, anywhere)
        options = Options(patience=min(patience, Options().patience))
        drain = Drain(client, host, targets, policy=policy, options=options, say=output.note)
        if dry_run:
            rows, plan = drain.preview()
            return _show_plan(output, host, rows, plan)
        with StateFile(state or default_folder(), host).held() as file:
            return _show(output, drain.run(file))


def _targets(client: Client, host: str, to: tuple[str, ...], anywhere: bool) -> tuple[str, ...]:
    """Names of the hosts that may take processes. Raises UsageError, UnknownHost."""
    client.inventory.host(host)
    named = [name.strip() for text in to for name in text.split(",") if name.strip()]
    if bool(named) == anywhere:
        raise UsageError("give either --to HOST,HOST or --any")
    names = client.hosts if anywhere else tuple(client.inventory.host(n).name for n in named)
    if host in named:
        raise UsageError(f"--to: {host} is the host to be drained")
    return tuple(dict.fromkeys(name for name in names if name != host))


def _show_plan(output: Output, host: str, rows: list[ProcessRow], plan: Plan) -> int:
    if output.json:
        document = {"schema": SCHEMA, "host": host, "dry_run": True}
        output.document({**document, **msgspec.to_builtins(plan)})
    elif not rows:
        output.text(f"No process of {host} uses KFD.")
    else:
        by_pid = {row.pid: row for row in rows}
        where = {placement.pid: placement for placement in plan.placements}
        output.table(
            (">PID", ">VRAM", "DESTINATION", "GPU MAP", "COMMAND"),
            (
                (
                    pid,
                    size(sum(row.vram.values())),
                    where[pid].host if pid in where else "none",
                    " ".join(f"{a}={b}" for a, b in where[pid].gpu_map.pairs)
                    if pid in where
                    else "",
                    row.command[:60],
                )
                for pid, row in by_pid.items()
            ),
        )
        for unplaced in plan.unplaced:
            for name, why in unplaced.reasons.items():
                output.note(f"pid {unplaced.pid}: {name}: {why}")
    return NoPlacement.exit_code if plan.unplaced else 0


def _show(output: Output, summary: Summary) -> int:
    error = summary.error()
    if output.json:
        output.document(summary)
        return error.exit_code if error is not None else 0
    if not summary.rows:
        output.text(f"No process of {summary.host} uses KFD.")
        return 0
    output.table(
        (">PID", "OUTCOME", "DESTINATION", ">PID THERE", ">ATTEMPTS", ">DOWNTIME", "MIGRATION"),
        (
            (
                row.pid,
                row.outcome,
                row.destination or "-",
                row.destination_pid or "-",
                row.attempts,
                duration(row.downtime) if row.downtime is not None else "-",
                row.migration or "-",
            )
            for row in summary.rows
        ),
    )
    for row in summary.rows:
        if row.reason:
            output.text(f"pid {row.pid}: {row.reason}: {row.message}")
    if error is None:
        return 0
    output.error(error)
    return error.exit_code
