"""What `migrate run` and `migrate check` take alike: which process, where to, and how."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import click

Command: TypeAlias = Callable[..., Any]

_ARGUMENTS: Sequence[Callable[[Command], Command]] = (
    click.argument("source", metavar="SRC"),
    click.argument("destination", metavar="DST"),
    click.argument("pid", type=click.IntRange(min=1)),
)
_LEEWAY: Sequence[Callable[[Command], Command]] = (
    click.option(
        "--gpu-map",
        default="",
        metavar="OLD=NEW,...",
        help="Which GPU goes where (default: the best map is searched).",
    ),
    click.option(
        "--tcp-close",
        is_flag=True,
        help="Open TCP connections are no obstacle: the copy finds them closed, and so do those at"
        " the other end. Only with the engine criu.",
    ),
    click.option(
        "--copy-file",
        "copy_files",
        multiple=True,
        metavar="GLOB",
        help="Send files of the process whose path matches (a * also stands for slashes) where the"
        " destination has none or another one, which is replaced. Only with the engine criu.",
    ),
    click.option("--relax", multiple=True, metavar="RULE", help="Leave out one topology rule."),
)


def move_arguments(command: Command) -> Command:
    """Arguments SRC, DST and PID."""
    return _with(_ARGUMENTS, command)


def leeway(command: Command) -> Command:
    """Options that choose a GPU map, or lift an obstacle."""
    return _with(_LEEWAY, command)


def _with(parameters: Sequence[Callable[[Command], Command]], command: Command) -> Command:
    for parameter in reversed(parameters):  # decorators apply from the last to the first
        command = parameter(command)
    return command
