"""Which rules have to be relaxed for a map to exist: the smallest set, and the mildest.

A best-first walk over sets of rules. From a set that does not suffice only steps are
taken that some map would need: all rules that one GPU at one place breaks, or one rule
about two GPUs. So every smallest set is reached, and no set is tried that is larger.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator

import numpy as np

from migrate.topology.search import Problem, Solution, feasible, matchable, solve

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
        found = feasible(problem, rules)
        if found is not None:
            return found
    return None


def _candidates(problem: Problem, allowed: int) -> Iterator[int]:
    """Sets worth trying, the smallest first; the consumer stops when it has enough."""
    joint = 0
    for row in problem.joint_broken:
        for bits in row:
            joint |= bits
    pair_steps = {1 << n for n in range(joint.bit_length()) if joint >> n & 1}
    heap = [(0, 0, 0)]
    known = {0}
    while heap:
        _, _, rules = heapq.heappop(heap)
        steps = _unary_steps(problem, rules)
        if steps is None:
            yield rules
            steps = pair_steps.union(*problem.gpu_broken)
        for step in _smallest(steps, rules):
            larger = rules | step
            if larger not in known and not larger & ~allowed:
                known.add(larger)
                heapq.heappush(heap, (larger.bit_count(), -larger, larger))


def _unary_steps(problem: Problem, rules: int) -> set[int] | None:
    """What to relax for every GPU to have a place of its own, pairs apart; None: nothing."""
    for row in problem.gpu_broken:
        if all(bits & ~rules for bits in row):
            return set(row)
    possible = (np.array(problem.gpu_broken, dtype=np.int64) & ~rules) == 0
    if matchable(possible, [1] * possible.shape[1]):
        return None
    return {bits for row in problem.gpu_broken for bits in row}


def _smallest(steps: Iterable[int], rules: int) -> list[int]:
    """What the steps add, without those that add all that another adds and more."""
    kept: list[int] = []
    for added in sorted({step & ~rules for step in steps} - {0}, key=lambda b: (b.bit_count(), b)):
        if not any(small & added == small for small in kept):
            kept.append(added)
    return kept
