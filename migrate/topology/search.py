"""The search: an exact branch and bound over assignments, blind to what rules mean.

Given: which rules each pair (source GPU, destination GPU) would break, and which rules
and costs each pair of such pairs. Wanted: an assignment that breaks none but the allowed
ones, of the least cost, or the proof that there is none.

It runs in stages: is there any; the least *grouping* cost (NUMA and hives); and within
that the least *bandwidth* cost. What keeps each of them fast without losing a solution:

* destination GPUs that can be swapped without anybody noticing in that stage are one
  *class* with a capacity, and interchangeable source GPUs take classes in ascending order;
* after each step every open GPU keeps only the classes that go with all that is placed
  and with something for every other open GPU (arc consistency), and a bipartite matching
  must still exist (so 5 GPUs never try 4 places);
* what is placed, plus half of the cheapest that each open pair could cost as seen from
  either end, is a lower bound (Gilmore and Lawler's, without its assignment step).

The search is deterministic: same input, same answer.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

Grid = NDArray[np.int64]
INFINITE = 1 << 55  # a sum of 2 * MAX_GPUS + 2 of them fits in 63 bits
_MANY = 9  # GPUs from which on the dear test at the root pays
_LONG = 100  # steps after which it is done everywhere, while nothing was found
_FEW = 4  # open GPUs for which it never pays
NEVER = 0xFFFFFFFF
MAX_GPUS = 64  # MAX_GPU_INSTANCE of kfd_priv.h


@dataclass(frozen=True)
class Problem:
    """What to solve. Rules are bits; k source GPUs, n destination GPUs, at most MAX_GPUS.

    ``gpu_broken[i][d]``: rules broken by i at d. ``source_joint[i][j]`` and
    ``destination_joint[d][e]``: what joins two GPUs, as an index into the rows and
    columns of ``joint_broken`` (rules) and of the two costs. These are of an ordered
    pair; both orders must tell the same, and the cost is counted once.
    """

    gpu_broken: Sequence[Sequence[int]]
    source_joint: Sequence[Sequence[int]]
    destination_joint: Sequence[Sequence[int]]
    joint_broken: Sequence[Sequence[int]]
    joint_grouping: Sequence[Sequence[int]]
    joint_bandwidth: Sequence[Sequence[int]]

    @cached_property
    def pair_broken(self) -> NDArray[np.uint32]:
        """Rules broken by (i at d, j at e), all of them where only one of two is placed."""
        rows = np.array(self.source_joint, dtype=np.int64)
        columns = np.array(self.destination_joint, dtype=np.int64)
        table = np.array(self.joint_broken, dtype=np.uint32)
        pairs: NDArray[np.uint32] = table[rows[:, None, :, None], columns[None, :, None, :]]
        here = np.arange(len(columns))
        pairs[:, here, :, here] = NEVER
        every = np.arange(len(rows))
        pairs[every, :, every, :] = 0
        return pairs


@dataclass(frozen=True)
class Solution:
    """``places[i]`` is the destination of source GPU i. ``proven``: none is cheaper."""

    places: tuple[int, ...]
    grouping: int = 0
    bandwidth: int = 0
    proven: bool = True

    @property
    def cost(self) -> tuple[int, int]:
        """Less is better."""
        return self.grouping, self.bandwidth


@dataclass
class Effort:
    """Steps that may still be spent on looking for something cheaper."""

    left: int


def feasible(problem: Problem, allowed: int = 0) -> Solution | None:
    """Some assignment that breaks only rules in *allowed*; None: proved to be none."""
    if not problem.gpu_broken:
        return Solution(places=())
    if len(problem.gpu_broken) > len(problem.gpu_broken[0]):
        return None
    nothing = np.zeros_like(np.array(problem.joint_broken, dtype=np.int64))
    found = _Search(_View(problem, allowed, nothing, nothing), limit=0, effort=Effort(0)).run()
    return None if found is None else Solution(places=found[0])


def solve(problem: Problem, allowed: int = 0, effort: Effort | None = None) -> Solution | None:
    """The cheapest assignment that breaks only rules in *allowed*; None: proved to be none.

    When *effort* is used up the best so far is taken and ``proven`` is false; None: no
    limit. Finding one at all, or the proof that there is none, knows no limit.
    """
    first = feasible(problem, allowed)
    if first is None or len(first.places) < 2:
        return first
    grouping = np.array(problem.joint_grouping, dtype=np.int64)
    bandwidth = np.array(problem.joint_bandwidth, dtype=np.int64)
    nothing = np.zeros_like(grouping)
    view = _View(problem, allowed, nothing, grouping)
    best = _Search(view, limit=0, effort=effort, known=first.places).run()
    assert best is not None
    places, least, proven = best
    view = _View(problem, allowed, grouping, bandwidth)
    last = _Search(view, limit=least, effort=effort, known=places).run()
    assert last is not None
    return Solution(places=last[0], grouping=least, bandwidth=last[1], proven=proven and last[2])


def broken_by(problem: Problem, places: Sequence[int]) -> int:
    """Rules that a whole assignment breaks, as bits."""
    bits = 0
    for i, d in enumerate(places):
        bits |= problem.gpu_broken[i][d]
        for j in range(i):
            row, column = problem.source_joint[i][j], problem.destination_joint[d][places[j]]
            bits |= problem.joint_broken[row][column]
    return bits


def interchangeable(problem: Problem) -> tuple[list[int], list[int]]:
    """Per source and per destination GPU the first one that is like it, as rules go."""
    rules = np.array(problem.joint_broken, dtype=np.int64)
    nothing = np.zeros_like(rules)
    view = _View(problem, -1, nothing, rules)  # -1: no rule forbids, each tells itself apart
    columns = [column.tobytes() for column in np.array(problem.gpu_broken).T]
    rows = [row.tobytes() for row in np.array(problem.gpu_broken)]
    found = []
    for unary, joint in ((rows, view.rows), (columns, view.columns)):
        groups = _twins(unary, joint)
        found.append([next(g[0] for g in groups if x in g) for x in range(len(unary))])
    return found[0], found[1]


class _View:
    """A problem as one stage sees it: *bounded* cost within a limit, *least* cost minimised.

    Joints that make no difference to the stage are one joint, so that there are as few
    classes as can be.
    """

    def __init__(self, problem: Problem, allowed: int, bounded: Grid, least: Grid) -> None:
        broken = np.array(problem.joint_broken, dtype=np.int64) & ~allowed
        self.bounded: Grid = np.where(broken != 0, INFINITE, bounded)
        self.least: Grid = np.where(broken != 0, INFINITE, least)
        both = np.stack([self.bounded, self.least])
        self.rows = _renamed(
            problem.source_joint, [both[:, r].tobytes() for r in range(len(broken))]
        )
        self.columns = _renamed(
            problem.destination_joint, [both[:, :, c].tobytes() for c in range(broken.shape[1])]
        )
        self.shut = (np.array(problem.gpu_broken, dtype=np.int64) & ~allowed) != 0

    @cached_property
    def classes(self) -> list[list[int]]:
        """Destination GPUs that can be swapped with each other, ascending, in groups."""
        return _twins([column.tobytes() for column in self.shut.T], self.columns)

    @cached_property
    def source_classes(self) -> list[list[int]]:
        """The same for the source GPUs."""
        return _twins([row.tobytes() for row in self.shut], self.rows)

    def cost(self, places: Sequence[int]) -> int:
        """The cost to be minimised of a whole assignment."""
        return sum(
            int(self.least[self.rows[i][j], self.columns[places[i]][places[j]]])
            for i in range(len(places))
            for j in range(i)
        )

    def grid(self) -> Grid:
        """Per source GPU and class INFINITE where it can't be."""
        heads = [group[0] for group in self.classes]
        return np.where(self.shut[:, heads], INFINITE, 0)

    def pairs(self, table: Grid) -> Grid:
        """Cost of (i at c, j at d), INFINITE where a rule or a class of one forbids it."""
        heads = [group[0] for group in self.classes]
        wide = np.hstack([table, np.full((len(table), 1), INFINITE)])  # last: can't be
        here = np.array(self.columns, dtype=np.int64)[np.ix_(heads, heads)]
        for c, group in enumerate(self.classes):
            here[c, c] = self.columns[group[0]][group[1]] if group[1:] else -1
        rows = np.array(self.rows, dtype=np.int64)
        pairs: Grid = wide[rows[:, None, :, None], here[None, :, None, :]]
        every = np.arange(len(rows))
        pairs[every, :, every, :] = 0
        return pairs


