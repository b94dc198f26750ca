"""What goes wrong in the mapper of CRIU's amdgpu plugin, one test each."""

from __future__ import annotations

import os
import random
import shutil
from itertools import permutations
from pathlib import Path

import msgspec
import pytest

from migrate.kfd.sysfs import read_topology
from migrate.topology.match import match
from migrate.topology.model import LinkType, Node, Topology
from migrate.topology.relations import Joints
from scenarios.bench.topology_machines import renumbered
from tests.unit.topology_kit import assemble, both, gpu, machine, saved, unpack


def test_a_renumbered_twin_of_3_gpus_and_2_cpus_is_found_whatever_the_numbers() -> None:
    source = machine([gpu(1), gpu(2), gpu(3, fw_version=90)], hives=[[1, 2]], sockets=[[1, 2], [3]])
    for numbers in permutations((0, 1, 2, 5, 8)):
        new = dict(zip((1000, 1001, 1, 2, 3), numbers, strict=True))
        nodes = [
            msgspec.structs.replace(
                node,
                number=new[node.number],
                links=tuple(
                    msgspec.structs.replace(x, node_from=new[x.node_from], node_to=new[x.node_to])
                    for x in node.links
                ),
            )
            for node in source.nodes
        ]
        twin = Topology(nodes=tuple(sorted(nodes, key=lambda n: n.number)))
        result = match(source, twin)
        assert result.map is not None
        assert result.map[3] == 3
        assert result.cost is not None
        assert (result.cost.numa, result.cost.hive, result.cost.xgmi_bandwidth_lost) == (0, 0, 0)


def test_the_search_ends_where_every_gpu_alone_would_fit() -> None:
    ids = list(range(1, 17))
    one = machine([gpu(g) for g in ids], hives=[ids])
    two = machine([gpu(g) for g in ids], hives=[ids[:8], ids[8:]])
    assert match(one, two).map is None
    assert match(two, one).map is not None


def test_the_order_of_directory_entries_does_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = unpack("mi210-8x2hives", tmp_path)
    straight = read_topology(tree)
    listdir = os.listdir

    def shuffled(path: str) -> list[str]:
        names = listdir(path)
        random.Random(3).shuffle(names)
        return names

    monkeypatch.setattr(os, "listdir", shuffled)
    assert read_topology(tree) == straight


def test_the_search_goes_back_into_a_hive() -> None:
    """The hive of 2 fits first where only the hive of 3 can go."""
    ids = [1, 2, 3, 4, 5]
    source = machine([gpu(g) for g in ids], hives=[[1, 2], [3, 4, 5]])
    destination = machine([gpu(g) for g in ids], hives=[[1, 2, 3], [4, 5]])
    result = match(source, destination)
    assert result.map is not None
    assert {result.map[1], result.map[2]} == {4, 5}


def test_a_link_to_a_node_that_is_not_shown_is_no_harm(tmp_path: Path) -> None:
    tree = unpack("mi210-8x2hives", tmp_path)
    whole = read_topology(tree)
    for number in (1, 4, 9):  # a CPU and a GPU of each hive
        shutil.rmtree(tree / "nodes" / str(number))
    cut = read_topology(tree)
    shown = {node.number for node in cut.nodes}
    assert any(link.node_to not in shown for node in cut.nodes for link in node.links)
    result = match(cut, whole)
    assert result.map is not None
    assert len(result.map.pairs) == 6
    assert match(cut, cut).map is not None


def test_sixty_three_partitions_are_found_under_other_numbers() -> None:
    topology = saved("mi300x-8x8cpx")
    result = match(topology, renumbered(random.Random(1), topology))
    assert result.map is not None
    assert len(result.map.pairs) == 63
    assert result.cost is not None
    assert result.cost.xgmi_bandwidth_lost == 0


def test_cpus_with_xgmi_links_and_a_hive_id_are_in_no_hive() -> None:
    """MI300A: every node shows the hive, CPUs are joined by XGMI."""
    topology = saved("mi300a4")
    cpus = [node for node in topology.nodes if not node.is_gpu]
    assert all(node.hive_id for node in cpus)
    links = [
        x for a in cpus for b in cpus if a is not b for x in both(LinkType.XGMI, a.number, b.number)
    ]
    nodes = [
        msgspec.structs.replace(
            node, links=node.links + tuple(x for x in links if x.node_from == node.number)
        )
        for node in topology.nodes
    ]
    joined = Topology(nodes=tuple(nodes))
    result = match(joined, joined)
    assert result.map is not None
    assert all(old == new for old, new in result.map.pairs)
    # Without the CPUs' hive the same map is found: they never took part.
    bare = [
        msgspec.structs.replace(node, hive_id=node.hive_id if node.is_gpu else 0) for node in nodes
    ]
    assert match(joined, Topology(nodes=tuple(bare))).map == result.map


def test_the_gfx_target_is_compared() -> None:
    result = match(assemble([gpu(1)]), assemble([gpu(2, gfx_target_version=90402)]))
    assert result.map is None
    assert [refusal.rule for refusal in result.refusals] == ["gfx-target"]


def test_p2p_links_are_compared() -> None:
    reachable = machine([gpu(1), gpu(2)])
    apart = machine([gpu(1), gpu(2)], without=[(1, 2)])
    assert all(link.p2p for node in reachable.nodes for link in node.links)
    assert match(reachable, apart).map is None
    assert match(apart, reachable).map is not None


def test_another_number_of_io_links_is_no_reason() -> None:
    """A destination with one more socket, and one more GPU beside."""
    here = machine([gpu(1), gpu(2)], hives=[[1, 2]], sockets=[[1, 2]])
    there = machine([gpu(1), gpu(2), gpu(3)], hives=[[1, 2, 3]], sockets=[[1, 2], [3]])
    count = [len(t.gpu(1).links) for t in (here, there)]
    assert count[0] != count[1]
    assert match(here, there).map is not None


@pytest.mark.parametrize("newer_first", [True, False])
def test_gpu_to_gpu_pcie_links_may_stand_in_either_folder(newer_first: bool) -> None:
    """Linux 6.x prints them in p2p_links, earlier ones in io_links."""
    new = machine([gpu(1), gpu(2)], sockets=[[1, 2]])
    nodes = [
        msgspec.structs.replace(
            node, links=tuple(msgspec.structs.replace(x, p2p=False) for x in node.links)
        )
        for node in new.nodes
    ]
    old = Topology(nodes=tuple(nodes))
    assert old != new
    result = match(new, old) if newer_first else match(old, new)
    assert result.map is not None


def test_an_indirect_link_to_a_cpu_does_not_make_it_the_nearest(tmp_path: Path) -> None:
    """p2p_links also lead to the other socket; the nearest CPU is the one in io_links."""
    topology = read_topology(unpack("mi210-8x2hives", tmp_path))
    numa = Joints(topology).numa
    assert [numa[g.number] for g in topology.gpus] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert isinstance(topology.nodes[0], Node)
