"""The search: an exact branch and bound over assignments, blind to what rules mean.

Given: which rules each pair (source GPU, destination GPU) would break, and which rules
and costs each pair of such pairs. Wanted: an assignment that breaks none but the allowed
ones, of the least cost, or the proof that there is none.

Three things keep it fast without losing a solution:

* destination GPUs that can be swapped without anybody noticing are one *class* with a
  capacity, and interchangeable source GPUs take classes in ascending order;
* after each step every open GPU keeps only the classes that go with all that is placed,
  and a bipartite matching must still exist (so 5 GPUs never try 4 places);
* what is placed, plus half of the cheapest that each open pair could cost as seen from
  either end, is a lower bound (Gilmore and Lawler's, without its assignment step).

The search is deterministic: same input, same answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Grid = NDArray[np.int64]
INFINITE = 1 << 56  # a sum of MAX_GPUS + 1 of them fits in 63 bits
MAX_GPUS = 64  # MAX_GPU_INSTANCE of kfd_priv.h


@dataclass(frozen=True)
class Problem:
    """What to solve. Rules are bits; k source GPUs, n destination GPUs.

    ``gpu_broken[i][d]``: rules broken by i at d. ``source_joint[i][j]`` and
    ``destination_joint[d][e]``: what joins two GPUs, as an index into the rows and
    columns of ``joint_broken`` and ``joint_cost`` (of an ordered pair; the costs of both
    orders must be the same and are counted once; less than INFINITE in all). At most
    MAX_GPUS GPUs a side, which is KFD's own limit.
    """

    gpu_broken: Sequence[Sequence[int]]
    source_joint: Sequence[Sequence[int]]
    destination_joint: Sequence[Sequence[int]]
    joint_broken: Sequence[Sequence[int]]
    joint_cost: Sequence[Sequence[int]]


@dataclass(frozen=True)
class Solution:
    """``places[i]`` is the destination of source GPU i. ``proven``: none is cheaper."""

    places: tuple[int, ...]
    cost: int
    proven: bool


def solve(problem: Problem, allowed: int = 0, effort: int | None = None) -> Solution | None:
    """The cheapest assignment that breaks only rules in *allowed*; None: proved to be none.

    After *effort* steps the best one found so far is returned with ``proven`` false; a
    None is always proven, whatever it takes.
    """
    if not problem.gpu_broken:
        return Solution(places=(), cost=0, proven=True)
    if len(problem.gpu_broken) > len(problem.gpu_broken[0]):
        return None
    return _Search(problem, allowed, effort).run()


def destination_classes(problem: Problem) -> list[list[int]]:
    """Destination GPUs that can be swapped with each other, ascending, in groups."""
    columns = list(zip(*problem.gpu_broken, strict=True))
    return _twins(columns, problem.destination_joint)


def source_classes(problem: Problem) -> list[list[int]]:
    """The same for the source GPUs."""
    return _twins([tuple(row) for row in problem.gpu_broken], problem.source_joint)


def _twins(unary: Sequence[tuple[int, ...]], joint: Sequence[Sequence[int]]) -> list[list[int]]:
    groups: list[list[int]] = []
    for x in range(len(unary)):
        for group in groups:
            if unary[x] == unary[group[0]] and _swappable(x, group[0], joint):
                group.append(x)
                break
        else:
            groups.append([x])
    return groups


def _swappable(x: int, y: int, joint: Sequence[Sequence[int]]) -> bool:
    return joint[x][y] == joint[y][x] and all(
        joint[x][z] == joint[y][z] and joint[z][x] == joint[z][y]
        for z in range(len(joint))
        if z not in (x, y)
    )


@dataclass
class _State:
    """A node of the search tree: ``cost`` of what is placed, ``open`` rows of the grid."""

    placed: dict[int, int]
    grid: Grid  # per source GPU and class: cost to what is placed, INFINITE: not possible
    left: list[int]  # capacity per class
    cost: int


@dataclass
class _Search:
    problem: Problem
    allowed: int
    effort: int | None
    classes: list[list[int]] = field(init=False)
    steps: int = 0
    best_cost: int = INFINITE
    best: dict[int, int] | None = None
    exhausted: bool = False

    def __post_init__(self) -> None:
        self.classes = destination_classes(self.problem)
        heads = [group[0] for group in self.classes]
        unary = np.array(self.problem.gpu_broken, dtype=np.int64)[:, heads]
        self.grid = np.where(unary & ~self.allowed, INFINITE, 0).astype(np.int64)
        self.pairs = self._pair_costs(heads)
        self.twin_order = self._source_order()

    def _pair_costs(self, heads: list[int]) -> Grid:
        """Cost of (i at c, j at d) for all, INFINITE where a rule forbids it."""
        broken = np.array(self.problem.joint_broken, dtype=np.int64)
        cost = np.array(self.problem.joint_cost, dtype=np.int64)
        table = np.where(broken & ~self.allowed, INFINITE, cost)
        table = np.hstack([table, np.full((table.shape[0], 1), INFINITE)])  # last: can't be
        here = np.array(self.problem.destination_joint, dtype=np.int64)[np.ix_(heads, heads)]
        for c, group in enumerate(self.classes):
            inside = self.problem.destination_joint[group[0]][group[1]] if group[1:] else -1
            here[c, c] = inside
        rows = np.array(self.problem.source_joint, dtype=np.int64)
        pairs: Grid = table[rows[:, None, :, None], here[None, :, None, :]].astype(np.int64)
        every = np.arange(len(rows))
        pairs[every, :, every, :] = 0
        return pairs

    def _source_order(self) -> dict[int, list[int]]:
        """Per source GPU its twins; ids tell which comes first."""
        order: dict[int, list[int]] = {}
        for group in source_classes(self.problem):
            for x in group:
                order[x] = [y for y in group if y != x]
        return order

    def run(self) -> Solution | None:
        capacity = [len(group) for group in self.classes]
        self._visit(_State(placed={}, grid=self.grid.copy(), left=capacity, cost=0))
        if self.best is None:
            return None
        return Solution(
            places=self._spread(self.best), cost=self.best_cost, proven=not self.exhausted
        )

    def _spread(self, chosen: dict[int, int]) -> tuple[int, ...]:
        """From classes to GPUs: ascending within a class."""
        stock = [iter(group) for group in self.classes]
        return tuple(next(stock[chosen[i]]) for i in sorted(chosen))

    def _visit(self, state: _State) -> None:
        self.steps += 1
        waiting = [i for i in range(len(self.grid)) if i not in state.placed]
        if not waiting:
            self.best_cost, self.best = state.cost, dict(state.placed)
            return
        bound = self._bound(state, waiting)
        if bound is None or not _matchable(bound < INFINITE, state.left):
            return
        row = min(range(len(waiting)), key=lambda r: (int((bound[r] < INFINITE).sum()), waiting[r]))
        lowest = bound.min(axis=1)
        others = 2 * state.cost + int(lowest.sum()) - int(lowest[row])
        values = sorted((int(v), c) for c, v in enumerate(bound[row]) if v < INFINITE)
        for value, c in values:
            if others + value >= 2 * self.best_cost:
                return
            if self._spent():
                return
            self._visit(self._place(state, waiting[row], c))

    def _spent(self) -> bool:
        """Whether to stop looking for something cheaper."""
        if self.best is not None and self.effort is not None and self.steps >= self.effort:
            self.exhausted = True
        return self.exhausted

    def _place(self, state: _State, i: int, c: int) -> _State:
        grid = np.minimum(state.grid + self.pairs[i, c], INFINITE)
        left = list(state.left)
        left[c] -= 1
        if not left[c]:
            grid[:, c] = INFINITE
        for twin in self.twin_order[i]:
            if twin > i:
                grid[twin, :c] = INFINITE
            else:
                grid[twin, c + 1 :] = INFINITE
        return _State(
            placed=state.placed | {i: c},
            grid=grid,
            left=left,
            cost=state.cost + int(state.grid[i, c]),
        )

    def _bound(self, state: _State, waiting: list[int]) -> Grid | None:
        """Twice the least that each open GPU adds per class, or None: a dead end.

        Repeated while it still rules out classes (arc consistency).
        """
        rows = np.array(waiting)
        base = state.grid[rows]
        pairs = self.pairs[rows][:, :, rows]
        while True:
            possible = base < INFINITE
            if not possible.any(axis=1).all():
                return None
            shut = np.where(possible, 0, INFINITE)
            nearest = np.minimum(pairs + shut[None, None], INFINITE).min(axis=3)
            every = np.arange(len(rows))
            nearest[every, :, every] = 0
            bound = np.minimum(2 * base + nearest.sum(axis=2), INFINITE)
            closed = (bound >= INFINITE) & possible
            if not closed.any():
                return np.asarray(bound)
            base = np.where(closed, INFINITE, base)


def _matchable(possible: NDArray[np.bool_], left: Sequence[int]) -> bool:
    """Whether every row can have a class of its own within the capacities (Kuhn)."""
    options = [[int(c) for c in np.flatnonzero(row)] for row in possible]
    holders: list[list[int]] = [[] for _ in left]

    def seat(row: int, seen: set[int]) -> bool:
        for c in options[row]:
            if c in seen:
                continue
            seen.add(c)
            if len(holders[c]) < left[c]:
                holders[c].append(row)
                return True
            for index, other in enumerate(holders[c]):
                if seat(other, seen):
                    holders[c][index] = row
                    return True
        return False

    return all(seat(row, set()) for row in range(len(options)))
