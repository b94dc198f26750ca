"""``migrate check``: everything that speaks against a migration, and what it would cost."""

from __future__ import annotations

import click

from migrate.cli.moves import leeway, move_arguments
from migrate.cli.output import Output, duration, rate, size
from migrate.cli.settings import Settings
from migrate.client import Client
from migrate.orchestrator.plan import Options
from migrate.preflight.findings import TCP_CLOSE
from migrate.report import Check, Prediction


@click.command("check")
@move_arguments
@click.option("--no-precopy", is_flag=True, help="As of `migrate run`; the prediction differs.")
@click.option(
    "--max-downtime",
    type=click.FloatRange(min=0),
    default=0.5,
    show_default=True,
    help="Seconds; a warning if more are predicted.",
)
@leeway
@click.pass_obj
def check_command(
    settings: Settings,
    source: str,
    destination: str,
    pid: int,
    *,
    no_precopy: bool,
    max_downtime: float,
    gpu_map: str,
    relax: tuple[str, ...],
    tcp_close: bool,
    copy_files: tuple[str, ...],
) -> int:
    """Say whether process PID can move from SRC to DST, without moving it.

    Lists every blocker and every warning at once (docs/preflight.md has all of them) and
    predicts time, downtime and bytes by a sample of its memory that is sent to DST and thrown
    away there. The process stands for some milliseconds. The exit code is 0, or that of the
    first blocker.
    """
    options = Options(
        precopy=not no_precopy,
        max_downtime=max_downtime,
        gpu_map=gpu_map,
        relax=relax,
        ways_out=(TCP_CLOSE,) if tcp_close else (),
        copy_files=copy_files,
    )
    with Client(settings.inventory) as client:
        return show(settings.output, client.check(source, destination, pid, options=options))


def show(output: Output, found: Check) -> int:
    """Print it; the exit code it stands for."""
    if output.json:
        output.document(found)
    else:
        render(output, found)
    return found.blockers[0].exit_code if found.blockers else 0


def render(output: Output, found: Check) -> None:
    """For people."""
    process = f"process {found.source.pid} ({' '.join(found.command)[:80]})"
    verdict = f"can't move: {len(found.blockers)} blockers" if found.blockers else "can move"
    output.text(f"{process} {verdict}, {found.source.host} -> {found.destination.host}")
    for blocker in found.blockers:
        output.text(f"  {blocker.reason}: {blocker.message}")
        output.text(f"      {blocker.advice}")
    for warning in found.warnings:
        output.text(f"  warning {warning.reason}: {warning.message}")
        output.text(f"      {warning.advice}")
    if found.gpu_map and not found.blockers:
        pairs = ", ".join(f"{g.source_gpu_id} -> {g.destination_gpu_id}" for g in found.gpu_map)
        output.text(f"GPUs: {pairs}")
    if found.prediction is not None and not found.blockers:
        output.text(foreseen(found.prediction))
    output.text(f"Checked in {duration(found.seconds)}.")


def foreseen(prediction: Prediction) -> str:
    """A prediction in one sentence."""
    text = (
        f"Predicted: {duration(prediction.seconds)} in all, {duration(prediction.downtime)} of"
        f" downtime, {size(prediction.wire)} on the wire"
    )
    if not prediction.sampled:
        return f"{text} (a guess: nothing was measured)"
    return (
        f"{text} (by a sample of {size(prediction.sampled)} at {rate(prediction.rate)}:"
        f" {prediction.zero:.0%} zero, {prediction.ratio:.0%} left on the wire,"
        f" {prediction.dirty:.0%} rewritten in {duration(prediction.interval)})"
    )
