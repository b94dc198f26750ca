"""Placement of a drain: what every plan must satisfy, and that a full one is found."""

from __future__ import annotations

from itertools import product

from hypothesis import given, settings
from hypothesis import strategies as st

from migrate.drain.placement import Job, Plan, Target, plan
from migrate.topology.match import PREFERENCES, match
from migrate.topology.model import Topology
from tests.unit.topology_kit import GIB, gpu

SIZES = st.integers(0, 8).map(lambda n: n * GIB)


def machine(count: int, first: int = 1, target: int = 90010) -> Topology:
    return Topology(nodes=tuple(gpu(first + n, gfx_target_version=target) for n in range(count)))


@st.composite
def cases(draw: st.DrawFn, gpus: int) -> tuple[Topology, list[Job], list[Target]]:
    source = machine(gpus)
    jobs = [
        Job(pid=100 + n, vram={g.gpu_id: draw(SIZES) for g in source.gpus})
        for n in range(draw(st.integers(0, 4)))
    ]
    targets = []
    for n in range(draw(st.integers(0, 3))):
        kind = draw(st.sampled_from((90010, 90010, 90010, 110000)))
        there = machine(gpus, 11 + 10 * n, kind)
        free = {g.gpu_id: draw(SIZES) for g in there.gpus}
        slots = draw(st.sampled_from((None, None, 1, 2)))
        targets.append(Target(name=f"h{n}", topology=there, free=free, slots=slots))
    return source, jobs, targets


def check(source: Topology, jobs: list[Job], targets: list[Target], made: Plan) -> None:
    """Every placement stands on its own, and all together leave no GPU overdrawn."""
    placed = [p.pid for p in made.placements]
    assert sorted(placed + [u.pid for u in made.unplaced]) == sorted(j.pid for j in jobs)
    left = {t.name: dict(t.free) for t in targets}
    by_name, by_pid = {t.name: t for t in targets}, {j.pid: j for j in jobs}
    for placement in made.placements:
        job, target = by_pid[placement.pid], by_name[placement.host]
        assert set(placement.gpu_map.as_dict()) == set(job.vram)
        fixed = match(
            source,
            target.topology,
            visible=sorted(job.vram),
            needs=job.vram,
            free=target.free,
            override=placement.gpu_map.pairs,
            relax=PREFERENCES,
        )
        assert fixed.map == placement.gpu_map
        for gpu_id, size in job.vram.items():
            left[placement.host][placement.gpu_map[gpu_id]] -= size
    assert all(size >= 0 for free in left.values() for size in free.values())
    for target in targets:
        if target.slots is not None:
            assert sum(p.host == target.name for p in made.placements) <= target.slots
    for unplaced in made.unplaced:
        assert set(unplaced.reasons) == set(by_name)
        assert all(unplaced.reasons.values())


@settings(max_examples=60, deadline=None)
@given(cases(2))
def test_a_plan_overdraws_nothing_and_tells_of_everyone(
    case: tuple[Topology, list[Job], list[Target]],
) -> None:
    source, jobs, targets = case
    made = plan(source, jobs, targets)
    check(source, jobs, targets, made)
    # The order in which they are named is nothing.
    assert plan(source, jobs[::-1], targets[::-1]) == made


@settings(max_examples=60, deadline=None)
@given(cases(1))
def test_as_many_are_placed_as_can_be(
    case: tuple[Topology, list[Job], list[Target]],
) -> None:
    """With a GPU a host it is bin packing: against every assignment there is."""
    source, jobs, targets = case
    most = 0
    choices = [None, *range(len(targets))]
    for assignment in product(choices, repeat=len(jobs)):
        loads = [[j.bytes for j, a in zip(jobs, assignment, strict=True) if a == n]
                 for n in range(len(targets))]  # fmt: skip
        fits = all(
            sum(load) <= min(t.free.values())
            and len(load) <= (len(jobs) if t.slots is None else t.slots)
            and (not load or t.topology.gpus[0].gfx_target_version == 90010)
            for load, t in zip(loads, targets, strict=True)
        )
        if fits:
            most = max(most, sum(a is not None for a in assignment))
    assert len(plan(source, jobs, targets).placements) == most


@settings(max_examples=30, deadline=None)
@given(cases(2), st.data())
def test_an_excluded_host_gets_nothing(
    case: tuple[Topology, list[Job], list[Target]], data: st.DataObject
) -> None:
    source, jobs, targets = case
    names = [t.name for t in targets]
    excluded = {
        job.pid: frozenset(data.draw(st.sets(st.sampled_from(names)))) if names else frozenset()
        for job in jobs
    }
    made = plan(source, jobs, targets, excluded=excluded)
    assert all(p.host not in excluded[p.pid] for p in made.placements)
