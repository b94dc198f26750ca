"""The README's examples are read by the code that they are for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from agents.config import load_config
from migrate.cli.main import COMMANDS
from migrate.inventory import parse

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```toml\n(.*?)```", TEXT, re.DOTALL)


def test_the_agents_configuration(tmp_path: Path) -> None:
    (example,) = (block for block in BLOCKS if "allow_from" in block)
    file = tmp_path / "agent.toml"
    file.write_text(example)
    config = load_config(file)
    assert config.allow_from == ("node-a",)
    assert config.tls.key == str(tmp_path / "node-b.key")


def test_the_inventory() -> None:
    (example,) = (block for block in BLOCKS if "[hosts." in block)
    inventory = parse(example.encode(), "README.md")
    assert [host.name for host in inventory.all_hosts()] == ["node-a", "node-b"]


@pytest.mark.parametrize("name", sorted(set(re.findall(r"(?:^ {4}|`)migrate (\w+)", TEXT, re.M))))
def test_the_commands(name: str) -> None:
    assert name in COMMANDS


@pytest.mark.parametrize("target", sorted(set(re.findall(r"^ {4}make (\w+)", TEXT, re.M))))
def test_the_targets(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M)


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)]+)\)", TEXT))))
def test_the_links(link: str) -> None:
    assert (ROOT / link).is_file()
