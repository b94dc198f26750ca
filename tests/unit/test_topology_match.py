"""What match answers beside the rules: subsets, choices, the caller's own map, errors."""

from __future__ import annotations

import random
from itertools import pairwise

import msgspec
import pytest

from migrate.errors import InsufficientVram, NoGpuMap, UsageError, VisibleGpus
from migrate.model import GpuMap
from migrate.topology.gpumap import advance, compose, parse_gpu_map
from migrate.topology.match import PREFERENCES, Cost, MatchResult, error_of, match
from migrate.topology.model import Topology
from scenarios.bench.topology_machines import renumbered
from tests.unit.topology_kit import GIB, assemble, gpu, machine, saved

FOUR = machine([gpu(g) for g in (1, 2, 3, 4)], hives=[[1, 2], [3, 4]], sockets=[[1, 2], [3, 4]])
PAIR = machine([gpu(11), gpu(12)], hives=[[11, 12]], sockets=[[11, 12]])


def pairs(result: MatchResult) -> dict[int, int]:
    assert result.map is not None, result.refusals
    return dict(result.map.pairs)


# ---------------------------------------------------------------- which GPUs


def test_a_subset_is_shown_and_no_other() -> None:
    result = match(PAIR, FOUR)
    assert result.subset
    assert result.show == (1, 2)
    assert set(pairs(result).values()) == {1, 2}
    assert not match(FOUR, FOUR).subset


def test_busy_gpus_and_taken_vram_count() -> None:
    assert match(PAIR, FOUR, busy={2}).show == (3, 4)
    free = {1: 0, 2: 0, 3: GIB, 4: 2 * GIB}
    result = match(PAIR, FOUR, needs={11: 2 * GIB, 12: GIB}, free=free)
    assert pairs(result) == {11: 4, 12: 3}


def test_only_what_the_process_sees_is_mapped() -> None:
    assert pairs(match(FOUR, PAIR, visible=[4, 3])) == {3: 11, 4: 12}
    with pytest.raises(UsageError, match="the source has no GPU 9"):
        match(FOUR, PAIR, visible=[9])


def test_the_best_by_cost_keeps_numa_then_hive_then_bandwidth() -> None:
    ids = [1, 2, 3, 4]
    # Bandwidth: of two hives the faster one.
    slow = machine([gpu(1), gpu(2)], hives=[[1, 2]], bandwidth=50_000)
    both_speeds = Topology(
        nodes=slow.nodes
        + tuple(
            msgspec.structs.replace(node, hive_id=99)
            for node in machine([gpu(3), gpu(4)], hives=[[3, 4]], bandwidth=100_000).nodes
        )
    )
    fast = machine([gpu(11), gpu(12)], hives=[[11, 12]], bandwidth=100_000)
    result = match(fast, both_speeds)
    assert set(pairs(result).values()) == {3, 4}
    assert result.cost == Cost(relaxed=0, numa=0, hive=0, xgmi_bandwidth_lost=0)
    lost = match(fast, both_speeds, busy={3})
    assert lost.cost == Cost(relaxed=0, numa=0, hive=0, xgmi_bandwidth_lost=100_000)
    # NUMA before hive: two PCIe GPUs of one socket stay on one, though that joins them.
    apart = machine([gpu(11), gpu(12)], sockets=[[11, 12]])
    target = machine([gpu(g) for g in ids], hives=[[1, 2]], sockets=[[1, 2], [3], [4]])
    numa = match(apart, target)
    assert set(pairs(numa).values()) == {1, 2}
    assert numa.cost == Cost(relaxed=0, numa=0, hive=1, xgmi_bandwidth_lost=0)
    # Hive, all else equal.
    even = machine([gpu(g) for g in ids], hives=[[1, 2]], sockets=[ids])
    assert match(apart, even).cost == Cost(relaxed=0, numa=0, hive=0, xgmi_bandwidth_lost=0)


def test_fewest_relaxations_come_first() -> None:
    """With both rules allowed the map that breaks one is better than the one that breaks two."""
    source = assemble([gpu(1, fw_version=93, caches_count=300)])
    target = assemble([gpu(2), gpu(3, fw_version=93)])
    result = match(source, target, relax={"fw-version", "caches-count"})
    assert pairs(result) == {1: 3}
    assert result.relaxed == ("caches-count",)


def test_the_same_answer_each_time_and_for_any_order_of_nodes() -> None:
    topology = saved("mi250x8")
    twin = renumbered(random.Random(5), topology)
    first = match(topology, twin)
    assert first == match(topology, twin)
    shuffled = list(twin.nodes)
    random.Random(6).shuffle(shuffled)
    other = match(topology, Topology(nodes=tuple(shuffled)))
    assert other.cost == first.cost


