"""What KFD says about a machine, as frozen values.

Source of every field: ``drivers/gpu/drm/amd/amdkfd/kfd_topology.c`` (the printing of
``/sys/class/kfd/kfd/topology``) and ``kfd_crat.h`` (link types and flags). Names are
KFD's own. A field that a kernel does not print has its default here, so that trees of
old and new kernels can be compared.

The whole is msgspec-serialisable: an agent sends it to its peer.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable

from migrate.model import Value

HEAP_SYSTEM = 0
HEAP_FB_PUBLIC = 1  # VRAM that the CPU can reach whole (large BAR)
HEAP_FB_PRIVATE = 2  # VRAM that the CPU can't reach whole


class LinkType(enum.IntEnum):
    """CRAT_IOLINK_TYPE_* of kfd_crat.h, as far as machines show them."""

    HYPERTRANSPORT = 1
    PCIE = 2
    QPI = 5
    XGMI = 11


class MemoryBank(Value):
    """One memory bank of a node. Size in bytes, width in bits, clock in MHz."""

    heap_type: int
    size_in_bytes: int
    width: int = 0
    mem_clk_max: int = 0


class Cache(Value):
    """Caches of a node that are alike: KFD prints one entry each, hundreds a GPU.

    ``size`` in KiB; ``type`` is the HSA_CACHE_TYPE_* bit set (1 data, 2 instruction,
    4 CPU, 8 SIMD).
    """

    level: int
    size: int
    type: int
    count: int


class Link(Value):
    """A link in one direction. Bandwidths in MB/s, 0 where the kernel does not know.

    ``p2p`` tells where it was printed: GPU to GPU over PCIe stands in p2p_links from
    Linux 6.0 on, and in io_links before.
    """

    type: int
    node_from: int
    node_to: int
    weight: int
    min_bandwidth: int = 0
    max_bandwidth: int = 0
    flags: int = 0
    p2p: bool = False

    @property
    def is_xgmi(self) -> bool:
        """Whether it is XGMI (Infinity Fabric)."""
        return self.type == LinkType.XGMI


class Node(Value):
    """One node: a CPU socket or NUMA domain, a GPU, a GPU partition, or an APU."""

    number: int
    gpu_id: int = 0
    name: str = ""
    cpu_cores_count: int = 0
    simd_count: int = 0
    caches_count: int = 0
    max_waves_per_simd: int = 0
    lds_size_in_kb: int = 0
    gds_size_in_kb: int = 0
    num_gws: int = 0
    wave_front_size: int = 0
    array_count: int = 0
    simd_arrays_per_engine: int = 0
    cu_per_simd_array: int = 0
    simd_per_cu: int = 0
    max_slots_scratch_cu: int = 0
    gfx_target_version: int = 0
    vendor_id: int = 0
    device_id: int = 0
    location_id: int = 0
    domain: int = 0
    drm_render_minor: int = 0
    hive_id: int = 0
    num_sdma_engines: int = 0
    num_sdma_xgmi_engines: int = 0
    num_sdma_queues_per_engine: int = 0
    num_cp_queues: int = 0
    max_engine_clk_fcompute: int = 0
    local_mem_size: int = 0
    fw_version: int = 0
    capability: int = 0
    sdma_fw_version: int = 0
    unique_id: int = 0
    num_xcc: int = 1  # kernels before 6.5 do not print it
    mem_banks: tuple[MemoryBank, ...] = ()
    caches: tuple[Cache, ...] = ()
    links: tuple[Link, ...] = ()

    @property
    def is_gpu(self) -> bool:
        """Whether KFD runs queues on it. CPU nodes have gpu_id 0."""
        return self.gpu_id != 0

    @property
    def vram_bytes(self) -> int:
        """Local memory in bytes. ``local_mem_size`` is 0 on current kernels; banks tell."""
        banks = sum(b.size_in_bytes for b in self.mem_banks if b.heap_type != HEAP_SYSTEM)
        return banks or self.local_mem_size

    @property
    def visible_vram_bytes(self) -> int:
        """Local memory in bytes that the CPU can map, as far as KFD tells."""
        return sum(b.size_in_bytes for b in self.mem_banks if b.heap_type == HEAP_FB_PUBLIC)

    @property
    def gfx(self) -> str:
        """The target's name, such as ``gfx90a``; the PCI device where no version is printed."""
        if not self.gfx_target_version:
            return f"PCI device {self.vendor_id:04x}:{self.device_id:04x}"
        major, rest = divmod(self.gfx_target_version, 10000)
        minor, stepping = divmod(rest, 100)
        return f"gfx{major}{minor:x}{stepping:x}"

    @property
    def pci(self) -> str:
        """PCI address, such as ``0000:63:00.0`` (location_id is bus << 8 | devfn)."""
        bus, devfn = divmod(self.location_id, 256)
        return f"{self.domain:04x}:{bus:02x}:{devfn >> 3:02x}.{devfn & 7}"

    @property
    def physical(self) -> tuple[int, int, int]:
        """What the partitions of one device share: PCI domain, bus and device, unique id.

        A partition shows its number in the function bits of location_id.
        """
        return self.domain, self.location_id >> 3, self.unique_id


class Topology(Value):
    """One machine. ``hidden`` are the nodes that the device cgroup keeps from the reader."""

    nodes: tuple[Node, ...]
    generation_id: int = 0
    hidden: tuple[int, ...] = ()

    @property
    def gpus(self) -> tuple[Node, ...]:
        """GPU nodes in the order of their numbers, which is also KFD's."""
        return tuple(node for node in self.nodes if node.is_gpu)

    def gpu(self, gpu_id: int) -> Node:
        """The GPU of that id. Raises KeyError."""
        for node in self.nodes:
            if node.is_gpu and node.gpu_id == gpu_id:
                return node
        raise KeyError(gpu_id)

    def node(self, number: int) -> Node | None:
        """The node of that number, None for one that is hidden or not there."""
        return next((node for node in self.nodes if node.number == number), None)

    def only(self, gpu_ids: Iterable[int]) -> Topology:
        """The same machine with just these GPUs; links to others stay and lead nowhere."""
        keep = frozenset(gpu_ids)
        nodes = tuple(n for n in self.nodes if not n.is_gpu or n.gpu_id in keep)
        gone = tuple(n.number for n in self.nodes if n.is_gpu and n.gpu_id not in keep)
        return Topology(
            nodes=nodes, generation_id=self.generation_id, hidden=tuple(sorted(self.hidden + gone))
        )
