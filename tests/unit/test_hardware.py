"""``make hardware`` on a machine without a card says what is missing."""

from __future__ import annotations

import io
from pathlib import Path

import msgspec
import pytest

from migrate.errors import HostUnfit
from migrate.model import HostPaths
from scenarios.hardware import Result, main, missing


def test_a_machine_without_a_card(tmp_path: Path) -> None:
    if Path(HostPaths().kfd).exists():
        pytest.skip("this machine has /dev/kfd: `make hardware` would use it")
    file, out = tmp_path / "hardware.json", io.StringIO()
    assert main([str(file)], out) == HostUnfit.exit_code
    assert "MISSING /dev/kfd is not there" in out.getvalue()
    result = msgspec.json.decode(file.read_bytes(), type=Result)
    assert not result.complete
    assert not result.suites
    assert result.loop_back is None
    assert result.doctor.findings


def test_what_is_missing_is_a_sentence_each(tmp_path: Path) -> None:
    found = missing(HostPaths.under(tmp_path))
    assert any("no AMD GPU, or amdgpu is not loaded" in sentence for sentence in found)
