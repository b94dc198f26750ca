"""A small scheduler, as somebody else would write it: it empties a host and then ends.

    python -m tests.integration.scheduler INVENTORY STATE SOURCE DESTINATION,DESTINATION

It knows nothing but ``migrate.client`` and its own state file, a JSON object of jobs. It may be
killed at any moment and started again, and so may the agents: a job's idempotency key is
written down before it is used.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from migrate.client import Client
from migrate.errors import AgentUnreachable, MigrateError, UnknownMigration

ATTEMPTS = 6
DONE = ("completed", "gone", "given up")


class Scheduler:
    """Jobs by "pid/start_time": destination, attempt, and what became of it."""

    def __init__(self, client: Client, state: Path, source: str, destinations: list[str]) -> None:
        self.client = client
        self.path = state
        self.source = source
        self.destinations = destinations
        self.jobs: dict[str, dict[str, Any]] = {}
        if state.exists():
            self.jobs = json.loads(state.read_text())

    def save(self) -> None:
        """Durable before anything is asked of an agent."""
        new = self.path.with_suffix(".new")
        with new.open("w") as file:
            json.dump(self.jobs, file)
            file.flush()
            os.fsync(file.fileno())
        new.replace(self.path)

    def discover(self) -> None:
        for row in self.client.processes(self.source):
            place = self.destinations[len(self.jobs) % len(self.destinations)]
            self.jobs.setdefault(
                f"{row.pid}/{row.start_time}", {"to": place, "attempt": 1, "status": "new"}
            )
        self.save()

    def move(self, name: str) -> None:
        """One step of one job. The same request again gives the same migration."""
        job = self.jobs[name]
        pid, start_time = map(int, name.split("/"))
        key = f"scheduler-{name}-{job['attempt']}"
        try:
            job["id"] = self.client.run(self.source, job["to"], pid, key=key, start_time=start_time)
            report = self.client.wait(self.source, job["id"])
        except (AgentUnreachable, UnknownMigration):
            return  # asked again with the same key
        except MigrateError as error:
            job["status"] = "gone" if error.reason == "NO_SUCH_PROCESS" else error.reason
            self.again(job)
            return
        if report.owner == "unknown":
            return  # its agent goes on asking: never start another one
        job["status"] = report.status
        if report.status != "completed":
            self.again(job)

    def again(self, job: dict[str, Any]) -> None:
        if job["status"] in DONE:
            return
        job["attempt"] += 1
        if job["attempt"] > ATTEMPTS:
            job["status"] = "given up"

    def run(self) -> None:
        while True:
            try:
                self.discover()
                break
            except AgentUnreachable:
                time.sleep(0.5)
        while pending := [n for n, job in self.jobs.items() if job["status"] not in DONE]:
            for name in pending:
                self.move(name)
                self.save()
            time.sleep(0.2)


if __name__ == "__main__":
    inventory, state, source, destinations = sys.argv[1:]
    with Client(inventory) as client:
        Scheduler(client, Path(state), source, destinations.split(",")).run()
