"""What tests see of a migration from outside: journals, processes, and who could run."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, Self

import msgspec

from migrate.engine import procfs
from migrate.errors import NoSuchProcess
from migrate.model import HostPaths
from scenarios.cluster import Cluster, SimulatedHost, wait_until
from tests.integration.jobs import migrate

PATIENCE = 100.0  # seconds for something to come about; nothing is measured by it


class HasPaths(Protocol):
    """A host of any of the test rigs."""

    @property
    def paths(self) -> HostPaths: ...


def records(host: HasPaths, migration: str, kind: str) -> list[dict[str, Any]]:
    """The journal's records of a kind, oldest first, read beside the agent."""
    rows = _select(
        host, "SELECT data FROM records WHERE migration = ? AND kind = ?", migration, kind
    )
    return [msgspec.json.decode(row[0]) for row in rows]


def _select(host: HasPaths, query: str, *values: object) -> list[Any]:
    path = Path(host.paths.run) / "journal.db"
    database = sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=10)
    try:
        return database.execute(f"{query} ORDER BY seq", values).fetchall()
    finally:
        database.close()


def keyed(host: HasPaths, key: str) -> str:
    """The migration that was started with an idempotency key, once it was."""
    found: list[str] = []

    def look() -> list[str]:
        query = "SELECT migration FROM records WHERE kind = 'key' AND data = ?"
        found.extend(row[0] for row in _select(host, query, msgspec.json.encode(key)))
        return found

    wait_until(look, PATIENCE, f"a migration of key {key}")
    return found[0]


def states(host: HasPaths, migration: str, side: str) -> list[str]:
    """The states of one side, oldest first."""
    return [record["state"] for record in records(host, migration, side)]


def wait_state(host: HasPaths, migration: str, side: str, *wanted: str) -> None:
    """Wait until a state was journaled."""
    wait_until(
        lambda: set(wanted) & set(states(host, migration, side)),
        PATIENCE,
        f"{side} of {migration} to be {' or '.join(wanted)}",
    )


def copy_pid(host: HasPaths, migration: str) -> int | None:
    """The pid of the copy at the destination, once it was built."""
    found = records(host, migration, "copy")
    return int(found[-1]["process"]["pid"]) if found else None


def kill_agent(host: SimulatedHost) -> None:
    """kill -9."""
    assert host.agent is not None
    host.agent.kill()
    host.agent.wait()


def is_runnable(pid: int | None) -> bool:
    """Whether a process exists and is not stopped as a whole.

    A tracer's stop is a moment of a running process. One that was killed is woken to die and
    makes no step of its own any more.
    """
    if pid is None:
        return False
    with contextlib.suppress(OSError, NoSuchProcess):
        if procfs.is_ending(procfs.reference(pid)):
            return False
        states = []
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):
                states.append((thread / "stat").read_text().rpartition(")")[2].split()[0])
        return any(state not in "TtZX" for state in states)
    return False


def is_stopped(pid: int) -> bool:
    """Whether it is stopped as by SIGSTOP."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    return False


def is_there(pid: int | None) -> bool:
    """Whether it exists and is no zombie."""
    if pid is None:
        return False
    with contextlib.suppress(Exception):
        return procfs.is_alive(procfs.reference(pid))
    return False


def cpu_time(pid: int) -> int:
    """utime + stime in clock ticks (proc(5), fields 14 and 15)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def words_at(pid: int, addresses: Iterable[int]) -> dict[int, int]:
    """The 64-bit words of a process at *addresses*."""
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        return {
            address: int.from_bytes(os.pread(memory.fileno(), 8, address), "little")
            for address in addresses
        }


def shared_memory(pid: int) -> bytes:
    """All that a process maps shared and writable: its buffers, which its GPUs write."""
    found = bytearray()
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            span, rights = line.split()[:2]
            if rights == "rw-s":
                first, end = (int(word, 16) for word in span.split("-"))
                memory.seek(first)
                found += memory.read(end - first)
    assert found
    return bytes(found)


@dataclass
class Watcher:
    """Looks at both copies all the time: never two that run, never none that is left.

    A process that is being killed is woken to die, so an alarm needs two looks in a row.
    """

    source: int
    destination: HasPaths
    migration: str
    both: list[str] = field(default_factory=list)
    neither: list[str] = field(default_factory=list)
    looks: int = 0
    _ran: bool = False

    def __enter__(self) -> Self:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            self.look()

    def look(self) -> None:
        """One look.

        The source is looked at first: when it is gone, the journal has told of its copy before,
        however long this look takes. A journal that can't be read now says nothing.
        """
        self.looks += 1
        gone = not is_there(self.source)
        try:
            copy = copy_pid(self.destination, self.migration)
            reached = states(self.destination, self.migration, "destination")
        except sqlite3.Error:
            return
        if gone and not is_there(copy):
            self.neither.append("neither copy exists")
        # Before PREPARED the copy's own interpreter runs, and nothing of the program.
        if "PREPARED" not in reached:
            return
        runs = is_runnable(self.source) and is_runnable(copy)
        if runs and self._ran:
            self.both.append("both copies run")
        self._ran = runs

    def check(self) -> None:
        """Raises AssertionError if an invariant was broken at any look."""
        assert self.looks
        assert not self.both, self.both[0]
        assert not self.neither, self.neither[0]


def started(cluster: Cluster, *arguments: str) -> str:
    """The id of a migration that was started and is not waited for.

    An agent that stops at the first moment of it may not have answered: its journal tells.
    """
    source = cluster.hosts[arguments[0]]
    before = migrations(source)
    outcome = migrate(cluster, "run", *arguments, "--no-wait")
    if outcome.code:
        assert outcome.document["error"]["reason"] == "AGENT_UNREACHABLE", outcome.document
    (found,) = migrations(source) - before
    assert outcome.code or found == outcome.document["id"]
    return found


def at_rest(cluster: Cluster, host: str, pid: int) -> None:
    """Wait until the agent has done with the migration of a process: it may be asked anew."""

    def rests() -> bool:
        rows = migrate(cluster, "ps", host).document["processes"]
        return not any(row["migration"] for row in rows if row["pid"] == pid)

    wait_until(rests, PATIENCE, f"the migration of {pid} to be over")


def migrations(host: HasPaths) -> set[str]:
    """The ids of all that its journal knows."""
    return {row[0] for row in _select(host, "SELECT migration FROM records")}


def ended(source: SimulatedHost, migration: str) -> dict[str, Any]:
    """The report, once it was journaled."""
    wait_until(lambda: records(source, migration, "report"), PATIENCE, f"the end of {migration}")
    return records(source, migration, "report")[-1]
