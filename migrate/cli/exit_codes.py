"""docs/exit-codes.md, made from the error tree: ``python -m migrate.cli.exit_codes``."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path

from migrate import errors
from migrate.errors import MigrateError

PAGE = Path(__file__).resolve().parents[2] / "docs" / "exit-codes.md"

HEAD = """\
# Exit codes and reason codes

Made from `migrate/errors.py` by `python -m migrate.cli.exit_codes`; do not edit.

Every error has a reason code, a message and an advice. A person gets message and advice on
stderr; with `--json` stdout has one document
`{"error": {"reason", "message", "advice", "exit_code"}}`. Both codes are stable: a code is
never used again for something else. 0 is success; 141 means that the reader of a pipe went
away.
"""

GROUPS = (
    (range(1, 2), "A bug", ""),
    (range(2, 3), "Usage", "The command line, the inventory or a file given is wrong."),
    (range(3, 4), "Interrupted", ""),
    (range(10, 30), "Hosts and agents", "Nothing was asked of the process."),
    (range(30, 50), "The process", "It can't be migrated as it is; nothing was done to it."),
    (range(50, 70), "The destination", "It can't take the process, which runs on at the source."),
    (range(70, 90), "On the way", "The migration failed; the process runs on at the source."),
    (range(90, 100), "An operator has to look", "See the ownership in the report."),
)


def error_classes(base: type[MigrateError] = MigrateError) -> Iterator[type[MigrateError]]:
    """*base* and every class of the tree below it, parents first."""
    yield base
    for cls in base.__subclasses__():
        if cls.__module__ == errors.__name__:
            yield from error_classes(cls)


def page() -> str:
    """The page's text."""
    classes = sorted(dict.fromkeys(error_classes()), key=lambda cls: (cls.exit_code, cls.reason))
    text = HEAD
    for codes, title, remark in GROUPS:
        text += f"\n## {title}\n\n"
        if remark:
            text += f"{remark}\n\n"
        text += "| exit code | reason | what it means | what to do |\n|---|---|---|---|\n"
        for cls in classes:
            if cls.exit_code in codes:
                text += _row(cls)
    return text


def _row(cls: type[MigrateError]) -> str:
    meaning = inspect.getdoc(cls) or ""
    if cls is MigrateError:
        meaning = "Something that was not foreseen."
    cells = (str(cls.exit_code), f"`{cls.reason}`", meaning.split("\n\n")[0], cls.advice)
    return "| " + " | ".join(cell.replace("\n", " ").replace("|", "\\|") for cell in cells) + " |\n"


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page())
