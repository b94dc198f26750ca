"""Drills: their data files and their page; the drills themselves as soak."""

from __future__ import annotations

import html.parser
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from migrate import faults
from migrate.errors import UsageError
from scenarios.drills import page
from scenarios.drills.drill import Drill, Expect, load
from scenarios.drills.outcome import Mark, Outcome, Results, Span
from scenarios.drills.runner import Play
from scenarios.drills.stage import Stage
from scenarios.drills.suite import play_all

FEW = (
    "source-agent-killed-at-checkpointed",
    "source-agent-killed-at-granted-after-write",
    "destination-agent-killed-at-placed",
    "destination-agent-killed-at-owned-before-write",
    "destination-agent-killed-at-owned-after-write",
    "workload-killed-at-prepared",
)


class Stages:
    """A stage for one drill after another; a new one after a failure."""

    def __init__(self) -> None:
        self._stage: Stage | None = None

    def get(self) -> Stage:
        if self._stage is None or self._stage.spoiled:
            self.leave()
            self._stage = Stage().__enter__()
        return self._stage

    def leave(self) -> None:
        if self._stage is not None:
            self._stage.__exit__(None, None, None)
            self._stage = None


@pytest.fixture(scope="module")
def stages() -> Iterator[Stages]:
    found = Stages()
    yield found
    found.leave()


@pytest.mark.soak
@pytest.mark.parametrize("name", FEW)
def test_a_drill(stages: Stages, name: str) -> None:
    (drill,) = [d for d in load() if d.name == name]
    outcome = Play(drill, stages.get()).run()
    assert outcome.problems == (), outcome.log
    assert outcome.digest
    assert {span.lane for span in outcome.spans} >= {"source", "process at the source", "owner"}


def covering() -> list[Drill]:
    """One drill of each actor and fault, and of each family. `make drills` plays all."""
    chosen: dict[tuple[str, str], Drill] = {}
    for drill in load():
        chosen.setdefault((drill.actor, drill.fault), drill)
    for drill in load():
        if drill.family not in {d.family for d in chosen.values()}:
            chosen[drill.family, ""] = drill
    return [drill for drill in chosen.values() if drill.name not in FEW]


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_drills_of_every_kind() -> None:
    results = play_all(covering(), stages=2)
    assert {o.drill.name: o.problems for o in results.outcomes if not o.passed} == {}


def test_what_is_played_covers_every_actor_and_fault() -> None:
    played = [d for d in load() if d.name in FEW] + covering()
    assert {(d.actor, d.fault) for d in played} == {(d.actor, d.fault) for d in load()}
    assert {d.family for d in played} == {d.family for d in load()}


def test_every_fault_point_has_a_drill_that_kills_its_agent_there() -> None:
    killed = {
        d.point
        for d in load()
        if d.fault == "kill" and d.actor == f"{d.point.partition('.')[0]}-agent"
    }
    assert killed == set(faults.POINTS)
    assert len(load()) >= 60


def test_a_drill_that_expects_nonsense_is_refused(tmp_path: Path) -> None:
    good = (
        '[[drill]]\nname = "x"\nwhy = "y"\nactor = "cli"\nfault = "kill"\n'
        'expect = { owner = "source", runs = "source", source = "DONE", destination = "" }\n'
    )
    (tmp_path / "family.toml").write_text(good)
    assert [d.name for d in load(tmp_path)] == ["x"]
    for old, new in (
        ('"cli"', '"nobody"'),
        ('"kill"', '"tickle"'),
        ('owner = "source"', 'owner = "me"'),
        ('why = "y"', 'why = "y"\npoint = "nowhere"'),
        ('why = "y"', 'why = "y"\nunknown = 1'),
        ("[[drill]]", "[[drill"),
    ):
        (tmp_path / "family.toml").write_text(good.replace(old, new))
        with pytest.raises(UsageError, match="family"):
            load(tmp_path)
    (tmp_path / "family.toml").write_text(good + good)
    with pytest.raises(UsageError, match="two drills"):
        load(tmp_path)


def test_the_page_is_complete_in_itself_and_escapes() -> None:
    drill = Drill(
        name="a<b",
        why="1 & 2",
        actor="cli",
        fault="kill",
        family="f",
        expect=Expect(owner="source", runs="source", source="DONE", destination=""),
    )
    outcome = Outcome(
        drill=drill,
        problems=("<script>",),
        seconds=1.0,
        spans=(Span(lane="source", start=0.0, end=2.0, text="DONE"),),
        marks=(Mark(at=1.0, text="kill: <cli>"),),
    )
    text = page.render(Results(outcomes=(outcome,), seconds=1.0, passed=0, failed=1))
    tags: list[str] = []

    class Reader(html.parser.HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            tags.append(tag)
            assert not any(name in {"src", "srcset"} for name, _ in attrs)
            assert not any(name == "href" and not (v or "").startswith("#") for name, v in attrs)

    Reader().feed(text)
    assert "script" not in tags
    assert {"svg", "rect", "section"} <= set(tags)
    assert "a&lt;b" in text


def test_outcomes_survive_json() -> None:
    drill = load()[0]
    results = Results(
        outcomes=(Outcome(drill=drill, problems=(), seconds=1.0),), seconds=1.0, passed=1, failed=0
    )
    assert msgspec.json.decode(msgspec.json.encode(results), type=Results) == results
