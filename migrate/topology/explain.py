"""Why a GPU can or can't go where: the table behind ``migrate map --explain``."""

from __future__ import annotations

from migrate.model import Value
from migrate.topology.match import ALL_RULES, OVERRIDE, Case, MatchResult, names_of
from migrate.topology.relax import SMALL, mildest
from migrate.topology.search import Problem, broken_by, feasible, interchangeable


class Cell(Value):
    """One source GPU at one destination GPU.

    ``rule`` is the first rule that forbids it, empty if some map has it. ``alone``: no
    rule forbids the pair itself, but together with the other GPUs no map has it.
    """

    source_gpu: int
    destination_gpu: int
    rule: str = ""
    alone: bool = False

    @property
    def shown(self) -> str:
        """For a person: ``yes``, the rule, or the rule in brackets if only others object."""
        if not self.rule:
            return "yes"
        return f"({self.rule})" if self.alone else self.rule


class Explanation(Value):
    """``rows`` per source GPU; ``relaxations``: the smallest set that would allow a map.

    ``relaxations`` is empty if there is a map, and if none would help.
    """

    rows: tuple[tuple[Cell, ...], ...]
    relaxations: tuple[str, ...]


def explain(case: Case, result: MatchResult) -> Explanation:
    """Look at every pair. The answer for interchangeable GPUs is found once."""
    relaxations: tuple[str, ...] = ()
    some_map = result.map is not None and not result.relaxed
    sets: list[int] = []
    if not some_map and len(case.sources) <= len(case.destinations):
        nearest = mildest(case.problem, ALL_RULES)
        if nearest is not None:
            sets.append(broken_by(case.problem, nearest.places))
            some_map = not sets[0]
            relaxations = names_of(sets[0]) if result.map is None else ()
    alike = interchangeable(case.problem)
    known: dict[tuple[int, int], tuple[str, bool]] = {}
    rows = []
    for i, s in sorted(enumerate(case.sources), key=lambda each: each[1].node.number):
        row = []
        for d, t in sorted(enumerate(case.destinations), key=lambda each: each[1].node.number):
            key = alike[0][i], alike[1][d]
            if key not in known:
                known[key] = _verdict(case.problem, i, d, sets, some_map)
            rule, alone = known[key]
            row.append(
                Cell(
                    source_gpu=s.node.gpu_id,
                    destination_gpu=t.node.gpu_id,
                    rule=rule,
                    alone=alone,
                )
            )
        rows.append(tuple(row))
    return Explanation(rows=tuple(rows), relaxations=relaxations)


def _verdict(problem: Problem, i: int, d: int, sets: list[int], some_map: bool) -> tuple[str, bool]:
    """*sets*: those of rules that sufficed before; without *some_map* the smallest is the first.

    Of many GPUs they are tried before a search for a smaller one, which takes seconds.
    """
    broken = problem.gpu_broken[i][d]
    if broken & OVERRIDE:
        return "gpu-map", False
    if broken:
        return names_of(broken)[0], False
    if len(problem.gpu_broken) > len(problem.gpu_broken[0]):
        return "visible-gpus", True
    fixed = _with(problem, i, d)
    if some_map and feasible(fixed) is not None:
        return "", False
    first = [] if some_map else sets[:1]
    tried = sets if len(problem.gpu_broken[0]) > SMALL else first
    nearest = next((found for rules in tried if (found := feasible(fixed, rules))), None)
    if nearest is None:
        nearest = mildest(fixed, ALL_RULES, quick=True)
    if nearest is None:
        return "gpu-map", True
    rules = broken_by(fixed, nearest.places)
    if rules not in sets:
        sets.append(rules)
    return names_of(rules)[0], True


def _with(problem: Problem, i: int, d: int) -> Problem:
    """The same problem with i at d."""
    rows = [
        [bits | (OVERRIDE if (r == i) != (c == d) else 0) for c, bits in enumerate(row)]
        for r, row in enumerate(problem.gpu_broken)
    ]
    return Problem(
        gpu_broken=rows,
        source_joint=problem.source_joint,
        destination_joint=problem.destination_joint,
        joint_broken=problem.joint_broken,
        joint_grouping=problem.joint_grouping,
        joint_bandwidth=problem.joint_bandwidth,
    )


def as_document(explanation: Explanation) -> object:
    """For JSON: ids as decimal strings, as in the map."""
    return {
        "relaxations": list(explanation.relaxations),
        "table": [
            {
                "source_gpu": str(cell.source_gpu),
                "destination_gpu": str(cell.destination_gpu),
                "rule": cell.rule or None,
                "alone": cell.alone,
            }
            for row in explanation.rows
            for cell in row
        ],
    }
