"""How long matching takes: `python -m scenarios.bench.topology [--pairs 10000] [--gpus 16]`.

Prints CPU time (of one thread, so that a busy machine says nearly the same) for two hosts
of 8 MI300X, and for random pairs the slowest, the median and how many were left unproven
(a map was found, a cheaper one not ruled out).
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time

import click

from migrate.kfd.sysfs import read_topology
from migrate.topology.match import match
from migrate.topology.model import Topology
from migrate.topology.profiles import PROFILES, write_tree
from migrate.topology.rules import RULE_NAMES
from scenarios.bench.topology_machines import Question, question


def profile(name: str, slot_offset: int) -> Topology:
    """The topology of a profile's tree."""
    with tempfile.TemporaryDirectory() as folder:
        write_tree(PROFILES[name], folder, slot_offset=slot_offset)
        return read_topology(folder)


def seconds(q: Question) -> tuple[float, bool, bool]:
    """CPU time for one question, whether there was a map, whether it was proven the best."""
    begin = time.process_time()
    result = match(
        q.source, q.destination, visible=q.visible, needs=q.needs, free=q.free, busy=q.busy,
        override=q.override, relax=q.relax,
    )  # fmt: skip
    return time.process_time() - begin, result.map is not None, result.proven


@click.command()
@click.option("--pairs", default=10_000, show_default=True)
@click.option("--gpus", default=16, show_default=True, help="At most so many a machine.")
@click.option("--seed", default=0, show_default=True)
def main(pairs: int, gpus: int, seed: int) -> None:
    """Print figures."""
    one, other = profile("mi300x8", 0), profile("mi300x8", 1)
    begin = time.process_time()
    match(one, other)
    click.echo(f"8 x MI300X to 8 x MI300X: {1000 * (time.process_time() - begin):.1f} ms")
    times, maps, unproven, worst = [], 0, 0, (0.0, seed)
    for number in range(seed, seed + pairs):
        rng = random.Random(number)
        spent, found, proven = seconds(question(rng, gpus, RULE_NAMES))
        times.append(spent)
        maps += found
        unproven += not proven
        worst = max(worst, (spent, number))
    click.echo(
        f"{pairs} random pairs of up to {gpus} GPUs: median {1000 * statistics.median(times):.1f}"
        f" ms, slowest {1000 * worst[0]:.0f} ms (seed {worst[1]}), {maps} maps,"
        f" {unproven} of them not proven the best"
    )


if __name__ == "__main__":
    main()
