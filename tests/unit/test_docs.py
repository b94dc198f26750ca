"""The docs are true as far as a program can tell: links, commands, options, targets, modules."""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from migrate.cli import pages
from migrate.cli.exit_codes import error_classes
from migrate.cli.main import group

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "ARCHITECTURE.md", *sorted((ROOT / "docs").glob("*.md"))]
ELLIPSIS = {"...", "…"}


def said(pattern: str) -> Iterator[tuple[str, str]]:
    """(page, what it says) for each different match."""
    for path in PAGES:
        for found in sorted(set(re.findall(pattern, path.read_text(), re.MULTILINE))):
            yield path.name, found


def commands() -> Iterator[tuple[str, str]]:
    """Lines of code that call migrate, continued lines joined, and commands within a text."""
    for path in PAGES:
        text = path.read_text().replace("\\\n", " ")
        lines = re.findall(r"^ {4,}(migrate .*)$", text, re.MULTILINE)
        inline = re.findall(r"`(migrate [^`]*)`", text)
        for line in sorted({" ".join(line.split()) for line in (*lines, *inline)}):
            yield path.name, line


def the_words(line: str) -> list[str]:
    """A shell line's words up to a comment, pipe or redirection."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>()")
    lexer.whitespace_split, lexer.commenters = True, "#"
    words: list[str] = []
    for word in lexer:
        if set(word) <= set("|&;<>()"):
            return [w for w in words if w != "2"]
        words.append(word)
    return words


@pytest.mark.parametrize(("page", "line"), tuple(commands()))
def test_each_command_parses(page: str, line: str) -> None:
    """Its name exists, its options exist, and there are not too many arguments."""
    words = [w for w in the_words(line) if w not in ELLIPSIS and not w.endswith("...")][1:]
    command: click.Command = group()
    context = click.Context(command, info_name="migrate")
    while words and isinstance(command, click.Group):
        if words[0].startswith("-"):
            words = words[1:]
            continue
        found = command.get_command(context, words[0])
        assert found is not None, f"{page}: {line}"
        command = found
        context = click.Context(command, info_name=words[0], parent=context)
        words = words[1:]
    words = [w for w in words if not (w.startswith("[") or w.endswith("]"))]
    try:
        _, rest, _ = command.make_parser(context).parse_args(list(words))
    except click.BadOptionUsage:  # in a sentence an option may stand without its value
        rest = []
    except click.UsageError as error:
        pytest.fail(f"{page}: {line}: {error}")
    assert not rest or isinstance(command, click.Group), f"{page}: {line}: {rest}"


@pytest.mark.parametrize(("page", "link"), tuple(said(r"\]\(([^)#]+)\)")))
def test_each_link_leads_somewhere(page: str, link: str) -> None:
    if "://" in link:
        assert link.startswith("https://")
        return
    base = ROOT if (ROOT / page).exists() else ROOT / "docs"
    assert (base / link).exists(), f"{page}: {link}"


@pytest.mark.parametrize(("page", "target"), tuple(said(r"(?:^ {4}|`)make ([a-z]+)")))
def test_each_target_is_in_the_makefile(page: str, target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), page


@pytest.mark.parametrize(("page", "module"), tuple(said(r"python -m ([\w.]+)")))
def test_each_module_is_there(page: str, module: str) -> None:
    name = module.rstrip(".")
    if name.split(".")[0] in ("migrate", "agents", "scenarios"):
        assert importlib.util.find_spec(name) is not None, page


def test_operations_has_the_reasons_of_now() -> None:
    text = pages.PAGE.read_text()
    assert text == pages.page(text), "run python -m migrate.cli.pages"
    for cls in error_classes():
        assert f"| `{cls.reason}` |" in text


def test_the_manual_page_has_every_command_and_option() -> None:
    text = pages.manual()
    root = group()
    context = click.Context(root, info_name="migrate")

    def check(command: click.Command, name: str) -> None:
        assert f".SS {name.replace('-', chr(92) + '-')}" in text
        for parameter in command.params:
            for option in parameter.opts if isinstance(parameter, click.Option) else ():
                hidden = getattr(parameter, "hidden", False)
                assert hidden or option.replace("-", "\\-") in text, f"{name} {option}"
        if isinstance(command, click.Group):
            for child in command.list_commands(context):
                found = command.get_command(context, child)
                assert found is not None
                check(found, f"{name} {child}")

    for name in root.list_commands(context):
        command = root.get_command(context, name)
        assert command is not None
        check(command, f"migrate {name}")


@pytest.mark.skipif(shutil.which("groff") is None, reason="groff is not installed")
def test_the_manual_page_is_well_formed() -> None:
    done = subprocess.run(
        ["groff", "-man", "-ww", "-z", "-Tascii"],
        input=pages.manual(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
