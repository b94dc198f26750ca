"""Fault points: what is armed fires once, at its count; the list and the code agree."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrate import faults
from migrate.errors import UsageError

ROOT = Path(faults.__file__).parents[1]
NAME = re.compile(r'"((?:source|destination)\.[a-z.-]+)"')


@pytest.fixture(autouse=True)
def disarmed() -> Iterator[None]:
    faults.arm("")
    yield
    faults.arm("")


def test_nothing_happens_unarmed() -> None:
    for name in faults.POINTS:
        faults.point(name)


def test_an_armed_point_fires_once_at_its_count() -> None:
    faults.arm("source.round=fail@3, destination.placed=sleep:0")
    faults.point("source.round")
    faults.point("source.round")
    faults.point("source.reserved")
    faults.point("destination.placed")
    with pytest.raises(faults.InjectedFault, match=r"source\.round"):
        faults.point("source.round")
    faults.point("source.round")


@pytest.mark.parametrize(
    "text",
    [
        "nowhere=kill",
        "source.round",
        "source.round=explode",
        "source.round=kill@0",
        "source.round=kill@x",
        "source.round=kill:3",
        "source.round=sleep",
        "source.round=sleep:-1",
    ],
)
def test_bad_specifications_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="MIGRATE_FAULTS"):
        faults.parse(text)


@pytest.mark.parametrize(
    ("action", "code"), [("kill", -signal.SIGKILL), ("exit", faults.EXIT_CODE)]
)
def test_the_agent_ends_there_and_says_so_first(action: str, code: int) -> None:
    program = (
        "from migrate import faults\n"
        f"faults.arm('source.frozen={action}')\n"
        "faults.point('source.frozen')\n"
        "print('went on')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == code
    assert done.stdout == ""
    assert done.stderr.startswith(f"fault point source.frozen: {action} at ")


def test_each_named_point_is_in_the_code_once_and_none_is_unnamed() -> None:
    found: Counter[str] = Counter()
    for folder in ("migrate/orchestrator", "agents"):
        for path in (ROOT / folder).glob("*.py"):
            found.update(NAME.findall(path.read_text()))
    assert set(found) == set(faults.POINTS)
    assert {name: count for name, count in found.items() if count > 1} == {}
