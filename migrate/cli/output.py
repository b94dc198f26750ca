"""Rendering: tables and sentences for people, one JSON document for programs.

Results go to stdout; progress, notes and errors to stderr. With ``--json`` stdout has
exactly one JSON document (or, for ``watch``, one a line) and nothing else.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from migrate.errors import MigrateError

NO_WIDTH = 1 << 16  # columns, where nothing limits them
UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


class _Console(Console):
    """rich's console, which leaves a closed pipe to main.py, as print() does."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


class Output:
    """Where a command's results go. ``json`` is set while options are parsed."""

    def __init__(self) -> None:
        self.json = False
        self.verbose = 0
        self._documents = 0

    @property
    def stdout(self) -> Console:
        """For people; made anew, so that it follows a replaced sys.stdout."""
        return _Console(file=sys.stdout, highlight=False, soft_wrap=True)

    @property
    def stderr(self) -> Console:
        """For notes, errors and progress."""
        return _Console(file=sys.stderr, highlight=False, soft_wrap=True)

    # ------------------------------------------------------------ programs

    def document(self, value: object) -> None:
        """Print the one JSON document of this command."""
        if self._documents:
            raise RuntimeError("a second JSON document on stdout")
        self._write(msgspec.json.format(msgspec.json.encode(value), indent=2))

    def line(self, value: object) -> None:
        """Print one document of a stream, on a line of its own, at once."""
        self._write(msgspec.json.encode(value))

    def _write(self, data: bytes) -> None:
        self._documents += 1
        sys.stdout.write(data.decode() + "\n")
        sys.stdout.flush()

    # ------------------------------------------------------------ people

    def text(self, text: str) -> None:
        """A sentence of the result. Not to be used with ``--json``."""
        self.stdout.print(escape(text))

    def note(self, text: str) -> None:
        """A sentence beside the result, left out with ``--json``."""
        if not self.json:
            self.stderr.print(escape(text))

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """A table in kubectl's manner: no lines, columns aligned, numbers to the right.

        A column whose name begins with ``>`` is right-aligned.
        """
        table = Table(box=None, pad_edge=False, show_edge=False, header_style="bold")
        for column in columns:
            right = column.startswith(">")
            table.add_column(
                escape(column.lstrip(">")), justify="right" if right else "left", no_wrap=True
            )
        for row in rows:
            table.add_row(*(escape(str(cell)) for cell in row))
        console = self.stdout
        if not console.is_terminal:
            # A file or pipe has no width at which cells would have to be cut.
            console.width = NO_WIDTH
        console.print(table)

    # ------------------------------------------------------------ errors

    def error(self, error: MigrateError, cause: BaseException | None = None) -> None:
        """Print an error: JSON if nothing was printed before, else message and advice.

        With ``-v`` the traceback of *cause* follows on stderr.
        """
        if self.json and not self._documents:
            self.document({"error": error_document(error)})
        else:
            console = self.stderr
            console.print(f"[bold red]error:[/] {escape(error.message)}")
            if error.hint:
                console.print(escape(error.hint))
        if self.verbose and cause is not None:
            sys.stderr.write("".join(traceback.format_exception(cause)))


def error_document(error: MigrateError) -> dict[str, Any]:
    """What ``--json`` says of an error: reason, message, advice, exit_code."""
    return {
        "reason": error.reason,
        "message": error.message,
        "advice": error.hint,
        "exit_code": error.exit_code,
    }


# ---------------------------------------------------------------- quantities


def size(count: float) -> str:
    """Bytes as ``64.0 GiB``, whole bytes below 1 KiB."""
    if abs(count) < 1024:
        return f"{count:.0f} B"
    for unit in UNITS[1:]:
        count /= 1024
        if abs(count) < 1023.95 or unit == UNITS[-1]:
            break
    return f"{count:.1f} {unit}"


def rate(bytes_per_second: float) -> str:
    """Bytes a second as ``1.5 GiB/s``."""
    return f"{size(bytes_per_second)}/s"


def duration(seconds: float) -> str:
    """Seconds as ``12 ms``, ``3.42 s`` or ``2 min 5 s``."""
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 59.995:
        return f"{seconds:.2f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s"
