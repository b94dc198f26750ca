"""The table, the drawing, the picture, and ``migrate map`` around them."""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from migrate.cli.main import run
from migrate.cli.map import Machine, document
from migrate.errors import InsufficientVram, NoGpuMap, VisibleGpus
from migrate.kfd.sysfs import read_topology
from migrate.topology.drawing import draw
from migrate.topology.explain import explain
from migrate.topology.match import Case, decide, match
from migrate.topology.model import Topology
from migrate.topology.profiles import PROFILES, write_tree
from migrate.topology.relax import mildest
from migrate.topology.rules import RULE_NAMES, RULES
from migrate.topology.svg import svg
from scenarios.bench.topology_machines import question
from tests.unit.topology_kit import GIB, MEMORY, assemble, gpu, machine, saved, unpack

IDS = [1, 2, 3, 4]
ONE_HIVE = machine([gpu(g) for g in IDS], hives=[IDS])
TWO_HIVES = machine([gpu(g + 10) for g in IDS], hives=[[11, 12], [13, 14]])


def case(source: Topology, destination: Topology, **more: Any) -> Case:
    given = {"needs": {}, "free": {}, "busy": (), "override": ()} | more
    return Case.of(source, destination, **given)


def shown(source: Topology, destination: Topology, **more: Any) -> list[list[str]]:
    question = case(source, destination, **more)
    explanation = explain(question, decide(question))
    return [[cell.shown for cell in row] for row in explanation.rows]


def test_two_hives_against_one() -> None:
    question = case(ONE_HIVE, TWO_HIVES)
    explanation = explain(question, decide(question))
    assert explanation.relaxations == ("xgmi", "hive")
    assert {cell.shown for row in explanation.rows for cell in row} == {"(xgmi)"}
    assert shown(TWO_HIVES, ONE_HIVE) == [["yes"] * 4] * 4


def test_the_first_rule_of_each_pair() -> None:
    source = assemble([gpu(1), gpu(2, fw_version=99)])
    target = assemble([gpu(3), gpu(4, gfx_target_version=90402, fw_version=1), gpu(5)])
    # GPU 2 has no place at all, so GPU 1 has none in a whole map either.
    assert shown(source, target) == [
        ["(fw-version)", "gfx-target", "(fw-version)"],
        ["fw-version", "gfx-target", "fw-version"],
    ]


def test_a_pair_that_only_the_others_forbid() -> None:
    """GPU 1 could be 3 or 4, but 2 has only 3."""
    source = assemble([gpu(1), gpu(2, fw_version=93)])
    target = assemble([gpu(3, fw_version=93), gpu(4)])
    assert shown(source, target) == [["(fw-version)", "yes"], ["yes", "fw-version"]]


def test_every_pair_of_many_gpus_comes_soon() -> None:
    """A source of odd links among 16 GPUs that no place has: few of its pairs are searched."""
    q = question(random.Random(684), 16, RULE_NAMES)
    here = case(q.source, q.destination, needs=q.needs, free=q.free, busy=q.busy)
    found, searches = decide(here), 0

    def count(frame: FrameType, event: str, _: object) -> None:
        nonlocal searches
        searches += event == "call" and frame.f_code is mildest.__code__

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        explanation = explain(here, found)
    finally:
        sys.setprofile(before)
    assert 0 < searches < 8
    assert explanation.relaxations
    assert all(cell.rule for row in explanation.rows for cell in row)


def test_pairs_against_the_callers_map_and_too_many_gpus() -> None:
    assert shown(ONE_HIVE, ONE_HIVE, override=[(1, 2)])[0] == [
        "gpu-map",
        "yes",
        "gpu-map",
        "gpu-map",
    ]
    assert shown(ONE_HIVE, machine([gpu(5)]))[0] == ["(visible-gpus)"]


# ---------------------------------------------------------------- drawing


def test_the_drawing() -> None:
    sockets = machine([gpu(1), gpu(2), gpu(3)], hives=[[1, 2]], sockets=[[1, 2], [3]])
    assert draw(sockets, "host") == [
        "host",
        "  NUMA node 1000",
        "  ├─ GPU 1 gfx90a renderD129 0000:01:00.0, 64 GiB, hive A",
        "  └─ GPU 2 gfx90a renderD130 0000:02:00.0, 64 GiB, hive A",
        "  NUMA node 1001",
        "  └─ GPU 3 gfx90a renderD131 0000:03:00.0, 64 GiB",
        "         1      2      3",
        "  1      -    X50      p",
        "  2    X50      -      p",
        "  3      p      p      -",
    ]


def test_the_drawing_tells_partitions() -> None:
    text = "\n".join(draw(saved("mi308x-4x8parts"), "host"))
    assert (
        "GPU 24248 gfx942 renderD128 0000:0a:00.0, 48 GiB, hive A, partition 1 of 4 (1 XCC)" in text
    )
    text = "\n".join(draw(saved("mi300x-8x8cpx"), "host"))
    assert text.count("partition 1 of 8 (1 XCC)") == 7
    assert text.count("partition 7 of 7 (1 XCC)") == 1
    assert "partition" not in "\n".join(draw(saved("mi300x8"), "host"))


