"""Which rules have to be relaxed for a map to exist: the smallest set, and the mildest.

A best-first walk over sets of rules. From a set that does not suffice only steps are
taken that some map would need: all rules that one GPU at one place breaks, or one rule
about two GPUs. So every smallest set is reached, and no set is tried that is larger.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from migrate.topology.search import Problem, Solution, solve

_EFFORT = 20_000


def cheapest(problem: Problem, allowed: int) -> Solution | None:
    """The best map that breaks the fewest rules, all of *allowed*; None: there is none.

    Of several smallest sets the one with the cheapest map.
    """
    best: Solution | None = None
    size = 0
    for rules in _candidates(problem, allowed):
        if best is not None and rules.bit_count() > size:
            break
        found = solve(problem, rules, _EFFORT)
        if found is not None and (best is None or found.cost < best.cost):
            best, size = found, rules.bit_count()
    return best


def mildest(problem: Problem, allowed: int) -> Solution | None:
    """A map that breaks the fewest rules; of several smallest sets the mildest (last in order)."""
    for rules in _candidates(problem, allowed):
        found = solve(problem, rules, _EFFORT)
        if found is not None:
            return found
    return None


def _candidates(problem: Problem, allowed: int) -> Iterator[int]:
    """Sets worth trying, the smallest first; the consumer stops when it has enough."""
    steps = {bits for row in problem.gpu_broken for bits in row if bits}
    joint = 0
    for row in problem.joint_broken:
        for bits in row:
            joint |= bits
    steps |= {1 << n for n in range(joint.bit_length()) if joint >> n & 1}
    heap = [(0, 0, 0)]
    known = {0}
    while heap:
        _, _, rules = heapq.heappop(heap)
        if _every_gpu_has_a_place(problem, rules):
            yield rules
        for step in _useful(problem, rules, steps):
            larger = rules | step
            if larger not in known and not larger & ~allowed:
                known.add(larger)
                heapq.heappush(heap, (larger.bit_count(), -larger, larger))


def _every_gpu_has_a_place(problem: Problem, rules: int) -> bool:
    return all(any(not bits & ~rules for bits in row) for row in problem.gpu_broken)


def _useful(problem: Problem, rules: int, steps: set[int]) -> set[int]:
    """Steps that some map would need: of a GPU without a place just its own."""
    for row in problem.gpu_broken:
        if all(bits & ~rules for bits in row):
            return set(row)
    return steps
