"""The search against a brute force written apart: it tries every assignment.

Nothing here uses the rules, relations or search of the product; only the model.
"""

from __future__ import annotations

import dataclasses
import os
import random
from itertools import permutations

import numpy as np
import pytest

from migrate.topology.match import Cost, MatchResult, match
from migrate.topology.model import Node, Topology
from migrate.topology.rules import RULE_NAMES
from scenarios.bench.topology_machines import Question, question

XGMI = 11
SHORT, FULL = 500, 10_000


# ---------------------------------------------------------------- the rules, told again


def alone(s: Node, d: Node, q: Question, host: tuple[int | None, int | None]) -> set[str]:
    """Names of the rules about one GPU that s at d breaks."""
    found = set()
    equal = {
        "gfx-target": ("gfx_target_version",),
        "partition": ("num_xcc",),
        "compute-units": (
            "simd_count",
            "simd_per_cu",
            "cu_per_simd_array",
            "array_count",
            "simd_arrays_per_engine",
        ),
        "waves": ("max_waves_per_simd", "max_slots_scratch_cu"),
        "wavefront": ("wave_front_size",),
        "lds-size": ("lds_size_in_kb",),
        "sdma-engines": (
            "num_sdma_engines",
            "num_sdma_xgmi_engines",
            "num_sdma_queues_per_engine",
        ),
    }
    for rule, fields in equal.items():
        if any(getattr(s, f) != getattr(d, f) for f in fields):
            found.add(rule)
    for rule, field in {
        "cp-queues": "num_cp_queues",
        "fw-version": "fw_version",
        "sdma-fw-version": "sdma_fw_version",
        "caches-count": "caches_count",
        "num-gws": "num_gws",
    }.items():
        if getattr(d, field) < getattr(s, field):
            found.add(rule)
    lost = s.capability & ~d.capability & ~0x03C03F00
    if lost or (s.capability ^ d.capability) & 0x3000:
        found.add("capability")
    if (s.capability >> 8 & 15) > (d.capability >> 8 & 15):
        found.add("capability")
    if s.mem_banks[0].heap_type == 1 and d.mem_banks[0].heap_type == 2:
        found.add("visible-vram")
    if d.mem_banks[0].size_in_bytes < s.mem_banks[0].size_in_bytes:
        found.add("vram-size")
    if d.gpu_id in q.free and q.free[d.gpu_id] < q.needs.get(s.gpu_id, 0):
        found.add("vram-free")
    if d.gpu_id in q.busy:
        found.add("busy")
    if None not in host and (host[1] or 0) & ~(host[0] or 0) & 12:
        found.add("pcie-atomics")
    return found


class Machine:
    """What joins the GPUs of a machine, straight from the links."""

    def __init__(self, topology: Topology) -> None:
        self.gpus = [n for n in topology.nodes if n.gpu_id]
        shown = {n.number: n for n in topology.nodes}
        self.type: dict[tuple[int, int], int] = {}
        self.bandwidth: dict[tuple[int, int], int] = {}
        self.cpu: dict[int, int] = {}
        self.flags: dict[int, int] = {}
        for node in topology.nodes:
            for link in node.links:
                if link.node_to not in shown:
                    continue
                self.type[link.node_from, link.node_to] = link.type
                if link.type == XGMI:
                    self.bandwidth[link.node_from, link.node_to] = link.max_bandwidth
                if node.gpu_id and not shown[link.node_to].gpu_id:
                    self.cpu[node.number] = link.node_to
                    self.flags[node.number] = link.flags

    def hive(self, a: Node, b: Node) -> bool:
        return a.hive_id != 0 and a.hive_id == b.hive_id

    def numa(self, a: Node, b: Node) -> bool | None:
        if a.number not in self.cpu or b.number not in self.cpu:
            return None
        return self.cpu[a.number] == self.cpu[b.number]


def together(
    here: Machine, there: Machine, a: Node, b: Node, c: Node, d: Node
) -> tuple[set[str], tuple[int, int, int]]:
    """Rules that (a, b) at (c, d) break, and what it costs: numa, hive, bandwidth."""
    found = set()
    lost = 0
    for old, new in (
        ((a.number, b.number), (c.number, d.number)),
        ((b.number, a.number), (d.number, c.number)),
    ):
        if here.type.get(old) == XGMI and there.type.get(new) != XGMI:
            found.add("xgmi")
        if old in here.type and new not in there.type:
            found.add("peer-link")
        lost += max(0, here.bandwidth.get(old, 0) - there.bandwidth.get(new, 0))
    hive = here.hive(a, b), there.hive(c, d)
    numa = here.numa(a, b), there.numa(c, d)
    if hive == (True, False):
        found.add("hive")
    if numa == (True, False):
        found.add("numa")
    changed = None not in numa and numa[0] != numa[1]
    return found, (int(changed), int(hive[0] != hive[1]), lost)


