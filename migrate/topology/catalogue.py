"""Machines that a simulated host can be: the values that real ones print.

Sources. MI210, MI300X (CPX) and MI308X nodes: the trees published with
ROCm/k8s-device-plugin (testdata/, Apache-2.0); MI100 and MI300A: the properties
published there. Counts of caches and sizes of VRAM of the others follow from
``kfd_crat.c`` (shared per how many CUs) and AMD's data sheets; the links of the MI250X
node are those of a Frontier node (OLCF user guide); link weights and bandwidths are
``kfd_fill_gpu_direct_io_link_to_cpu`` and ``kfd_fill_gpu_xgmi_link_to_gpu``.
"""

from __future__ import annotations

from collections.abc import Sequence

from migrate.model import Value

GIB = 1 << 30
MIB = 1 << 20


class CacheKind(Value):
    """*count* caches of *size* KiB, each shared by *shared* compute units."""

    level: int
    size: int
    type: int  # HSA_CACHE_TYPE_*: 9 data, 10 instruction
    count: int
    shared: int = 1


class GpuKind(Value):
    """One GPU as KFD prints it; names of the fields are those of the properties file."""

    name: str
    properties: tuple[tuple[str, int], ...]
    subsystem: int  # PCI subsystem vendor | device << 16, part of the gpu_id hash
    vram: int  # bytes
    mem_width: int  # bits
    mem_clk: int  # MHz
    caches: tuple[CacheKind, ...]
    pcie_bandwidth: int  # MB/s
    large_bar: bool = True
    apu: bool = False

    def __getitem__(self, key: str) -> int:
        return dict(self.properties)[key]


class Socket(Value):
    """A CPU node (socket or NUMA domain)."""

    cores: int
    memory: int  # bytes
    clock: int = 2450  # MHz


class Slot(Value):
    """Where a GPU sits: its socket's number, PCI address, hive (None: none)."""

    kind: GpuKind
    socket: int
    bus: int
    function: int = 0
    hive: int | None = None


class XgmiLink(Value):
    """GPUs by their position in the profile, hops, and number of links between them."""

    a: int
    b: int
    hops: int = 1
    bandwidth: int = 0  # MB/s


class Profile(Value):
    """A machine."""

    name: str
    title: str
    sockets: tuple[Socket, ...]
    slots: tuple[Slot, ...]
    xgmi: tuple[XgmiLink, ...] = ()
    socket_link: tuple[int, int] = (1, 32)  # type and weight between sockets
    cpu_hive: bool = False  # MI300A: CPU nodes show the hive too


def _gpu_properties(**changed: int) -> tuple[tuple[str, int], ...]:
    common = {
        "simd_id_base": 0x80001000,
        "max_waves_per_simd": 8,
        "lds_size_in_kb": 64,
        "gds_size_in_kb": 0,
        "num_gws": 64,
        "wave_front_size": 64,
        "simd_arrays_per_engine": 1,
        "simd_per_cu": 4,
        "max_slots_scratch_cu": 32,
        "vendor_id": 0x1002,
        "num_sdma_engines": 2,
        "num_sdma_xgmi_engines": 0,
        "num_sdma_queues_per_engine": 8,
        "num_cp_queues": 24,
        "debug_prop": 1511,
        "num_xcc": 1,
    }
    return tuple((common | changed).items())


def _gfx9_caches(
    cus: int, shared: int, groups: int, l2: int, *, l1: int = 16, inst: int = 32, l3: int = 0
) -> tuple[CacheKind, ...]:
    """*cus* vector caches, *groups* instruction and scalar caches, one L2, maybe one L3."""
    caches = [
        CacheKind(level=1, size=l1, type=9, count=cus),
        CacheKind(level=1, size=inst, type=10, count=groups, shared=shared),
        CacheKind(level=1, size=16, type=9, count=groups, shared=shared),
        CacheKind(level=2, size=l2, type=9, count=1, shared=cus),
    ]
    if l3:
        caches.append(CacheKind(level=3, size=l3, type=9, count=1, shared=cus))
    return tuple(caches)


