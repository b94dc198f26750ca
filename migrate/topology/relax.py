"""Which rules have to be relaxed for a map to exist: the smallest set, and the mildest.

A best-first walk over sets of rules. From a set that does not suffice only steps are
taken that some map would need: all rules that one GPU at one place breaks, or one rule
about two GPUs. So every smallest set is reached, and no set is tried that is larger.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator

import numpy as np

from migrate.topology.search import Effort, Problem, Solution, bits_of, feasible, matchable, solve

# Steps spent on proving that no cheaper map exists: half a second for 16 GPUs a side. Up to
# SMALL GPUs there is no limit, because the proof always comes soon.
_EFFORT = 2_000
SMALL = 10
_TRIES = 40
_LARGE = 1024  # pairs of a source and a destination GPU; a table of their pairs is 4 MiB


def cheapest(problem: Problem, allowed: int) -> Solution | None:
    """The best map that breaks the fewest rules, all of *allowed*; None: there is none.

    Of several smallest sets the one with the cheapest map.
    """
    if not problem.gpu_broken:
        return Solution(places=())
    best: Solution | None = None
    size = 0
    effort = None
    if len(problem.gpu_broken[0]) > SMALL:
        effort = Effort(_EFFORT)
    for rules in _candidates(problem, allowed):
        if best is not None and rules.bit_count() > size:
            break
        found = solve(problem, rules, effort)
        if found is not None and (best is None or found.cost < best.cost):
            best, size = found, rules.bit_count()
    return best


def mildest(
    problem: Problem, allowed: int, *, tried: int | None = None, quick: bool = False
) -> Solution | None:
    """A map that breaks the fewest rules; of several smallest sets the mildest (last in order).

    *tried*: rules that are known not to suffice, all of them together. *quick*: for many
    GPUs stop soon, with a set of which no rule can be left out.
    """
    large = bool(problem.gpu_broken) and len(problem.gpu_broken[0]) > SMALL
    for tries, rules in enumerate(_candidates(problem, allowed)):
        if quick and large and tries >= _TRIES:
            return _irreducible(problem, allowed)
        if tried is not None and not rules & ~tried:
            continue
        found = feasible(problem, rules)
        if found is not None:
            return found
    return None


def _irreducible(problem: Problem, allowed: int) -> Solution | None:
    """A map that breaks rules of which none can be left out, the mild ones kept."""
    best = feasible(problem, allowed)
    for n in range(allowed.bit_length()):
        less = allowed & ~(1 << n)
        if best is not None and (found := feasible(problem, less)) is not None:
            best, allowed = found, less
    return best


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
            if _plausible(problem, rules):
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
    if matchable(bits_of(possible), [1] * possible.shape[1]):
        return None
    return {bits for row in problem.gpu_broken for bits in row}


def _plausible(problem: Problem, rules: int) -> bool:
    """Whether a glance leaves it open that the set suffices: most sets do not pass.

    Every GPU must have a place that goes with some place of every other GPU.
    """
    unary = (np.array(problem.gpu_broken, dtype=np.int64) & ~rules) == 0
    if unary.size > _LARGE:
        return True
    fits = (problem.pair_broken & ~np.uint32(rules)) == 0
    while True:
        supported = (fits & unary).any(axis=3).all(axis=2) & unary
        if (supported == unary).all():
            return matchable(bits_of(unary), [1] * unary.shape[1])
        unary = supported
        if not unary.any(axis=1).all():
            return False


def _smallest(steps: Iterable[int], rules: int) -> list[int]:
    """What the steps add, without those that add all that another adds and more."""
    kept: list[int] = []
    for added in sorted({step & ~rules for step in steps} - {0}, key=lambda b: (b.bit_count(), b)):
        if not any(small & added == small for small in kept):
            kept.append(added)
    return kept