def test_the_same_map_however_the_kernel_numbers_the_nodes() -> None:
    """gpu_ids stay, so the map must too, also where many maps are equally good."""
    for name in ("mi210-8x2hives", "mi300x8", "mi60x4"):
        topology, twin = saved(name), renumbered(random.Random(5), saved(name))
        wanted = pairs(match(topology, twin))
        for seed in range(4):
            other = numbered_anew(random.Random(seed), twin)
            assert other.gpus != twin.gpus
            assert pairs(match(topology, other)) == wanted
            assert pairs(match(numbered_anew(random.Random(seed), topology), twin)) == wanted


def numbered_anew(rng: random.Random, topology: Topology) -> Topology:
    """Other node numbers, the same gpu_ids."""
    new = renumbered(rng, topology)
    old = {node.location_id: node.gpu_id for node in topology.gpus}
    return Topology(
        nodes=tuple(
            msgspec.structs.replace(node, gpu_id=old[node.location_id]) if node.is_gpu else node
            for node in new.nodes
        )
    )


def test_more_gpus_than_kfd_can_have() -> None:
    many = assemble([gpu(g) for g in range(1, 66)])
    for source, destination, side in ((many, PAIR, "source"), (PAIR, many, "destination")):
        with pytest.raises(UsageError, match=f"the {side} has 65 GPUs, more than KFD's 64"):
            match(source, destination)


def test_a_process_without_gpus() -> None:
    assert pairs(match(assemble([]), PAIR)) == {}
    assert pairs(match(PAIR, FOUR, visible=[])) == {}


# ---------------------------------------------------------------- refusals and errors


def test_a_process_that_sees_more_gpus() -> None:
    result = match(FOUR, PAIR)
    (refusal,) = result.refusals
    assert refusal.rule == "visible-gpus"
    error = error_of(result)
    assert isinstance(error, VisibleGpus)
    assert str(error) == (
        "visible-gpus: the process sees 4 GPUs, the destination has 2 GPUs"
        " (KFD restores a process only with as many GPUs as it saw, used or not)"
    )
    assert "only the GPUs it uses" in error.hint


def test_errors_by_rule() -> None:
    taken = error_of(match(PAIR, PAIR, needs={11: 5}, free={11: 4, 12: 4}))
    assert isinstance(taken, InsufficientVram)
    held = match(PAIR, PAIR, needs={11: 5}, free={11: 4, 12: 4}, busy={11, 12}, relax=PREFERENCES)
    assert isinstance(error_of(held), InsufficientVram)
    other = error_of(match(PAIR, assemble([gpu(1, fw_version=1), gpu(2)])))
    assert type(other) is NoGpuMap
    assert "--relax fw-version" in other.hint
    with pytest.raises(ValueError, match="there is a map"):
        error_of(match(PAIR, PAIR))


def test_refusals_name_rule_gpus_and_both_values() -> None:
    result = match(assemble([gpu(1, num_gws=65)]), assemble([gpu(2)]))
    assert list(msgspec.to_builtins(result.refusals)) == [
        {
            "rule": "num-gws",
            "source_gpu": "1",
            "destination_gpu": "2",
            "source_value": "65",
            "destination_value": "64",
            "message": "num-gws: the number of GWS of source GPU 1 is 65, of destination GPU 2"
            " it is 64 (must not be fewer)",
        }
    ]


def test_the_smallest_set_of_relaxations_is_the_mildest_of_its_size() -> None:
    """GPU 2 breaks fw-version, GPU 3 num-gws, GPU 4 both."""
    target = assemble([gpu(2, fw_version=1), gpu(3, num_gws=1), gpu(4, fw_version=1, num_gws=1)])
    assert match(assemble([gpu(1)]), target).advice == ("num-gws",)


def test_the_smallest_set_may_be_behind_the_less_obvious_place() -> None:
    """GPU 1 breaks two rules at either place, but at the first it drives GPU 2 out."""
    source = assemble(
        [
            gpu(1, fw_version=93, num_gws=65, caches_count=300, sdma_fw_version=1, num_cp_queues=1),
            gpu(2, caches_count=300),
        ]
    )
    target = assemble(
        [
            gpu(3, caches_count=300),
            gpu(4, fw_version=93, sdma_fw_version=1, num_cp_queues=1),
        ]
    )
    assert match(source, target).advice == ("caches-count", "num-gws")


def test_an_unknown_rule() -> None:
    with pytest.raises(UsageError, match="there is no rule 'nonsense'") as caught:
        match(PAIR, PAIR, relax={"nonsense"})
    assert "gfx-target" in caught.value.hint


