"""The demo: one real migration between two simulated hosts, checked against a twin."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import msgspec

from migrate import inventory
from migrate.cli.following import follow
from migrate.cli.output import Output
from migrate.cli.reporting import render
from migrate.cli.run import start
from migrate.decode import from_json
from migrate.errors import MigrationFailed
from migrate.model import Value
from migrate.orchestrator.plan import Options
from migrate.report import Report
from migrate.status import Status
from scenarios.cluster import Cluster, steps_logged, wait_until

SEED = 7
RUN_TIMEOUT = 900.0  # seconds for a workload to end; it is killed only after that
MOVE_AT = 0.1  # share of the steps done when the migration starts
# Seconds to wait after each step, so that the job lasts longer than its migration: some
# at any size, and more for the time that its memory takes to copy and to check.
PACE = 0.004
PACE_PER_GIB = 0.02


class Verdict(Value):
    """What the demo adds to the report."""

    digest: str
    twin_digest: str
    equal: bool
    source_pid_gone: bool
    gpu_ids: tuple[int, ...]  # what the process sees
    real_gpu_ids: tuple[int, ...]  # what it runs on now
    steps: int


class Result(msgspec.Struct, frozen=True):
    """Of what the workload writes at its end, what the demo looks at."""

    digest: str
    steps: int
    gpu_ids: tuple[int, ...]


def run(output: Output, *, vram: int, steps: int, profile: str) -> int:
    """Run the demo and print it. 0 if the process moved and came out right."""
    with Cluster.temporary() as cluster:
        output.note("Starting two simulated hosts, a and b, with an agent each ...")
        for name in ("a", "b"):
            cluster.add_host(name, profile)
            output.note(f"  {name}: agent at {cluster.hosts[name].address}")
        report, moved, gone = _migrated(cluster, output, vram, steps)
        if report.status is not Status.COMPLETED:
            return _show(output, report, None)
        output.note("Running a twin that never moves ...")
        twin = _twin(cluster, vram, steps)
        verdict = Verdict(
            digest=moved.digest,
            twin_digest=twin.digest,
            equal=moved.digest == twin.digest and moved.steps == twin.steps == steps,
            source_pid_gone=gone,
            gpu_ids=moved.gpu_ids,
            real_gpu_ids=tuple(row.destination_gpu_id for row in report.gpu_map),
            steps=moved.steps,
        )
        return _show(output, report, verdict)


def workload_command(
    folder: Path, name: str, *, vram: int, steps: int, pace: float = 0.0
) -> list[str]:
    """The training loop's command line; its log and result are in *folder*.

    *pace*: seconds between steps. It changes no digest.
    """
    return [
        "-m", "scenarios.workloads.train",
        "--steps", str(steps),
        "--vram", str(vram),
        "--gpus", "2",
        "--seed", str(SEED),
        "--pace", str(pace),
        "--log", str(folder / f"{name}.log"),
        "--result", str(folder / f"{name}.json"),
    ]  # fmt: skip


def _migrated(
    cluster: Cluster, output: Output, vram: int, steps: int
) -> tuple[Report, Result, bool]:
    """Start the workload on a, move it to b in the middle, wait for its result."""
    log, result = cluster.folder / "moved.log", cluster.folder / "moved.json"
    workload = cluster.workload(
        "a",
        workload_command(
            cluster.folder,
            "moved",
            vram=vram,
            steps=steps,
            pace=PACE + PACE_PER_GIB * vram / (1 << 30),
        ),
    )
    output.note(f"Workload on a: pid {workload.pid}, filling {vram >> 20} MiB of VRAM ...")
    wait_until(
        lambda: steps_logged(log) >= max(1, int(steps * MOVE_AT)) or workload.poll() is not None,
        RUN_TIMEOUT,
        "the workload's first steps",
    )
    if workload.poll() is not None:
        raise MigrationFailed(f"the workload ended early with {workload.returncode}")
    hosts = inventory.load(cluster.inventory)
    migration = start(hosts, "a", "b", workload.pid, Options(), "")
    output.note(f"Migration {migration} at step {steps_logged(log)}")
    report = follow(hosts, "a", migration, output)
    if report.status is not Status.COMPLETED:
        return report, Result(digest="", steps=0, gpu_ids=()), False
    workload.wait(30)
    gone = workload.returncode == -9 and not Path(f"/proc/{workload.pid}/fd").exists()
    wait_until(result.exists, RUN_TIMEOUT, "the moved workload's result")
    return report, from_json(result.read_bytes(), Result), gone


def _twin(cluster: Cluster, vram: int, steps: int) -> Result:
    process = cluster.workload(
        "a", workload_command(cluster.folder, "twin", vram=vram, steps=steps)
    )
    try:
        process.wait(RUN_TIMEOUT)
    except subprocess.TimeoutExpired:
        raise MigrationFailed("the twin did not end") from None
    result = cluster.folder / "twin.json"
    if not result.exists():
        raise MigrationFailed(f"the twin ended with {process.returncode} and no result")
    return from_json(result.read_bytes(), Result)


def _show(output: Output, report: Report, verdict: Verdict | None) -> int:
    ok = verdict is not None and verdict.equal and verdict.source_pid_gone
    if output.json:
        document: dict[str, Any] = msgspec.to_builtins(report)
        document["demo"] = msgspec.to_builtins(verdict)
        output.document(document)
    else:
        render(output, report)
        if verdict is not None:
            _render(output, verdict)
    if report.failure is not None:
        return report.failure.exit_code
    return 0 if ok else 1


def _render(output: Output, verdict: Verdict) -> None:
    output.text(f"Digest of the moved process: {verdict.digest}")
    output.text(f"Digest of its twin:          {verdict.twin_digest}")
    output.text("Equal." if verdict.equal else "THEY DIFFER.")
    output.text(
        f"The process sees GPUs {', '.join(map(str, verdict.gpu_ids))} and runs on"
        f" {', '.join(map(str, verdict.real_gpu_ids))}; the source process is"
        f" {'gone' if verdict.source_pid_gone else 'STILL THERE'}."
    )
