"""Agents on the hosts of the lab, and an inventory to command them from outside.

Each agent runs in its guest as on any machine: /dev/kfd, CRIU, the hook, mTLS. It is
dialled through a port that QEMU forwards; the agents dial each other on the network between
the guests. Their authority is a throwaway.

    with LabCluster(Layout.default()) as lab:
        lab.add_host(HostSpec(name="a"))
        lab.add_host(HostSpec(name="b"))
        pid = lab.spawn("a", "python3 -m tests.lab.gpu_program /tmp/counter")
        report = lab.migrate("a", "b", pid)

or, on hosts that are up: ``python -m scenarios.lab agents``.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec

from migrate.inventory import HostEntry, Inventory, TlsFiles, to_toml
from migrate.rpc.ca import Role, create_ca, issue, load_ca
from scenarios.lab import conformance
from scenarios.lab.host import AGENT_PORT, FIRST_SLOT, Host, HostSpec
from scenarios.lab.layout import LabError, Layout

CONFIG = "/etc/migrate"  # in the guest
LOG = "/var/log/migrate-agent.log"
PID_FILE = "/run/migrate-agent.pid"
SPAWNED = "/run/spawned"
READY = "/run/migrate-agent.ready"
START_SECONDS = 900.0  # an emulated guest compiles the hook and imports slowly
MIGRATE_SECONDS = 600.0


@dataclass
class LabCluster:
    """Hosts with agents. As a context manager it switches off the hosts that it started.

    ``settings`` are keys added to every agent's configuration file.
    """

    layout: Layout
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="mig-lab-")))
    settings: Mapping[str, object] = field(default_factory=dict)
    hosts: dict[str, Host] = field(default_factory=dict)
    _started: list[Host] = field(default_factory=list)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for host in self._started:
            host.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def inventory(self) -> Path:
        """Inventory file for commands on this machine; of hosts whose agent was started."""
        return self.folder / "hosts.toml"

    # ------------------------------------------------------------ hosts and agents

    def add_host(self, spec: HostSpec) -> Host:
        """Boot a host, install the project, start its agent."""
        host = Host(self.layout, spec.name)
        host.stop()
        host.start(spec)
        self._started.append(host)
        self.adopt(host)
        return host

    def adopt(self, host: Host) -> None:
        """As ``add_host`` for a host that is up; it is not switched off at the end."""
        conformance.install_project(host)
        self.hosts[host.name] = host
        self.start_agent(host.name)

    def start_agent(
        self,
        name: str,
        *,
        settings: Mapping[str, object] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Start the agent of a host (again), and wait until it answers."""
        self._launch(name, settings, environment)
        self._wait_ready(self.hosts[name])
        self.write_inventory()

    def start_agents(
        self,
        *,
        settings: Mapping[str, object] | None = None,
        environments: Mapping[str, Mapping[str, str]] | None = None,
    ) -> None:
        """The same for all hosts at once; *environments* by host."""
        for name in self.hosts:
            self._launch(name, settings, (environments or {}).get(name))
        for host in self.hosts.values():
            self._wait_ready(host)
        self.write_inventory()

    def _launch(
        self,
        name: str,
        settings: Mapping[str, object] | None,
        environment: Mapping[str, str] | None,
    ) -> None:
        host = self.hosts[name]
        files = self._tls(name, Role.AGENT, hosts=[host_address(name), "127.0.0.1"])
        self._push(host, files, {**self.settings, **(settings or {})})
        exports = " ".join(f"{k}={shlex.quote(v)}" for k, v in (environment or {}).items())
        host.ssh(
            f"rm -f {READY}; cd /opt/project; {exports} setsid sh -c"
            f" 'echo $$ > {PID_FILE}; exec python3 -m migrate agent serve"
            f" --config {CONFIG}/agent.toml --ready-fd 9 9> {READY}'"
            f" > /dev/null 2>> {LOG} < /dev/null &"
        )

    def kill_agent(self, name: str, number: int = 9) -> None:
        """Send a signal to an agent and wait until it is gone."""
        self.hosts[name].ssh(
            f"pid=$(cat {PID_FILE}); kill -{number} $pid 2>/dev/null;"
            " while kill -0 $pid 2>/dev/null; do sleep 0.05; done"
        )

    def write_inventory(self) -> None:
        """Of the hosts that are up, for an operator."""
        operator = self._tls("operator", Role.OPERATOR)
        entries = {}
        for name, host in self.hosts.items():
            running = host.running
            if running is not None:
                entries[name] = HostEntry(
                    address=f"127.0.0.1:{running.agent_port}",
                    peer_address=f"{host_address(name)}:{AGENT_PORT}",
                )
        self.inventory.write_text(to_toml(Inventory(tls=operator, hosts=entries)))

    def agent_log(self, name: str) -> str:
        """What a host's agent, its watchdog and helpers wrote."""
        return self.hosts[name].ssh(f"cat {LOG} 2>/dev/null || true")

    # ------------------------------------------------------------ programs and migrations

    def spawn(self, name: str, command: str, *, log: str = "/dev/null") -> int:
        """Start a shell line on a host in a session of its own; its pid.

        *log* is a file there for its output, which moves with the process only if the other
        host has a file of that path: /dev/null is on every host.
        """
        program = shlex.quote(f"echo $$ > {SPAWNED}; exec {command}")
        line = (
            f"rm -f {SPAWNED}; cd /opt/project; setsid sh -c {program} > {log} 2>&1 < /dev/null &"
            f" while [ ! -s {SPAWNED} ]; do sleep 0.02; done; cat {SPAWNED}"
        )
        return int(self.hosts[name].ssh(line))

    def command(self, *arguments: str) -> list[str]:
        """The command line of ``migrate`` on this machine with this inventory."""
        return [sys.executable, "-m", "migrate", "--inventory", str(self.inventory), *arguments]

    def run(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run ``migrate ARGUMENTS`` here. Raises LabError if it fails, unless *check* is False."""
        result = subprocess.run(
            self.command(*arguments),
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=MIGRATE_SECONDS,
            env={**os.environ, "NO_COLOR": "1"},
            check=False,
        )
        if check and result.returncode:
            raise LabError(
                f"migrate {' '.join(arguments)} ended with {result.returncode}:\n"
                f"{result.stdout}{result.stderr}"
            )
        return result

    def migrate(self, source: str, destination: str, pid: int, *options: str) -> dict[str, Any]:
        """``migrate run`` from outside; the report. Raises LabError if it did not complete."""
        result = self.run("--json", "run", source, destination, str(pid), *options)
        report: dict[str, Any] = json.loads(result.stdout)
        return report

    # ------------------------------------------------------------ inside

    def _tls(self, name: str, role: Role, *, hosts: Sequence[str] = ()) -> TlsFiles:
        folder = self.folder / "ca"
        authority = load_ca(folder) if folder.exists() else create_ca(folder)
        return issue(authority, name, role, self.folder / "tls", hosts=hosts)

    def _push(self, host: Host, files: TlsFiles, settings: Mapping[str, object]) -> None:
        stage = self.folder / f"push-{host.name}"
        stage.mkdir(exist_ok=True)
        for key, target in (("ca", "ca.pem"), ("cert", "agent.crt"), ("key", "agent.key")):
            shutil.copy(getattr(files, key), stage / target)
        values: dict[str, object] = {
            "name": host.name,
            "engine": "criu",
            "listen": f"0.0.0.0:{AGENT_PORT}",
            "advertise": f"{host_address(host.name)}:{AGENT_PORT}",
            "data_listen": "0.0.0.0:0",
            "data_advertise": "",
            "allow_from": [name for name in FIRST_SLOT if name != host.name],
            **settings,
        }
        lines = [f"{key} = {msgspec.json.encode(value).decode()}" for key, value in values.items()]
        lines += ["[tls]", 'ca = "ca.pem"', 'cert = "agent.crt"', 'key = "agent.key"']
        (stage / "agent.toml").write_text("\n".join(lines) + "\n")
        host.copy(".", source=stage, target=CONFIG)
        host.ssh(f"chmod 700 {CONFIG}; chmod 600 {CONFIG}/agent.key")

    def _wait_ready(self, host: Host) -> None:
        deadline = time.monotonic() + START_SECONDS
        look = f"for i in 1 2 3 4 5 6; do [ -s {READY} ] && echo yes && break; sleep 0.5; done"
        while not host.ssh(look):
            alive = host.ssh(f"kill -0 $(cat {PID_FILE}) 2>/dev/null && echo yes || true")
            if time.monotonic() > deadline or (host.ssh(f"ls {PID_FILE}") and not alive):
                raise LabError(
                    f"the agent of host {host.name} does not start:\n{self.agent_log(host.name)}"
                )


def host_address(name: str) -> str:
    """On the network between the hosts."""
    return HostSpec(name=name).address
