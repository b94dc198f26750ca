"""Small machines for the topology tests, and the saved trees of real ones."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Sequence
from functools import cache
from itertools import permutations
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec

from migrate.kfd.sysfs import read_topology
from migrate.topology.model import Link, LinkType, MemoryBank, Node, Topology

DATA = Path(__file__).parents[1] / "data" / "topologies"
# Thousands of small files: a disk would take seconds.
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
GIB = 1 << 30


def unpack(name: str, folder: Path) -> Path:
    """The saved tree *name* below *folder*."""
    with tarfile.open(DATA / f"{name}.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder / name


@cache
def saved(name: str) -> Topology:
    """The machine of a saved tree."""
    with TemporaryDirectory(dir=MEMORY) as folder:
        return read_topology(unpack(name, Path(folder)))


def gpu(gpu_id: int, **changed: Any) -> Node:
    """An MI210-like GPU; node number and gpu_id are the same unless told."""
    node = Node(
        number=gpu_id,
        gpu_id=gpu_id,
        simd_count=416,
        caches_count=217,
        max_waves_per_simd=8,
        lds_size_in_kb=64,
        num_gws=64,
        wave_front_size=64,
        array_count=8,
        simd_arrays_per_engine=1,
        cu_per_simd_array=14,
        simd_per_cu=4,
        max_slots_scratch_cu=32,
        gfx_target_version=90010,
        vendor_id=0x1002,
        device_id=0x740F,
        location_id=gpu_id << 8,
        drm_render_minor=128 + gpu_id,
        num_sdma_engines=2,
        num_sdma_xgmi_engines=3,
        num_sdma_queues_per_engine=8,
        num_cp_queues=24,
        fw_version=92,
        sdma_fw_version=9,
        capability=0x2C778680,
        mem_banks=(MemoryBank(heap_type=1, size_in_bytes=64 * GIB),),
    )
    return msgspec.structs.replace(node, **changed)


def link(kind: LinkType, a: int, b: int, **changed: Any) -> Link:
    """A link from node a to node b."""
    return msgspec.structs.replace(Link(type=kind, node_from=a, node_to=b, weight=20), **changed)


def both(kind: LinkType, a: int, b: int, **changed: Any) -> list[Link]:
    """The link and the one back."""
    return [link(kind, a, b, **changed), link(kind, b, a, **changed)]


def assemble(nodes: Sequence[Node], links: Sequence[Link] = ()) -> Topology:
    """A machine of nodes and links."""
    return Topology(
        nodes=tuple(
            msgspec.structs.replace(
                node, links=tuple(x for x in links if x.node_from == node.number)
            )
            for node in sorted(nodes, key=lambda n: n.number)
        )
    )


def machine(
    gpus: Sequence[Node],
    *,
    hives: Sequence[Sequence[int]] = (),
    sockets: Sequence[Sequence[int]] = (),
    bandwidth: int = 50_000,
    without: Sequence[tuple[int, int]] = (),
) -> Topology:
    """Hives and sockets are lists of gpu_ids; other pairs have PCIe, *without* has nothing.

    CPU nodes are numbered from 1000.
    """
    number = {node.gpu_id: node.number for node in gpus}
    hive = {g: 7 + index for index, members in enumerate(hives) for g in members}
    nodes = [msgspec.structs.replace(n, hive_id=hive.get(n.gpu_id, 0)) for n in gpus]
    links = []
    for a, b in permutations(number, 2):
        if (a, b) in without or (b, a) in without:
            continue
        joined = a in hive and hive[a] == hive.get(b)
        kind = LinkType.XGMI if joined else LinkType.PCIE
        rate = bandwidth if joined else 0
        links.append(link(kind, number[a], number[b], max_bandwidth=rate, p2p=not joined))
    for index, members in enumerate(sockets):
        nodes.append(Node(number=1000 + index, cpu_cores_count=64))
        for g in members:
            links += both(LinkType.PCIE, number[g], 1000 + index, flags=1)
    return assemble(nodes, links)
