"""Each rule: what it accepts, what it refuses in which words, and that it can be relaxed."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest

from migrate.topology.match import match
from migrate.topology.model import LinkType, MemoryBank, Node, Topology
from migrate.topology.rules import RULE_NAMES, RULES
from tests.unit.topology_kit import GIB, assemble, both, gpu, link, machine


class Single(NamedTuple):
    """Rule, change of the source that is refused, change that is accepted, both shown."""

    rule: str
    refused: dict[str, Any]
    accepted: dict[str, Any]
    shown: tuple[str, str]


def bank(size: int, heap: int = 1) -> tuple[MemoryBank, ...]:
    return (MemoryBank(heap_type=heap, size_in_bytes=size),)


UNITS = "SIMDs, 4 a CU, 14 CUs an array, 8 arrays, 1 an engine"
SINGLE = (
    Single("gfx-target", {"gfx_target_version": 90402}, {}, ("gfx942", "gfx90a")),
    Single("partition", {"num_xcc": 8}, {"num_xcc": 1}, ("8", "1")),
    Single("compute-units", {"simd_count": 440}, {}, (f"440 {UNITS}", f"416 {UNITS}")),
    Single(
        "waves",
        {"max_waves_per_simd": 10},
        {},
        ("10 a SIMD, 32 scratch slots a CU", "8 a SIMD, 32 scratch slots a CU"),
    ),
    Single("wavefront", {"wave_front_size": 32}, {}, ("32", "64")),
    Single("lds-size", {"lds_size_in_kb": 32}, {}, ("32 KiB", "64 KiB")),
    Single(
        "sdma-engines",
        {"num_sdma_xgmi_engines": 6},
        {},
        ("2 engines and 6 for XGMI, 8 queues each", "2 engines and 3 for XGMI, 8 queues each"),
    ),
    Single("cp-queues", {"num_cp_queues": 32}, {"num_cp_queues": 8}, ("32", "24")),
    Single("fw-version", {"fw_version": 93}, {"fw_version": 91}, ("93", "92")),
    Single("sdma-fw-version", {"sdma_fw_version": 10}, {"sdma_fw_version": 8}, ("10", "9")),
    Single("caches-count", {"caches_count": 218}, {"caches_count": 20}, ("218", "217")),
    Single("num-gws", {"num_gws": 65}, {"num_gws": 0}, ("65", "64")),
    Single(
        "capability",
        {"capability": 0x2C778682},
        # Fewer features, another revision, fewer watch points.
        {"capability": 0x28678580},
        ("0x2c778682", "0x2c778680"),
    ),
    Single(
        "vram-size",
        {"mem_banks": bank(65 * GIB)},
        {"mem_banks": bank(1)},
        ("66560 MiB", "65536 MiB"),
    ),
)
DEMANDS = {rule.name: rule for rule in RULES}


def refuse(source: Topology, destination: Topology, rule: str, **more: Any) -> str:
    """The one message; and that relaxing just this rule gives a map that says so."""
    result = match(source, destination, **more)
    assert result.map is None
    assert result.advice == (rule,)
    relaxed = match(source, destination, relax={rule}, **more)
    assert relaxed.map is not None
    assert relaxed.relaxed == (rule,)
    others = frozenset(RULE_NAMES) - {rule}
    assert match(source, destination, relax=others, **more).map is None
    (refusal,) = {r.message: r for r in result.refusals if r.rule == rule}.values()
    return refusal.message


def accept(source: Topology, destination: Topology, **more: Any) -> None:
    result = match(source, destination, **more)
    assert result.map is not None, result.refusals
    assert result.relaxed == ()


@pytest.mark.parametrize("case", SINGLE, ids=[case.rule for case in SINGLE])
def test_rule_about_one_gpu(case: Single) -> None:
    here = assemble([gpu(2)])
    rule = DEMANDS[case.rule]
    message = refuse(assemble([gpu(1, **case.refused)]), here, case.rule)
    assert message == (
        f"{case.rule}: {rule.compares} of source GPU 1 is {case.shown[0]},"
        f" of destination GPU 2 it is {case.shown[1]} ({rule.demand})"
    )
    accept(assemble([gpu(1, **case.accepted)]), here)


def test_one_message_in_full() -> None:
    message = refuse(assemble([gpu(1, fw_version=93)]), assemble([gpu(2)]), "fw-version")
    assert message == (
        "fw-version: the MEC firmware of source GPU 1 is 93, of destination GPU 2 it is 92"
        " (must not be older)"
    )


def test_visible_vram() -> None:
    small, large = assemble([gpu(2, mem_banks=bank(64 * GIB, heap=2))]), assemble([gpu(1)])
    assert refuse(large, small, "visible-vram") == (
        "visible-vram: VRAM the CPU can map of source GPU 1 is whole, of destination GPU 2 it is"
        " only in part (the whole of it must stay mappable)"
    )
    accept(small, large)
    two = (MemoryBank(heap_type=1, size_in_bytes=GIB), MemoryBank(2, 63 * GIB))
    part = assemble([gpu(2, mem_banks=two)])
    assert refuse(large, part, "visible-vram") == (
        "visible-vram: VRAM the CPU can map of source GPU 1 is whole, of destination GPU 2 it is"
        " only 1024 MiB of it (the whole of it must stay mappable)"
    )
    accept(part, large)
    accept(part, assemble([gpu(3, mem_banks=two)]))
    smaller = assemble([gpu(3, mem_banks=bank(32 * GIB))])
    assert refuse(large, smaller, "vram-size")  # and nothing else


def test_vram_free() -> None:
    a, b = assemble([gpu(1)]), assemble([gpu(2)])
    assert refuse(a, b, "vram-free", needs={1: 1001}, free={2: 1000}) == (
        "vram-free: VRAM of source GPU 1 is 1001 bytes needed, of destination GPU 2 it is"
        " 1000 bytes free (what the process holds must fit beside what is taken)"
    )
    accept(a, b, needs={1: 1000}, free={2: 1000})
    accept(a, b, needs={1: 1000})


def test_busy() -> None:
    a, b = assemble([gpu(1)]), assemble([gpu(2)])
    assert refuse(a, b, "busy", busy={2}) == (
        "busy: use of source GPU 1 is in use by the process, of destination GPU 2 it is"
        " in use by another process (no other process may hold the GPU)"
    )
    accept(a, b, busy={3})


def test_pcie_atomics() -> None:
    def with_flags(gpu_id: int, flags: int) -> Topology:
        cpu = Node(number=0, cpu_cores_count=1)
        return assemble([cpu, gpu(gpu_id)], both(LinkType.PCIE, 0, gpu_id, flags=flags))

    assert refuse(with_flags(1, 1), with_flags(2, 5), "pcie-atomics") == (
        "pcie-atomics: atomics to the host of source GPU 1 is there, of destination GPU 2 it is"
        " missing (must not be lost)"
    )
    accept(with_flags(1, 13), with_flags(2, 5))
    accept(with_flags(1, 1), with_flags(2, 3))


PAIR = [gpu(1), gpu(2)]
OTHER = [gpu(3), gpu(4)]


def test_peer_link() -> None:
    apart = machine(OTHER, without=[(3, 4)])
    assert refuse(machine(PAIR), apart, "peer-link") == (
        "peer-link: the link between source GPUs 1 and 2 is PCIe, between destination GPUs 3 and 4"
        " it is none (a link must not be lost)"
    )
    accept(apart, machine(PAIR))


def test_xgmi() -> None:
    """One hive id on both sides, so that only the link differs."""
    members = [gpu(3, hive_id=9), gpu(4, hive_id=9)]
    pcie = assemble(members, both(LinkType.PCIE, 3, 4))
    assert refuse(machine(PAIR, hives=[[1, 2]]), pcie, "xgmi") == (
        "xgmi: the link between source GPUs 1 and 2 is XGMI, between destination GPUs 3 and 4"
        " it is PCIe (XGMI must stay XGMI)"
    )
    accept(pcie, machine(PAIR, hives=[[1, 2]]))


def test_xgmi_one_way_is_not_enough() -> None:
    half = [link(LinkType.XGMI, 3, 4), link(LinkType.PCIE, 4, 3)]
    members = [gpu(3, hive_id=9), gpu(4, hive_id=9)]
    assert refuse(machine(PAIR, hives=[[1, 2]]), assemble(members, half), "xgmi") == (
        "xgmi: the link between source GPUs 1 and 2 is XGMI, between destination GPUs 3 and 4"
        " it is XGMI one way and PCIe the other (XGMI must stay XGMI)"
    )


def test_hive() -> None:
    links = both(LinkType.XGMI, 3, 4, max_bandwidth=50_000)
    two = assemble([gpu(3, hive_id=8), gpu(4, hive_id=9)], links)
    assert refuse(machine(PAIR, hives=[[1, 2]]), two, "hive") == (
        "hive: the hive of source GPUs 1 and 2 is shared, of destination GPUs 3 and 4 it is"
        " not shared (GPUs of one hive must stay in one)"
    )
    accept(two, machine(PAIR, hives=[[1, 2]]))


def test_numa() -> None:
    near, far = machine(PAIR, sockets=[[1, 2]]), machine(OTHER, sockets=[[3], [4]])
    assert refuse(near, far, "numa") == (
        "numa: the NUMA node of source GPUs 1 and 2 is shared, of destination GPUs 3 and 4 it is"
        " not shared (GPUs of one NUMA node must stay on one)"
    )
    accept(far, near)
    accept(near, machine(OTHER))  # not told is no reason


def test_every_rule_says_what_and_why_and_crius_seven_are_there() -> None:
    assert len(set(RULE_NAMES)) == len(RULES)
    for rule in RULES:
        assert rule.compares
        assert rule.demand
        assert len(rule.why) > 20
    assert {rule.criu for rule in RULES if rule.criu} == {
        "KFD_FW_VER_CHECK",
        "KFD_SDMA_FW_VER_CHECK",
        "KFD_CACHES_COUNT_CHECK",
        "KFD_NUM_GWS_CHECK",
        "KFD_VRAM_SIZE_CHECK",
        "KFD_NUMA_CHECK",
        "KFD_CAPABILITY_CHECK",
    }


def test_a_rule_can_be_relaxed_by_the_name_of_crius_switch() -> None:
    new, old = gpu(1, fw_version=93, num_gws=65), gpu(2)
    result = match(
        assemble([new]), assemble([old]), relax={"KFD_FW_VER_CHECK", "KFD_NUM_GWS_CHECK"}
    )
    assert result.map is not None
    assert result.relaxed == ("fw-version", "num-gws")
    for rule in RULES:
        if rule.criu:
            assert match(assemble([gpu(1)]), assemble([gpu(2)]), relax={rule.criu}).map
