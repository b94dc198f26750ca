"""That the comparison with the brute force notices a search that prunes too much.

A copy of the search has one condition turned round or dropped; the oracle then has to
find a pair that is answered otherwise. The same way the dear test of the search, which
only many GPUs need, is compared with the oracle for few.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SEARCH = Path("migrate", "topology", "search.py")
PARTS = ("migrate", "scenarios/bench", "tests/property/test_topology_oracle.py")
PAIRS = 60
EVERYWHERE = (("_MANY = 9", "_MANY = 2"), ("_LONG = 100", "_LONG = 0"), ("_FEW = 4", "_FEW = 1"))

WRONG = {
    "the matching": ("or not matchable(bits_of(bound", "or matchable(bits_of(bound"),
    "the lower bound": (
        "others + value >= 2 * self.best_cost",
        "others + value <= 2 * self.best_cost",
    ),
    "half of the lower bound": (
        "others + value >= 2 * self.best_cost",
        "others + value >= self.best_cost",
    ),
    "full classes": ("if not left[c]:\n            bounded", "if left[c]:\n            bounded"),
    "order of twins": ("INFINITE if twin < i else", "INFINITE if twin > i else"),
    "the limit of the grouping": ("int(lowest.sum()) > room", "int(lowest.sum()) >= room"),
    "GPUs around": ("if not matchable(beside, room)", "if matchable(beside, room)"),
}


def oracle(folder: Path, *changes: tuple[str, str]) -> subprocess.CompletedProcess[str]:
    """Run the comparison on a copy whose search is changed."""
    for part in PARTS:
        source, target = ROOT / part, folder / part
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    text = (folder / SEARCH).read_text()
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    (folder / SEARCH).write_text(text)
    code = (
        "from tests.property.test_topology_oracle import compare\n"
        "import migrate.topology.search as search\n"
        f"assert search.__file__.startswith({str(folder)!r}), search.__file__\n"
        f"for seed in range({PAIRS}): compare(seed)"
    )
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        text=True,
        capture_output=True,
        timeout=100,
        check=False,
    )


@pytest.mark.parametrize("condition", WRONG)
def test_a_condition_turned_round_is_found(condition: str, tmp_path: Path) -> None:
    done = oracle(tmp_path, WRONG[condition], *EVERYWHERE)
    assert done.returncode == 1
    assert "AssertionError" in done.stderr


def test_the_dear_test_everywhere_changes_no_answer(tmp_path: Path) -> None:
    done = oracle(tmp_path, *EVERYWHERE)
    assert done.returncode == 0, done.stderr
