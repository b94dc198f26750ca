"""docs/preflight.md, made from the catalogue and the tests: ``python -m scenarios.preflight_page``.

A test that provokes a code says so by the marker ``provokes("CODE")``.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

from migrate.errors import MigrateError
from migrate.preflight.catalogue import ALONE, BLOCKERS
from migrate.preflight.notes import NOTES

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "preflight.md"
MARKER = "provokes"

HEAD = """\
# Preflight

Made by `python -m scenarios.preflight_page`; do not edit.

    migrate check SRC DST PID            # or: migrate run SRC DST PID --dry-run

lists everything that speaks against a migration, all at once, and starts nothing. `migrate
run` does the same before it starts, and refuses with the same list: what is on it is found
before the process is frozen. The exit code is that of the first blocker (see exit-codes.md), 0
if there is none; with `--json` stdout has one document, `migrate.check/1`.

To be able to look, the source's agent stops the process for some milliseconds, as a round of
pre-copy does. A sample of its GPU buffers (16 MiB at most, for 0.3 s) is sent to the
destination through the real streams and thrown away there: the prediction of time, downtime and
bytes is made of what the sample compressed to, how fast it went, and what of it the process wrote
anew meanwhile. What was predicted stays in the report beside what came true (`prediction`).

What is compared hangs on the process engine. `criu` moves a process whole: everything below
holds. `reexec` starts the command anew, so that files need only be there, pids, sockets and
CPU features do not matter, and other libraries are a warning.

Two files are taken for the same if they have the same build id, or the same size and the same
bytes in 16 samples of 16 KiB. A file that the process has open for writing must be on a file
system that both hosts share, or go with it.

`--copy-file GLOB` (engine `criu`, may be given several times) sends the process's open and mapped
files whose path matches, while it stands; a `*` also stands for slashes. A file of the
destination that is another one is replaced, the same one is left alone. Until the copy is
released the old one is kept beside it (`.NAME.MIGRATION.old`) and put back if the migration comes
to nothing; from then on the file is the process's. Its folder must be there. The file keeps mode,
owner and time of change.
"""


def provoking(folder: Path = ROOT / "tests") -> dict[str, list[str]]:
    """Reason code to ``path::test`` of those that provoke it."""
    found: dict[str, list[str]] = {}
    for path in sorted(folder.rglob("test_*.py")):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                for reason in _marked(node):
                    name = f"{path.relative_to(folder.parent)}::{node.name}"
                    if name not in found.setdefault(reason, []):
                        found[reason].append(name)
    return found


def _marked(test: ast.FunctionDef) -> Iterator[str]:
    for decorator in test.decorator_list:
        for node in ast.walk(decorator):
            if (
                isinstance(node, ast.Call)
                and _name(node.func) == MARKER
                and node.args
                and isinstance(node.args[0], ast.Constant)
            ):
                yield str(node.args[0].value)


def _name(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def page() -> str:
    """The page's text."""
    tests = provoking()
    text = f"{HEAD}\n## Blockers\n\n"
    text += "| reason | what it means | what to do | provoked by |\n|---|---|---|---|\n"
    text += "".join(
        _row(cls.reason, _meaning(cls), cls.advice, tests.get(cls.reason, [])) for cls in BLOCKERS
    )
    text += "\n## Warnings\n\nThey forbid nothing and have no exit code.\n\n"
    text += "| reason | what it means | what to do | provoked by |\n|---|---|---|---|\n"
    text += "".join(
        _row(note.reason, note.meaning, note.advice, tests.get(note.reason, [])) for note in NOTES
    )
    text += "\n## Nothing to be checked\n\nThe command fails with this alone.\n\n"
    text += "| reason | what it means | what to do |\n|---|---|---|\n"
    for cls in ALONE:
        text += f"| `{cls.reason}` | {_cell(_meaning(cls))} | {_cell(cls.advice)} |\n"
    return text


def _meaning(cls: type[MigrateError]) -> str:
    return (inspect.getdoc(cls) or "").split("\n\n")[0]


def _row(reason: str, meaning: str, advice: str, tests: list[str]) -> str:
    names = "<br>".join(f"`{name.removeprefix('tests/')}`" for name in tests)
    return f"| `{reason}` | {_cell(meaning)} | {_cell(advice)} | {names} |\n"


def _cell(text: str) -> str:
    return text.replace("\n", " ").replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page())
