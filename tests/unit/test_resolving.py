"""``resolve``: what an operator may decide, where, and what is refused."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from agents.destination import Destinations
from agents.resolving import resolve
from agents.source import Sources
from migrate.errors import UnknownMigration, UsageError
from migrate.orchestrator.handover import Resolved
from migrate.status import SourceState as S


class AtSource:
    """The agent of host a, which sends to b."""

    def __init__(self, state: S | None, *, keeps: bool = False) -> None:
        self._state = state
        self.keeps = keeps  # its copy, until the destination's is confirmed
        self.decided: list[Resolved] = []

    def destination_of(self, migration: str) -> str | None:
        return "b" if migration == "m" else None

    def state(self, _migration: str) -> S | None:
        return self._state

    def get(self, _migration: str) -> Any:
        return SimpleNamespace(resolve=self.decided.append, may_take_back=lambda: self.keeps)


class AtDestination:
    """The agent of host b, which received from a."""

    def __init__(self) -> None:
        self.fenced: list[str] = []

    def find(self, migration: str) -> Any:
        if migration != "m":
            return None
        return SimpleNamespace(source=SimpleNamespace(name="a"), resolve=self.fenced.append)


def ask_source(state: S | None, owner: str, fenced: str) -> tuple[str, list[Resolved]]:
    sources = AtSource(state)
    said = resolve(
        "a", cast(Sources, sources), cast(Destinations, None), "m", owner=owner, fenced=fenced
    )
    return said, sources.decided


def ask_destination(owner: str, fenced: str, migration: str = "m") -> list[str]:
    destinations = AtDestination()
    nothing = cast(Sources, SimpleNamespace(destination_of=lambda _m: None))
    there = cast(Destinations, destinations)
    resolve("b", nothing, there, migration, owner=owner, fenced=fenced)
    return destinations.fenced


def test_a_source_that_keeps_its_copy_sends_the_operator_to_the_destination() -> None:
    sources = cast(Sources, AtSource(S.GRANTED, keeps=True))
    with pytest.raises(UsageError, match="confirm first"):
        resolve("a", sources, cast(Destinations, None), "m", owner="b", fenced="a")
    assert resolve("a", sources, cast(Destinations, None), "m", owner="a", fenced="b")


def test_a_granted_source_takes_the_decision_and_says_what_it_costs() -> None:
    said, decided = ask_source(S.GRANTED, "a", "b")
    assert decided == [Resolved(source_owns=True, fenced="b")]
    assert "again" in said
    _, decided = ask_source(S.GRANTED, "b", "a")
    assert decided == [Resolved(source_owns=False, fenced="a")]


@pytest.mark.parametrize(
    ("state", "owner", "fenced"),
    [(S.DONE, "b", "a"), (S.RELEASING, "b", "a"), (S.ROLLED_BACK, "a", "b"), (S.UNDOING, "a", "b")],
)
def test_the_same_decision_again_changes_nothing(state: S, owner: str, fenced: str) -> None:
    said, decided = ask_source(state, owner, fenced)
    assert decided == []
    assert "before" in said


@pytest.mark.parametrize(
    ("state", "owner", "fenced"),
    [
        (S.DONE, "a", "b"),  # decided otherwise
        (S.ROLLED_BACK, "b", "a"),
        (S.DEVICE, "a", "b"),  # nothing to decide: abort
        (None, "a", "b"),
        (S.GRANTED, "a", "a"),  # not the two hosts
        (S.GRANTED, "a", "c"),
        (S.GRANTED, "c", "b"),
    ],
)
def test_what_is_decided_or_not_theirs_is_refused(state: S | None, owner: str, fenced: str) -> None:
    with pytest.raises(UsageError):
        ask_source(state, owner, fenced)


def test_a_destination_may_be_told_that_its_copy_is_the_process() -> None:
    assert ask_destination("b", "a") == ["a"]
    with pytest.raises(UsageError, match="must be off"):
        ask_destination("a", "b")
    with pytest.raises(UsageError, match="hosts of m"):
        ask_destination("b", "c")
    with pytest.raises(UnknownMigration):
        ask_destination("b", "a", migration="other")
