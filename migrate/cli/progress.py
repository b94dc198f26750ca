"""Live progress of migrations on a terminal; nothing at all elsewhere.

Fed with the events of the agents' journal, so that `run`, `watch`, `drain` and `demo` show
the same. Drawn on stderr: stdout stays the result's.
"""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table

from migrate.cli.output import Output, duration, rate, size
from migrate.report import Event

COLUMNS = ("ID", "STATUS", "PHASE", "ROUND", "", ">LEFT", ">RATE", ">DOWNTIME", "")
BAR_WIDTH = 24


class Progress:
    """A context manager; ``update()`` takes each event and draws the newest of each id."""

    def __init__(self, console: Console, *, enabled: bool) -> None:
        self._newest: dict[str, Event] = {}
        self._live = (
            Live(console=console, auto_refresh=False, get_renderable=self.render)
            if enabled
            else None
        )

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live:
            self._live.stop()

    def update(self, event: Event) -> None:
        """Show *event*; an event older than what is shown is left out."""
        shown = self._newest.get(event.id)
        if shown is not None and shown.sequence > event.sequence:
            return
        self._newest[event.id] = event
        if self._live:
            self._live.refresh()

    def render(self) -> Table:
        """The table as it is now."""
        table = Table(box=None, pad_edge=False, show_edge=False, header_style="dim")
        for column in COLUMNS:
            right = column.startswith(">")
            table.add_column(column.lstrip(">"), justify="right" if right else "left", no_wrap=True)
        for event in self._newest.values():
            predicted = event.predicted_downtime
            table.add_row(
                escape(event.id),
                escape(str(event.status)),
                escape(event.phase),
                str(event.round) if event.round else "",
                _bar(event),
                size(event.left) if event.total else "",
                rate(event.rate) if event.rate else "",
                "" if predicted is None else f"~{duration(predicted)}",
                escape(event.message),
            )
        return table


def _bar(event: Event) -> ProgressBar | str:
    if not event.total:
        return ""
    done = min(max(event.total - event.left, 0), event.total)
    return ProgressBar(total=event.total, completed=done, width=BAR_WIDTH)


def progress(output: Output) -> Progress:
    """Progress for a command: drawn if stderr is a terminal and ``--json`` is not given."""
    console = output.stderr
    console.soft_wrap = False  # a line that wraps can't be redrawn
    return Progress(console, enabled=console.is_terminal and not output.json)