def _renamed(joint: Sequence[Sequence[int]], keys: Sequence[Hashable]) -> list[list[int]]:
    """Joints of the same key under the number of the first of them."""
    first: dict[Hashable, int] = {}
    new = [first.setdefault(key, index) for index, key in enumerate(keys)]
    return [[new[x] for x in row] for row in joint]


def _twins(unary: Sequence[Hashable], joint: Sequence[Sequence[int]]) -> list[list[int]]:
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
    """A node of the search tree. Grids: per source GPU and class, cost to what is placed."""

    placed: dict[int, int]
    bounded: Grid
    least: Grid
    left: list[int]  # capacity per class
    cost: tuple[int, int] = (0, 0)  # bounded and least, of what is placed


class _Search:
    """One stage. *limit*: of the bounded cost. *effort* is counted down; None: no limit.

    *known* is an assignment that is already known to do.
    """

    def __init__(
        self,
        view: _View,
        *,
        limit: int,
        effort: Effort | None,
        known: tuple[int, ...] | None = None,
    ) -> None:
        self.limit, self.effort = limit, effort
        self.classes = view.classes
        self.start = view.grid()
        self.bounded, self.least = view.pairs(view.bounded), view.pairs(view.least)
        self.twins = {x: [y for y in g if y != x] for g in view.source_classes for x in g}
        self.free = not self.least[self.least < INFINITE].any()
        self.tightness = (self.bounded >= INFINITE).any(axis=3).sum(axis=(1, 2))
        self.best = known
        self.best_cost = INFINITE if known is None else view.cost(known)
        self.exhausted = False
        self.steps = 0

    def run(self) -> tuple[tuple[int, ...], int, bool] | None:
        """Places, least cost and whether that is proven, or None."""
        left = [len(group) for group in self.classes]
        state = _State(placed={}, bounded=self.start, least=self.start, left=left)
        rows = np.arange(len(self.start))
        if len(rows) >= _MANY:
            state.bounded = self._surrounded(state, rows)
        self._visit(state)
        if self.best is None:
            return None
        return self.best, self.best_cost, not self.exhausted

    def _surrounded(self, state: _State, rows: NDArray[np.int64]) -> Grid:
        """The bounded grid without (i at c) where the others have no places beside it.

        Dear, so only done at the root and where a search turns out to be long: it decides
        nearly alike machines of many GPUs, whose few odd links must fall on odd links
        (Solnon's local all-different).
        """
        possible: list[int] = bits_of(state.bounded[rows] < INFINITE)
        numbers = rows.tolist()
        changed = True
        while changed:
            changed = False
            for r, i in enumerate(numbers):
                for c in _members(possible[r]):
                    room = list(state.left)
                    room[c] -= 1
                    fits = self.fits[i][c]
                    beside = [fits[j] & possible[q] for q, j in enumerate(numbers) if q != r]
                    if not matchable(beside, room):
                        possible[r] &= ~(1 << c)
                        changed = True
        grid = state.bounded.copy()
        for r, i in enumerate(numbers):
            grid[i, [c for c in range(len(state.left)) if not possible[r] >> c & 1]] = INFINITE
        return grid

    @cached_property
    def fits(self) -> list[list[list[int]]]:
        """Per (i at c) and j the classes that j can have beside it, as bits."""
        found: list[list[list[int]]] = bits_of(self.bounded < INFINITE)
        return found

    def _spread(self, chosen: dict[int, int]) -> tuple[int, ...]:
        """From classes to GPUs: ascending within a class."""
        stock = [iter(group) for group in self.classes]
        return tuple(next(stock[chosen[i]]) for i in sorted(chosen))

    def _visit(self, state: _State) -> None:
        if self.effort is not None:
            self.effort.left -= 1
        waiting = [i for i in range(len(self.start)) if i not in state.placed]
        if not waiting:
            self.best_cost, self.best = state.cost[1], self._spread(state.placed)
            return
        self.steps += 1
        bound = self._bound(state, np.array(waiting))
        if bound is None or not matchable(bits_of(bound < INFINITE), state.left):
            return
        if self.best is None and self.steps > _LONG and len(waiting) > _FEW:
            state.bounded[waiting] = np.where(bound < INFINITE, state.bounded[waiting], INFINITE)
            state.bounded = self._surrounded(state, np.array(waiting))
            bound = self._bound(state, np.array(waiting))
            if bound is None:
                return
        sizes = (bound < INFINITE).sum(axis=1) * len(self.start) ** 2
        row = int((sizes - self.tightness[waiting]).argmin())
        lowest = bound.min(axis=1)
        others = 2 * state.cost[1] + int(lowest.sum()) - int(lowest[row])
        for value, c in sorted((int(v), c) for c, v in enumerate(bound[row]) if v < INFINITE):
            if others + value >= 2 * self.best_cost or self._spent():
                return
            self._visit(self._place(state, waiting[row], c))

    def _spent(self) -> bool:
        """Whether to stop looking for something cheaper."""
        if self.best is not None and self.effort is not None and self.effort.left <= 0:
            self.exhausted = True
        return self.exhausted

    def _place(self, state: _State, i: int, c: int) -> _State:
        bounded = np.minimum(state.bounded + self.bounded[i, c], INFINITE)
        least = np.minimum(state.least + self.least[i, c], INFINITE)
        left = list(state.left)
        left[c] -= 1
        if not left[c]:
            bounded[:, c] = INFINITE
        for twin in self.twins[i]:
            bounded[twin, :c] = INFINITE if twin > i else bounded[twin, :c]
            bounded[twin, c + 1 :] = INFINITE if twin < i else bounded[twin, c + 1 :]
        return _State(
            placed=state.placed | {i: c},
            bounded=bounded,
            least=least,
            left=left,
            cost=(
                state.cost[0] + int(state.bounded[i, c]),
                state.cost[1] + int(state.least[i, c]),
            ),
        )

    def _bound(self, state: _State, rows: NDArray[np.int64]) -> Grid | None:
        """Twice the least that each open GPU adds per class, or None: a dead end.

        INFINITE where the class is ruled out, also by the limit of the bounded cost;
        repeated while that still rules out more.
        """
        base = state.bounded[rows]
        beside = self.bounded[rows]
        beside[base >= INFINITE] = INFINITE
        room = 2 * (self.limit - state.cost[0])
        while True:
            possible = base < INFINITE
            if not possible.any(axis=1).all():
                return None
            bound = _halves(base, beside, rows)
            lowest = bound.min(axis=1)
            if lowest.max() >= INFINITE:
                return None
            closed = possible & (bound - lowest[:, None] + int(lowest.sum()) > room)
            if not closed.any():
                break
            base = np.where(closed, INFINITE, base)
            beside[closed] = INFINITE
        least = np.where(possible, state.least[rows], INFINITE)
        if self.free:
            return least
        beside = self.least[rows]
        beside[~possible] = INFINITE
        return _halves(least, beside, rows)


