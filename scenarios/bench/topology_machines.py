"""Random machines: near enough to real ones that maps exist, odd enough to have none."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

import msgspec

from migrate.topology.model import Link, LinkType, MemoryBank, Node, Topology

GIB = 1 << 30
_BANDWIDTHS = (0, 50000, 100000, 200000)
_CHANGES: tuple[tuple[str, tuple[int, ...]], ...] = (
    ("gfx_target_version", (90010, 90402)),
    ("num_xcc", (1, 8)),
    ("simd_count", (416, 440)),
    ("max_waves_per_simd", (8, 10)),
    ("wave_front_size", (64, 32)),
    ("lds_size_in_kb", (64, 128)),
    ("num_sdma_xgmi_engines", (3, 6)),
    ("num_cp_queues", (24, 16)),
    ("fw_version", (92, 80)),
    ("sdma_fw_version", (9, 8)),
    ("caches_count", (217, 200)),
    ("num_gws", (64, 32)),
    ("capability", (0x2C778680, 0x24778680)),
)


@dataclass(frozen=True)
class Shape:
    """How wild a machine is: chances between 0 and 1."""

    gpus: int
    odd_gpu: float = 0.1  # a GPU differs in one property
    no_xgmi: float = 0.1  # a link inside a hive is missing or PCIe
    no_peer: float = 0.1  # no PCIe link between GPUs of two hives
    odd_bandwidth: float = 0.3  # an XGMI link has a bandwidth of its own


def machine(rng: random.Random, shape: Shape) -> Topology:
    """A machine of that shape, its nodes in random order of kinds."""
    sockets = rng.choice((1, 1, 2, 2, 4))
    hives = [rng.randrange(rng.choice((1, 1, 2, 3))) for _ in range(shape.gpus)]
    if rng.random() < 0.15:
        hives = [-1] * shape.gpus
    numa = [rng.randrange(sockets) for _ in range(shape.gpus)]
    if rng.random() < 0.5:  # the orderly kind: neighbours together
        hives.sort()
        numa.sort()
    numbers = list(range(sockets + shape.gpus))
    if rng.random() < 0.5:
        rng.shuffle(numbers)
    cpus, gpus = numbers[:sockets], numbers[sockets:]
    ids = rng.sample(range(1, 65536), shape.gpus)
    links = _links(rng, shape, _Plan(cpus, gpus, hives, numa))
    nodes = [
        Node(number=n, cpu_cores_count=64, links=tuple(x for x in links if x.node_from == n))
        for n in cpus
    ]
    for index, number in enumerate(gpus):
        node = _gpu(rng, shape, ids[index], number, hives[index] + 1)
        mine = tuple(x for x in links if x.node_from == number)
        nodes.append(msgspec.structs.replace(node, links=mine))
    return Topology(nodes=tuple(sorted(nodes, key=lambda n: n.number)))


def _gpu(rng: random.Random, shape: Shape, gpu_id: int, number: int, hive: int) -> Node:
    values = {name: choices[0] for name, choices in _CHANGES}
    vram, heap = 64 * GIB, 1
    if rng.random() < shape.odd_gpu:
        which = rng.randrange(len(_CHANGES) + 2)
        if which < len(_CHANGES):
            values[_CHANGES[which][0]] = _CHANGES[which][1][1]
        elif which == len(_CHANGES):
            vram = 32 * GIB
        else:
            heap = 2
    bank = MemoryBank(heap_type=heap, size_in_bytes=vram)
    node = Node(number=number, gpu_id=gpu_id, hive_id=hive, mem_banks=(bank,))
    return msgspec.structs.replace(node, **values)


@dataclass(frozen=True)
class _Plan:
    """Node numbers of CPUs and GPUs; per GPU its hive (-1: none) and its CPU's position."""

    cpus: Sequence[int]
    gpus: Sequence[int]
    hives: Sequence[int]
    numa: Sequence[int]


def _links(rng: random.Random, shape: Shape, plan: _Plan) -> list[Link]:
    cpus, gpus, hives, numa = plan.cpus, plan.gpus, plan.hives, plan.numa
    links = [_link(LinkType.HYPERTRANSPORT, a, b, 32) for a, b in permutations(cpus, 2)]
    for index, gpu in enumerate(gpus):
        flags = 13 if rng.random() < shape.odd_gpu / 4 else 1
        if rng.random() > 0.02:  # else its NUMA node is not told
            links.append(_link(LinkType.PCIE, gpu, cpus[numa[index]], 20, flags=flags))
            links.append(_link(LinkType.PCIE, cpus[numa[index]], gpu, 20))
    usual = rng.choice(_BANDWIDTHS)
    for a in range(len(gpus)):
        for b in range(a):
            joined = hives[a] == hives[b] >= 0
            kind = LinkType.XGMI if joined else LinkType.PCIE
            if joined and rng.random() < shape.no_xgmi:
                kind = LinkType.PCIE
            if kind is LinkType.PCIE and rng.random() < shape.no_peer:
                continue
            odd = rng.random() < shape.odd_bandwidth
            bandwidth = rng.choice(_BANDWIDTHS) if odd else usual
            back = kind if rng.random() > 0.02 else LinkType.PCIE
            for x, y, way in ((gpus[a], gpus[b], kind), (gpus[b], gpus[a], back)):
                p2p = way is LinkType.PCIE
                links.append(_link(way, x, y, 15, bandwidth=bandwidth, p2p=p2p))
    return links


