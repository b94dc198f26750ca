"""``migrate checkpoint`` and ``migrate restore``: a process into a directory, and back."""

from __future__ import annotations

import click

from migrate.cli.following import follow
from migrate.cli.output import Output
from migrate.cli.run import finish
from migrate.cli.settings import Settings
from migrate.client import Client
from migrate.orchestrator.plan import Options
from migrate.report import Restored


@click.command("checkpoint")
@click.argument("host", metavar="HOST")
@click.argument("pid", type=click.IntRange(min=1))
@click.argument("directory", metavar="DIR")
@click.option(
    "--leave-running",
    is_flag=True,
    help="Let the process go on afterwards. Restoring the image then makes a second one.",
)
@click.option(
    "--precopy",
    is_flag=True,
    help="Write the memory while the process runs, stop it only for the rest. Takes more room.",
)
@click.option(
    "--idempotency-key",
    default="",
    metavar="KEY",
    help="A retried command with the same key starts nothing twice.",
)
@click.pass_obj
def checkpoint_command(
    settings: Settings,
    host: str,
    pid: int,
    directory: str,
    *,
    leave_running: bool,
    precopy: bool,
    idempotency_key: str,
) -> int:
    """Put process PID of host HOST into an image, a new directory DIR on that host.

    DIR is an absolute path on HOST, not here; it may lie on a file system that other hosts
    share. The process is ended once the image is complete and on the disk, unless
    --leave-running. Whoever can read the image can read the process's memory.
    """
    options = Options(precopy=precopy, leave_running=leave_running)
    inventory, output = settings.inventory, settings.output
    with Client(inventory) as client:
        migration = client.checkpoint(host, pid, directory, options=options, key=idempotency_key)
    output.note(f"Checkpoint {migration}")
    return finish(output, follow(inventory, host, migration, output))


@click.command("restore")
@click.argument("host", metavar="HOST")
@click.argument("directory", metavar="DIR")
@click.option(
    "--gpu-map",
    default="",
    metavar="OLD=NEW,...",
    help="Which GPU becomes which (default: the best map is searched).",
)
@click.option("--relax", multiple=True, metavar="RULE", help="Leave out one topology rule.")
@click.option(
    "--again", is_flag=True, help="Also an image that was restored before: makes another copy."
)
@click.pass_obj
def restore_command(
    settings: Settings,
    host: str,
    directory: str,
    *,
    gpu_map: str,
    relax: tuple[str, ...],
    again: bool,
) -> int:
    """Start the process of the image in directory DIR of host HOST there.

    Every frame and every chunk of memory is checked, as in a migration; a torn or altered
    image is refused and nothing is left of the attempt.
    """
    options = Options(gpu_map=gpu_map, relax=relax)
    with Client(settings.inventory) as client:
        found = client.restore(host, directory, options=options, again=again)
    if settings.output.json:
        settings.output.document(found)
    else:
        _render(settings.output, host, found)
    return 0


def _render(output: Output, host: str, found: Restored) -> None:
    name = " ".join(found.command)
    output.text(f"Process {found.pid} runs on {host}: {name}")
    output.text(
        f"from the image of {found.created} ({found.source}), {found.chunks_verified} chunks"
        f" verified, {found.seconds:.2f} s"
    )
