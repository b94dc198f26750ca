"""Which destination GPU becomes which source GPU: the one function that decides.

Preflight, restore and the command line all call :func:`match`. If a map exists that
satisfies every rule it is found; else the refusals say what forbids it and ``advice``
which rules would have to be relaxed. Of several maps the best by this cost is taken, the
first number that differs deciding:

1. ``relaxed``: how many rules had to be relaxed (of those that the caller allowed);
2. ``numa``: pairs of GPUs that shared a NUMA node and do not, or the other way round;
3. ``hive``: the same for hives;
4. ``xgmi_bandwidth_lost``: MB/s, summed over both directions of all pairs of GPUs, by
   which the XGMI bandwidth at the destination is below the source's.

Remaining ties are broken by the GPUs' PCI addresses, so the answer is the same each time, also
where the kernel numbered the nodes otherwise.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from migrate.errors import InsufficientVram, MigrateError, NoGpuMap, UsageError, VisibleGpus
from migrate.model import GpuMap, Value
from migrate.topology.model import Node, Topology
from migrate.topology.relations import Joint, Joints, host_link_flags
from migrate.topology.relax import cheapest, mildest
from migrate.topology.rules import (
    CRIU_SWITCHES,
    GPU_RULES,
    PAIR_RULES,
    RULE_NAMES,
    RULES,
    DestinationGpu,
    GpuRule,
    PairRule,
    SourceGpu,
)
from migrate.topology.search import MAX_GPUS, Problem, Solution, broken_by

VISIBLE_GPUS = "visible-gpus"  # no rule to relax: RESTORE wants the same number
GPU_MAP = "gpu-map"  # the caller's own --gpu-map

_NUMA_SHIFT = 12  # at most 2016 pairs of 64 GPUs
_MOST_BANDWIDTH = (1 << 32) - 1  # the kernel's field has 32 bits
ALL_RULES = (1 << len(RULES)) - 1
OVERRIDE = 1 << len(RULES)  # a bit that nothing relaxes


class Cost(Value):
    """See the module's text; lower is better, the first field that differs decides."""

    relaxed: int
    numa: int
    hive: int
    xgmi_bandwidth_lost: int


class Refusal(Value):
    """One reason against: ids are gpu_ids as decimal strings, empty where none is meant."""

    rule: str
    source_gpu: str
    destination_gpu: str
    source_value: str
    destination_value: str
    message: str


