"""``migrate drill``: hurt real agents on simulated hosts, and see who owns the process."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import click

from migrate.cli.settings import Settings


@click.group("drill")
def drill_command() -> None:
    """Drills: agents, networks, disks and processes hurt at named moments.

    Each drill starts a training job on one of two simulated hosts, moves it, and kills or
    hurts something at the worst moment. Afterwards exactly one copy of the job must be
    there, and come to the digest of a twin that nobody hurt. Needs no GPU and no root.
    """


@drill_command.command("list")
@click.pass_obj
def list_command(settings: Settings) -> int:
    """List the drills by family."""
    return int(_suite().show(settings.output))


@drill_command.command("run")
@click.argument("names", nargs=-1, metavar="[NAME|FAMILY]...")
@click.option("--all", "everything", is_flag=True, help="All drills.")
@click.option(
    "--html",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write one page with a picture of each drill.",
)
@click.option(
    "--stages",
    type=click.IntRange(1, 32),
    default=2,
    show_default=True,
    help="Drills at a time, each on two hosts of its own.",
)
@click.pass_obj
def run_command(
    settings: Settings, names: tuple[str, ...], *, everything: bool, html: Path | None, stages: int
) -> int:
    """Run drills. Exit code 0 only if all passed."""
    return int(
        _suite().run(settings.output, names, everything=everything, stages=stages, html=html)
    )


def _suite() -> Any:
    # scenarios is a layer above the command line: imported only when a drill is run.
    return importlib.import_module("scenarios.drills.suite")