MI210 = GpuKind(
    name="aldebaran",
    properties=_gpu_properties(
        simd_count=416, array_count=8, cu_per_simd_array=14, gfx_target_version=90010,
        device_id=0x740F, num_sdma_xgmi_engines=3, max_engine_clk_fcompute=1700,
        fw_version=92, sdma_fw_version=9, capability=746037888, debug_prop=470,
    ),
    subsystem=0x1002 | 0x0C34 << 16,
    vram=65520 * MIB, mem_width=4096, mem_clk=1600,
    caches=_gfx9_caches(104, 2, 56, 8192), pcie_bandwidth=32000,
)  # fmt: skip

MI250X = GpuKind(
    name="aldebaran",
    properties=_gpu_properties(
        simd_count=440, array_count=8, cu_per_simd_array=14, gfx_target_version=90010,
        device_id=0x7408, num_sdma_xgmi_engines=3, max_engine_clk_fcompute=1700,
        fw_version=78, sdma_fw_version=8, capability=746037888, debug_prop=470,
    ),
    subsystem=0x1002 | 0x0B0C << 16,
    vram=65520 * MIB, mem_width=4096, mem_clk=1600,
    caches=_gfx9_caches(110, 2, 56, 8192), pcie_bandwidth=36000,
)  # fmt: skip

MI100 = GpuKind(
    name="arcturus",
    properties=_gpu_properties(
        simd_count=480, max_waves_per_simd=10, array_count=8, cu_per_simd_array=16,
        gfx_target_version=90008, device_id=0x738C, num_sdma_xgmi_engines=6,
        max_engine_clk_fcompute=1502, fw_version=65, sdma_fw_version=18,
        capability=749970048, debug_prop=1494,
    ),
    subsystem=0x1002 | 0x0C34 << 16,
    vram=32752 * MIB, mem_width=4096, mem_clk=1200,
    caches=_gfx9_caches(120, 3, 48, 8192), pcie_bandwidth=32000,
)  # fmt: skip

MI60 = GpuKind(
    name="vega20",
    properties=_gpu_properties(
        simd_count=256, max_waves_per_simd=10, array_count=4, cu_per_simd_array=16,
        gfx_target_version=90006, device_id=0x66A1, num_sdma_xgmi_engines=0,
        max_engine_clk_fcompute=1800, fw_version=472, sdma_fw_version=145,
        capability=9860, num_sdma_queues_per_engine=8, debug_prop=1494,
    ),
    subsystem=0x1002 | 0x0834 << 16,
    vram=32752 * MIB, mem_width=4096, mem_clk=1000,
    caches=_gfx9_caches(64, 3, 24, 4096), pcie_bandwidth=16000,
)  # fmt: skip

MI300X = GpuKind(
    name="ip discovery",
    properties=_gpu_properties(
        simd_count=1216, array_count=32, cu_per_simd_array=10, gfx_target_version=90402,
        device_id=0x74A1, num_sdma_xgmi_engines=14, max_engine_clk_fcompute=2100,
        fw_version=177, sdma_fw_version=24, capability=2893521536, num_xcc=8,
    ),
    subsystem=0x1002 | 0x74A1 << 16,
    vram=196592 * MIB, mem_width=8192, mem_clk=1300,
    caches=_gfx9_caches(304, 2, 160, 4096, l1=32, inst=64, l3=262144), pcie_bandwidth=64000,
)  # fmt: skip

MI300X_CPX = GpuKind(
    name="ip discovery",
    properties=_gpu_properties(
        simd_count=152, array_count=4, cu_per_simd_array=10, gfx_target_version=90402,
        device_id=0x74A1, max_engine_clk_fcompute=2100,
        fw_version=177, sdma_fw_version=24, capability=2893521536,
    ),
    subsystem=0x1002 | 0x74A1 << 16,
    vram=196592 * MIB // 8, mem_width=8192, mem_clk=1300,
    caches=_gfx9_caches(38, 2, 20, 4096, l1=32, inst=64, l3=262144), pcie_bandwidth=64000,
)  # fmt: skip

MI300A = GpuKind(
    name="ip discovery",
    properties=_gpu_properties(
        simd_count=912, array_count=24, cu_per_simd_array=10, gfx_target_version=90402,
        device_id=0x74A0, num_sdma_xgmi_engines=10, max_engine_clk_fcompute=2100,
        fw_version=138, sdma_fw_version=19, capability=1013424768, num_xcc=6,
    ),
    subsystem=0x1002 | 0x74A0 << 16,
    vram=128 * GIB, mem_width=8192, mem_clk=1300,
    caches=_gfx9_caches(228, 2, 120, 4096, l1=32, inst=64, l3=262144), pcie_bandwidth=64000,
)  # fmt: skip

