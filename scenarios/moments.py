"""Many migrations, each at a random moment: does every digest come out right?

``python -m scenarios.moments --count 50 --seed 1`` prints one JSON document.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
from pathlib import Path

import msgspec

from migrate import inventory
from migrate.cli.following import follow
from migrate.cli.output import Output
from migrate.cli.run import start
from migrate.errors import NoSuchProcess, NotKfdProcess
from migrate.model import Value
from migrate.orchestrator.plan import Options
from migrate.status import Status
from scenarios.cluster import Cluster, steps_logged, wait_until

STEPS = 700
VRAM = 16 << 20
JOB_TIMEOUT = 120.0  # seconds
GPU_TIME = 2000  # microseconds that each step keeps the GPUs busy, so that packets wait
ATTEMPTS = 3  # more for a job that ended by itself before its migration began
WINDOW = (3, 120)  # steps between which a migration starts


class Moment(Value):
    """One migration. ``step``: steps logged when it was asked for."""

    step: int
    status: str
    pending_packets: int
    downtime: float | None
    digest: str


class Moments(Value):
    """All of them; ``right`` counts digests equal to the twin's."""

    seed: int
    count: int
    completed: int
    with_pending_packets: int
    right: int
    twin_digest: str
    moments: tuple[Moment, ...]


def run(cluster: Cluster, count: int, seed: int) -> Moments:
    """Start *count* jobs on host a, one after another, and move each to b."""
    dice = random.Random(seed)
    twin = _result(cluster, _start(cluster, "moment-twin"))
    moments = [_one(cluster, number, dice.randrange(*WINDOW)) for number in range(count)]
    return Moments(
        seed=seed,
        count=count,
        completed=sum(m.status == Status.COMPLETED for m in moments),
        with_pending_packets=sum(m.pending_packets > 0 for m in moments),
        right=sum(m.digest == twin for m in moments),
        twin_digest=twin,
        moments=tuple(moments),
    )


def _start(cluster: Cluster, name: str) -> tuple[str, int]:
    folder = cluster.folder
    process = cluster.workload(
        "a",
        [
            "-m", "scenarios.workloads.train",
            "--steps", str(STEPS),
            "--vram", str(VRAM),
            "--seed", "11",
            "--delay-us", str(GPU_TIME),
            "--log", str(folder / f"{name}.log"),
            "--result", str(folder / f"{name}.json"),
        ],
    )  # fmt: skip
    return name, process.pid


def _one(cluster: Cluster, number: int, step: int) -> Moment:
    for attempt in itertools.count():
        name, pid = _start(cluster, f"moment-{number}-{attempt}")
        log = cluster.folder / f"{name}.log"
        wait_until(lambda log=log: steps_logged(log) >= step, JOB_TIMEOUT, f"step {step}")
        hosts = inventory.load(cluster.inventory)
        try:
            migration = start(hosts, "a", "b", pid, Options(max_rounds=1), "")
        except (NotKfdProcess, NoSuchProcess):
            if attempt == ATTEMPTS or not _path(cluster, name).exists():
                raise
            continue  # on a busy machine a job can be over before it is asked for
        break
    report = follow(hosts, "a", migration, Output())
    return Moment(
        step=step,
        status=report.status,
        pending_packets=report.pending_packets,
        downtime=report.downtime.seconds if report.downtime is not None else None,
        digest=_result(cluster, (name, pid)),
    )


def _result(cluster: Cluster, job: tuple[str, int]) -> str:
    path = _path(cluster, job[0])
    wait_until(path.exists, JOB_TIMEOUT, f"the result of {job[0]}")
    digest: str = json.loads(path.read_text())["digest"]
    return digest


def _path(cluster: Cluster, name: str) -> Path:
    return cluster.folder / f"{name}.json"


def main() -> int:
    """The command line. 0 if every migration completed with the right digest."""
    parser = argparse.ArgumentParser(prog="python -m scenarios.moments", description=__doc__)
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with Cluster.temporary() as cluster:
        for name in ("a", "b"):
            cluster.add_host(name)
        result = run(cluster, options.count, options.seed)
    sys.stdout.write(msgspec.json.format(msgspec.json.encode(result), indent=1).decode() + "\n")
    return 0 if result.completed == result.right == result.count else 1


if __name__ == "__main__":
    sys.exit(main())
