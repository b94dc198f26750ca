"""What the options that every command takes have set."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any, TextIO

import click

from migrate import inventory
from migrate.cli.output import Output
from migrate.inventory import Inventory


class Settings:
    """The object of the click context: ``@click.pass_obj`` hands it to a command."""

    def __init__(self) -> None:
        self.output = Output()
        self.inventory_path: str | None = None
        self._inventory: Inventory | None = None

    @property
    def inventory(self) -> Inventory:
        """The inventory, read when it is first needed. Raises UsageError."""
        if self._inventory is None:
            self._inventory = inventory.load(self.inventory_path or inventory.default_path())
        return self._inventory


def shared_options() -> list[click.Option]:
    """--inventory, --json and -v, which work before and after a command's name."""
    return [
        click.Option(
            ["--inventory"],
            metavar="FILE",
            expose_value=False,
            callback=_setter(_set_inventory),
            help="Inventory (default: $MIGRATE_INVENTORY, or ~/.config/migrate/hosts.toml).",
        ),
        click.Option(
            ["--json"],
            is_flag=True,
            is_eager=True,
            expose_value=False,
            callback=_setter(_set_json),
            help="Print one JSON document and nothing else.",
        ),
        click.Option(
            ["-v", "--verbose"],
            count=True,
            is_eager=True,
            expose_value=False,
            callback=_setter(_set_verbose),
            help="Log more to stderr; twice for debugging.",
        ),
    ]


def add_shared_options(command: click.Command) -> None:
    """Give a command, and each command below it, the options it does not define itself."""
    taken = {name for parameter in command.params for name in parameter.opts}
    for option in shared_options():
        if taken.isdisjoint(option.opts):
            command.params.append(option)
    if isinstance(command, click.Group):
        for child in command.commands.values():
            add_shared_options(child)


def _setter(apply: Callable[[Settings, Any], None]) -> Callable[..., None]:
    def callback(context: click.Context, parameter: click.Parameter, value: Any) -> None:
        # The default must not undo what was given before the command's name.
        if value:
            apply(context.ensure_object(Settings), value)

    return callback


def _set_inventory(settings: Settings, value: str) -> None:
    settings.inventory_path = value


def _set_json(settings: Settings, value: bool) -> None:
    settings.output.json = value


def _set_verbose(settings: Settings, value: int) -> None:
    settings.output.verbose = value
    configure_logging(value)


class _Stderr(logging.StreamHandler[TextIO]):
    """Writes to what sys.stderr is at that moment, as print() does."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)
        self.setFormatter(
            logging.Formatter("%(asctime)s %(levelname)s %(threadName)s %(name)s: %(message)s")
        )

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


def configure_logging(verbose: int) -> None:
    """Log to stderr: warnings, with 1 what we do, with 2 everything, libraries too."""
    root = logging.getLogger()
    if not any(isinstance(handler, _Stderr) for handler in root.handlers):
        root.addHandler(_Stderr())
    root.setLevel(logging.DEBUG if verbose > 1 else logging.WARNING)
    ours = (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    for package in ("migrate", "agents", "scenarios"):
        logging.getLogger(package).setLevel(ours)
