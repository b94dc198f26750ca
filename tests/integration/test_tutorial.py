"""docs/tutorial.md, the part with simulated hosts, done as it stands there."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from scenarios.cluster import LOOPBACK
from scenarios.ports import free_port

PAGE = Path(__file__).resolve().parents[2] / "docs" / "tutorial.md"
PORTS = ("7612", "7613", "7614")


def script() -> str:
    """The code of the part, in order, as one shell script."""
    part = PAGE.read_text().partition("## Two simulated hosts")[2].partition("\n## ")[0]
    blocks = re.findall(r"(?:^(?: {4}.*)?\n)+", part, re.MULTILINE)
    lines = [line[4:] for block in blocks for line in block.splitlines() if line.startswith("    ")]
    return "\n".join(line for line in lines if "$CLONE" not in line)


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="mig-") as made:  # sockets want a short path
        yield Path(made)


@pytest.mark.timeout(500)
def test_the_tutorial_works(folder: Path) -> None:
    text = script()
    for port in PORTS:
        assert f"{LOOPBACK}:{port}" in text
        text = text.replace(f":{port}", f":{free_port()}")
    binaries = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{binaries}:{os.environ['PATH']}"}
    environment.pop("MIGRATE_INVENTORY", None)
    with subprocess.Popen(
        ["bash", "-euxc", text],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as shell:
        try:
            said, _ = shell.communicate(timeout=450)
        finally:
            # What the script left, if it failed; it is a session of its own.
            for number in (signal.SIGTERM, signal.SIGKILL):
                try:
                    os.killpg(shell.pid, number)
                except ProcessLookupError:
                    break
    assert shell.returncode == 0, said[-3000:]
    result = json.loads((folder / "job.json").read_text())
    assert len(result["pids"]) == 2, said[-3000:]
    assert "completed" in said
