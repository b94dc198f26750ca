"""Simulated machines: their topology tree in the format of ``/sys/class/kfd/kfd/topology``."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from itertools import permutations
from pathlib import Path

from migrate.model import Value
from migrate.topology.catalogue import PROFILES, CacheKind, GpuKind, Profile
from migrate.topology.model import HEAP_FB_PRIVATE, HEAP_FB_PUBLIC, HEAP_SYSTEM, LinkType

__all__ = ["PROFILES", "Profile", "TreeGpu", "place", "write_tree"]

_RENDER_MINOR_BASE = 128
_PCIE_WEIGHT = 20
_XGMI_WEIGHT = 15
_PARTITION_WEIGHT = 13
_ENABLED = 1  # CRAT_IOLINK_FLAGS_*
_NON_COHERENT = 3
_PCIE_MIN_BANDWIDTH = 312  # MB/s, one lane at PCIe 1 speed and 32 bits
_BUS_SHIFT = 0x11  # per slot_offset, so that no two hosts' GPUs share a bus number soon


class TreeGpu(Value):
    """A GPU of a tree that was written."""

    gpu_id: int
    node: int
    render_minor: int
    vram_bytes: int
    name: str
    gfx_target_version: int
    location_id: int
    domain: int
    unique_id: int
    hive_id: int


def hash_32(value: int, bits: int) -> int:
    """Linux's ``hash_32`` (include/linux/hash.h)."""
    return (value * 0x61C88647 & 0xFFFFFFFF) >> (32 - bits)


def generate_gpu_id(*, devfn: int, subsystem: int, domain: int, device_id: int, bus: int,
                    vram: int) -> int:  # fmt: skip
    """``kfd_generate_gpu_id`` of kfd_topology.c: 16 bits from where the GPU is and what it is."""
    words = (devfn, subsystem, domain, device_id, bus, vram & 0xFFFFFFFF, vram >> 32)
    result = 0
    for word in words:
        result ^= hash_32(word, 16)
    return result


def write_tree(profile: Profile, dest: str | Path, *, slot_offset: int = 0) -> tuple[TreeGpu, ...]:
    """Write ``<dest>/topology`` for *profile* and return its GPUs in the order of the nodes.

    Another *slot_offset* is another host: other PCI slots, therefore other gpu_ids, and
    other serial numbers and hive ids. Raises FileExistsError if there is a tree already.
    """
    gpus = place(profile, slot_offset)
    base = Path(dest) / "topology"
    (base / "nodes").mkdir(parents=True)
    (base / "generation_id").write_text("2\n")
    (base / "system_properties").write_text("platform_oem 0\nplatform_id 0\nplatform_rev 1\n")
    links = _links(profile)
    for number in range(len(profile.sockets)):
        _write_node(base, number, _cpu_node(profile, number, gpus), links)
    for gpu, slot in zip(gpus, profile.slots, strict=True):
        _write_node(base, gpu.node, _gpu_node(gpu, slot.kind), links)
    return gpus


def place(profile: Profile, slot_offset: int = 0) -> tuple[TreeGpu, ...]:
    """The GPUs of *profile* in the host of that *slot_offset*, without writing anything."""
    taken: set[int] = {0}
    found = []
    for index, slot in enumerate(profile.slots):
        bus = (slot.bus + _BUS_SHIFT * slot_offset) & 0xFF
        gpu_id = generate_gpu_id(
            devfn=slot.function,
            subsystem=slot.kind.subsystem,
            domain=0,
            device_id=slot.kind["device_id"],
            bus=bus,
            vram=slot.kind.vram,
        )
        while gpu_id in taken:  # later kernels do the same
            gpu_id = (gpu_id + 1) & 0xFFFF
        taken.add(gpu_id)
        hive = "" if slot.hive is None else f"hive {slot.hive}"
        found.append(
            TreeGpu(
                gpu_id=gpu_id,
                node=len(profile.sockets) + index,
                render_minor=_RENDER_MINOR_BASE + index,
                vram_bytes=slot.kind.vram,
                name=slot.kind.name,
                gfx_target_version=slot.kind["gfx_target_version"],
                location_id=bus << 8 | slot.function,
                domain=0,
                unique_id=_serial(profile, slot_offset, f"bus {slot.bus}"),
                hive_id=_serial(profile, slot_offset, hive) if hive else 0,
            )
        )
    return tuple(found)