W7900 = GpuKind(
    name="ip discovery",
    properties=_gpu_properties(
        simd_count=192, max_waves_per_simd=16, wave_front_size=32, array_count=12,
        simd_arrays_per_engine=2, cu_per_simd_array=8, simd_per_cu=2,
        gfx_target_version=110000, device_id=0x7448, num_sdma_queues_per_engine=6,
        num_cp_queues=8, max_engine_clk_fcompute=1760, fw_version=550, sdma_fw_version=21,
        capability=671588992, debug_prop=1495,
    ),
    subsystem=0x1002 | 0x0E0D << 16,
    vram=49136 * MIB, mem_width=384, mem_clk=1124,
    caches=(
        CacheKind(level=1, size=32, type=9, count=96),
        CacheKind(level=1, size=32, type=10, count=48, shared=2),
        CacheKind(level=1, size=16, type=9, count=48, shared=2),
        CacheKind(level=2, size=6144, type=9, count=1, shared=96),
        CacheKind(level=3, size=98304, type=9, count=1, shared=96),
    ),
    pcie_bandwidth=32000,
)  # fmt: skip


def _full_xgmi(members: Sequence[int], bandwidth: int) -> tuple[XgmiLink, ...]:
    return tuple(XgmiLink(a=a, b=b, bandwidth=bandwidth) for a in members for b in members if a < b)


def _slots(kind: GpuKind, buses: Sequence[int], sockets: Sequence[int],
           hives: Sequence[int | None]) -> tuple[Slot, ...]:  # fmt: skip
    return tuple(
        Slot(kind=kind, bus=bus, socket=socket, hive=hive)
        for bus, socket, hive in zip(buses, sockets, hives, strict=True)
    )


# Frontier: GCDs of one package share four links, packages two or one; others are hops away.
_FRONTIER_LINKS = {
    (0, 1): 4, (2, 3): 4, (4, 5): 4, (6, 7): 4, (0, 6): 2, (1, 3): 2, (2, 4): 2, (5, 7): 2,
    (0, 2): 1, (1, 5): 1, (3, 7): 1, (4, 6): 1,
}  # fmt: skip


def _frontier_xgmi() -> tuple[XgmiLink, ...]:
    near: dict[int, set[int]] = {g: set() for g in range(8)}
    for a, b in _FRONTIER_LINKS:
        near[a].add(b)
        near[b].add(a)
    links = []
    for a in range(8):
        for b in range(a + 1, 8):
            width = _FRONTIER_LINKS.get((a, b), 0)
            hops = 1 if width else 2 if near[a] & near[b] else 3
            links.append(XgmiLink(a=a, b=b, hops=hops, bandwidth=50000 * width))
    return tuple(links)


_EPYC = Socket(cores=64, memory=512 * GIB)
_GENOA = Socket(cores=96, memory=1152 * GIB, clock=3700)


def _cpx_slots(devices: Sequence[tuple[int, int]], parts: int) -> tuple[Slot, ...]:
    return tuple(
        Slot(kind=MI300X_CPX, bus=bus, socket=socket, function=part, hive=0)
        for bus, socket in devices
        for part in range(parts)
    )


