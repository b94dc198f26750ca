"""What joins GPUs to each other and to their CPU, as the rules and the cost see it."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from migrate.topology.model import Link, LinkType, Node, Topology


class LinkKind(enum.IntEnum):
    """How one GPU reaches another."""

    NONE = 0
    PCIE = 1  # or anything else that is no XGMI
    XGMI = 2


_SHOWN = {LinkKind.NONE: "none", LinkKind.PCIE: "PCIe", LinkKind.XGMI: "XGMI"}


@dataclass(frozen=True)
class Joint:
    """What joins two GPUs a and b: both directions, a to b first.

    ``bandwidth`` in MB/s, of XGMI only, 0 where the kernel does not know. ``same_numa``
    is None where a GPU's NUMA node is not told.
    """

    kinds: tuple[LinkKind, LinkKind]
    bandwidth: tuple[int, int]
    same_hive: bool
    same_numa: bool | None

    @property
    def shown(self) -> str:
        """For a person."""
        a, b = (_SHOWN[kind] for kind in self.kinds)
        return a if a == b else f"{a} one way and {b} the other"


def best_links(topology: Topology) -> dict[tuple[int, int], Link]:
    """The best link per (node_from, node_to): XGMI first, then the smallest weight.

    Links to nodes that are not shown are left out.
    """
    shown = {node.number for node in topology.nodes}
    best: dict[tuple[int, int], Link] = {}
    for node in topology.nodes:
        for link in node.links:
            key = (link.node_from, link.node_to)
            if link.node_to in shown and (key not in best or _rank(link) < _rank(best[key])):
                best[key] = link
    return best


def _rank(link: Link) -> tuple[bool, int, int, bool, int, int]:
    """The last three only so that the order of the folders never decides."""
    return not link.is_xgmi, link.weight, -link.max_bandwidth, link.p2p, link.type, link.flags


def numa_nodes(topology: Topology, links: dict[tuple[int, int], Link]) -> dict[int, int]:
    """Per GPU node number: the number of its CPU node. GPUs whose links do not tell lack.

    The nearest CPU by weight among io_links (p2p_links lead past the own one); of two
    equally near ones none, since nothing tells.
    """
    cpus = [node.number for node in topology.nodes if node.cpu_cores_count]
    found: dict[int, int] = {}
    for gpu in topology.gpus:
        if gpu.cpu_cores_count:  # an APU of the old kind: one node for both
            found[gpu.number] = gpu.number
            continue
        near = sorted(
            (link.weight, cpu)
            for cpu in cpus
            if (link := links.get((gpu.number, cpu)) or links.get((cpu, gpu.number)))
            and not link.p2p
        )
        if near and (len(near) == 1 or near[0][0] != near[1][0]):
            found[gpu.number] = near[0][1]
    return found


def host_link_flags(
    gpu: Node, numa: dict[int, int], links: dict[tuple[int, int], Link]
) -> int | None:
    """Flags of the link from a GPU to its CPU, None if there is none to see."""
    link = links.get((gpu.number, numa.get(gpu.number, -1)))
    return link.flags if link else None


class Joints:
    """All joints of a machine's GPUs, computed once."""

    def __init__(self, topology: Topology) -> None:
        self.links = best_links(topology)
        self.numa = numa_nodes(topology, self.links)

    def between(self, a: Node, b: Node) -> Joint:
        """What joins *a* and *b*."""
        there = self.links.get((a.number, b.number))
        back = self.links.get((b.number, a.number))
        numa_a, numa_b = self.numa.get(a.number), self.numa.get(b.number)
        return Joint(
            kinds=(_kind(there), _kind(back)),
            bandwidth=(_bandwidth(there), _bandwidth(back)),
            same_hive=a.hive_id != 0 and a.hive_id == b.hive_id,
            same_numa=None if numa_a is None or numa_b is None else numa_a == numa_b,
        )


def _kind(link: Link | None) -> LinkKind:
    if link is None:
        return LinkKind.NONE
    return LinkKind.XGMI if link.type == LinkType.XGMI else LinkKind.PCIE


def _bandwidth(link: Link | None) -> int:
    return link.max_bandwidth if link is not None and link.is_xgmi else 0