class MatchResult(Value):
    """The map, or why there is none.

    ``relaxed`` are the rules that the map breaks, all allowed by the caller. ``refusals``
    come with no map only; the first are those of the map that needs the fewest
    relaxations, which ``advice`` names (the fewest: up to 10 GPUs; with more it may be a
    set of which none can be left out). ``show`` are the destination's gpu_ids that the
    process must see and no others; ``subset`` tells that the destination has more, so
    that a device cgroup has to hide the rest. ``proven`` is false where a cheaper map
    was not ruled out within the effort limit.
    """

    map: GpuMap | None
    cost: Cost | None
    relaxed: tuple[str, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    advice: tuple[str, ...] = ()
    show: tuple[int, ...] = ()
    subset: bool = False
    proven: bool = True


# Rules that are broken rather than that a process stays where it is: an idle GPU is
# better than one that another process uses, and that one is better than none.
PREFERENCES = frozenset({"busy"})


def match(
    source: Topology,
    destination: Topology,
    *,
    visible: Sequence[int] | None = None,
    needs: Mapping[int, int] | None = None,
    free: Mapping[int, int] | None = None,
    busy: Collection[int] = (),
    override: Sequence[tuple[int, int]] | None = None,
    relax: Collection[str] = frozenset(),
) -> MatchResult:
    """Find the best map of a process's GPUs to the destination's.

    *visible*: actual gpu_ids that the process sees (KFD counts them, used or not), None
    for all of the source's. *needs*: bytes of VRAM that it holds per source gpu_id.
    *free*: bytes not taken per destination gpu_id, no limit where not given. *busy*:
    destination gpu_ids that other processes hold. *override*: pairs of source and
    destination gpu_id that the caller fixes; the same rules hold for them. *relax*: names
    of rules, or CRIU's for them, that may be broken if there is no map else.

    Raises UsageError for an unknown rule or gpu_id, a GPU named twice, or more GPUs than KFD
    can have.
    """
    case = Case.of(
        source,
        destination,
        visible=visible,
        needs=needs or {},
        free=free or {},
        busy=frozenset(busy),
        override=tuple(override or ()),
    )
    return decide(case, relax)


def decide(case: Case, relax: Collection[str] = frozenset()) -> MatchResult:
    """As :func:`match`, of a case that is already put together."""
    allowed = _bits(relax)
    if len(case.sources) > len(case.destinations):
        return MatchResult(map=None, cost=None, refusals=(_too_many(case),))
    found = cheapest(case.problem, allowed)
    if found is not None:
        return _success(case, found)
    return _failure(case, allowed)


def _bits(names: Collection[str]) -> int:
    plain = {CRIU_SWITCHES.get(name, name) for name in names}
    unknown = sorted(plain - set(RULE_NAMES))
    if unknown:
        raise UsageError(
            f"there is no rule {unknown[0]!r}",
            advice=f"The rules are: {', '.join(RULE_NAMES)}; CRIU's names hold too:"
            f" {', '.join(CRIU_SWITCHES)}.",
        )
    return sum(1 << RULE_NAMES.index(name) for name in plain)


def names_of(bits: int) -> tuple[str, ...]:
    """Names of the rules in a bit set."""
    return tuple(name for index, name in enumerate(RULE_NAMES) if bits >> index & 1)


@dataclass(frozen=True)
class Case:
    """One question, with the GPUs in the order of their PCI addresses."""

    sources: tuple[SourceGpu, ...]
    destinations: tuple[DestinationGpu, ...]
    source_joints: Joints
    destination_joints: Joints
    override: Mapping[int, int]

    @classmethod
    def of(
        cls,
        source: Topology,
        destination: Topology,
        *,
        visible: Sequence[int] | None = None,
        needs: Mapping[int, int],
        free: Mapping[int, int],
        busy: Collection[int],
        override: Sequence[tuple[int, int]],
    ) -> Case:
        """Look everything up. Raises UsageError for ids that are not there, or too many GPUs."""
        for side, machine in (("source", source), ("destination", destination)):
            if len(machine.gpus) > MAX_GPUS:
                raise UsageError(
                    f"the {side} has {len(machine.gpus)} GPUs, more than KFD's {MAX_GPUS}"
                )
        joints, there = Joints(source), Joints(destination)
        seen = _choose(source, visible)
        sources = tuple(
            SourceGpu(
                node=node,
                need=needs.get(node.gpu_id, 0),
                host_link_flags=host_link_flags(node, joints.numa, joints.links),
            )
            for node in sorted(seen, key=_address)
        )
        destinations = tuple(
            DestinationGpu(
                node=node,
                free=free.get(node.gpu_id),
                busy=node.gpu_id in busy,
                host_link_flags=host_link_flags(node, there.numa, there.links),
            )
            for node in sorted(destination.gpus, key=_address)
        )
        fixed = _fixed(override, seen, destination.gpus)
        return cls(sources, destinations, joints, there, fixed)

    @cached_property
    def problem(self) -> Problem:
        """The question as the search wants it."""
        mine, source_joint = _index(self.source_joints, [s.node for s in self.sources])
        theirs, destination_joint = _index(
            self.destination_joints, [d.node for d in self.destinations]
        )
        broken: dict[tuple[object, object], int] = {}
        return Problem(
            gpu_broken=[[self.gpu_broken(s, d) for d in self.destinations] for s in self.sources],
            source_joint=source_joint,
            destination_joint=destination_joint,
            joint_broken=[[_joint_broken(a, b, broken) for b in theirs] for a in mine],
            joint_grouping=[[_grouping(a, b) for b in theirs] for a in mine],
            joint_bandwidth=[[_bandwidth(a, b) for b in theirs] for a in mine],
        )

    def gpu_broken(self, s: SourceGpu, d: DestinationGpu) -> int:
        """Rules that s at d would break, as bits."""
        bits = sum(1 << n for n, rule in enumerate(GPU_RULES) if rule.check(s, d) is not None)
        wanted = self.override.get(s.node.gpu_id)
        taken = d.node.gpu_id in self.override.values()
        if wanted != d.node.gpu_id and (wanted is not None or taken):
            bits |= OVERRIDE
        return bits


def _address(node: Node) -> tuple[int, int, int]:
    """What stays when nodes are numbered anew."""
    return node.domain, node.location_id, node.gpu_id


def _choose(source: Topology, visible: Sequence[int] | None) -> tuple[Node, ...]:
    if visible is None:
        return source.gpus
    known = {node.gpu_id for node in source.gpus}
    for gpu_id in visible:
        if gpu_id not in known:
            raise UsageError(f"the source has no GPU {gpu_id}, which the process is said to see")
    return tuple(node for node in source.gpus if node.gpu_id in visible)


def _fixed(
    override: Sequence[tuple[int, int]], sources: Sequence[Node], destinations: Sequence[Node]
) -> dict[int, int]:
    fixed: dict[int, int] = {}
    for old, new in override:
        if old not in {node.gpu_id for node in sources}:
            raise UsageError(f"--gpu-map: {old} is not a GPU that the process sees")
        if new not in {node.gpu_id for node in destinations}:
            raise UsageError(f"--gpu-map: the destination has no GPU {new}")
        if old in fixed:
            raise UsageError(f"--gpu-map: source GPU {old} stands there twice")
        if new in fixed.values():
            raise UsageError(f"--gpu-map: destination GPU {new} stands there twice")
        fixed[old] = new
    return fixed


def _index(joints: Joints, nodes: Sequence[Node]) -> tuple[list[Joint], list[list[int]]]:
    """Every kind of joint once, and per ordered pair of GPUs which it is."""
    kinds: dict[Joint, int] = {}
    rows = [
        [0 if a is b else kinds.setdefault(joints.between(a, b), len(kinds)) for b in nodes]
        for a in nodes
    ]
    return list(kinds) or [_ALONE], rows


_ALONE = Joints(Topology(nodes=())).between(Node(number=0), Node(number=1))


def _joint_broken(a: Joint, b: Joint, known: dict[tuple[object, object], int]) -> int:
    key = (a.kinds, a.same_hive, a.same_numa), (b.kinds, b.same_hive, b.same_numa)
    if key not in known:
        first = len(GPU_RULES)
        known[key] = sum(
            1 << (first + n) for n, rule in enumerate(PAIR_RULES) if rule.check(a, b) is not None
        )
    return known[key]


def _grouping(a: Joint, b: Joint) -> int:
    """NUMA before hive, in one number."""
    numa = None not in (a.same_numa, b.same_numa) and a.same_numa != b.same_numa
    return (numa << _NUMA_SHIFT) + (a.same_hive != b.same_hive)


def _bandwidth(a: Joint, b: Joint) -> int:
    return sum(
        min(max(0, old - new), _MOST_BANDWIDTH)
        for old, new in zip(a.bandwidth, b.bandwidth, strict=True)
    )


# ---------------------------------------------------------------- results


def _success(case: Case, found: Solution) -> MatchResult:
    relaxed = names_of(broken_by(case.problem, found.places))
    pairs = sorted(
        (
            (s.node, case.destinations[d].node)
            for s, d in zip(case.sources, found.places, strict=True)
        ),
        key=lambda pair: pair[0].number,
    )
    show = sorted((new for _, new in pairs), key=lambda node: node.number)
    return MatchResult(
        map=GpuMap(pairs=tuple((old.gpu_id, new.gpu_id) for old, new in pairs)),
        cost=Cost(
            relaxed=len(relaxed),
            numa=found.grouping >> _NUMA_SHIFT,
            hive=found.grouping & (1 << _NUMA_SHIFT) - 1,
            xgmi_bandwidth_lost=found.bandwidth,
        ),
        relaxed=relaxed,
        show=tuple(node.gpu_id for node in show),
        subset=len(show) < len(case.destinations),
        proven=found.proven,
    )


def _failure(case: Case, tried: int) -> MatchResult:
    nearest = mildest(case.problem, ALL_RULES, tried=tried, quick=True)
    refusals: dict[tuple[str, str, str], Refusal] = {}
    advice: tuple[str, ...] = ()
    if nearest is not None:
        advice = names_of(broken_by(case.problem, nearest.places))
        for refusal in _against(case, nearest.places):
            refusals.setdefault(_key(refusal), refusal)
    for refusal in _table(case):
        refusals.setdefault(_key(refusal), refusal)
    return MatchResult(map=None, cost=None, refusals=tuple(refusals.values()), advice=advice)


def _key(refusal: Refusal) -> tuple[str, str, str]:
    return refusal.rule, refusal.source_gpu, refusal.destination_gpu


def _against(case: Case, places: Sequence[int]) -> Iterator[Refusal]:
    """Everything that forbids one assignment."""
    for i, d in enumerate(places):
        for rule in GPU_RULES:
            if (refusal := gpu_refusal(rule, case.sources[i], case.destinations[d])) is not None:
                yield refusal
    for j, d in enumerate(places):
        for i in range(j):
            for pair_rule in PAIR_RULES:
                refusal = pair_refusal(case, pair_rule, (i, j), (places[i], d))
                if refusal is not None:
                    yield refusal


def _table(case: Case) -> Iterator[Refusal]:
    """The first rule that forbids each source GPU each destination GPU."""
    for s in case.sources:
        for d in case.destinations:
            found = (gpu_refusal(rule, s, d) for rule in GPU_RULES)
            first = next((refusal for refusal in found if refusal is not None), None)
            if first is not None:
                yield first


def gpu_refusal(rule: GpuRule, s: SourceGpu, d: DestinationGpu) -> Refusal | None:
    """What *rule* says against s becoming d, None if nothing."""
    values = rule.check(s, d)
    if values is None:
        return None
    return Refusal(
        rule=rule.name,
        source_gpu=str(s.node.gpu_id),
        destination_gpu=str(d.node.gpu_id),
        source_value=values[0],
        destination_value=values[1],
        message=rule.message(s.node.gpu_id, d.node.gpu_id, values),
    )


def pair_refusal(
    case: Case, rule: PairRule, pair: tuple[int, int], places: tuple[int, int]
) -> Refusal | None:
    """What *rule* says against two GPUs at two places (all by position), None if nothing."""
    a, b = (case.sources[i].node for i in pair)
    c, d = (case.destinations[i].node for i in places)
    if a.number > b.number:  # as the drawings and tables have them
        a, b, c, d = b, a, d, c
    values = rule.check(case.source_joints.between(a, b), case.destination_joints.between(c, d))
    if values is None:
        return None
    return Refusal(
        rule=rule.name,
        source_gpu=f"{a.gpu_id},{b.gpu_id}",
        destination_gpu=f"{c.gpu_id},{d.gpu_id}",
        source_value=values[0],
        destination_value=values[1],
        message=rule.message((a.gpu_id, b.gpu_id), (c.gpu_id, d.gpu_id), values),
    )


def _too_many(case: Case) -> Refusal:
    here, there = len(case.sources), len(case.destinations)
    return Refusal(
        rule=VISIBLE_GPUS,
        source_gpu="",
        destination_gpu="",
        source_value=str(here),
        destination_value=str(there),
        message=(
            f"{VISIBLE_GPUS}: the process sees {_gpus(here)}, the destination has {_gpus(there)}"
            " (KFD restores a process only with as many GPUs as it saw, used or not)"
        ),
    )


def _gpus(count: int) -> str:
    return f"{count} GPU" if count == 1 else f"{count} GPUs"


def error_of(result: MatchResult) -> MigrateError:
    """The error that says why there is no map. ValueError if there is one."""
    if result.map is not None:
        raise ValueError("there is a map")
    if not result.refusals:
        return NoGpuMap("no map has the pairs given by --gpu-map")
    first = result.refusals[0]
    if first.rule == VISIBLE_GPUS:
        return VisibleGpus(first.message)
    more = len(result.refusals) - 1
    message = first.message + (f"; and {more} more" if more else "")
    # What is only preferred is broken unasked; VRAM is mostly taken where a GPU is busy, too.
    needed = [name for name in result.advice if name not in PREFERENCES] or result.advice
    if set(needed) == {"vram-free"}:
        return InsufficientVram(message)
    if not needed:
        return NoGpuMap(message)
    relax = " ".join(f"--relax {name}" for name in needed)
    return NoGpuMap(
        message, advice=f"{NoGpuMap.advice} The smallest relaxation that allows a map: {relax}."
    )