def _serial(profile: Profile, slot_offset: int, what: str) -> int:
    text = f"{profile.name}/{slot_offset}/{what}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") | 1


# ---------------------------------------------------------------- links


class _LinkEntry(Value):
    """One entry of io_links or p2p_links. Bandwidths in MB/s."""

    folder: str
    a: int
    b: int
    type: int
    weight: int
    flags: int
    bandwidth: tuple[int, int] = (0, 0)

    def text(self) -> str:
        return (
            f"type {self.type}\nversion_major 0\nversion_minor 0\nnode_from {self.a}\n"
            f"node_to {self.b}\nweight {self.weight}\nmin_latency 0\nmax_latency 0\n"
            f"min_bandwidth {self.bandwidth[0]}\nmax_bandwidth {self.bandwidth[1]}\n"
            f"recommended_transfer_size 0\nflags {self.flags}\n"
        )


def _links(profile: Profile) -> list[_LinkEntry]:
    """Every link of the machine, as kfd_crat.c and kfd_topology.c make them."""
    return [*_socket_links(profile), *_host_links(profile), *_gpu_links(profile)]


def _socket_links(profile: Profile) -> Iterator[_LinkEntry]:
    type_, weight = profile.socket_link
    for a, b in permutations(range(len(profile.sockets)), 2):
        yield _LinkEntry(folder="io_links", a=a, b=b, type=type_, weight=weight, flags=0)


def _host_links(profile: Profile) -> Iterator[_LinkEntry]:
    """Each GPU and its own socket, and the other sockets behind that one, both ways."""
    sockets = len(profile.sockets)
    for index, slot in enumerate(profile.slots):
        for socket in range(sockets):
            near = socket == slot.socket
            weight = _PCIE_WEIGHT + (0 if near else profile.socket_link[1])
            for a, b, flags in (
                (socket, sockets + index, _NON_COHERENT),
                (sockets + index, socket, _ENABLED),
            ):
                yield _LinkEntry(
                    folder="io_links" if near else "p2p_links",
                    a=a,
                    b=b,
                    type=LinkType.PCIE,
                    weight=weight,
                    flags=flags,
                    bandwidth=(_PCIE_MIN_BANDWIDTH, slot.kind.pcie_bandwidth) if near else (0, 0),
                )


def _gpu_links(profile: Profile) -> Iterator[_LinkEntry]:
    """Links between GPUs: XGMI where there is some, else PCIe by way of the sockets."""
    base = len(profile.sockets)
    xgmi = {(x.a, x.b): x for x in profile.xgmi} | {(x.b, x.a): x for x in profile.xgmi}
    for (a, left), (b, right) in permutations(enumerate(profile.slots), 2):
        if (link := xgmi.get((a, b))) is not None:
            yield _LinkEntry(
                folder="io_links",
                a=base + a,
                b=base + b,
                type=LinkType.XGMI,
                weight=_PARTITION_WEIGHT if left.bus == right.bus else _XGMI_WEIGHT * link.hops,
                flags=_ENABLED,
                bandwidth=(link.bandwidth, link.bandwidth),
            )
        else:
            across = profile.socket_link[1] if left.socket != right.socket else 0
            yield _LinkEntry(
                folder="p2p_links",
                a=base + a,
                b=base + b,
                type=LinkType.PCIE,
                weight=2 * _PCIE_WEIGHT + across,
                flags=_NON_COHERENT,
            )


# ---------------------------------------------------------------- nodes

# The order in which node_show prints them.
_NODE_ORDER = (
    "cpu_cores_count", "simd_count", "mem_banks_count", "caches_count", "io_links_count",
    "p2p_links_count", "cpu_core_id_base", "simd_id_base", "max_waves_per_simd",
    "lds_size_in_kb", "gds_size_in_kb", "num_gws", "wave_front_size", "array_count",
    "simd_arrays_per_engine", "cu_per_simd_array", "simd_per_cu", "max_slots_scratch_cu",
    "gfx_target_version", "vendor_id", "device_id", "location_id", "domain",
    "drm_render_minor", "hive_id", "num_sdma_engines", "num_sdma_xgmi_engines",
    "num_sdma_queues_per_engine", "num_cp_queues",
)  # fmt: skip
_GPU_ORDER = (
    "max_engine_clk_fcompute", "local_mem_size", "fw_version", "capability", "debug_prop",
    "sdma_fw_version", "unique_id", "num_xcc",
)  # fmt: skip


