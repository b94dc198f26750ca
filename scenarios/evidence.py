"""The full figures behind what the documents say: ``python -m scenarios.evidence FOLDER``.

Each file names the commit, the seed and the machine it was made on. A figure that is not
what it must be ends the command with 1, and its file says so all the same.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from scenarios import moments
from scenarios.cluster import Cluster

SEED = 1
COUNT = 50
PENDING = 40  # of COUNT migrations, those that must have met packets in the rings
AGENT_LIMIT = 300 << 20  # bytes of PSS of one agent, without staging


def demo(vram: str) -> dict[str, Any]:
    """One ``migrate demo --json``; ``ok`` if it moved, came out right and stayed small."""
    done = subprocess.run(
        [sys.executable, "-m", "migrate", "demo", "--vram", vram, "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    report: dict[str, Any] = msgspec.json.decode(done.stdout)
    peaks = [report[key]["agent"] for key in ("source_peak", "destination_peak")]
    # The paths of the machine it was made on are nobody's business.
    report["command"] = [Path(word).name or word for word in report["command"]]
    ok = done.returncode == 0 and report["demo"]["equal"] and max(peaks) < AGENT_LIMIT
    return {"ok": ok, "exit_code": done.returncode, "report": report}


def at_any_moment() -> dict[str, Any]:
    """Migrations at random moments."""
    with Cluster.temporary() as cluster:
        for name in ("a", "b"):
            cluster.add_host(name)
        found = moments.run(cluster, COUNT, SEED)
    ok = found.completed == found.right == COUNT and found.with_pending_packets >= PENDING
    return {"ok": ok, "result": msgspec.to_builtins(found)}


LAB = ("migrations", "visible_gpus", "eight_gpus")


def lab() -> dict[str, Any]:
    """The migrations between virtual hosts; their reports go to the folder's ``lab``."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-m", "lab", "-p", "no:randomly"),
            *("--timeout=3600", *(f"tests/lab/test_{name}.py" for name in LAB)),
        ],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    last = done.stdout.strip().splitlines()[-1:] or [""]
    return {"ok": done.returncode == 0 and "skipped" not in last[0], "pytest": last[0]}


def bench(module: str, *arguments: str) -> dict[str, Any]:
    """A benchmark of its own command line, whose JSON and exit code count."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], stdout=subprocess.PIPE, text=True, check=False
    )
    ok = done.returncode == 0
    return {"ok": ok, "exit_code": done.returncode, "result": msgspec.json.decode(done.stdout)}


# These write their own JSON, with commit and machine, beside their tables and plots.
BENCHMARKED = frozenset({"throughput", "codecs", "downtime"})
BENCHMARKS = str(Path(__file__).resolve().parents[1] / "docs" / "benchmarks")
DATAPLANE = "scenarios.bench.dataplane"

FIGURES: dict[str, Callable[[], dict[str, Any]]] = {
    "demo": lambda: demo("256MiB"),
    "demo-4gib": lambda: demo("4GiB"),
    "moments": at_any_moment,
    "lab": lab,
    "throughput": lambda: bench(DATAPLANE, "--only", "rivals", "--folder", BENCHMARKS),
    "codecs": lambda: bench(DATAPLANE, "--only", "codecs", "--folder", BENCHMARKS),
    "downtime": lambda: bench("scenarios.bench.downtime", "--folder", BENCHMARKS),
    "cuts": lambda: bench("scenarios.bench.cuts", "--cuts", "1000", "--seed", str(SEED)),
    "frames": lambda: bench("scenarios.bench.fuzz_frames", "--seed", str(SEED)),
    "rpc": lambda: bench("scenarios.bench.fuzz_rpc"),  # of seed 1 and of a fresh one
}


def machine() -> dict[str, Any]:
    """What the figures were made on."""
    return {
        "cpus": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def commit() -> str:
    """The commit at hand, marked if the work tree differs from it."""
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40"],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent,
    )
    return found.stdout.strip()


def main() -> int:
    """Make all figures, or those named."""
    parser = argparse.ArgumentParser(prog="python -m scenarios.evidence", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("figures", nargs="*", choices=[*FIGURES, []], default=list(FIGURES))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    os.environ["MIGRATE_EVIDENCE"] = str(options.folder.resolve())
    fine = True
    for name in options.figures:
        found = {"commit": commit(), "seed": SEED, "machine": machine(), **FIGURES[name]()}
        fine = fine and found["ok"]
        if name not in BENCHMARKED:
            text = msgspec.json.format(msgspec.json.encode(found), indent=1).decode()
            (options.folder / f"{name}.json").write_text(text + "\n")
        print(f"{name}: {'ok' if found['ok'] else 'NOT AS IT MUST BE'}", flush=True)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
