"""``abort`` at every phase: what is promised is what can be kept."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from agents.aborting import abort
from agents.destination import Destinations
from agents.source import Sources
from migrate.errors import UnknownMigration
from migrate.rpc.pb.agent_pb2 import AbortReply
from migrate.status import SourceState as S

CANCELLING, ENDED, TOO_LATE = (
    AbortReply.CANCELLING,
    AbortReply.ALREADY_ENDED,
    AbortReply.TOO_LATE,
)


class AtSource:
    """The agent of host a. *wins*: the state that it has once the abort came."""

    def __init__(self, state: S, wins: S | None = None, *, present: bool = True) -> None:
        self._states = [state, wins or state]
        self._present = present

    def destination_of(self, migration: str) -> str | None:
        return "b" if migration == "m" else None

    def state(self, _migration: str) -> S:
        return self._states.pop(0)

    def report(self, _migration: str) -> Any:
        return SimpleNamespace(status="completed", running="destination")

    def get(self, _migration: str) -> Any:
        open_ = self._states[0] in (S.SETUP, S.ACTIVE, S.DEVICE)
        return SimpleNamespace(abort=lambda: open_, has_process=lambda: self._present)


def ask(sources: AtSource, migration: str = "m", destinations: Any = None) -> tuple[int, str]:
    there = cast(Destinations, destinations)
    return abort("a", cast(Sources, sources), there, migration)


@pytest.mark.parametrize(
    ("state", "outcome", "words"),
    [
        (S.SETUP, CANCELLING, "the source runs on"),
        (S.ACTIVE, CANCELLING, "the source runs on"),
        (S.DEVICE, CANCELLING, "the source runs on"),
        (S.GRANTED, TOO_LATE, "only the answer of b"),
        (S.RELEASING, TOO_LATE, "b owns the process"),
        (S.RECLAIMED, CANCELLING, "b gave the process back"),
        (S.UNDOING, CANCELLING, "already"),
        (S.DONE, ENDED, "completed"),
        (S.ROLLED_BACK, ENDED, "it has ended"),
    ],
)
def test_every_state_has_its_answer(state: S, outcome: int, words: str) -> None:
    assert ask(AtSource(state))[0] == outcome
    assert words in ask(AtSource(state))[1]


def test_every_state_is_asked_about() -> None:
    assert set(S) == {
        *(S.SETUP, S.ACTIVE, S.DEVICE, S.GRANTED, S.RELEASING),
        *(S.RECLAIMED, S.UNDOING, S.DONE, S.ROLLED_BACK),
    }


def test_a_grant_that_was_written_meanwhile_wins() -> None:
    assert ask(AtSource(S.DEVICE, S.GRANTED))[0] == TOO_LATE


def test_a_source_that_is_gone_is_not_said_to_run_on() -> None:
    outcome, words = ask(AtSource(S.DEVICE, present=False))
    assert outcome == CANCELLING
    assert "the process is gone here" in words


def test_a_destination_says_whom_to_ask() -> None:
    found = SimpleNamespace(source=SimpleNamespace(name="c"))
    with pytest.raises(UnknownMigration) as raised:
        ask(AtSource(S.DEVICE), "x", SimpleNamespace(find=lambda _m: found))
    assert "--host c" in raised.value.hint
    with pytest.raises(UnknownMigration):
        ask(AtSource(S.DEVICE), "x", SimpleNamespace(find=lambda _m: None))
