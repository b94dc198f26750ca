"""``migrate agent deploy``: agents on hosts, by SSH."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import click
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from migrate.cli.output import Output
from migrate.cli.settings import Settings
from migrate.client import Client
from migrate.deploy.deploy import Deployment, Outcome, Service, Wanted, failed, first_error
from migrate.deploy.ssh import load_config
from migrate.errors import MigrateError
from migrate.rpc.ca import load_ca

SCHEMA = "migrate.deploy/1"
FOLDER = click.Path(file_okay=False, path_type=Path)


@click.command("deploy")
@click.argument("hosts", nargs=-1, required=True, metavar="HOST...")
@click.option("--ca", type=FOLDER, help="The authority's folder; needed for a new certificate.")
@click.option("--allow-from", metavar="HOST,...", default="", help="Whose processes may come.")
@click.option(
    "--engine",
    default="",
    help="Process engine (default: criu where the host has all it needs, else reexec).",
)
@click.option("--metrics-listen", default="", metavar="HOST:PORT", help="Prometheus endpoint.")
@click.option("--prefix", default=Wanted().prefix, show_default=True, help="Where it goes.")
@click.option("--root", default="", help="Folder of a simulated host.")
@click.option(
    "--service",
    type=click.Choice([service.value for service in Service]),
    help="Who starts the agent: systemd, nobody after a reboot (background), or you (none)."
    " Default: systemd where it is.",
)
@click.option("--no-hook", is_flag=True, help="Do not build the hook inside CRIU.")
@click.option("--user", default="", help="Log in as (default: as in ssh_config).")
@click.option("--python", default="python3", show_default=True, help="Python of the hosts.")
@click.option(
    "--ssh-config",
    type=click.Path(dir_okay=False, path_type=Path),
    help="ssh_config (default: ~/.ssh/config).",
)
@click.option("--cache", type=FOLDER, help="Where wheels are kept (default: ~/.cache/migrate).")
@click.option("--at-once", type=click.IntRange(1, 64), default=8, show_default=True, help="Hosts.")
@click.option("--remove", is_flag=True, help="Stop and remove the agents; processes run on.")
@click.option("--purge", is_flag=True, help="With --remove: also journal, key and certificate.")
@click.pass_obj
def deploy_command(
    settings: Settings,
    hosts: tuple[str, ...],
    *,
    ca: Path | None,
    allow_from: str,
    engine: str,
    metrics_listen: str,
    prefix: str,
    root: str,
    service: str | None,
    no_hook: bool,
    user: str,
    python: str,
    ssh_config: Path | None,
    cache: Path | None,
    at_once: int,
    remove: bool,
    purge: bool,
) -> int:
    """Install, upgrade or remove the agents of HOSTs of the inventory, by SSH.

    A host is checked first (Python, disk, clock, kfd) and changed only if it is fit. It needs
    no internet: wheels are fetched here. Its key is made there and stays there; --ca signs it.
    Done twice, nothing changes. Hosts must be in known_hosts: none is added. In --prefix and
    --root, {host} is the host's name.
    """
    wanted = Wanted(
        prefix=prefix.rstrip("/"),
        service=Service(service) if service else None,
        allow_from=tuple(name.strip() for name in allow_from.split(",") if name.strip()),
        engine=engine,
        root=root,
        metrics_listen=metrics_listen,
        hook=not no_hook,
        user=user,
        python=python,
    )
    authority = load_ca(ca) if ca is not None else None
    config = load_config(ssh_config)
    names = tuple(dict.fromkeys(hosts))
    shown = _Progress(settings.output, names)
    with Client(settings.inventory) as client:
        for name in names:
            client.inventory.host(name)

        def one(name: str) -> Outcome:
            try:
                deployment = Deployment(
                    client,
                    name,
                    wanted,
                    config=config,
                    ca=authority,
                    cache=cache,
                    say=lambda step: shown.say(name, step),
                )
                return deployment.remove(purge=purge) if remove else deployment.run()
            except MigrateError as error:
                shown.say(name, error.reason)
                return failed(name, error)

        with shown.live, ThreadPoolExecutor(at_once) as pool:
            outcomes = list(pool.map(one, names))
    _show(settings.output, outcomes)
    return first_error(outcomes)


class _Progress:
    """A line a host, redrawn on a terminal; elsewhere a note for each step."""

    def __init__(self, output: Output, names: tuple[str, ...]) -> None:
        self._output = output
        self._lock = threading.Lock()
        self._steps = dict.fromkeys(names, "waiting")
        console = output.stderr
        console.soft_wrap = False
        self._drawn = console.is_terminal and not output.json
        self.live: Live | nullcontext[None] = (
            Live(console=console, get_renderable=self.table, refresh_per_second=4)
            if self._drawn
            else nullcontext()
        )

    def say(self, name: str, step: str) -> None:
        """A host has come to a step."""
        with self._lock:
            self._steps[name] = step
        if not self._drawn and not step.startswith("uploading"):
            self._output.note(f"{name}: {step}")

    def table(self) -> Table:
        """As it is now."""
        table = Table(box=None, pad_edge=False, show_edge=False, header_style="dim")
        table.add_column("HOST")
        table.add_column("STEP")
        with self._lock:
            for name, step in self._steps.items():
                table.add_row(escape(name), escape(step))
        return table


def _show(output: Output, outcomes: list[Outcome]) -> None:
    if output.json:
        output.document({"schema": SCHEMA, "hosts": outcomes})
        return
    output.table(
        ("HOST", "RESULT", "RELEASE", "CHANGED"),
        (
            (
                outcome.host,
                "ok" if outcome.error is None else outcome.error["reason"],
                outcome.release or "-",
                ", ".join(outcome.changed) or "nothing",
            )
            for outcome in outcomes
        ),
    )
    for outcome in outcomes:
        for warning in outcome.warnings:
            output.note(f"{outcome.host}: {warning}")
        if outcome.start:
            output.text(f"{outcome.host}: start it by: {outcome.start}")
        if outcome.error is not None:
            output.text(f"{outcome.host}: {outcome.error['message']}")
            output.text(str(outcome.error["advice"]))
