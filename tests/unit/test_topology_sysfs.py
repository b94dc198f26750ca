"""The sysfs reader on trees of real machines, on odd ones and on broken ones."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
import pytest

from migrate.errors import BrokenTopology
from migrate.kfd.sysfs import (
    ProcessUsage,
    QueueUsage,
    VramUsage,
    busy_gpus,
    read_process,
    read_processes,
    read_render_minors,
    read_topology,
    read_vram,
)
from migrate.model import HostPaths
from migrate.topology.match import match
from migrate.topology.model import Cache, LinkType, Topology
from migrate.topology.profiles import PROFILES, place, write_tree
from tests.data.topologies.make import COMPOSED
from tests.unit.topology_kit import GIB, MEMORY, saved, unpack

# Archive, target, GPUs, SIMDs and VRAM in MiB of each, hives, CPU nodes.
MACHINES = (
    ("mi210-8x2hives", "gfx90a", 8, 416, 0, 2, 2),
    ("mi308x-4x8parts", "gfx942", 32, 80, 49136, 1, 2),
    ("mi300x-8x8cpx", "gfx942", 63, 152, 0, 1, 2),
    ("vega10-1gpu", "PCI device 1002:6860", 1, 256, 16368, 0, 1),
    ("mi100-node-partial", "gfx908", 1, 480, 0, 0, 0),
    ("mi250x8", "gfx90a", 8, 440, 65520, 1, 4),
    ("mi300x8", "gfx942", 8, 1216, 196592, 1, 2),
    ("mi300a4", "gfx942", 4, 912, 131072, 1, 4),
    ("mi100x4", "gfx908", 4, 480, 32752, 1, 2),
    ("mi60x4", "gfx906", 4, 256, 32752, 2, 2),
    ("w7900x2", "gfx1100", 2, 192, 49136, 0, 1),
)


@pytest.mark.parametrize("machine", MACHINES, ids=[machine[0] for machine in MACHINES])
def test_trees_of_machines(machine: tuple[str, str, int, int, int, int, int]) -> None:
    name, gfx, gpus, simds, vram, hives, cpus = machine
    topology = saved(name)
    assert len(topology.gpus) == gpus
    assert {gpu.gfx for gpu in topology.gpus} == {gfx}
    assert {gpu.simd_count for gpu in topology.gpus} == {simds}
    assert min(gpu.vram_bytes >> 20 for gpu in topology.gpus) == vram
    assert len({gpu.hive_id for gpu in topology.gpus} - {0}) == hives
    assert len(topology.nodes) - gpus == cpus
    result = match(topology, topology)
    assert result.map is not None
    assert result.proven
    assert result.cost is not None
    assert msgspec.structs.astuple(result.cost) == (0, 0, 0, 0)


def test_the_mixed_machine() -> None:
    gpus = saved("mixed").gpus
    assert [gpu.gfx for gpu in gpus] == ["gfx90a", "gfx90a", "gfx1100", "gfx908"]
    assert gpus[0].pci == "0000:63:00.0"


def test_what_is_read_of_one_gpu() -> None:
    gpu = saved("mi308x-4x8parts").gpus[1]
    assert gpu.gpu_id == 41657
    assert gpu.location_id == 2561
    assert gpu.pci == "0000:0a:00.1"
    assert gpu.physical == saved("mi308x-4x8parts").gpus[0].physical
    assert gpu.visible_vram_bytes == 48 * GIB
    assert sum(cache.count for cache in gpu.caches) == gpu.caches_count == 46
    assert Cache(level=3, size=65536, type=9, count=1) in gpu.caches
    near = next(link for link in gpu.links if link.node_to == 2)
    assert (near.type, near.weight, near.max_bandwidth) == (LinkType.XGMI, 13, 819200)
    assert [link.node_to for link in gpu.links if link.p2p] == [1]


@pytest.mark.parametrize("name", COMPOSED)
def test_saved_trees_are_those_that_the_profiles_write(name: str) -> None:
    with TemporaryDirectory(dir=MEMORY) as folder:
        gpus = write_tree(PROFILES[name], folder)
        topology = read_topology(folder)
    assert topology == saved(name)
    assert [(gpu.gpu_id, gpu.vram_bytes, gpu.drm_render_minor) for gpu in topology.gpus] == [
        (gpu.gpu_id, gpu.vram_bytes, gpu.render_minor) for gpu in gpus
    ]


@pytest.mark.parametrize("name", sorted(PROFILES))
def test_hosts_in_other_slots_have_other_ids_and_take_each_others_processes(
    name: str,
) -> None:
    seen: set[int] = set()
    for slot_offset in range(6):
        ids = {gpu.gpu_id for gpu in place(PROFILES[name], slot_offset)}
        assert len(ids) == len(PROFILES[name].slots)
        assert not ids & seen
        seen |= ids
    if len(PROFILES[name].slots) <= 2:
        with TemporaryDirectory(dir=MEMORY) as folder:
            trees = Path(folder, "a"), Path(folder, "b")
            for slot_offset, path in enumerate(trees):
                write_tree(PROFILES[name], path, slot_offset=slot_offset)
            here, there = (read_topology(path) for path in trees)
        assert match(here, there).map is not None


def test_a_topology_goes_over_the_wire() -> None:
    for name in ("mi308x-4x8parts", "mixed"):
        topology = saved(name)
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(topology), type=Topology) == topology
        assert msgspec.json.decode(msgspec.json.encode(topology), type=Topology) == topology


# ---------------------------------------------------------------- tolerance


@pytest.fixture
def tree() -> Iterator[Path]:
    """The nodes of a small machine: 0 is the CPU, 1 and 2 are GPUs."""
    with TemporaryDirectory(dir=MEMORY) as folder:
        write_tree(PROFILES["mi210x2"], folder)
        yield Path(folder) / "topology" / "nodes"


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_fields_that_a_kernel_adds_or_lacks(tree: Path) -> None:
    before = read_topology(tree.parent).gpus[0]
    properties = tree / "1" / "properties"
    properties.write_text(properties.read_text() + "shiny_new_field 7\nshiny_text a,b\n")
    change(tree / "1/io_links/0/properties", "flags", "recommended_sdma_engine_id_mask 3\nflags")
    assert read_topology(tree.parent).gpus[0] == before
    change(properties, "num_xcc 1\n", "")
    change(properties, "num_gws 64\n", "")
    assert read_topology(tree.parent).gpus[0] == msgspec.structs.replace(before, num_gws=0)


def test_the_tree_is_found_from_nodes_and_the_folders_around_it(tree: Path) -> None:
    whole = read_topology(tree.parent)
    assert read_topology(tree) == read_topology(tree.parent.parent) == whole
    with TemporaryDirectory(dir=MEMORY) as folder:
        kfd = Path(folder, "sys", "class", "kfd", "kfd")
        kfd.mkdir(parents=True)
        (kfd / "topology").symlink_to(tree.parent)
        for around in (kfd, *kfd.parents[:4]):
            assert read_topology(around) == whole, around


def test_folders_that_are_no_nodes_and_blanks_do_not_matter(tree: Path) -> None:
    before = read_topology(tree.parent)
    for name in ("01", "-1", "\u0663", "power"):
        (tree / name).mkdir()
    properties = tree / "1" / "properties"
    text = properties.read_text()
    properties.write_text("\r\n".join("  " + line.replace(" ", "\t ") for line in text.split("\n")))
    assert read_topology(tree.parent) == before


def test_a_name_file_may_be_missing_and_folders_too(tree: Path) -> None:
    (tree / "1" / "name").unlink()
    (tree / "1" / "mem_banks").rename(tree / "1" / "gone")
    gpu = read_topology(tree.parent).gpus[0]
    assert (gpu.name, gpu.vram_bytes) == ("", 0)


def test_a_node_that_the_device_cgroup_hides(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read_text = Path.read_text

    def guarded(path: Path, encoding: str | None = None, errors: str | None = None) -> str:
        if path.parent == tree / "2":
            raise PermissionError(errno.EPERM, "Operation not permitted")
        return read_text(path, encoding, errors)

    monkeypatch.setattr(Path, "read_text", guarded)
    topology = read_topology(tree.parent)
    assert topology.hidden == (2,)
    assert len(topology.gpus) == 1
    assert read_render_minors(tree.parent) == {topology.gpus[0].gpu_id: 128}


def test_a_machine_without_gpus(tree: Path) -> None:
    (tree / "1").rename(tree / "x1")
    (tree / "2").rename(tree / "x2")
    assert read_topology(tree.parent).gpus == ()
    assert read_render_minors(tree.parent) == {}


@pytest.mark.parametrize("name", [machine[0] for machine in MACHINES])
def test_render_nodes_alone_are_those_of_the_topology(name: str, tmp_path: Path) -> None:
    root = unpack(name, tmp_path)
    gpus = read_topology(root).gpus
    assert read_render_minors(root) == {gpu.gpu_id: gpu.drm_render_minor for gpu in gpus}


def test_render_nodes_alone_need_no_caches(tree: Path) -> None:
    wanted = read_render_minors(tree.parent)
    (tree / "1" / "caches" / "0" / "properties").write_text("level x\n")
    assert "level" in broken(tree)
    assert read_render_minors(tree.parent) == wanted


# ---------------------------------------------------------------- broken trees


def broken(tree: Path) -> str:
    with pytest.raises(BrokenTopology) as caught:
        read_topology(tree.parent)
    assert caught.value.exit_code == 2
    return str(caught.value).replace(str(tree.parent), "TREE")


def test_no_tree(tmp_path: Path) -> None:
    with pytest.raises(BrokenTopology, match="no folder `nodes` there"):
        read_topology(tmp_path)
    with pytest.raises(BrokenTopology, match="missing: no such folder"):
        read_topology(tmp_path / "missing")


def test_a_published_part_of_a_tree_is_no_machine(tmp_path: Path) -> None:
    with pytest.raises(BrokenTopology, match="nodes/0/gpu_id: No such file or directory"):
        read_topology(unpack("mi300a-4apu-partial", tmp_path))


def test_an_empty_nodes_folder(tmp_path: Path) -> None:
    (tmp_path / "nodes").mkdir()
    with pytest.raises(BrokenTopology, match="no node can be read there"):
        read_topology(tmp_path)


def test_gpu_id_is_no_number(tree: Path) -> None:
    (tree / "1" / "gpu_id").write_text("0x1a97\n")
    assert broken(tree) == "TREE/nodes/1/gpu_id: the value is '0x1a97', not a number"


def test_a_property_is_no_number(tree: Path) -> None:
    change(tree / "1" / "properties", "simd_count 416", "simd_count many")
    assert broken(tree) == (
        "TREE/nodes/1/properties: the value of simd_count is 'many', not a number"
    )


def test_properties_are_empty(tree: Path) -> None:
    (tree / "1" / "properties").write_text("")
    assert broken(tree) == "TREE/nodes/1/properties: empty"


def test_a_link_without_a_field(tree: Path) -> None:
    change(tree / "1/io_links/0/properties", "node_to 0\n", "")
    assert broken(tree) == "TREE/nodes/1/io_links/0/properties: no field node_to"


def test_a_link_of_another_node(tree: Path) -> None:
    change(tree / "1/io_links/0/properties", "node_from 1", "node_from 2")
    assert broken(tree) == ("TREE/nodes/1/io_links/0/properties: node_from is 2, but the node is 1")


def test_a_copy_that_broke_off(tree: Path) -> None:
    (tree / "1/io_links/1").rename(tree / "gone")
    assert broken(tree) == "TREE/nodes/1/io_links: 1 entries, but io_links_count is 2"


def test_one_node_without_its_folder_of_links(tree: Path) -> None:
    """Where no node has one, as in some published trees, they are not told."""
    (tree / "1" / "io_links").rename(tree / "gone")
    assert broken(tree) == "TREE/nodes/1/io_links: missing, but io_links_count is 2"
    for number in ("0", "2"):
        (tree / number / "io_links").rename(tree / f"gone{number}")
    assert not [link for node in read_topology(tree.parent).nodes for link in node.links]


def test_a_file_of_something_else(tree: Path) -> None:
    (tree / "1" / "properties").write_bytes(b"\xff\xfe\x00 1\nhello 3\n")
    assert broken(tree) == "TREE/nodes/1/properties: no field of KFD in it"


def test_a_gpu_id_twice(tree: Path) -> None:
    (tree / "1" / "gpu_id").write_text((tree / "2" / "gpu_id").read_text())
    gpu_id = (tree / "2" / "gpu_id").read_text().strip()
    assert broken(tree) == f"TREE: 2 nodes have the gpu_id {gpu_id}"
    with pytest.raises(BrokenTopology, match="2 nodes have the gpu_id"):
        read_render_minors(tree.parent)


def test_a_tree_that_changes_all_the_time(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read_text = Path.read_text
    count = iter(range(1000))

    def moving(path: Path, encoding: str | None = None, errors: str | None = None) -> str:
        if path.name == "generation_id":
            return str(next(count))
        return read_text(path, encoding, errors)

    monkeypatch.setattr(Path, "read_text", moving)
    assert "changes all the time" in broken(tree)


# ---------------------------------------------------------------- processes


def test_processes_and_their_queues(tmp_path: Path) -> None:
    paths = HostPaths.under(tmp_path)
    assert read_processes(paths) == ()
    process = Path(paths.kfd_sysfs) / "proc" / "77"
    (process / "queues" / "3").mkdir(parents=True)
    (process / "pasid").write_text("32769\n")
    (process / "vram_41677").write_text("4096\n")
    (process / "vram_9").write_text("0")
    for name, value in (("gpuid", 41677), ("size", 65536), ("type", 0)):
        (process / "queues" / "3" / name).write_text(str(value))
    (process / "queues" / "4").mkdir()  # being destroyed
    expected = ProcessUsage(
        pid=77,
        pasid=32769,
        vram=((9, 0), (41677, 4096)),
        queues=(QueueUsage(queue_id=3, gpu_id=41677, size=65536, type=0),),
    )
    assert read_process(paths, 77) == expected
    assert read_processes(paths) == (expected,)
    assert read_process(paths, 78) is None
    assert busy_gpus([expected]) == {41677}
    assert busy_gpus([expected], apart=[77]) == frozenset()


def test_free_vram(tmp_path: Path) -> None:
    paths = HostPaths.under(tmp_path)
    write_tree(PROFILES["mi210x2"], paths.kfd_sysfs)
    topology = read_topology(paths.topology)
    device = Path(paths.drm_sysfs) / "renderD129" / "device"
    device.mkdir(parents=True)
    (device / "mem_info_vram_total").write_text("1000\n")
    (device / "mem_info_vram_used").write_text("300\n")
    (usage,) = read_vram(paths, topology)  # the other GPU does not tell
    assert usage == VramUsage(gpu_id=topology.gpus[1].gpu_id, total=1000, used=300)
    assert usage.free == 700