def test_the_picture_has_every_gpu_and_link_and_the_map() -> None:
    result = match(TWO_HIVES, ONE_HIVE)
    picture = svg(TWO_HIVES, ONE_HIVE, result, ("<left>", "right & more"))
    root = ET.fromstring(picture)
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "<left>" in texts
    assert "right & more" in texts
    for gpu_id in (*IDS, 11, 12, 13, 14):
        assert str(gpu_id) in texts
    assert "to 1" in texts
    assert "from 11" in texts
    assert len(list(root.iter("{http://www.w3.org/2000/svg}circle"))) == 8
    assert len(list(root.iter("{http://www.w3.org/2000/svg}line"))) == 12


def test_the_picture_of_a_refusal_says_why() -> None:
    result = match(ONE_HIVE, TWO_HIVES)
    picture = svg(ONE_HIVE, TWO_HIVES, result, ("a", "b"))
    assert "XGMI must stay XGMI" in picture
    assert "Smallest relaxation that allows a map: xgmi, hive" in picture


def test_circles_and_labels_of_many_gpus_do_not_cover_each_other() -> None:
    for name in ("vega10-1gpu", "mi300x8", "mi308x-4x8parts", "mi300x-8x8cpx"):
        topology = saved(name)
        picture = svg(topology, topology, match(topology, topology), ("a", "b"))
        root = ET.fromstring(picture)
        width, height = (float(root.attrib[key]) for key in ("width", "height"))
        places = [
            (float(circle.attrib["cx"]), float(circle.attrib["cy"]))
            for circle in root.iter("{http://www.w3.org/2000/svg}circle")
        ]
        assert len(places) == 2 * len(topology.gpus)
        assert all(60 < x < width - 60 and 60 < y < height - 60 for x, y in places)
        assert all(math.dist(a, b) > 2 * 25 for a, b in combinations(places, 2))
        labels = list(root.iter("{http://www.w3.org/2000/svg}text"))
        outside = [text for text in labels if text.attrib.get("class") == "p"]
        assert len(outside) == len(places)
        for label in outside:
            at = float(label.attrib["x"]), float(label.attrib["y"]) - 4
            assert min(math.dist(at, place) for place in places) > 25


# ---------------------------------------------------------------- migrate map


@pytest.fixture(scope="module")
def trees() -> Iterator[Path]:
    with TemporaryDirectory(dir=MEMORY) as name:
        folder = Path(name)
        write_tree(PROFILES["mi210x2"], folder / "mi210x2")
        write_tree(PROFILES["mi210x2-pcie"], folder / "mi210x2-pcie", slot_offset=1)
        write_tree(PROFILES["mi210x2"], folder / "twin", slot_offset=2)
        yield folder


def ask(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str, str]:
    code = run(["map", *map(str, words)])
    out, err = capsys.readouterr()
    return code, out, err


