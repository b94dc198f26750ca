"""The command line's frame: what is printed where, and which exit code it ends with."""

from __future__ import annotations

import json
import logging
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import click
import pytest

from migrate.cli.main import BROKEN_PIPE, COMMANDS, Entry, group, run
from migrate.cli.output import Output, duration, rate, size
from migrate.cli.settings import Settings
from migrate.errors import AgentUnreachable, Interrupted, MigrateError, UnknownHost, UsageError

DEADLINE = 60.0

# ---------------------------------------------------------------- commands to try it with


@click.command()
@click.option("--code", default=0)
@click.pass_obj
def good(settings: Settings, code: int) -> int:
    """A command that ends well, or with --code after its document."""
    if settings.output.json:
        settings.output.document({"inventory": settings.inventory_path})
    else:
        settings.output.text(f"inventory [{settings.inventory_path}]")
        settings.output.note("a note")
    return code


@click.command()
@click.argument("kind")
@click.pass_obj
def bad(settings: Settings, kind: str) -> None:
    """A command that fails."""
    if kind == "late":
        settings.output.line({"first": 1})
        raise AgentUnreachable("went away")
    raised: dict[str, BaseException] = {
        "known": UnknownHost("no host [b]x[/b]", advice="look [there]"),
        "bug": ZeroDivisionError("division"),
        "interrupt": KeyboardInterrupt(),
        "pipe": BrokenPipeError(),
    }
    raise raised[kind]


@click.group()
def nest() -> None:
    """A command of commands."""


@nest.command()
@click.pass_obj
def leaf(settings: Settings) -> None:
    """Print whether --json is on."""
    settings.output.document({"json": settings.output.json})


@click.command()
def wait() -> None:
    """Wait to be interrupted."""
    print("waiting", flush=True)
    signal.pause()


@click.command()
def chatty() -> None:
    """Log at each level."""
    logger = logging.getLogger("migrate.chatty")
    logger.warning("bad")
    logger.info("what")
    logger.debug("detail")
    logging.getLogger("some.library").info("library")


ENTRIES = {
    name: Entry(f"{__name__}:{name}", f"Help of {name}.")
    for name in ("good", "bad", "nest", "wait", "chatty")
} | {"gone": Entry("migrate.no_such_module:x", "Not there.")}


def attempt(*arguments: str) -> int:
    return run(arguments, group(ENTRIES))


Capture = pytest.CaptureFixture[str]


# ---------------------------------------------------------------- people and programs


def test_people_get_results_on_stdout_and_notes_on_stderr(capsys: Capture) -> None:
    assert attempt("good") == 0
    out, err = capsys.readouterr()
    assert (out, err) == ("inventory [None]\n", "a note\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ("--json", "--inventory", "x", "good"),
        ("good", "--json", "--inventory", "x"),
        ("--inventory", "x", "good", "--json"),
        ("--inventory", "y", "good", "--json", "--inventory", "x"),
    ],
)
def test_shared_options_work_on_both_sides(capsys: Capture, arguments: tuple[str, ...]) -> None:
    assert attempt(*arguments) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"inventory": "x"}
    assert err == ""


def test_shared_options_reach_nested_commands(capsys: Capture) -> None:
    assert attempt("nest", "leaf", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"json": True}


def test_a_command_may_end_with_a_code_after_its_document(capsys: Capture) -> None:
    assert attempt("good", "--json", "--code", "71") == 71
    out, err = capsys.readouterr()
    assert json.loads(out) == {"inventory": None}
    assert err == ""


def test_a_second_document_is_a_bug() -> None:
    output = Output()
    output.document({})
    with pytest.raises(RuntimeError):
        output.document({})


# ---------------------------------------------------------------- errors


def test_an_error_for_people(capsys: Capture) -> None:
    assert attempt("bad", "known") == UnknownHost.exit_code
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "error: no host [b]x[/b]\nlook [there]\n"


def test_an_error_for_programs(capsys: Capture) -> None:
    assert attempt("bad", "known", "--json") == UnknownHost.exit_code
    out, err = capsys.readouterr()
    assert err == ""
    assert json.loads(out) == {
        "error": {
            "reason": "UNKNOWN_HOST",
            "message": "no host [b]x[/b]",
            "advice": "look [there]",
            "exit_code": UnknownHost.exit_code,
        }
    }


def test_an_error_after_a_document_goes_to_stderr(capsys: Capture) -> None:
    assert attempt("bad", "late", "--json") == AgentUnreachable.exit_code
    out, err = capsys.readouterr()
    assert json.loads(out) == {"first": 1}
    assert "went away" in err


def test_a_bug_is_internal_and_shows_its_traceback_when_asked(capsys: Capture) -> None:
    assert attempt("bad", "bug", "--json") == MigrateError.exit_code
    document = json.loads(capsys.readouterr().out)
    assert document["error"]["reason"] == "INTERNAL"
    assert document["error"]["message"] == "ZeroDivisionError: division"
    assert attempt("bad", "bug") == 1
    assert "Traceback" not in capsys.readouterr().err
    assert attempt("bad", "bug", "-v") == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("nix",), "No such command 'nix'"),
        (("good", "--nix"), "No such option"),
        (("bad",), "Missing argument 'KIND'"),
        (("good", "--code", "x"), "'x' is not a valid int"),
        (("gone",), "not part of this installation: there is no module migrate.no_such_module"),
    ],
)
def test_usage_errors(capsys: Capture, arguments: tuple[str, ...], said: str) -> None:
    assert attempt(*arguments) == UsageError.exit_code
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert attempt(*arguments, "--json") == UsageError.exit_code
    out, err = capsys.readouterr()
    assert err == ""
    error = json.loads(out)["error"]
    assert error["reason"] == "USAGE"
    assert said in error["message"]


