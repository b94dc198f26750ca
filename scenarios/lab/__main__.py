"""``python -m scenarios.lab``: build, up, shell, run, test, log, network, down."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import click

from migrate.errors import MigrateError
from scenarios.lab import build as builder
from scenarios.lab import conformance
from scenarios.lab.cluster import LabCluster
from scenarios.lab.host import FIRST_SLOT, Host, HostSpec
from scenarios.lab.layout import Layout

HOSTS = click.Choice(sorted(FIRST_SLOT))


def say(line: str) -> None:
    """A line for the person, at once."""
    click.echo(line)
    sys.stdout.flush()


def start(layout: Layout, spec: HostSpec) -> Host:
    """Boot the host of *spec*, which must be down."""
    host = Host(layout, spec.name)
    started = time.monotonic()
    host.start(spec)
    say(f"host {spec.name} with {spec.gpus} GPUs is up after {time.monotonic() - started:.0f} s")
    return host


@click.group()
def main() -> None:
    """Virtual GPU hosts with the real amdkfd driver (docs/lab.md)."""


@main.command()
def build() -> None:
    """Build what is missing: kernel, software GPU, disk. Needs root."""
    builder.build(Layout.default(), say)


@main.command()
@click.argument("names", nargs=-1, type=HOSTS)
@click.option("--gpus", default=2, show_default=True, help="GPUs of each host, 0 to 8.")
@click.option("--vram", default=256, show_default=True, help="MiB of VRAM of each GPU.")
@click.option("--memory", default=1536, show_default=True, help="MiB of memory of each host.")
@click.option("--cpus", default=2, show_default=True, help="CPUs of each host.")
def up(names: tuple[str, ...], gpus: int, vram: int, memory: int, cpus: int) -> None:
    """Boot hosts a and b, or those named. Builds first if needed."""
    layout = Layout.default()
    builder.build(layout, say)
    for name in names or tuple(sorted(FIRST_SLOT)):
        spec = HostSpec(name=name, gpus=gpus, vram_mb=vram, memory_mb=memory, cpus=cpus)
        start(layout, spec)


@main.command()
@click.argument("name", type=HOSTS, default="a")
def shell(name: str) -> None:
    """A root shell on a host; the project is in /opt/project."""
    host = Host(Layout.default(), name)
    conformance.install_project(host)
    command = host.ssh_command("cd /opt/project && exec bash -i", terminal=True)
    os.execvp(command[0], command)  # noqa: S606


@main.command(context_settings={"ignore_unknown_options": True})
@click.argument("name", type=HOSTS)
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def run(name: str, command: tuple[str, ...]) -> None:
    """Run a shell command on a host; ends with its status."""
    line = Host(Layout.default(), name).ssh_command(*command)
    sys.exit(subprocess.run(line, check=False).returncode)


@main.command()
@click.argument("name", type=HOSTS, default="a")
def log(name: str) -> None:
    """The kernel log of a host."""
    say(Host(Layout.default(), name).kernel_log())


@main.command()
@click.argument("name", type=HOSTS)
@click.argument("state", type=click.Choice(["up", "down"]))
def network(name: str, state: str) -> None:
    """Plug or pull a host's cable on the network between the hosts."""
    Host(Layout.default(), name).set_network(state == "up")


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
def agents(folder: Path) -> None:
    """Start agents on the hosts that are up; FOLDER gets hosts.toml for `migrate`."""
    layout = Layout.default()
    cluster = LabCluster(layout, folder)
    for name in sorted(FIRST_SLOT):
        host = Host(layout, name)
        if host.running:
            cluster.adopt(host)
            say(f"the agent of host {name} answers")
    say(f"migrate --inventory {cluster.inventory} ps a")


@main.command()
@click.argument("names", nargs=-1, type=HOSTS)
def down(names: tuple[str, ...]) -> None:
    """Switch hosts off; what they wrote is gone."""
    for name in names or tuple(sorted(FIRST_SLOT)):
        Host(Layout.default(), name).stop()


@main.command(context_settings={"ignore_unknown_options": True})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def test(arguments: tuple[str, ...]) -> None:
    """Run tests/conformance on the real driver, with ARGUMENTS for pytest; from nothing."""
    layout = Layout.default()
    builder.build(layout, say)
    host = Host(layout, "a")
    host.stop()
    start(layout, HostSpec(name="a"))
    try:
        passed = conformance.run(host, arguments, say)
    finally:
        host.stop()
    say(f"{len(passed)} passed on the real amdkfd; the kernel log is clean")


if __name__ == "__main__":
    try:
        main()
    except MigrateError as error:
        click.echo(f"{error}\n{error.hint}", err=True)
        sys.exit(error.exit_code)
