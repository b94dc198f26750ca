"""``migrate demo``: a real migration between two simulated hosts on this machine."""

from __future__ import annotations

import importlib

import click

from migrate.cli.settings import Settings
from migrate.errors import UsageError

UNITS = {"": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
SMALLEST = 8 << 20


class Size(click.ParamType[int]):
    """A number of bytes such as 256MiB."""

    name = "size"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        """See click."""
        if isinstance(value, int):
            return value
        text = str(value).strip().upper().removesuffix("B") + "B"
        digits = text.rstrip("BGIKM")
        unit = text[len(digits) :].replace("IB", "B").replace("B", "IB") if text != "B" else ""
        try:
            return int(digits) * UNITS[unit if unit != "IB" else ""]
        except (ValueError, KeyError):
            self.fail(f"{value!r} is not a size such as 256MiB", param, ctx)


@click.command("demo")
@click.option(
    "--vram",
    type=Size(),
    default="256MiB",
    show_default=True,
    help="VRAM of the workload, on two GPUs together.",
)
@click.option(
    "--steps",
    type=click.IntRange(min=4),
    default=2000,
    show_default=True,
    help="Training steps; the process is moved in the middle.",
)
@click.option("--profile", default="mi210x2", show_default=True, help="Machine of both hosts.")
@click.pass_obj
def demo_command(settings: Settings, vram: int, steps: int, profile: str) -> int:
    """Move a running training process between two simulated GPU hosts.

    Two hosts are started on this machine, each with a KFD node and an agent (mTLS with a
    throwaway authority); a workload computes on two GPUs of the first and is moved to the
    second while it runs. A twin that never moves must come to the same digest. Needs no
    GPU and no root.
    """
    if vram < SMALLEST:
        raise UsageError(f"--vram: the workload wants at least {SMALLEST >> 20} MiB")
    # scenarios is a layer above the command line: imported only when the demo is run.
    run = importlib.import_module("scenarios.demo").run
    return int(run(settings.output, vram=vram, steps=steps, profile=profile))
