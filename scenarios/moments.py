"""Many migrations, each at a random moment: does every digest come out right?

``python -m scenarios.moments --count 50 --seed 1`` prints one JSON document.
"""

from __future__ import annotations

import argparse
import random
import sys

import msgspec

from migrate import inventory
from migrate.cli.following import follow
from migrate.cli.output import Output
from migrate.cli.run import start
from migrate.decode import from_json
from migrate.model import Value
from migrate.orchestrator.plan import Options
from migrate.status import Status
from scenarios.cluster import Cluster, steps_logged, wait_until

VRAM = 16 << 20
JOB_TIMEOUT = 120.0  # seconds
GPU_TIME = 2000  # microseconds that each step keeps the GPUs busy, so that packets wait
WINDOW = (3, 120)  # steps between which a migration starts


class Moment(Value):
    """One migration. ``step``: steps logged when it was asked for; ``steps``: all it made."""

    step: int
    status: str
    pending_packets: int
    downtime: float | None
    steps: int
    digest: str
    twin_digest: str


class Moments(Value):
    """All of them; ``right`` counts digests equal to the twin's."""

    seed: int
    count: int
    completed: int
    with_pending_packets: int
    right: int
    moments: tuple[Moment, ...]


def run(cluster: Cluster, count: int, seed: int) -> Moments:
    """Start *count* jobs on host a, one after another, and move each to b."""
    dice = random.Random(seed)
    moments = [_one(cluster, number, dice.randrange(*WINDOW)) for number in range(count)]
    return Moments(
        seed=seed,
        count=count,
        completed=sum(m.status == Status.COMPLETED for m in moments),
        with_pending_packets=sum(m.pending_packets > 0 for m in moments),
        right=sum(m.digest == m.twin_digest for m in moments),
        moments=tuple(moments),
    )


def _start(cluster: Cluster, name: str, *options: str) -> int:
    """Start a job; its pid."""
    folder = cluster.folder
    process = cluster.workload(
        "a",
        [
            "-m", "scenarios.workloads.train",
            "--vram", str(VRAM),
            "--seed", "11",
            "--log", str(folder / f"{name}.log"),
            "--result", str(folder / f"{name}.json"),
            *options,
        ],
    )  # fmt: skip
    return process.pid


def _one(cluster: Cluster, number: int, step: int) -> Moment:
    """Move a job, which trains until it has moved, and a twin that makes as many steps."""
    name, end = f"moment-{number}", cluster.folder / f"moment-{number}.end"
    pid = _start(cluster, name, "--delay-us", str(GPU_TIME), "--until", str(end))
    log = cluster.folder / f"{name}.log"
    wait_until(lambda: steps_logged(log) >= step, JOB_TIMEOUT, f"step {step}")
    hosts = inventory.load(cluster.inventory)
    try:
        migration = start(hosts, "a", "b", pid, Options(max_rounds=1), "")
        report = follow(hosts, "a", migration, Output())
    finally:
        end.touch()
    moved = _result(cluster, name)
    _start(cluster, f"{name}-twin", "--steps", str(moved.steps))
    return Moment(
        step=step,
        status=report.status,
        pending_packets=report.pending_packets,
        downtime=report.downtime.seconds if report.downtime is not None else None,
        steps=moved.steps,
        digest=moved.digest,
        twin_digest=_result(cluster, f"{name}-twin").digest,
    )


class Result(msgspec.Struct, frozen=True):
    """Of what a job writes at its end, what is looked at."""

    digest: str
    steps: int


def _result(cluster: Cluster, name: str) -> Result:
    path = cluster.folder / f"{name}.json"
    wait_until(path.exists, JOB_TIMEOUT, f"the result of {name}")
    return from_json(path.read_bytes(), Result)


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