def test_json_after_a_double_dash_is_not_the_option(capsys: Capture) -> None:
    assert attempt("good", "--", "--json") == UsageError.exit_code
    out, err = capsys.readouterr()
    assert out == ""
    assert "unexpected extra argument" in err


def test_an_interrupt_has_its_code(capsys: Capture) -> None:
    assert attempt("bad", "interrupt", "--json") == Interrupted.exit_code
    assert json.loads(capsys.readouterr().out)["error"]["reason"] == "INTERRUPTED"


@pytest.mark.parametrize(
    ("options", "shown"),
    [((), {"bad"}), (("-v",), {"bad", "what"}), (("-vv",), {"bad", "what", "detail", "library"})],
)
def test_logs_go_to_stderr(capsys: Capture, options: tuple[str, ...], shown: set[str]) -> None:
    assert attempt("chatty", "--json", *options) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert {word for word in ("bad", "what", "detail", "library") if word in err} == shown


# ---------------------------------------------------------------- help


def test_help_imports_no_command(capsys: Capture) -> None:
    assert attempt("--help") == 0
    out = capsys.readouterr().out
    for name, entry in ENTRIES.items():
        assert re.search(rf"^ +{name} +{re.escape(entry.help)}$", out, re.MULTILINE)


def test_help_of_a_command_has_the_shared_options(capsys: Capture) -> None:
    assert attempt("nest", "leaf", "--help") == 0
    out = capsys.readouterr().out
    assert "--json" in out
    assert "--inventory" in out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_of_the_product_is_there(capsys: Capture, name: str) -> None:
    assert run([name, "--help"]) == 0
    out = capsys.readouterr().out
    assert f"migrate {name}" in out
    assert "--json" in out


def test_version(capsys: Capture) -> None:
    assert run(["--version"]) == 0
    assert re.fullmatch(r"migrate, version \d+\.\d+\.\d+\n", capsys.readouterr().out)


# ---------------------------------------------------------------- as a process

# A shell's background jobs start with SIGINT ignored, and so would their children.
PROGRAM = f"""
import signal, sys
from {__name__} import attempt
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(attempt(*sys.argv[1:]))
"""
ROOT = str(Path(__file__).resolve().parents[2])


@contextmanager
def spawned(
    *arguments: str,
    stdout: int = subprocess.PIPE,
    stderr: int = subprocess.PIPE,
    environment: Mapping[str, str] | None = None,
) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments],
        cwd=ROOT,
        text=True,
        stdout=stdout,
        stderr=stderr,
        env={**os.environ, **(environment or {})},
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def test_ctrl_c_ends_with_the_documented_code() -> None:
    with spawned("wait") as process:
        assert process.stdout
        assert process.stdout.readline() == "waiting\n"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == Interrupted.exit_code
    assert err.lstrip().startswith("error: interrupted\n")


def test_a_reader_that_goes_away_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    with spawned("good", stdout=write) as process:
        os.close(write)
        _, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == BROKEN_PIPE
    assert "Traceback" not in err
    assert "Exception ignored" not in err


def test_colours_are_for_terminals() -> None:
    leader, follower = pty.openpty()
    colours = {"TERM": "xterm-256color", "NO_COLOR": ""}  # empty means not set
    with spawned("bad", "known", stderr=follower, environment=colours) as process:
        os.close(follower)
        process.communicate(timeout=DEADLINE)
    seen = _drain(leader)
    assert b"\x1b[" in seen
    assert b"no host [b]x[/b]" in seen


def _drain(leader: int) -> bytes:
    """All that was written to a terminal whose last writer has ended (EIO then)."""
    seen = b""
    limit = time.monotonic() + DEADLINE
    try:
        while select.select([leader], [], [], max(0.0, limit - time.monotonic()))[0]:
            seen += os.read(leader, 1 << 16)
    except OSError:
        pass
    finally:
        os.close(leader)
    return seen


# ---------------------------------------------------------------- rendering


def test_tables_are_aligned_and_never_cut(capsys: Capture) -> None:
    wide = "x" * 300
    Output().table(("NAME", ">GPUS", "[TEXT]"), [("a", 1, wide), ("bcd", 128, "[/]")])
    out = capsys.readouterr().out
    assert out.splitlines() == [
        "NAME  GPUS  [TEXT]" + " " * (len(wide) - 6),
        f"a        1  {wide}",
        "bcd    128  [/]" + " " * (len(wide) - 3),
    ]


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        ((1 << 20) - 1, "1.0 MiB"),
        (64 << 30, "64.0 GiB"),
        (3 << 60, "3072.0 PiB"),
    ],
)
def test_sizes(count: int, text: str) -> None:
    assert size(count) == text
    assert rate(count) == f"{text}/s"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0 ms"),
        (0.0124, "12 ms"),
        (0.9996, "1.00 s"),
        (3.417, "3.42 s"),
        (59.999, "1 min 0 s"),
        (125.4, "2 min 5 s"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