def brute_force(q: Question) -> tuple[Cost | None, int | None]:
    """Cost of the best map or None, and the size of the smallest set of relaxations."""
    here, there = Machine(q.source), Machine(q.destination)
    mine = [g for g in here.gpus if q.visible is None or g.gpu_id in q.visible]
    if len(mine) > len(there.gpus):
        return None, None
    bit = {name: 1 << n for n, name in enumerate(RULE_NAMES)}
    every = np.array(list(permutations(range(len(there.gpus)), len(mine))), dtype=np.int64)
    for old, new in q.override:
        i = [g.gpu_id for g in mine].index(old)
        every = every[every[:, i] == [g.gpu_id for g in there.gpus].index(new)]
    broken = np.zeros(len(every), dtype=np.int64)
    costs = np.zeros((3, len(every)), dtype=np.int64)
    for i, s in enumerate(mine):
        row = [
            sum(
                bit[r]
                for r in alone(s, d, q, (here.flags.get(s.number), there.flags.get(d.number)))
            )
            for d in there.gpus
        ]
        broken |= np.array(row)[every[:, i]]
        for j in range(i):
            rules = np.zeros((len(there.gpus),) * 2, dtype=np.int64)
            cost = np.zeros((3, *rules.shape), dtype=np.int64)
            for x, c in enumerate(there.gpus):
                for y, d in enumerate(there.gpus):
                    if x != y:
                        names, parts = together(here, there, s, mine[j], c, d)
                        rules[x, y] = sum(bit[r] for r in names)
                        cost[:, x, y] = parts
            broken |= rules[every[:, i], every[:, j]]
            costs += cost[:, every[:, i], every[:, j]]
    counts = np.array([int(b).bit_count() for b in broken])
    allowed = sum(bit[name] for name in q.relax)
    good = np.flatnonzero((broken & ~allowed) == 0)
    smallest = int(counts.min()) if len(counts) else None
    if not len(good):
        return None, smallest
    best = min((int(counts[n]), *(int(costs[k, n]) for k in range(3))) for n in good)
    return Cost(relaxed=best[0], numa=best[1], hive=best[2], xgmi_bandwidth_lost=best[3]), smallest


def ask(q: Question) -> MatchResult:
    return match(
        q.source,
        q.destination,
        visible=q.visible,
        needs=q.needs,
        free=q.free,
        busy=q.busy,
        override=q.override,
        relax=q.relax,
    )


def compare(seed: int) -> bool:
    """One random pair; whether there was a map."""
    q = question(random.Random(seed), 8, RULE_NAMES)
    cost, smallest = brute_force(q)
    result = ask(q)
    assert result.cost == cost, f"seed {seed}: {result}"
    assert (result.map is None) == (cost is None)
    if result.map is None:
        assert len(result.advice) == (smallest or 0), f"seed {seed}: {result.advice}"
        assert result.refusals or q.override
    else:
        assert result.proven
        assert_costs(q, result)
    return result.map is not None


def assert_costs(q: Question, result: MatchResult) -> None:
    """That the map itself, not only the number beside it, is as cheap as it says."""
    assert result.map is not None
    it = dataclasses.replace(q, override=result.map.pairs, relax=frozenset(result.relaxed))
    cost, _ = brute_force(it)
    assert cost == result.cost
    assert cost is not None
    assert cost.relaxed == len(result.relaxed)
    assert len({new for _, new in result.map.pairs}) == len(result.map.pairs)


def run(count: int, start: int) -> None:
    found = sum(compare(seed) for seed in range(start, start + count))
    assert count * 0.2 < found < count * 0.8, f"{found} of {count} had a map: too one-sided"


def test_random_pairs_have_the_answer_of_the_brute_force() -> None:
    run(int(os.environ.get("MIGRATE_TOPOLOGY_PAIRS", SHORT)), 0)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_ten_thousand_random_pairs_have_the_answer_of_the_brute_force() -> None:
    run(FULL, 1_000_000)
