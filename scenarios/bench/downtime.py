"""Downtime with pre-copy against stop-and-copy: ``python -m scenarios.bench.downtime``.

A workload that rewrites 5% of its VRAM all the time is moved between two simulated hosts over
a paced link, with pre-copy and without in turn. The hosts' VRAM is populated before the first
turn, as a card's is: the workload runs on each host once, and the pages that it touched stay.
One migration with pre-copy is not counted: it is what the first prediction learns from.
Prints one JSON document; with --folder also a table and plots. Of each size, medians over the
turns:

* ``ratio``: downtime with pre-copy ÷ without, within one turn
* ``formula``: downtime ÷ (last delta ÷ link + all bytes ÷ placement rate + engine time), the
  placement rate being what the turn's stop-and-copy showed
* ``prediction``: what was predicted before the freeze ÷ what it was
* ``parts``: the sum of the downtime's parts ÷ the downtime
* ``agent``: peak PSS of both agents without BO memory and staging, bytes

Exit code 1 if a claim does not hold.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from migrate import inventory
from migrate.cli.following import follow
from migrate.cli.output import Output
from migrate.cli.run import start
from migrate.errors import MigrationFailed
from migrate.orchestrator.plan import Options
from migrate.report import Downtime, Report
from migrate.status import Status
from scenarios.bench.dataplane import GIGABIT, machine
from scenarios.bench.pages import commit, points, write
from scenarios.cluster import Cluster, end, wait_until

GIB = 1 << 30
PARTS = ("stop", "checkpoint", "delta", "build", "placement", "read_back", "engine", "handover")
FILL = 600.0  # seconds a workload may take to fill its VRAM


def filled(cluster: Cluster, host: str, name: str, size: int) -> subprocess.Popen[bytes]:
    """A fresh workload whose VRAM has contents."""
    log = cluster.folder / f"{name}.log"
    command = ["-m", "scenarios.workloads.rewrite", "--vram", str(size), "--log", str(log)]
    program = cluster.workload(host, command)
    wait_until(lambda: log.exists() and log.stat().st_size >= 10, FILL, "two passes")
    return program


def add_host(cluster: Cluster, name: str, size: int) -> None:
    """A host whose VRAM is populated, for *size* bytes of the workload."""
    cluster.add_host(name, node_options=["--populated", str(size)])
    end(filled(cluster, name, f"first-{name}", size))


def migrated(cluster: Cluster, name: str, size: int, link: float, *, precopy: bool) -> Report:
    """One migration of a fresh workload. Raises MigrationFailed if it does not complete."""
    program = filled(cluster, "a", name, size)
    hosts = inventory.load(cluster.inventory)
    options = Options(precopy=precopy, bandwidth=int(link), max_downtime=0.0, max_rounds=4)
    report = follow(hosts, "a", start(hosts, "a", "b", program.pid, options, ""), Output())
    if report.status is not Status.COMPLETED or report.destination.pid is None:
        raise MigrationFailed(f"{name} did not move: {report.failure}")
    end_pid(report.destination.pid)
    end(program)
    return report


def end_pid(pid: int) -> None:
    """End the moved copy."""
    os.kill(pid, signal.SIGKILL)


def figures(moved: Report, stopped: Report, link: float) -> dict[str, Any]:
    """One turn."""
    now, before = parts_of(moved), parts_of(stopped)
    held = moved.bytes.vram + moved.bytes.gtt + moved.bytes.cpu
    placement = held / (before.placement + before.read_back)
    engine = now.stop + now.checkpoint + now.build + now.engine + now.handover
    delta = moved.rounds[-1].wire
    formula = delta / link + held / placement + engine
    return {
        "downtime": now.seconds,
        "stop_and_copy": before.seconds,
        "ratio": now.seconds / before.seconds,
        "formula": now.seconds / formula,
        "prediction": (moved.predicted_downtime or 0.0) / now.seconds,
        "parts": sum(getattr(now, part) for part in PARTS) / now.seconds,
        "downtime_parts": {part: round(getattr(now, part), 4) for part in PARTS},
        "delta_bytes": delta,
        "total_seconds": moved.seconds,
        "wire_bytes": moved.bytes.wire,
        "rounds": len(moved.rounds),
        "agent": max(moved.source_peak.agent, moved.destination_peak.agent),
    }


def parts_of(report: Report) -> Downtime:
    """The downtime of a completed migration."""
    if report.downtime is None:
        raise MigrationFailed(f"migration {report.id} has no downtime")
    return report.downtime


def measure(sizes: list[float], repeat: int, link: float) -> dict[str, Any]:
    """All turns of all sizes, and medians."""
    result: dict[str, Any] = {}
    for size in sizes:
        turns = []
        with Cluster.temporary() as cluster:  # agents anew: peaks are of one size
            for name in ("a", "b"):
                add_host(cluster, name, int(size * GIB))
            migrated(cluster, "first", int(size * GIB), link, precopy=True)
            for turn in range(repeat):
                both = [
                    migrated(cluster, name, int(size * GIB), link, precopy=precopy)
                    for name, precopy in ((f"stop-{turn}", False), (f"live-{turn}", True))
                ]
                turns.append(figures(both[1], both[0], link))
                sys.stderr.write(f"{size:g} GiB, turn {turn + 1}: {json.dumps(turns[-1])}\n")
        medians = {
            key: round(statistics.median(turn[key] for turn in turns), 4)
            for key, value in turns[0].items()
            if isinstance(value, (int, float))
        }
        result[f"{size:g} GiB"] = {"median": medians, "turns": turns}
    return result


def summary(sizes: dict[str, Any]) -> dict[str, Any]:
    """What must hold, over all sizes."""
    turns = [turn for one in sizes.values() for turn in one["turns"]]
    agents = [one["median"]["agent"] for one in sizes.values()]
    return {
        "worst ratio": max(one["median"]["ratio"] for one in sizes.values()),
        "worst formula": max(one["median"]["formula"] for one in sizes.values()),
        "predictions within 20%": f"{sum(0.8 <= t['prediction'] <= 1.2 for t in turns)}"
        f" of {len(turns)}",
        "parts add up": all(abs(turn["parts"] - 1) < 0.01 for turn in turns),
        "agent PSS, largest ÷ smallest": round(max(agents) / min(agents), 3),
    }


def claims(found: dict[str, Any]) -> list[dict[str, Any]]:
    """What must hold of a summary, and whether it does."""
    right, turns = (int(part) for part in found["predictions within 20%"].split(" of "))
    wanted = (
        ("downtime at most 0.2 of stop-and-copy's", found["worst ratio"] <= 0.2),
        ("downtime at most 1.3 x the formula", found["worst formula"] <= 1.3),
        ("9 of 10 predictions within 20%", right >= 0.9 * turns),
        ("the parts add up", found["parts add up"]),
        ("agent memory flat within 10%", found["agent PSS, largest ÷ smallest"] <= 1.1 / 0.9),
    )
    return [{"claim": claim, "holds": holds} for claim, holds in wanted]


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m scenarios.bench.downtime", description=__doc__)
    parser.add_argument("--sizes", nargs="+", type=float, default=[1, 2, 6], help="GiB of VRAM")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--link", type=float, default=5.0, help="Gbit/s")
    parser.add_argument("--folder", type=Path, help="where tables and plots go (docs/benchmarks)")
    options = parser.parse_args(arguments)
    sizes = measure(options.sizes, options.repeat, options.link * GIGABIT)
    found = summary(sizes)
    result: dict[str, Any] = {
        "commit": commit(),
        "machine": machine(),
        "link_gbit": options.link,
        "summary": found,
        "claims": claims(found),
        "sizes": sizes,
    }
    if options.folder is not None:
        rows = [(name, one["median"]) for name, one in sizes.items()]
        plots = {
            "downtime against size of VRAM": points(
                {"pre-copy": "downtime", "stop and copy": "stop_and_copy"}, rows, "seconds"
            ),
            "total time against bytes sent": points(
                {"pre-copy": "total_seconds"}, rows, "seconds", across="wire_bytes"
            ),
        }
        write(options.folder, "downtime", result, rows, plots)
    sys.stdout.write(json.dumps(result, indent=2) + "\n")
    return 0 if all(claim["holds"] for claim in result["claims"]) else 1


if __name__ == "__main__":
    sys.exit(main())