def _halves(base: Grid, beside: Grid, rows: NDArray[np.int64]) -> Grid:
    """Twice *base* and the cheapest possible place of each other open GPU beside it.

    *beside*: cost of (j at d, i at c), j only open GPUs (*rows*) and i all. The minimum is
    over the second axis, not the last, because that is several times as fast.
    """
    nearest = beside.min(axis=1)
    nearest[np.arange(len(rows)), rows] = 0
    bound: Grid = np.minimum(2 * base + nearest.sum(axis=0)[rows], INFINITE)
    return bound


def _members(bits: int) -> list[int]:
    return [n for n in range(bits.bit_length()) if bits >> n & 1]


def bits_of(possible: NDArray[np.bool_]) -> Any:
    """The last axis, at most MAX_GPUS long, as bit sets: nested lists of one dimension less."""
    packed = np.packbits(possible, axis=-1, bitorder="little")
    words = np.zeros((*packed.shape[:-1], MAX_GPUS // 8), dtype=np.uint8)
    words[..., : packed.shape[-1]] = packed
    return words.view("<u8")[..., 0].tolist()


def matchable(options: Sequence[int], left: Sequence[int]) -> bool:
    """Whether every row can have a class of its own within the capacities (Kuhn).

    *options*: per row the classes that it may have, as bits.
    """
    order = sorted(options, key=int.bit_count)
    if not order:
        return True
    if not order[0]:
        return False
    room = list(left)
    open_ = sum(1 << c for c, capacity in enumerate(left) if capacity > 0)
    holders: list[list[int]] = [[] for _ in left]

    def seat(row: int, seen: int) -> int:
        """The classes that were tried, -1 if the row has got one."""
        nonlocal open_
        free = order[row] & open_
        if free:
            c = (free & -free).bit_length() - 1
            holders[c].append(row)
            room[c] -= 1
            open_ ^= 0 if room[c] else 1 << c
            return -1
        rest = order[row] & ~seen
        while rest:
            bit = rest & -rest
            seen |= bit
            c = bit.bit_length() - 1
            for index, other in enumerate(holders[c]):
                tried = seat(other, seen)
                if tried < 0:
                    holders[c][index] = row
                    return -1
                seen |= tried
            rest = order[row] & ~seen
        return seen

    return all(seat(row, 0) < 0 for row in range(len(order)))