class _NodeText(Value):
    """What a node's files say, links apart."""

    gpu_id: int
    name: str
    values: dict[str, int]
    bank: dict[str, int]
    caches: list[str]


def _cpu_node(profile: Profile, number: int, gpus: Iterable[TreeGpu]) -> _NodeText:
    socket = profile.sockets[number]
    hive = next((gpu.hive_id for gpu in gpus), 0) if profile.cpu_hive else 0
    values = {
        "cpu_cores_count": socket.cores,
        "cpu_core_id_base": sum(s.cores for s in profile.sockets[:number]),
        "hive_id": hive,
        "max_engine_clk_ccompute": socket.clock,
    }
    bank = _bank(HEAP_SYSTEM, socket.memory, 64, 3200)
    return _NodeText(gpu_id=0, name="", values=values, bank=bank, caches=[])


def _gpu_node(gpu: TreeGpu, kind: GpuKind) -> _NodeText:
    values = dict(kind.properties) | {
        "location_id": gpu.location_id,
        "domain": gpu.domain,
        "drm_render_minor": gpu.render_minor,
        "hive_id": gpu.hive_id,
        "unique_id": gpu.unique_id,
        "local_mem_size": 0,  # 0 in current kernels: the banks tell
        "max_engine_clk_ccompute": 2450,
    }
    heap = HEAP_FB_PUBLIC if kind.large_bar else HEAP_FB_PRIVATE
    bank = _bank(heap, kind.vram, kind.mem_width, kind.mem_clk)
    caches = _caches(kind)
    return _NodeText(gpu_id=gpu.gpu_id, name=kind.name, values=values, bank=bank, caches=caches)


def _bank(heap: int, size: int, width: int, clock: int) -> dict[str, int]:
    return {
        "heap_type": heap,
        "size_in_bytes": size,
        "flags": 0,
        "width": width,
        "mem_clk_max": clock,
    }


def _caches(kind: GpuKind) -> list[str]:
    return [
        _cache(cache, kind["simd_id_base"] + index * cache.shared)
        for cache in kind.caches
        for index in range(cache.count)
    ]


def _cache(cache: CacheKind, processor: int) -> str:
    ones = min(cache.shared, 256)
    siblings = ",".join("1" * ones + "0" * (256 - ones))
    return (
        f"processor_id_low {processor}\nlevel {cache.level}\nsize {cache.size}\n"
        "cache_line_size 0\ncache_lines_per_tag 0\nassociation 0\nlatency 0\n"
        f"type {cache.type}\nsibling_map {siblings}\n"
    )


def _write_node(base: Path, number: int, node: _NodeText, links: list[_LinkEntry]) -> None:
    entries = {"mem_banks": [_lines(node.bank)], "caches": node.caches}
    for folder in ("io_links", "p2p_links"):
        entries[folder] = [x.text() for x in links if x.a == number and x.folder == folder]
    values = node.values | {f"{kind}_count": len(texts) for kind, texts in entries.items()}
    order = _NODE_ORDER + (_GPU_ORDER if node.gpu_id else ()) + ("max_engine_clk_ccompute",)
    path = base / "nodes" / str(number)
    path.mkdir()
    (path / "gpu_id").write_text(f"{node.gpu_id}\n")
    (path / "name").write_text(f"{node.name}\n")
    (path / "properties").write_text(_lines({key: values.get(key, 0) for key in order}))
    for kind, texts in entries.items():
        (path / kind).mkdir()
        for index, text in enumerate(texts):
            entry = path / kind / str(index)
            entry.mkdir()
            (entry / "properties").write_text(text)


def _lines(values: Mapping[str, int]) -> str:
    return "".join(f"{key} {value}\n" for key, value in values.items())
