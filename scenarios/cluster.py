"""Simulated hosts on this machine: a KFD node and an agent each, with a throwaway authority.

What runs is the product: nodes and agents are processes of their own, agents speak mTLS
over loopback, and may be killed and started again. The demo, the drills and the
integration tests stand on this.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import msgspec

from migrate.engine.runtime import HOST_ROOT, PTRACER
from migrate.inventory import HostEntry, Inventory, TlsFiles, load, to_toml
from migrate.model import HostPaths
from migrate.rpc.ca import Authority, Role, create_ca, issue
from scenarios.ports import free_port

READY_TIMEOUT = 120.0  # seconds for a node or an agent to be usable, on a machine that is busy
END_TIMEOUT = 20.0  # seconds for one to end after SIGTERM
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class AgentSetup:
    """How an agent differs from an ordinary one, for drills of what goes wrong.

    ``settings`` are keys of its configuration file, ``tls`` its certificate instead of one
    of the throwaway authority, ``prelude`` Python that its process runs first,
    ``environment`` what is added to its environment.
    """

    settings: Mapping[str, object] = field(default_factory=dict)
    tls: TlsFiles | None = None
    prelude: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass
class SimulatedHost:
    """One host: its folder, its node, and its agent while that runs."""

    name: str
    root: Path
    node: subprocess.Popen[bytes]
    agent: subprocess.Popen[bytes] | None = None
    address: str = ""
    setup: AgentSetup = AgentSetup()

    @property
    def paths(self) -> HostPaths:
        """Where things of this host are."""
        return HostPaths.under(self.root)


@dataclass
class Cluster:
    """Any number of simulated hosts. Use it as a context manager: it ends what it started."""

    folder: Path
    names: tuple[str, ...] = ("a", "b", "c", "d")  # hosts whose agents may send to each other
    hosts: dict[str, SimulatedHost] = field(default_factory=dict)
    ready_timeout: float = READY_TIMEOUT
    _processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    _own_folder: bool = False

    @classmethod
    def temporary(cls) -> Self:
        """A cluster in a folder of its own; a short path, because sockets want one."""
        cluster = cls(Path(tempfile.mkdtemp(prefix="mig-")))
        cluster._own_folder = True
        return cluster

    def __enter__(self) -> Self:
        self._authority = create_ca(self.folder / "ca")
        self._operator = self.certificate("operator", Role.OPERATOR)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for process in reversed(self._processes):
            end(process)
        if self._own_folder:
            shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def authority(self) -> Authority:
        """The throwaway authority."""
        return self._authority

    @property
    def inventory(self) -> Path:
        """The inventory file, with every host whose agent was ever started."""
        return self.folder / "hosts.toml"

    @property
    def admin_inventory(self) -> Path:
        """The same hosts, seen by somebody who may `migrate resolve`, too."""
        path = self.folder / "admin.toml"
        hosts = load(self.inventory).hosts
        path.write_text(to_toml(Inventory(tls=self.certificate("admin", Role.ADMIN), hosts=hosts)))
        return path

    def certificate(self, name: str, role: Role) -> TlsFiles:
        """A certificate for loopback, of the throwaway authority."""
        return issue(self._authority, name, role, self.folder / "tls", hosts=[LOOPBACK])

    # ------------------------------------------------------------ hosts

    def add_host(
        self,
        name: str,
        profile: str = "mi210x2",
        *,
        slot_offset: int | None = None,
        node_options: Sequence[str] = (),
        allow_unprivileged: bool = True,
        setup: AgentSetup | None = None,
    ) -> SimulatedHost:
        """Start a node and its agent. Other slots give other gpu_ids on each host.

        *allow_unprivileged* False: its KFD wants CAP_CHECKPOINT_RESTORE, as a kernel does.
        """
        self.add_node(
            name,
            profile,
            slot_offset=slot_offset,
            node_options=node_options,
            allow_unprivileged=allow_unprivileged,
        )
        return self.start_agent(name, setup)

    def add_node(
        self,
        name: str,
        profile: str = "mi210x2",
        *,
        slot_offset: int | None = None,
        node_options: Sequence[str] = (),
        allow_unprivileged: bool = True,
    ) -> SimulatedHost:
        """Start a node alone: its agent is somebody else's."""
        offset = len(self.hosts) * 3 if slot_offset is None else slot_offset
        root = self.folder / name
        node = self._start(
            [
                "-m", "migrate.kfd.sim",
                "--root", str(root),
                "--profile", profile,
                "--slot-offset", str(offset),
                *(("--allow-unprivileged",) if allow_unprivileged else ()),
                *node_options,
            ],
            self.folder / f"{name}.node.log",
        )  # fmt: skip
        host = SimulatedHost(name, root, node)
        self.hosts[name] = host
        return host

    def start_agent(self, name: str, setup: AgentSetup | None = None) -> SimulatedHost:
        """Start the agent of a host, or start it again on the same journal and port.

        A *setup* holds for later starts, too.
        """
        host = self.hosts[name]
        host.setup = setup or host.setup
        config = self.folder / f"{name}.toml"
        config.write_text(self._config(host))
        program = ["-m", "migrate"]
        if host.setup.prelude:
            program = ["-c", f"{host.setup.prelude}\nfrom migrate.cli.main import main\nmain()"]
        host.agent = self._start(
            [*program, "agent", "serve", "--config", str(config)],
            self.folder / f"{name}.agent.log",
            host.setup.environment,
        )
        host.address = self._ready.strip().decode()
        self._write_inventory()
        return host

    def kill_agent(self, name: str, number: int = signal.SIGKILL) -> None:
        """Send a signal to an agent and wait until it is gone."""
        agent = self.hosts[name].agent
        assert agent is not None
        agent.send_signal(number)
        agent.wait(self.ready_timeout)

    def remove_host(self, name: str) -> None:
        """End a host's agent, and its node if no other host stands on it."""
        host = self.hosts.pop(name)
        if host.agent is not None:
            end(host.agent)
        if all(other.node is not host.node for other in self.hosts.values()):
            end(host.node)
        self._write_inventory()

    def workload(
        self, host: str, command: Sequence[str], *, output: IO[bytes] | int = subprocess.DEVNULL
    ) -> subprocess.Popen[bytes]:
        """Start a program on a host, as its user would: it knows the host's paths alone."""
        environment = {
            **os.environ,
            HOST_ROOT: str(self.hosts[host].root),
            PTRACER: str(os.getpid()),  # our descendants, the agents among them, may trace it
        }
        process = subprocess.Popen(
            [sys.executable, *command],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            # Not ours: a copy opens its files anew, and may not have the right to open ours.
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._processes.append(process)
        return process

    # ------------------------------------------------------------ inside

    def _config(self, host: SimulatedHost) -> str:
        tls = host.setup.tls or self.certificate(host.name, Role.AGENT)
        values: dict[str, object] = {
            "name": host.name,
            "listen": host.address or f"{LOOPBACK}:{free_port()}",
            "data_listen": f"{LOOPBACK}:0",
            "root": str(host.root),
            "allow_from": [name for name in self.names if name != host.name],
            **host.setup.settings,
        }
        lines = [f"{key} = {msgspec.json.encode(value).decode()}" for key, value in values.items()]
        lines.append("[tls]")
        lines += [f'{key} = "{value}"' for key, value in msgspec.structs.asdict(tls).items()]
        return "\n".join(lines) + "\n"

    def _write_inventory(self) -> None:
        entries = {h.name: HostEntry(address=h.address) for h in self.hosts.values() if h.address}
        self.inventory.write_text(to_toml(Inventory(tls=self._operator, hosts=entries)))

    def _start(
        self, arguments: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start one of our programs and wait until it says that it is usable."""
        reader, writer = os.pipe()
        with log.open("ab") as stream:
            process = subprocess.Popen(
                [sys.executable, *arguments, "--ready-fd", str(writer)],
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                pass_fds=[writer],
                start_new_session=True,
                env={**os.environ, **(environment or {})},
            )
        self._processes.append(process)
        os.close(writer)
        try:
            readable, _, _ = select.select([reader], [], [], self.ready_timeout)
            self._ready = os.read(reader, 256) if readable else b""
        finally:
            os.close(reader)
        if not self._ready:
            _tell_stacks(process)
            end(process)  # it holds its host's lock: the next one must not meet it
            raise RuntimeError(f"{' '.join(arguments[:4])} did not start:\n{log.read_text()}")
        return process


def _tell_stacks(process: subprocess.Popen[bytes]) -> None:
    """Have one that is alive and not ready write where its threads are: see agents.daemon."""
    if process.poll() is None and "agent" in process.args:  # type: ignore[operator]
        process.send_signal(signal.SIGUSR1)
        time.sleep(1.0)


def end(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM, then SIGKILL; also for one that is stopped."""
    if process.poll() is None:
        process.terminate()
        process.send_signal(signal.SIGCONT)
        try:
            process.wait(END_TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    for stream in (process.stdout, process.stderr):
        if stream is not None:
            stream.close()


def wait_until(condition: object, timeout: float = 100.0, what: str = "the condition") -> None:
    """Wait for a callable to be true. Raises TimeoutError."""
    assert callable(condition)
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout} s for {what}")
        time.sleep(0.02)


def steps_logged(log: Path) -> int:
    """Steps of a training job by its log, a line each; 0 while there is none."""
    try:
        return log.read_bytes().count(b"\n")
    except OSError:
        return 0
