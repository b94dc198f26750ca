"""docs/preflight.md: made of the catalogue and the tests, and complete."""

from __future__ import annotations

import pytest

from migrate import errors
from migrate.errors import MigrateError, by_reason
from migrate.preflight.catalogue import ALONE, BLOCKERS
from migrate.preflight.notes import NOTES, Note
from scenarios.preflight_page import PAGE, page, provoking

TESTS = provoking()


@pytest.mark.parametrize("cls", BLOCKERS, ids=lambda cls: cls.reason)
def test_every_blocker_is_provoked_by_a_test(cls: type[MigrateError]) -> None:
    assert TESTS.get(cls.reason), f"no test provokes {cls.reason}"


@pytest.mark.parametrize("note", NOTES, ids=lambda note: note.reason)
def test_every_warning_is_provoked_by_a_test(note: Note) -> None:
    assert TESTS.get(note.reason), f"no test provokes {note.reason}"
    assert by_reason(note.reason) is MigrateError, "a warning has no error of its name"


def test_every_test_provokes_something_known() -> None:
    known = {cls.reason for cls in BLOCKERS} | {note.reason for note in NOTES}
    assert set(TESTS) == known


def test_whatever_forbids_a_migration_beforehand_is_in_the_catalogue() -> None:
    """Exit codes 30 to 49 and 50 to 69 mean that nothing was done to the process."""
    before = {
        cls
        for cls in vars(errors).values()
        if isinstance(cls, type) and issubclass(cls, MigrateError) and 30 <= cls.exit_code < 70
    }
    assert before - set(BLOCKERS) - set(ALONE) <= {
        errors.ProcessExited,
        errors.DowntimeExceeded,
        *OF_MANY,
    }


# About no single process.
OF_MANY = {cls for cls in vars(errors).values() if getattr(cls, "__name__", "") == "NoPlacement"}


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == page(), "run python -m scenarios.preflight_page"
