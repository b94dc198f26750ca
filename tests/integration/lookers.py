"""What tests see of a migration from outside: journals, processes, and who could run."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import msgspec

from migrate.engine import procfs
from scenarios.cluster import Cluster, SimulatedHost, wait_until

PATIENCE = 60.0  # seconds for something to come about; nothing is measured by it


def records(host: SimulatedHost, migration: str, kind: str) -> list[dict[str, Any]]:
    """The journal's records of a kind, oldest first, read beside the agent."""
    path = Path(host.paths.run) / "journal.db"
    database = sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=10)
    try:
        rows = database.execute(
            "SELECT data FROM records WHERE migration = ? AND kind = ? ORDER BY seq",
            (migration, kind),
        ).fetchall()
    finally:
        database.close()
    return [msgspec.json.decode(row[0]) for row in rows]


def states(host: SimulatedHost, migration: str, side: str) -> list[str]:
    """The states of one side, oldest first."""
    return [record["state"] for record in records(host, migration, side)]


def wait_state(host: SimulatedHost, migration: str, side: str, *wanted: str) -> None:
    """Wait until a state was journaled."""
    wait_until(
        lambda: set(wanted) & set(states(host, migration, side)),
        PATIENCE,
        f"{side} of {migration} to be {' or '.join(wanted)}",
    )


def copy_pid(host: SimulatedHost, migration: str) -> int | None:
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

    A tracer's stop is a moment of a running process.
    """
    if pid is None:
        return False
    with contextlib.suppress(OSError):
        states = []
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):
                states.append((thread / "stat").read_text().rpartition(")")[2].split()[0])
        return any(state not in "TZX" for state in states)
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


@dataclass
class Watcher:
    """Looks at both copies all the time: never two that run, never none that is left.

    Source and copy are looked at in the order in which the handover could make both run,
    so one of them stopped in between is no false alarm: an alarm needs both to be seen
    runnable, and the first to be so still.
    """

    source: int
    destination: SimulatedHost
    migration: str
    both: list[str] = field(default_factory=list)
    neither: list[str] = field(default_factory=list)
    looks: int = 0

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
        """One look."""
        self.looks += 1
        copy = None
        with contextlib.suppress(sqlite3.Error):
            copy = copy_pid(self.destination, self.migration)
        if not is_there(self.source) and not is_there(copy):
            self.neither.append("neither copy exists")
        held = [s for s in self._destination_states() if s == "PREPARED"]
        # Before PREPARED the copy's own interpreter runs, and nothing of the program.
        if held and is_runnable(self.source) and is_runnable(copy) and is_runnable(self.source):
            self.both.append("both copies run")

    def _destination_states(self) -> list[str]:
        with contextlib.suppress(sqlite3.Error):
            return states(self.destination, self.migration, "destination")
        return []

    def check(self) -> None:
        """Raises AssertionError if an invariant was broken at any look."""
        assert self.looks
        assert not self.both, self.both[0]
        assert not self.neither, self.neither[0]


def suspended(host: SimulatedHost) -> contextlib.AbstractContextManager[None]:
    """The agent stands still, as on a machine that swaps, and goes on afterwards."""

    @contextlib.contextmanager
    def hold() -> Any:
        assert host.agent is not None
        os.kill(host.agent.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(host.agent.pid, signal.SIGCONT)

    return hold()


def started(cluster: Cluster, *arguments: str) -> str:
    """The id of a migration that was started and is not waited for."""
    from tests.integration.jobs import migrate  # noqa: PLC0415

    outcome = migrate(cluster, "run", *arguments, "--no-wait")
    assert outcome.code == 0, outcome.document
    found: str = outcome.document["id"]
    return found


def ended(cluster: Cluster, host: str, migration: str) -> dict[str, Any]:
    """The report, once the migration has ended."""
    from tests.integration.jobs import migrate  # noqa: PLC0415

    deadline = time.monotonic() + PATIENCE
    while True:
        document = migrate(cluster, "show", host, migration).document
        if document.get("status") in ("completed", "failed", "cancelled"):
            return document
        assert time.monotonic() < deadline, document
