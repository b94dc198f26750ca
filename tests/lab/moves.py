"""Migrations between the virtual hosts: what every one of them must show, and its evidence."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scenarios.evidence import commit, machine
from scenarios.lab import conformance
from scenarios.lab.cluster import LabCluster
from tests.lab.jobs import exists

Report = dict[str, Any]
Pair = Callable[[int, int], LabCluster]
Keep = Callable[..., None]
PATIENCE = ("--patience", "600")  # emulated hosts on a busy machine


def move(cluster: LabCluster, pid: int, way: str, *options: str) -> Report:
    """Migrate over the hosts of *way* ("ab"), and look at what must be true of any migration."""
    source, destination = way[0], way[1]
    report = cluster.migrate(source, destination, pid, *PATIENCE, *options)
    assert (report["status"], report["owner"]) == ("completed", "destination"), report
    assert report["destination"]["pid"] == pid
    assert not exists(cluster.hosts[source], pid), "the source still has the process"
    downtime = dict(report["downtime"])
    whole = downtime.pop("seconds")
    assert sum(downtime.values()) == pytest.approx(whole, rel=0.05, abs=0.05)
    for host in cluster.hosts.values():
        conformance.check_kernel(host)
    return report


def check_map(report: Report, user_gpu_ids: list[int]) -> None:
    """Every GPU that the process sees has got one of the destination's, each its own."""
    rows = report["gpu_map"]
    assert sorted(row["user_gpu_id"] for row in rows) == sorted(user_gpu_ids)
    assert len({row["destination_gpu_id"] for row in rows}) == len(rows)


def keep_evidence(
    test: str, cluster: LabCluster, name: str, reports: list[Report], **facts: object
) -> None:
    """Look at the kernels a last time; with MIGRATE_EVIDENCE=FOLDER write what was shown there."""
    for host in cluster.hosts.values():
        conformance.check_kernel(host)
    folder = os.environ.get("MIGRATE_EVIDENCE")
    if not folder:
        return
    found = {
        "commit": commit(),
        "machine": machine(),
        "test": test,
        "kernel_logs": "clean",
        **facts,
        "reports": reports,
    }
    target = Path(folder) / "lab" / f"{name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(found, indent=1) + "\n")
