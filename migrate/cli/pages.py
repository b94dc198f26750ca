"""What is made of the code: the table in docs/operations.md, and the manual page.

``python -m migrate.cli.pages`` writes the table; ``--man FILE`` writes the page (``make man``).
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import click

from migrate.cli.exit_codes import error_classes
from migrate.cli.main import group
from migrate.errors import MigrateError

PAGE = Path(__file__).resolve().parents[2] / "docs" / "operations.md"
BEGIN = "<!-- reasons: made by python -m migrate.cli.pages -->\n"
END = "<!-- end of reasons -->\n"

# Where the process is, by exit code (the groups of migrate/errors.py).
PLACES = (
    (range(1, 4), "where it was, or on its way"),
    (range(10, 30), "untouched"),
    (range(30, 50), "untouched"),
    (range(50, 70), "runs on at the source"),
    (range(70, 90), "runs on at the source"),
    (range(90, 100), "see the report's owner"),
)


def _classes() -> list[type[MigrateError]]:
    return sorted(dict.fromkeys(error_classes()), key=lambda cls: (cls.exit_code, cls.reason))


def reasons() -> str:
    """Every reason code: what it means, where the process is, what to do."""
    lines = ["| reason | what it means | the process | what to do |", "|---|---|---|---|"]
    for cls in _classes():
        meaning = (inspect.getdoc(cls) or "").split("\n\n")[0]
        if cls is MigrateError:
            meaning = "Something that was not foreseen."
        place = next(text for codes, text in PLACES if cls.exit_code in codes)
        cells = (f"`{cls.reason}`", meaning, place, cls.advice)
        lines.append(
            "| " + " | ".join(c.replace("\n", " ").replace("|", "\\|") for c in cells) + " |"
        )
    return "\n".join(lines) + "\n"


def page(text: str) -> str:
    """docs/operations.md with the table of now. Raises ValueError if it has no place for it."""
    head, found, rest = text.partition(BEGIN)
    _, closed, tail = rest.partition(END)
    if not (found and closed):
        raise ValueError(f"{PAGE} has no place for the reasons")
    return f"{head}{BEGIN}\n{reasons()}\n{END}{tail}"


# ---------------------------------------------------------------- manual page


def manual() -> str:
    """migrate(1), in man(7)."""
    root = group()
    context = click.Context(root, info_name="migrate")
    lines = [
        f'.TH MIGRATE 1 "" "migrate {version("migrate")}" "User Commands"',
        ".SH NAME",
        "migrate \\- " + _text(root.help or "").rstrip("."),
        ".SH SYNOPSIS",
        ".B migrate",
        "[OPTIONS] COMMAND [ARGS]...",
        ".SH OPTIONS",
        *_options(root, context),
        ".SH COMMANDS",
    ]
    for name in root.list_commands(context):
        command = root.get_command(context, name)
        assert command is not None
        lines += _command(command, context, name)
    lines += [".SH EXIT STATUS", ".TP", ".B 0", "Success."]
    for cls in _classes():
        meaning = (inspect.getdoc(cls) or "").split("\n\n")[0]
        lines += [".TP", f".B {cls.exit_code}", f"{cls.reason}: {_text(meaning)}"]
    lines += [
        ".SH FILES",
        ".TP",
        ".I ~/.config/migrate/hosts.toml",
        "The inventory.",
        ".TP",
        ".I /etc/migrate/agent.toml",
        "The configuration of a host's agent.",
        ".SH ENVIRONMENT",
        ".TP",
        ".B MIGRATE_INVENTORY",
        "The inventory's path.",
    ]
    return "\n".join(lines) + "\n"


def _command(command: click.Command, parent: click.Context, name: str) -> Iterator[str]:
    context = click.Context(command, info_name=name, parent=parent)
    yield f".SS {_text(context.get_usage().removeprefix('Usage: '))}"
    for paragraph in inspect.cleandoc(command.help or "").split("\n\n"):
        yield _text(paragraph.replace("\b", ""))
        yield ".PP"
    yield from _options(command, context)
    if isinstance(command, click.Group):
        for child in command.list_commands(context):
            found = command.get_command(context, child)
            assert found is not None
            yield from _command(found, context, child)


def _options(command: click.Command, context: click.Context) -> Iterator[str]:
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is not None:
            yield from (".TP", f".B {_text(record[0])}", _text(record[1]) or "\\&")


def _text(text: str) -> str:
    """One line of roff: no escapes, no requests, hyphens that can be copied."""
    line = " ".join(text.split()).replace("\\", "\\e").replace("-", "\\-")
    return f"\\&{line}" if line.startswith((".", "'")) else line


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--man", type=Path, metavar="FILE", help="write the manual page")
    options = parser.parse_args()
    if options.man is None:
        PAGE.write_text(page(PAGE.read_text()))
    else:
        options.man.parent.mkdir(parents=True, exist_ok=True)
        options.man.write_text(manual())
    return 0


if __name__ == "__main__":
    sys.exit(main())
