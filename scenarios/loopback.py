"""A migration from this machine to itself, on its own cards: ``python -m scenarios.loopback``.

Two agents with folders of their own share the machine's /dev/kfd. Between them moves a program
that fills buffers of VRAM all the time and checks each before it frees it; it runs no kernel, so
any card will do. All VRAM goes by ``--vram-access`` (default sdma). Prints the report as JSON.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from migrate.dataplane.vram import VramMode
from migrate.errors import MigrationFailed
from migrate.model import HostPaths
from scenarios.cluster import AgentSetup, Cluster, SimulatedHost

PATIENCE = 900.0  # seconds; emulated hosts on a busy machine are slow
MOVED_BUFFERS = 6  # that the program has filled before it is moved, and again afterwards


def add_host(cluster: Cluster, name: str, mode: VramMode) -> None:
    """An agent of this machine, with a run folder of its own and links to all else."""
    root = cluster.folder / name
    (root / "run").mkdir(parents=True)
    here, there = HostPaths(), HostPaths.under(root)
    for key in ("kfd", "dri", "kfd_sysfs", "drm_sysfs"):
        os.symlink(getattr(here, key), getattr(there, key))
    nothing = subprocess.Popen(["true"])
    nothing.wait()
    cluster.hosts[name] = SimulatedHost(name, root, nothing)
    setup = AgentSetup(settings={"vram_access": mode.value})
    cluster.start_agent(name, setup)


def wait(what: str, done: Callable[[], bool]) -> None:
    """Raises MigrationFailed after PATIENCE."""
    end = time.monotonic() + PATIENCE
    while not done():
        if time.monotonic() > end:
            raise MigrationFailed(f"{what}: not seen in {PATIENCE:.0f} s")
        time.sleep(0.2)


def run(mode: VramMode) -> dict[str, Any]:
    """Move the program once; report, and whether all its buffers were right."""
    with Cluster.temporary() as cluster:
        cluster.ready_timeout = PATIENCE
        for name in ("a", "b"):
            add_host(cluster, name, mode)
        log, end = cluster.folder / "log", cluster.folder / "end"
        command = ["-m", "tests.integration.churn", "--log", str(log), "--until", str(end)]
        with (cluster.folder / "output").open("wb") as output:
            job = cluster.workload("a", command, output=output)
        wait("buffers are filled", lambda: _lines(log) >= MOVED_BUFFERS)
        done = subprocess.run(
            [
                *(sys.executable, "-m", "migrate", "run", "a", "b", str(job.pid)),
                *("--inventory", str(cluster.inventory), "--json"),
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        before = _lines(log)
        right = False
        if not done.returncode:
            wait("it goes on", lambda: _lines(log) >= before + MOVED_BUFFERS)
            end.touch()
            wait("it ends", lambda: log.read_text().endswith("ok\n"))
            right = True
        return {
            "exit_code": done.returncode,
            "vram_access": mode.value,
            "buffers_checked": _lines(log),
            "contents_right": right,
            "report": msgspec.json.decode(done.stdout) if done.stdout else done.stderr,
            "agents": [_tail(cluster.folder / f"{name}.agent.log") for name in ("a", "b")],
        }


def _lines(log: Path) -> int:
    return len(log.read_text().splitlines()) if log.exists() else 0


def _tail(log: Path) -> str:
    return "\n".join(log.read_text().splitlines()[-5:])


def main() -> int:
    """0 if the program moved and nothing of its memory was lost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vram-access", type=VramMode, default=VramMode.SDMA)
    result = run(parser.parse_args().vram_access)
    sys.stdout.write(msgspec.json.format(msgspec.json.encode(result), indent=1).decode() + "\n")
    return 0 if result["contents_right"] else 1


if __name__ == "__main__":
    sys.exit(main())
