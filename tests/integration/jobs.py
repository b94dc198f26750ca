"""Training jobs on a cluster, the migrate command as its user runs it, and the twin's digest."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from migrate.cli.main import run
from migrate.report import Report
from scenarios.cluster import Cluster, steps_logged, wait_until

VRAM = 16 << 20
PACE = 0.02  # seconds between steps: a twin has to make as many
END = 110.0  # seconds for a job to end
# A prelude of agents: on a busy machine a copy may not get to run for some seconds.
PATIENT = "import migrate.orchestrator.life as life\nlife.WINDOW = 60.0"
TWIN_END = 600.0  # for a twin: one of a job that a whole file is about has many steps to make


@dataclass
class Job:
    """A training process, what it leaves, and the file that ends it."""

    pid: int
    log: Path
    result_path: Path
    started: subprocess.Popen[bytes]
    end: Path

    def steps(self) -> int:
        """Steps it has logged."""
        return steps_logged(self.log)

    def wait_steps(self, count: int) -> None:
        """Wait until it has logged *count* steps."""
        wait_until(lambda: self.steps() >= count or self.result_path.exists(), END, f"step {count}")

    def runs_on(self) -> None:
        """It makes steps from now on, or comes to its end."""
        self.wait_steps(self.steps() + 3)

    def finish(self) -> dict[str, Any]:
        """Tell it to end, wherever it is now; what it wrote then."""
        self.end.touch()
        return self.result()

    def result(self) -> dict[str, Any]:
        """What it wrote at its end."""
        wait_until(self.result_path.exists, END, "the job's result")
        found: dict[str, Any] = json.loads(self.result_path.read_text())
        return found


def start_job(
    cluster: Cluster,
    host: str,
    name: str,
    *,
    pace: float = PACE,
    options: tuple[str, ...] = (),
) -> Job:
    """Start a training job on a host and wait for its first steps.

    It trains until it is told to ``finish``: no machine is too slow to move it before, and
    none so quick that its end is long in coming.
    """
    log, result = cluster.folder / f"{name}.log", cluster.folder / f"{name}.json"
    end = cluster.folder / f"{name}.end"
    started = cluster.workload(
        host,
        [
            "-m", "scenarios.workloads.train",
            "--until", str(end),
            "--vram", str(VRAM),
            "--gpus", "2",
            "--seed", "11",
            "--pace", str(pace),
            "--log", str(log),
            "--result", str(result),
            *options,
        ],
    )  # fmt: skip
    job = Job(started.pid, log, result, started, end)
    job.wait_steps(2)
    return job


def comes_out_right(cluster: Cluster, job: Job) -> dict[str, Any]:
    """Tell a job to end: its digest is its twin's. What it wrote."""
    result = job.finish()
    assert result["digest"] == twin_digest(cluster, result["steps"])
    return result


def twin_digest(cluster: Cluster, steps: int, *options: str) -> str:
    """The digest of a job that makes as many steps and never moves."""
    result = cluster.folder / f"twin-{steps}.json"
    subprocess.run(
        [
            sys.executable, "-m", "scenarios.workloads.train",
            "--steps", str(steps), "--vram", str(VRAM), "--gpus", "2", "--seed", "11",
            "--log", str(cluster.folder / f"twin-{steps}.log"), "--result", str(result), *options,
        ],
        check=True,
        timeout=TWIN_END,
        env={**os.environ, "MIGRATE_HOST_ROOT": str(cluster.hosts["a"].root)},
    )  # fmt: skip
    digest: str = json.loads(result.read_text())["digest"]
    return digest


@dataclass
class Outcome:
    """What ``migrate ... --json`` printed and its exit code."""

    code: int
    document: dict[str, Any]

    @property
    def report(self) -> Report:
        """The document as a report."""
        import msgspec  # noqa: PLC0415

        return msgspec.convert(self.document, Report)

    @property
    def failure(self) -> dict[str, Any]:
        """The failure of the report, or the error of the command itself."""
        found: dict[str, Any] = self.document.get("failure") or self.document["error"]
        return found


def migrate(cluster: Cluster, *arguments: str, inventory: Path | None = None) -> Outcome:
    """Run a command line in this process; stdout must be exactly one JSON document."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        code = run(["--json", "--inventory", str(inventory or cluster.inventory), *arguments])
    return Outcome(code, json.loads(output.getvalue()))


def command(
    cluster: Cluster, *arguments: str, inventory: Path | None = None, timeout: float = 120
) -> Outcome:
    """The same as its user runs it: a process of its own."""
    done = subprocess.run(
        [
            sys.executable, "-m", "migrate",
            "--json", "--inventory", str(inventory or cluster.inventory), *arguments,
        ],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.stdout, done.stderr
    return Outcome(done.returncode, json.loads(done.stdout))


def kernel_log(cluster: Cluster) -> str:
    """What the nodes would have oopsed with: empty if our guards hold."""
    return "".join(
        (host.root / "run" / "kernel.log").read_text() for host in cluster.hosts.values()
    )
