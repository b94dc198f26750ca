"""The error tree: codes are stable, unique and documented."""

from __future__ import annotations

import pytest

from migrate import errors
from migrate.cli.exit_codes import GROUPS, PAGE, error_classes, page
from migrate.errors import BrokenTopology, MigrateError, UsageError, by_reason

CLASSES = tuple(dict.fromkeys(error_classes()))


def test_the_tree_is_not_empty() -> None:
    declared = [c for c in vars(errors).values() if isinstance(c, type)]
    assert set(CLASSES) == {c for c in declared if issubclass(c, MigrateError)}


def test_every_class_has_a_reason_of_its_own() -> None:
    reasons = [cls.reason for cls in CLASSES]
    assert sorted(set(reasons)) == sorted(reasons)
    assert all(reason.replace("_", "").isalpha() and reason.isupper() for reason in reasons)


def test_every_reason_has_an_exit_code_of_its_own() -> None:
    """But for a topology tree given by the user: that is a usage error."""
    codes = [cls.exit_code for cls in CLASSES if cls is not BrokenTopology]
    assert sorted(set(codes)) == sorted(codes)
    assert BrokenTopology.exit_code == UsageError.exit_code


@pytest.mark.parametrize("cls", CLASSES)
def test_every_class_is_complete(cls: type[MigrateError]) -> None:
    for own in ("reason", "advice", "__doc__"):
        assert vars(cls).get(own), f"{cls.__name__} inherits {own}"
    assert sum(cls.exit_code in codes for codes, _, _ in GROUPS) == 1
    # What arrives from an agent is rebuilt from the reason with these arguments.
    rebuilt = by_reason(cls.reason)("message", advice="advice")
    assert type(rebuilt) is cls
    assert (str(rebuilt), rebuilt.hint) == ("message", "advice")
    assert cls("message").hint == cls.advice


def test_an_unknown_reason_is_an_internal_error() -> None:
    assert by_reason("FROM_A_LATER_RELEASE") is MigrateError


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == page(), "run python -m migrate.cli.exit_codes"


@pytest.mark.parametrize("cls", CLASSES)
def test_the_page_has_every_class_once(cls: type[MigrateError]) -> None:
    assert page().count(f"| {cls.exit_code} | `{cls.reason}` |") == 1