# ---------------------------------------------------------------- --gpu-map


def test_the_callers_pairs_are_kept_and_the_rest_is_searched() -> None:
    assert pairs(match(FOUR, FOUR, override=[(1, 4)])) == {1: 4, 2: 3, 3: 1, 4: 2}


def test_the_same_rules_hold_for_the_callers_pairs() -> None:
    result = match(FOUR, FOUR, override=[(1, 2), (2, 3)])
    assert result.map is None
    assert result.advice == ("xgmi", "hive", "numa")
    assert "source GPUs 1 and 2" in str(error_of(result))
    relaxed = match(FOUR, FOUR, override=[(1, 2), (2, 3)], relax=set(result.advice))
    assert relaxed.relaxed == result.advice


def test_callers_pairs_that_make_no_sense() -> None:
    for override, words in (
        ([(9, 1)], "9 is not a GPU that the process sees"),
        ([(1, 9)], "the destination has no GPU 9"),
        ([(1, 2), (1, 3)], "source GPU 1 stands there twice"),
        ([(1, 2), (3, 2)], "destination GPU 2 stands there twice"),
    ):
        with pytest.raises(UsageError, match=words):
            match(FOUR, FOUR, override=override)


def test_gpu_map_by_id_index_and_render_node() -> None:
    here = machine([gpu(0x1A97, number=5, drm_render_minor=128), gpu(6808, number=6)])
    there = machine([gpu(0x770F, number=1, drm_render_minor=128), gpu(2, drm_render_minor=129)])
    wanted = ((0x1A97, 0x770F), (6808, 2))
    for text in (
        "0x1a97=0x770f,0x1A98=0x2",
        " 6807 = 30479 , 6808=2",
        "0=0,1=1",
        "renderD128=renderD128,1=/dev/dri/renderD129",
    ):
        assert parse_gpu_map(text, here, there) == wanted
    assert parse_gpu_map("1=0", here, there) == ((6808, 0x770F),)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "'' is not OLD=NEW"),
        ("1", "'1' is not OLD=NEW"),
        ("1=2=3", "'1=2=3' is not OLD=NEW"),
        ("1=2,", "'' is not OLD=NEW"),
        ("x=1", "'x' names no GPU"),
        ("-1=1", "'-1' names no GPU"),
        ("7=1", "the source has no GPU 7"),
        ("1=0x7", "the destination has no GPU 0x7"),
        ("renderD99=1", "the source has no GPU renderD99"),
        ("1=2,0x1=3", "source GPU 1 stands there twice"),
        ("1=3,2=3", "destination GPU 3 stands there twice"),
    ],
)
def test_gpu_maps_that_are_wrong(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        parse_gpu_map(text, FOUR, FOUR)
    assert caught.value.exit_code == 2


# ---------------------------------------------------------------- chains


def test_the_second_migration_is_named_by_either_id() -> None:
    """The process still says 1 and 2, the GPUs under it are now 11 and 12."""
    known = [(1, 11), (2, 12)]
    assert parse_gpu_map("1=3,0x2=4", PAIR, FOUR, identities=known) == ((11, 3), (12, 4))
    assert parse_gpu_map("11=3,12=4", PAIR, FOUR, identities=known) == ((11, 3), (12, 4))


def test_an_actual_id_goes_before_a_user_id() -> None:
    swapped = [(11, 12), (12, 11)]
    assert parse_gpu_map("11=3", PAIR, FOUR, identities=swapped) == ((11, 3),)


def test_chains_of_any_length() -> None:
    machines = [renumbered(random.Random(seed), saved("mi60x4")) for seed in range(12)]
    start = tuple((g.gpu_id, g.gpu_id) for g in machines[0].gpus)
    identities = start
    maps = []
    for here, there in pairwise(machines):
        result = match(here, there, visible=[actual for _, actual in identities])
        assert result.map is not None
        maps.append(result.map)
        identities = advance(identities, result.map)
    assert [user for user, _ in identities] == [user for user, _ in start]
    assert {actual for _, actual in identities} == {g.gpu_id for g in machines[-1].gpus}
    assert compose(maps).pairs == identities
    assert compose([]) == GpuMap(pairs=())


def test_a_chain_that_does_not_hold() -> None:
    with pytest.raises(UsageError, match="the map says nothing of GPU 5"):
        advance([(1, 5)], GpuMap(pairs=((6, 7),)))
    with pytest.raises(UsageError, match="two GPUs of the process to the same GPU"):
        advance([(1, 5), (2, 6)], GpuMap(pairs=((5, 7), (6, 7))))
