"""What must hold for any pair of machines, whatever the rules say of it."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migrate.errors import BrokenTopology
from migrate.kfd.sysfs import read_topology
from migrate.topology.explain import explain
from migrate.topology.match import VISIBLE_GPUS, Case, Cost, MatchResult, decide, match
from migrate.topology.model import Topology
from migrate.topology.rules import RULE_NAMES
from scenarios.bench.topology_machines import Question, Shape, machine, question, renumbered
from tests.unit.topology_kit import MEMORY, unpack

SEEDS = st.integers(min_value=0, max_value=1 << 32)
NOTHING_LOST = Cost(relaxed=0, numa=0, hive=0, xgmi_bandwidth_lost=0)
FEW = settings(max_examples=40, deadline=None)


def ask(q: Question) -> MatchResult:
    return match(
        q.source,
        q.destination,
        visible=q.visible,
        needs=q.needs,
        free=q.free,
        busy=q.busy,
        override=q.override,
        relax=q.relax,
    )


@FEW
@given(SEEDS, st.integers(min_value=1, max_value=12))
def test_a_renumbered_twin_always_fits_and_nothing_is_lost(seed: int, gpus: int) -> None:
    rng = random.Random(seed)
    source = machine(rng, Shape(gpus=gpus, odd_gpu=0.3))
    result = match(source, renumbered(rng, source))
    assert result.map is not None
    assert result.cost == NOTHING_LOST
    assert result.proven


@FEW
@given(SEEDS)
def test_the_map_given_back_as_the_callers_own_is_accepted_at_the_same_cost(seed: int) -> None:
    q = question(random.Random(seed), 10, RULE_NAMES)
    result = ask(q)
    if result.map is not None:
        assert ask(dataclasses.replace(q, override=result.map.pairs)) == result


@FEW
@given(SEEDS)
def test_the_advice_suffices_and_no_rule_of_it_can_be_left_out(seed: int) -> None:
    q = question(random.Random(seed), 10, RULE_NAMES)
    result = ask(q)
    if result.map is None and result.advice:
        relaxed = ask(dataclasses.replace(q, relax=frozenset(result.advice)))
        assert set(relaxed.relaxed) == set(result.advice)
        for rule in result.advice:
            less = frozenset(result.advice) - {rule}
            assert ask(dataclasses.replace(q, relax=less)).map is None


@FEW
@given(SEEDS)
def test_a_machine_with_more_gpus_is_never_worse(seed: int) -> None:
    """Neither for whether there is a map, nor for what it costs."""
    q = question(random.Random(seed), 8, RULE_NAMES)
    wide = machine(random.Random(seed + 1), Shape(gpus=9))
    smaller = wide.only([gpu.gpu_id for gpu in wide.gpus[:7]])
    there, here = match(q.source, smaller), match(q.source, wide)
    if there.map is not None:
        assert there.cost is not None
        assert here.cost is not None
        assert msgspec.structs.astuple(here.cost) <= msgspec.structs.astuple(there.cost)


@pytest.mark.parametrize("seed", range(40))
def test_each_cell_of_the_table_is_what_match_says_of_that_pair(seed: int) -> None:
    q = dataclasses.replace(question(random.Random(seed), 6, RULE_NAMES), relax=frozenset())
    case = Case.of(
        q.source, q.destination, visible=q.visible, needs=q.needs, free=q.free, busy=q.busy,
        override=(),
    )  # fmt: skip
    for row in explain(case, decide(case)).rows:
        for cell in row:
            pair = (cell.source_gpu, cell.destination_gpu)
            result = ask(dataclasses.replace(q, override=(pair,)))
            assert (result.map is not None) == (not cell.rule)
            if cell.alone and cell.rule != VISIBLE_GPUS:
                assert cell.rule == result.advice[0]


@pytest.fixture(scope="module")
def tree() -> Iterator[Path]:
    with TemporaryDirectory(dir=MEMORY) as folder:
        yield unpack("vega10-1gpu", Path(folder))


@FEW
@given(data=st.data())
def test_a_damaged_file_is_read_or_named_in_a_clear_error(tree: Path, data: st.DataObject) -> None:
    files = sorted(path for path in tree.rglob("*") if path.is_file())
    path = data.draw(st.sampled_from(files))
    whole = path.read_bytes()
    at = data.draw(st.integers(0, len(whole)))
    digits = st.text("0123456789", min_size=1, max_size=5000).map(str.encode)
    path.write_bytes(whole[:at] + data.draw(st.binary(max_size=40) | digits) + whole[at + 3 :])
    try:
        topology = read_topology(tree)
        msgspec.msgpack.encode(topology)
        match(topology, topology)
    except BrokenTopology as error:
        said = str(error)
    else:
        said = str(tree)
    finally:
        path.write_bytes(whole)
    assert str(tree) in said


@FEW
@given(SEEDS)
def test_a_topology_goes_over_the_wire_whole(seed: int) -> None:
    topology = machine(random.Random(seed), Shape(gpus=5))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(topology), type=Topology) == topology