def _cpx_xgmi(devices: int, parts: int) -> tuple[XgmiLink, ...]:
    total = devices * parts
    return tuple(
        XgmiLink(a=a, b=b, bandwidth=819200 if a // parts == b // parts else 0)
        for a in range(total)
        for b in range(a + 1, total)
    )


_ALL = (
    Profile(
        name="mi210x2",
        title="2 MI210 joined by one XGMI bridge, one EPYC socket",
        sockets=(_EPYC,),
        slots=_slots(MI210, (0x63, 0x43), (0, 0), (0, 0)),
        xgmi=_full_xgmi((0, 1), 50000),
    ),
    Profile(
        name="mi210x2-pcie",
        title="2 MI210 without a bridge",
        sockets=(_EPYC,),
        slots=_slots(MI210, (0x63, 0x43), (0, 0), (None, None)),
    ),
    Profile(
        name="mi210x4",
        title="4 MI210 in one hive, two sockets",
        sockets=(_EPYC, _EPYC),
        slots=_slots(MI210, (0x63, 0x43, 0x83, 0xC3), (0, 0, 1, 1), (0,) * 4),
        xgmi=_full_xgmi(range(4), 50000),
    ),
    Profile(
        name="mi210x4-2hives",
        title="4 MI210 in two hives of two, two sockets",
        sockets=(_EPYC, _EPYC),
        slots=_slots(MI210, (0x63, 0x43, 0x83, 0xC3), (0, 0, 1, 1), (0, 0, 1, 1)),
        xgmi=_full_xgmi((0, 1), 100000) + _full_xgmi((2, 3), 100000),
    ),
    Profile(
        name="mi210x8-2hives",
        title="8 MI210 in two hives of four, two sockets",
        sockets=(_EPYC, _EPYC),
        slots=_slots(
            MI210,
            (0x63, 0x43, 0x03, 0x26, 0xE3, 0xC3, 0x83, 0xA3),
            (0,) * 4 + (1,) * 4,
            (0,) * 4 + (1,) * 4,
        ),
        xgmi=_full_xgmi(range(4), 50000) + _full_xgmi(range(4, 8), 50000),
    ),
    Profile(
        name="mi250x8",
        title="8 GCDs of 4 MI250X, one EPYC in four NUMA domains (a Frontier node)",
        sockets=(Socket(cores=16, memory=128 * GIB, clock=2000),) * 4,
        slots=_slots(
            MI250X,
            (0xC1, 0xC6, 0xC9, 0xCE, 0xD1, 0xD6, 0xD9, 0xDE),
            (3, 3, 1, 1, 0, 0, 2, 2),
            (0,) * 8,
        ),
        xgmi=_frontier_xgmi(),
        socket_link=(1, 12),
    ),
    Profile(
        name="mi300x8",
        title="8 MI300X, every one joined to every other by XGMI, two sockets",
        sockets=(_GENOA, _GENOA),
        slots=_slots(
            MI300X,
            (0x05, 0x26, 0x46, 0x65, 0x85, 0xA6, 0xC6, 0xE5),
            (0,) * 4 + (1,) * 4,
            (0,) * 8,
        ),
        xgmi=_full_xgmi(range(8), 64000),
    ),
    Profile(
        name="mi300x1-cpx",
        title="1 MI300X in CPX mode: 8 partitions",
        sockets=(_GENOA,),
        slots=_cpx_slots(((0x05, 0),), 8),
        xgmi=_cpx_xgmi(1, 8),
    ),
    Profile(
        name="mi300a4",
        title="4 MI300A, each a GPU node beside its CPU node",
        sockets=(Socket(cores=48, memory=128 * GIB, clock=3700),) * 4,
        slots=_slots(MI300A, (0x02, 0x22, 0x42, 0x62), (0, 1, 2, 3), (0,) * 4),
        xgmi=_full_xgmi(range(4), 128000),
        cpu_hive=True,
    ),
    Profile(
        name="mi100x4",
        title="4 MI100 in one hive, two sockets",
        sockets=(_EPYC, _EPYC),
        slots=_slots(MI100, (0x23, 0x26, 0x83, 0x86), (0, 0, 1, 1), (0,) * 4),
        xgmi=_full_xgmi(range(4), 50000),
    ),
    Profile(
        name="mi60x4",
        title="4 MI60 in two hives of two, two sockets",
        sockets=(_EPYC, _EPYC),
        slots=_slots(MI60, (0x09, 0x2F, 0x8C, 0xB5), (0, 0, 1, 1), (0, 0, 1, 1)),
        xgmi=_full_xgmi((0, 1), 50000) + _full_xgmi((2, 3), 50000),
    ),
    Profile(
        name="w7900x2",
        title="2 Radeon PRO W7900, one socket",
        sockets=(Socket(cores=32, memory=256 * GIB, clock=4000),),
        slots=_slots(W7900, (0x03, 0x83), (0, 0), (None, None)),
    ),
    Profile(
        name="mixed",
        title="2 bridged MI210, a W7900 and an MI100, two sockets",
        sockets=(_EPYC, _EPYC),
        slots=(
            Slot(kind=MI210, socket=0, bus=0x63, hive=0),
            Slot(kind=MI210, socket=0, bus=0x43, hive=0),
            Slot(kind=W7900, socket=1, bus=0x83),
            Slot(kind=MI100, socket=1, bus=0xC3),
        ),
        xgmi=_full_xgmi((0, 1), 50000),
    ),
)

PROFILES: dict[str, Profile] = {profile.name: profile for profile in _ALL}
