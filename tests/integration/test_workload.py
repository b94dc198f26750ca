"""The training loop by itself: its digest tells, and its operations may be repeated."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.engine_rig import PATIENCE, REPOSITORY, SIZE, Host, hosts, job


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    with hosts(tmp_path_factory.mktemp("host"), "a") as found:
        yield found[0]


def digest(host: Host, folder: Path, name: str, *options: str) -> str:
    with job(host, folder, name, *options) as found:
        assert found.popen.wait(PATIENCE) == 0, found.errors.read_text()
        return str(json.loads(found.result.read_text())["digest"])


def test_the_digest_depends_on_all_it_should_and_on_nothing_else(
    host: Host, tmp_path: Path
) -> None:
    base = ("--steps", "20", "--seed", "5")
    assert digest(host, tmp_path, "one", *base) == digest(host, tmp_path, "two", *base)
    others = [("--steps", "21", "--seed", "5"), ("--steps", "20", "--seed", "6")]
    found = {digest(host, tmp_path, f"other{n}", *options) for n, options in enumerate(others)}
    assert len(found | {digest(host, tmp_path, "again", *base)}) == 3


@pytest.mark.parametrize("seed", [1, 2])
def test_every_operation_may_be_broken_off_anywhere_and_repeated(
    host: Host, tmp_path: Path, seed: int
) -> None:
    log, result = tmp_path / "broken.log", tmp_path / "broken.json"
    command = [sys.executable, "-m", "tests.integration.interrupted_training", str(seed)]
    command += ["--steps", "60", "--log", str(log), "--result", str(result), *SIZE]
    environment = os.environ | {"MIGRATE_HOST_ROOT": host.root}
    done = subprocess.run(
        command,
        env=environment,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) > 50
    expected = digest(host, tmp_path, "twin", "--steps", "60")
    assert json.loads(result.read_text())["digest"] == expected
    assert log.read_bytes() == (tmp_path / "twin.log").read_bytes()


def test_more_gpus_than_there_are_is_said(host: Host, tmp_path: Path) -> None:
    with job(host, tmp_path, "many", "--gpus", "3") as found:
        assert found.popen.wait(PATIENCE) == 1
    assert "--gpus 3: this host shows 2" in found.errors.read_text()
    assert not found.result.exists()


def test_a_host_without_kfd_is_said(host: Host, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "scenarios.workloads.train"]
    command += ["--log", str(tmp_path / "log"), "--result", str(tmp_path / "result")]
    environment = os.environ | {"MIGRATE_HOST_ROOT": str(tmp_path / "nowhere")}
    done = subprocess.run(
        command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert f"{tmp_path}/nowhere/kfd" in done.stderr
    assert "Traceback" not in done.stderr