def _link(
    kind: LinkType,
    a: int,
    b: int,
    weight: int,
    *,
    flags: int = 1,
    bandwidth: int = 0,
    p2p: bool = False,
) -> Link:
    return Link(
        type=kind,
        node_from=a,
        node_to=b,
        weight=weight,
        flags=flags,
        min_bandwidth=bandwidth,
        max_bandwidth=bandwidth,
        p2p=p2p,
    )


def renumbered(rng: random.Random, topology: Topology) -> Topology:
    """A twin with other node numbers and other gpu_ids."""
    numbers = [node.number for node in topology.nodes]
    shuffled = rng.sample(numbers, len(numbers))
    new = dict(zip(numbers, shuffled, strict=True))
    ids = iter(rng.sample(range(1, 65536), len(numbers)))
    nodes = []
    for node in topology.nodes:
        links = tuple(
            msgspec.structs.replace(
                link, node_from=new[link.node_from], node_to=new.get(link.node_to, link.node_to)
            )
            for link in node.links
        )
        gpu_id = next(ids) if node.is_gpu else 0
        nodes.append(
            msgspec.structs.replace(node, number=new[node.number], gpu_id=gpu_id, links=links)
        )
    return Topology(nodes=tuple(sorted(nodes, key=lambda n: n.number)))


@dataclass(frozen=True)
class Question:
    """Arguments of ``match``."""

    source: Topology
    destination: Topology
    visible: tuple[int, ...] | None
    needs: dict[int, int]
    free: dict[int, int]
    busy: frozenset[int]
    override: tuple[tuple[int, int], ...]
    relax: frozenset[str]


def question(rng: random.Random, most: int, rules: Sequence[str]) -> Question:
    """A pair of machines of up to *most* GPUs with all that goes with them.

    Half of the destinations are the source renumbered and then cut or changed a little,
    so that a map exists but is not the obvious one.
    """
    wild = rng.choice((0.0, 0.02, 0.1, 0.4))
    shape = Shape(
        gpus=rng.randint(1, most), odd_gpu=wild, no_xgmi=rng.choice((0, wild)),
        no_peer=rng.choice((0, wild)), odd_bandwidth=rng.choice((0, 0.3, 1)),
    )  # fmt: skip
    source = machine(rng, shape)
    if rng.random() < 0.5:
        destination = renumbered(rng, source)
    else:
        other = rng.randint(max(1, shape.gpus - 1), most)
        destination = machine(rng, resized(shape, other))
    if rng.random() < 0.3:
        source = _fewer(rng, source)
    return _conditions(rng, source, destination, rules)


def resized(shape: Shape, gpus: int) -> Shape:
    """The same shape with another number of GPUs."""
    return Shape(gpus, shape.odd_gpu, shape.no_xgmi, shape.no_peer, shape.odd_bandwidth)


def _fewer(rng: random.Random, topology: Topology) -> Topology:
    ids = [gpu.gpu_id for gpu in topology.gpus]
    return topology.only(rng.sample(ids, rng.randint(1, len(ids))))


def _conditions(
    rng: random.Random, source: Topology, destination: Topology, rules: Sequence[str]
) -> Question:
    mine = [gpu.gpu_id for gpu in source.gpus]
    theirs = [gpu.gpu_id for gpu in destination.gpus]
    some = rng.random() < 0.2
    fixed = rng.random() < 0.15
    return Question(
        source=source,
        destination=destination,
        visible=tuple(rng.sample(mine, rng.randint(1, len(mine)))) if some else None,
        needs={g: rng.randrange(64 * GIB) for g in mine} if rng.random() < 0.3 else {},
        free={g: rng.randrange(16, 64) * GIB for g in theirs} if rng.random() < 0.3 else {},
        busy=frozenset(g for g in theirs if rng.random() < 0.1) if some else frozenset(),
        override=((rng.choice(mine), rng.choice(theirs)),) if fixed and not some else (),
        relax=frozenset(rng.sample(list(rules), rng.randint(1, 4)))
        if rng.random() < 0.4
        else frozenset(),
    )
