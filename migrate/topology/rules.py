"""The rules that a GPU map must satisfy: one named object each.

A rule tells what it compares, why that matters and by which source, and can be switched
off by its name (``--relax NAME``). Rules about one GPU compare a source GPU with the
destination GPU it would become; rules about two compare what joins them.

``criu`` names the switch of CRIU's amdgpu plugin that does the same
(plugins/amdgpu/amdgpu_plugin_topology.c: the seven KFD_*_CHECK environment variables).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from migrate.topology.model import Node
from migrate.topology.relations import Joint, LinkKind

# HSA_CAP_* of linux/kfd_sysfs.h that are numbers, not features.
CAP_ASIC_REVISION = 0x03C00000
CAP_WATCH_POINTS_TOTALBITS = 0x00000F00
CAP_DOORBELL_TYPE = 0x00003000
NO_ATOMICS = 0x4 | 0x8  # HSA_IOLINK_FLAGS_NO_ATOMICS_{32,64}_BIT

Refused = tuple[str, str] | None  # both values as shown to a person, None: accepted


@dataclass(frozen=True)
class SourceGpu:
    """A GPU of the process. ``need`` is the VRAM it holds there in bytes."""

    node: Node
    need: int = 0
    host_link_flags: int | None = None


@dataclass(frozen=True)
class DestinationGpu:
    """A GPU it may move to. ``free`` is VRAM not taken in bytes, None if not known."""

    node: Node
    free: int | None = None
    busy: bool = False
    host_link_flags: int | None = None


@dataclass(frozen=True)
class Rule:
    """What every rule tells of itself."""

    name: str
    compares: str
    demand: str
    why: str
    criu: str | None = None


@dataclass(frozen=True)
class GpuRule(Rule):
    """A rule about one GPU and its destination."""

    check: Callable[[SourceGpu, DestinationGpu], Refused] = lambda s, d: None

    def message(self, source: int, destination: int, values: tuple[str, str]) -> str:
        """What a person reads; ids are gpu_ids."""
        return (
            f"{self.name}: {self.compares} of source GPU {source} is {values[0]},"
            f" of destination GPU {destination} it is {values[1]} ({self.demand})"
        )


@dataclass(frozen=True)
class PairRule(Rule):
    """A rule about two GPUs and what joins them."""

    preposition: str = "of"
    check: Callable[[Joint, Joint], Refused] = lambda s, d: None

    def message(
        self, source: tuple[int, int], destination: tuple[int, int], values: tuple[str, str]
    ) -> str:
        """What a person reads; ids are gpu_ids."""
        return (
            f"{self.name}: {self.compares} {self.preposition} source GPUs {source[0]} and"
            f" {source[1]} is {values[0]}, {self.preposition} destination GPUs {destination[0]}"
            f" and {destination[1]} it is {values[1]} ({self.demand})"
        )


def _same(show: Callable[[Node], str]) -> Callable[[SourceGpu, DestinationGpu], Refused]:
    def check(s: SourceGpu, d: DestinationGpu) -> Refused:
        left, right = show(s.node), show(d.node)
        return None if left == right else (left, right)

    return check


def _at_least(
    value: Callable[[Node], int], show: Callable[[int], str] = str
) -> Callable[[SourceGpu, DestinationGpu], Refused]:
    def check(s: SourceGpu, d: DestinationGpu) -> Refused:
        left, right = value(s.node), value(d.node)
        return None if right >= left else (show(left), show(right))

    return check


def show_bytes(count: int) -> str:
    """Bytes as MiB; 0 is what a tree says that has no memory banks."""
    return f"{count // (1 << 20)} MiB" if count else "not told"


def _compute_units(n: Node) -> str:
    return (
        f"{n.simd_count} SIMDs, {n.simd_per_cu} a CU, {n.cu_per_simd_array} CUs an array,"
        f" {n.array_count} arrays, {n.simd_arrays_per_engine} an engine"
    )


def _sdma(n: Node) -> str:
    return (
        f"{n.num_sdma_engines} engines and {n.num_sdma_xgmi_engines} for XGMI,"
        f" {n.num_sdma_queues_per_engine} queues each"
    )


def _capability(s: SourceGpu, d: DestinationGpu) -> Refused:
    """Features of the source must be there; the doorbell type must be the same."""
    left, right = s.node.capability, d.node.capability
    numbers = CAP_ASIC_REVISION | CAP_WATCH_POINTS_TOTALBITS | CAP_DOORBELL_TYPE
    missing = left & ~right & ~numbers
    points = (left & CAP_WATCH_POINTS_TOTALBITS) > (right & CAP_WATCH_POINTS_TOTALBITS)
    doorbell = (left ^ right) & CAP_DOORBELL_TYPE
    return (f"{left:#010x}", f"{right:#010x}") if missing or points or doorbell else None


def _visible_vram(s: SourceGpu, d: DestinationGpu) -> Refused:
    here, there = s.node.visible_vram_bytes, d.node.visible_vram_bytes
    if there >= min(here, d.node.vram_bytes):  # all of a smaller card is enough: see vram-size
        return None
    return _mappable(s.node), _mappable(d.node)


def _mappable(n: Node) -> str:
    if n.visible_vram_bytes >= n.vram_bytes:
        return "whole"
    told = n.visible_vram_bytes
    return f"only {show_bytes(told)} of it" if told else "only in part"


def _vram_free(s: SourceGpu, d: DestinationGpu) -> Refused:
    if d.free is None or d.free >= s.need:
        return None
    return f"{s.need} bytes needed", f"{d.free} bytes free"


def _busy(_: SourceGpu, d: DestinationGpu) -> Refused:
    return ("in use by the process", "in use by another process") if d.busy else None


def _atomics(s: SourceGpu, d: DestinationGpu) -> Refused:
    if s.host_link_flags is None or d.host_link_flags is None:
        return None
    lost = d.host_link_flags & NO_ATOMICS & ~s.host_link_flags
    return ("there", "missing") if lost else None


GPU_RULES: tuple[GpuRule, ...] = (
    GpuRule(
        name="gfx-target",
        compares="the target",
        demand="must be the same",
        why="Code objects, wave state and queue descriptors are those of one ISA"
        " (kfd_device.c gfx_target_version; LLVM AMDGPU processors).",
        check=_same(lambda n: n.gfx),
    ),
    GpuRule(
        name="partition",
        compares="the number of XCCs",
        demand="must be the same",
        why="A queue has one descriptor and one save area per XCC, so CPX, DPX and SPX"
        " partitions can't stand in for each other (kfd_mqd_manager_v9.c).",
        check=_same(lambda n: str(n.num_xcc)),
    ),
    GpuRule(
        name="compute-units",
        compares="the shape",
        demand="must be the same",
        why="Saved wave state is laid out by shader engine and CU, and CU masks name them"
        " (kfd_queue.c, cwsr_trap_handler; hipExtStreamCreateWithCUMask).",
        check=_same(_compute_units),
    ),
    GpuRule(
        name="waves",
        compares="the number of waves",
        demand="must be the same",
        why="The process sized its scratch memory by them (ROCr: max_slots_scratch_cu).",
        check=_same(
            lambda n: f"{n.max_waves_per_simd} a SIMD, {n.max_slots_scratch_cu} scratch slots a CU"
        ),
    ),
    GpuRule(
        name="wavefront",
        compares="the wavefront size",
        demand="must be the same",
        why="Compiled into every kernel.",
        check=_same(lambda n: str(n.wave_front_size)),
    ),
    GpuRule(
        name="lds-size",
        compares="LDS",
        demand="must be the same",
        why="Kernels are launched with LDS sizes chosen for it, and it is part of saved waves.",
        check=_same(lambda n: f"{n.lds_size_in_kb} KiB"),
    ),
    GpuRule(
        name="sdma-engines",
        compares="SDMA",
        demand="must be the same",
        why="A queue's sdma_id, which RESTORE takes over, counts through engines and queues"
        " (kfd_device_queue_manager.c allocate_sdma_queue).",
        check=_same(_sdma),
    ),
    GpuRule(
        name="cp-queues",
        compares="the number of CP queues",
        demand="must not be fewer",
        why="More queues than that are oversubscribed: all of them slow down.",
        check=_at_least(lambda n: n.num_cp_queues),
    ),
    GpuRule(
        name="fw-version",
        compares="the MEC firmware",
        demand="must not be older",
        why="Saved waves and queue descriptors are written by the newer firmware.",
        criu="KFD_FW_VER_CHECK",
        check=_at_least(lambda n: n.fw_version),
    ),
    GpuRule(
        name="sdma-fw-version",
        compares="the SDMA firmware",
        demand="must not be older",
        why="SDMA queue state is written by the newer firmware, which may know more packets.",
        criu="KFD_SDMA_FW_VER_CHECK",
        check=_at_least(lambda n: n.sdma_fw_version),
    ),
    GpuRule(
        name="caches-count",
        compares="the number of caches",
        demand="must not be fewer",
        why="Libraries tile by the caches they saw at start.",
        criu="KFD_CACHES_COUNT_CHECK",
        check=_at_least(lambda n: n.caches_count),
    ),
    GpuRule(
        name="num-gws",
        compares="the number of GWS",
        demand="must not be fewer",
        why="Cooperative launches hold global wave sync resources (kfd_ioctl_alloc_queue_gws).",
        criu="KFD_NUM_GWS_CHECK",
        check=_at_least(lambda n: n.num_gws),
    ),
    GpuRule(
        name="capability",
        compares="the capability word",
        demand="no feature may be lost",
        why="The process asked at start what the GPU can do (linux/kfd_sysfs.h HSA_CAP_*).",
        criu="KFD_CAPABILITY_CHECK",
        check=_capability,
    ),
    GpuRule(
        name="pcie-atomics",
        compares="atomics to the host",
        demand="must not be lost",
        why="Signals are decremented in host memory by PCIe atomics (HSA_IOLINK_FLAGS_NO_ATOMICS).",
        check=_atomics,
    ),
    GpuRule(
        name="visible-vram",
        compares="VRAM the CPU can map",
        demand="the whole of it must stay mappable",
        why="With a large BAR the process may have mapped any VRAM (KFD heap types 1 and 2).",
        check=_visible_vram,
    ),
    GpuRule(
        name="vram-size",
        compares="VRAM",
        demand="must not be less",
        why="The process may allocate as much as it saw at start.",
        criu="KFD_VRAM_SIZE_CHECK",
        check=_at_least(lambda n: n.vram_bytes, show_bytes),
    ),
    GpuRule(
        name="vram-free",
        compares="VRAM",
        demand="what the process holds must fit beside what is taken",
        why="RESTORE allocates every BO at once, else ENOMEM and the process is unusable.",
        check=_vram_free,
    ),
    GpuRule(
        name="busy",
        compares="use",
        demand="no other process may hold the GPU",
        why="Two processes share a GPU by time slices: both slow down.",
        check=_busy,
    ),
)


def _xgmi(s: Joint, d: Joint) -> Refused:
    return (
        (s.shown, d.shown)
        if any(
            a is LinkKind.XGMI and b is not LinkKind.XGMI
            for a, b in zip(s.kinds, d.kinds, strict=True)
        )
        else None
    )


def _peer(s: Joint, d: Joint) -> Refused:
    lost = any(
        a is not LinkKind.NONE and b is LinkKind.NONE for a, b in zip(s.kinds, d.kinds, strict=True)
    )
    return (s.shown, d.shown) if lost else None


def _hive(s: Joint, d: Joint) -> Refused:
    return ("shared", "not shared") if s.same_hive and not d.same_hive else None


def _numa(s: Joint, d: Joint) -> Refused:
    return ("shared", "not shared") if s.same_numa is True and d.same_numa is False else None


PAIR_RULES: tuple[PairRule, ...] = (
    PairRule(
        name="peer-link",
        compares="the link",
        preposition="between",
        demand="a link must not be lost",
        why="Without one a GPU can't reach the other's memory, and mapping it there fails"
        " (kfd_topology.c kfd_add_peer_prop; hipDeviceCanAccessPeer was answered at start).",
        check=_peer,
    ),
    PairRule(
        name="xgmi",
        compares="the link",
        preposition="between",
        demand="XGMI must stay XGMI",
        why="Communication libraries chose rings and kernels by it, and coherence differs"
        " (amdgpu_amdkfd_gpuvm.c get_pte_flags).",
        check=_xgmi,
    ),
    PairRule(
        name="hive",
        compares="the hive",
        demand="GPUs of one hive must stay in one",
        why="Memory of the same hive is mapped with another caching mode"
        " (amdgpu_xgmi_same_hive in svm_range_get_pte_flags).",
        check=_hive,
    ),
    PairRule(
        name="numa",
        compares="the NUMA node",
        demand="GPUs of one NUMA node must stay on one",
        why="Threads and host buffers were bound beside their GPUs.",
        criu="KFD_NUMA_CHECK",
        check=_numa,
    ),
)

RULES: tuple[GpuRule | PairRule, ...] = (*GPU_RULES, *PAIR_RULES)
RULE_NAMES: tuple[str, ...] = tuple(rule.name for rule in RULES)
# CRIU's switches by name, for those who know them.
CRIU_SWITCHES: dict[str, str] = {rule.criu: rule.name for rule in RULES if rule.criu}
