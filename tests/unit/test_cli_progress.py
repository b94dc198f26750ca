"""Live progress: what a terminal shows, and that nothing else shows anything."""

from __future__ import annotations

import io

import msgspec
import pytest
from rich.console import Console

from migrate.cli.output import Output
from migrate.cli.progress import Progress, progress
from migrate.report import Event
from migrate.status import Owner, Status

EVENT = Event(
    id="m-1",
    sequence=3,
    status=Status.ACTIVE,
    owner=Owner.SOURCE,
    phase="pre-copy",
    round=2,
    rate=1.5 * (1 << 30),
    left=1 << 30,
    total=4 << 30,
    predicted_downtime=0.4,
    message="[copying]",
)


def terminal() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=140, _environ={})


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def rendered(shown: Progress) -> str:
    console = Console(file=io.StringIO(), width=140, _environ={})
    console.print(shown.render())
    return text_of(console)


def test_an_event_shows_phase_rate_bytes_left_and_downtime() -> None:
    with Progress(terminal(), enabled=True) as shown:
        shown.update(EVENT)
        for part in ("m-1", "active", "pre-copy", "1.5 GiB/s", "1.0 GiB", "~400 ms", "[copying]"):
            assert part in rendered(shown)


def test_each_migration_has_one_row_with_its_newest_event() -> None:
    with Progress(terminal(), enabled=True) as shown:
        shown.update(EVENT)
        shown.update(msgspec.structs.replace(EVENT, id="m-2", phase="setup", total=0, rate=0.0))
        shown.update(msgspec.structs.replace(EVENT, sequence=5, phase="freeze"))
        shown.update(msgspec.structs.replace(EVENT, sequence=4, phase="stale"))
        lines = rendered(shown).splitlines()
    assert len(lines) == 3
    assert "freeze" in lines[1]
    assert "setup" in lines[2]
    assert "/s" not in lines[2]


def test_a_terminal_is_redrawn_and_its_cursor_comes_back() -> None:
    console = terminal()

    def interrupted() -> None:
        with Progress(console, enabled=True) as shown:
            shown.update(EVENT)
            shown.update(msgspec.structs.replace(EVENT, sequence=4))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    drawn = text_of(console)
    assert drawn.count("m-1") >= 2
    assert drawn.rindex("\x1b[?25h") > drawn.rindex("\x1b[?25l")


@pytest.mark.parametrize("json", [False, True])
def test_nothing_is_drawn_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str], json: bool
) -> None:
    output = Output()
    output.json = json
    with progress(output) as shown:
        shown.update(EVENT)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("left", [-1, 0, 5 << 30])
def test_a_count_that_is_off_does_no_harm(left: int) -> None:
    with Progress(terminal(), enabled=True) as shown:
        shown.update(msgspec.structs.replace(EVENT, left=left))
        assert "m-1" in rendered(shown)
