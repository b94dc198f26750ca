"""Where drills are played: two simulated hosts with a wire of ours between their agents."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from migrate import faults
from migrate.errors import MigrateError, UsageError
from migrate.inventory import HostEntry, Inventory, to_toml
from migrate.journal import Record, read_records
from migrate.rpc.ca import Role
from scenarios.cluster import LOOPBACK, AgentSetup, Cluster, SimulatedHost
from scenarios.drills.proxy import Proxy
from scenarios.ports import free_port

HOSTS: Mapping[str, str] = {"source": "a", "destination": "b"}
SHIM = Path(__file__).with_name("shim.c")


@dataclass
class Side:
    """One host, the wires to its agent, and the port where that really listens."""

    host: SimulatedHost
    control: Proxy
    data: Proxy
    port: int

    @property
    def journal(self) -> Path:
        """The agent's journal."""
        return self.host.root / "run" / "journal.db"

    @property
    def kernel_log(self) -> Path:
        """What the node would have logged, or oopsed with: of all drills of the stage."""
        return self.host.root / "run" / "kernel.log"

    @property
    def agent(self) -> subprocess.Popen[bytes]:
        """The agent's process."""
        assert self.host.agent is not None
        return self.host.agent

    def records(self) -> list[Record]:
        """What the journal holds; nothing while it can't be read."""
        try:
            return read_records(self.journal)
        except MigrateError:
            return []


class Stage:
    """Two hosts, a and b. Use it as a context manager."""

    def __init__(self) -> None:
        self.cluster = Cluster.temporary()
        self.sides: dict[str, Side] = {}
        self._armed: set[str] = set()
        self.spoiled = False  # a drill left something that the next one must not meet

    @property
    def folder(self) -> Path:
        """Everything of this stage lies here."""
        return self.cluster.folder

    @property
    def inventory(self) -> Path:
        """For the command line: a directly, b by its wire, as a's agent dials it."""
        return self.folder / "drill.toml"

    def __enter__(self) -> Self:
        self.cluster.__enter__()
        try:
            for side, name in HOSTS.items():
                self._add(side, name)
            self._write_inventory()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for side in self.sides.values():
            side.control.close()
            side.data.close()
        self.cluster.__exit__(kind, error, trace)

    def _add(self, side: str, name: str) -> None:
        port, data_port = free_port(), free_port()
        control, data = Proxy(port), Proxy(data_port)
        self._settings = {
            "listen": f"{LOOPBACK}:{port}",
            "advertise": f"{LOOPBACK}:{control.port}",
            "data_listen": f"{LOOPBACK}:{data_port}",
            "data_advertise": f"{LOOPBACK}:{data.port}",
        }
        host = self.cluster.add_host(name, setup=AgentSetup(settings=self._settings))
        self.sides[side] = Side(host, control, data, port)

    def _write_inventory(self) -> None:
        """The operator's own certificate, and where he finds the agents."""
        files = self.cluster.certificate("drill", Role.OPERATOR)
        source, destination = self.sides["source"], self.sides["destination"]
        entries = {
            "a": HostEntry(address=f"{LOOPBACK}:{source.port}"),
            "b": HostEntry(address=f"{LOOPBACK}:{destination.control.port}"),
        }
        self.inventory.write_text(to_toml(Inventory(tls=files, hosts=entries)))

    # ------------------------------------------------------------ agents

    def arm(self, side: str, specification: str, *, shim: bool = False) -> None:
        """An agent with these fault points; the one that is there serves if there are none.

        *shim*: its wall clock can be made to jump, and its disk to be full.
        """
        plain = not specification and not shim and side not in self._armed
        if plain and self.sides[side].agent.poll() is None:
            return
        environment = {faults.VARIABLE: specification}
        if shim:
            environment |= {
                "LD_PRELOAD": str(self._shim()),
                "MIGRATE_DRILL_CLOCK": self.clock(side),
                "MIGRATE_DRILL_DISK": self.disk(side),
            }
        self.restart(side, environment)
        if specification or shim:
            self._armed.add(side)

    def restart(self, side: str, environment: Mapping[str, str] | None = None) -> None:
        """A new agent; one that still runs is killed first."""
        found = self.sides[side]
        if found.agent.poll() is None:
            found.agent.kill()
            found.agent.wait()
        name = HOSTS[side]
        settings = self.cluster.hosts[name].setup.settings
        self.cluster.start_agent(name, AgentSetup(settings=settings, environment=environment or {}))
        self._armed.discard(side)

    def clock(self, side: str) -> str:
        """The file that holds the seconds by which a side's wall clock is off."""
        return str(self.folder / f"{side}.clock")

    def disk(self, side: str) -> str:
        """The file whose presence means that a side's disk is full."""
        return str(self.folder / f"{side}.full")

    def _shim(self) -> Path:
        built = self.folder / "shim.so"
        if not built.exists():
            compiler = shutil.which("cc") or shutil.which("gcc")
            if compiler is None:
                raise UsageError("a clock that jumps and a disk that is full need a C compiler")
            subprocess.run(
                [compiler, "-shared", "-fPIC", "-O2", "-o", str(built), str(SHIM)], check=True
            )
        return built

    def log_size(self, side: str) -> int:
        """Bytes that an agent has written to its log."""
        return self._log(side).stat().st_size

    def announced(self, side: str, offset: int, point: str) -> bool:
        """Whether an agent has said since *offset* that *point* has come."""
        with self._log(side).open("rb") as log:
            log.seek(offset)
            return f"{faults.ANNOUNCEMENT} {point}:".encode() in log.read()

    def log_tail(self, side: str, offset: int) -> str:
        """What an agent has logged since."""
        with self._log(side).open("rb") as log:
            log.seek(offset)
            return log.read().decode(errors="replace")

    def _log(self, side: str) -> Path:
        return self.folder / f"{HOSTS[side]}.agent.log"


def last_state(records: list[Record], migration: str, kind: str) -> str:
    """The newest state that a journal has of a migration, "" without any."""
    for record in reversed(records):
        if record.migration == migration and record.kind == kind:
            return str(msgspec.json.decode(record.data)["state"])
    return ""


def processes_of(needle: str) -> dict[int, str]:
    """Command lines of all processes that name *needle*, by pid; zombies have none."""
    found = {}
    for entry in os.listdir("/proc"):
        if not entry.isdecimal() or int(entry) == os.getpid():
            continue
        try:
            line = Path(f"/proc/{entry}/cmdline").read_bytes().replace(b"\0", b" ").decode()
        except (OSError, UnicodeDecodeError):
            continue
        if needle in line:
            found[int(entry)] = line.strip()
    return found