def test_a_map_in_json(trees: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = ask(capsys, trees / "mi210x2", trees / "twin", "--json")
    said = json.loads(out)
    assert code == 0
    assert set(said["map"]) == {"41677", "58685"}
    assert all(value.isdecimal() for value in said["map"].values())
    assert said["cost"] == {"relaxed": 0, "numa": 0, "hive": 0, "xgmi_bandwidth_lost": 0}
    assert (said["relaxed"], said["refusals"]) == ([], [])


def test_no_map_in_json(trees: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = ask(capsys, trees / "mi210x2", trees / "mi210x2-pcie", "--json", "--explain")
    said = json.loads(out)
    assert code == NoGpuMap.exit_code
    assert (said["map"], said["cost"]) == (None, None)
    first = said["refusals"][0]
    assert set(first) == {
        "rule",
        "source_gpu",
        "destination_gpu",
        "source_value",
        "destination_value",
        "message",
    }
    assert said["explain"]["relaxations"] == ["xgmi", "hive"]
    assert len(said["explain"]["table"]) == 4


def test_relaxed_and_mapped_by_hand(trees: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--relax", "xgmi", "--relax", "hive", "--gpu-map", "0=1,1=0", "--json")
    code, out, _ = ask(capsys, trees / "mi210x2", trees / "mi210x2-pcie", *words)
    said = json.loads(out)
    assert code == 0
    assert said["relaxed"] == ["xgmi", "hive"]
    assert said["map"]["41677"] == said["show"][1]


def test_for_people(trees: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    picture = tmp_path / "picture.svg"
    pair = trees / "mi210x2", trees / "mi210x2-pcie"
    code, out, err = ask(capsys, *pair, "--explain", "--svg", picture)
    assert code == NoGpuMap.exit_code
    assert "hive A" in out
    assert "(xgmi)" in out
    assert "Smallest relaxation that allows a map: --relax xgmi --relax hive" in out
    assert "xgmi: the link between source GPUs 41677 and 58685 is XGMI" in err
    assert ET.fromstring(picture.read_text()) is not None
    code, out, _ = ask(capsys, trees / "mi210x2", trees / "twin")
    assert code == 0
    assert "41677" in out
    assert "Cost: 0 rules relaxed" in out


def test_what_a_process_of_a_saved_host_sees(
    trees: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "kfd").mkdir()
    (tmp_path / "kfd" / "topology").symlink_to(trees / "mi210x2" / "topology")
    process = tmp_path / "kfd" / "proc" / "12"
    process.mkdir(parents=True)
    (process / "pasid").write_text("1")
    (process / "vram_58685").write_text("4096")
    code, out, _ = ask(capsys, tmp_path / "kfd", trees / "mi210x2-pcie", "--pid", "12", "--json")
    assert code == 0
    assert list(json.loads(out)["map"]) == ["58685"]
    code, _, err = ask(capsys, tmp_path / "kfd", trees / "twin", "--pid", "13")
    assert code == 30
    assert "nothing of a KFD process 13" in err


def test_processes_of_a_saved_destination_count(
    trees: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A GPU that one of them holds is taken only if no idle one fits, and never if it is full."""
    kfd = tmp_path / "kfd"
    kfd.mkdir()
    write_tree(PROFILES["mi210x4"], kfd)
    ids = [g.gpu_id for g in read_topology(kfd).gpus]
    process = kfd / "proc" / "12"
    process.mkdir(parents=True)
    (process / "pasid").write_text("1")
    (process / f"vram_{ids[0]}").write_text("4096")
    code, out, _ = ask(capsys, trees / "mi210x2", kfd, "--json")
    assert code == 0
    said = json.loads(out)
    assert str(ids[0]) not in said["show"]
    assert said["relaxed"] == []
    everywhere = ",".join(f"{n}={n}" for n in range(2))
    code, out, _ = ask(capsys, trees / "mi210x2", kfd, "--gpu-map", everywhere, "--json")
    assert (code, json.loads(out)["relaxed"]) == (0, ["busy"])
    source = tmp_path / "source"
    write_tree(PROFILES["mi210x2"], source)
    (source / "proc" / "7").mkdir(parents=True)
    (source / "proc" / "7" / "pasid").write_text("1")
    (source / "proc" / "7" / "vram_41677").write_text(str(GIB))
    for gpu_id in ids:
        (process / f"vram_{gpu_id}").write_text(str(64 * GIB - GIB // 2))
    code, out, _ = ask(capsys, source, kfd, "--pid", "7", "--json")
    assert code == InsufficientVram.exit_code
    assert {refusal["rule"] for refusal in json.loads(out)["refusals"]} >= {"vram-free"}


def test_the_table_of_many_gpus_has_alike_ones_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = unpack("mi300x-8x8cpx", tmp_path)
    code, out, _ = ask(capsys, tree, tree, "--explain")
    assert code == 0
    lines = [line.split() for line in out.splitlines()]
    assert ["10002", "and", "31", "more", "yes", "(numa)"] in lines
    assert ["10034", "and", "30", "more", "(numa)", "yes"] in lines
    (told,) = [line for line in out.splitlines() if line.startswith("SRC 10034 and 30 more: ")]
    assert told.endswith("10062, 10063, 10064")


def test_usage_and_broken_trees_exit_with_2(
    trees: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = trees / "mi210x2"
    for words, said in (
        ((), "SRC and DST are missing"),
        ((good,), "SRC and DST are missing"),
        ((good, tmp_path), "no KFD topology tree"),
        ((good, "no-such-host", "--inventory", tmp_path / "none"), "no-such-host is no folder"),
        ((good, good, "--relax", "nonsense"), "there is no rule 'nonsense'"),
        ((good, good, "--gpu-map", "1"), "is not OLD=NEW"),
        ((good, good, "--pid", "0"), "pid"),
        ((good, good, "--svg", tmp_path / "no" / "x.svg"), "can't be written"),
    ):
        code, _, err = ask(capsys, *words)
        assert code == 2, words
        assert said in err


def test_a_process_that_sees_too_many(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = match(ONE_HIVE, machine([gpu(1)]))
    assert document(result)["map"] is None
    source = Machine(name="a", topology=ONE_HIVE, processes={5: {1: 0, 2: 7}})
    assert source.busy == {2}
    write_tree(PROFILES["w7900x2"], tmp_path / "two")
    write_tree(PROFILES["mi300x1-cpx"], tmp_path / "eight")
    code, _, err = ask(capsys, tmp_path / "eight", tmp_path / "two")
    assert code == VisibleGpus.exit_code
    assert "the process sees 8 GPUs, the destination has 2 GPUs" in err


def test_the_list_of_rules(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = ask(capsys, "--rules")
    assert code == 0
    for rule in RULES:
        assert f"{rule.name}: {rule.why}" in out
    code, out, _ = ask(capsys, "--rules", "--json")
    assert [rule["name"] for rule in json.loads(out)["rules"]] == [rule.name for rule in RULES]
