"""VRAM through both sides of the seam, by an unmodified libdrm_amdgpu, on the real driver."""

from __future__ import annotations

import json

import pytest

from scenarios.lab import conformance
from scenarios.lab.host import Host, HostSpec
from tests.lab.conftest import SharedHost

pytestmark = [pytest.mark.lab, pytest.mark.timeout(3000)]

PYTEST = (
    "cd /opt/project && MIGRATE_CONFORMANCE=kernel timeout 2500 python3 -m pytest -q -s"
    " -p no:cacheprovider -p no:randomly --timeout=600"
)


def access(host: Host, *arguments: str) -> str:
    """Run tests/access on *host*; what pytest says. Raises LabError if a test fails."""
    conformance.install_project(host)
    said = host.ssh(f"{PYTEST} {' '.join(arguments)} tests/access")
    conformance.check_kernel(host)
    return said


def test_the_suite_passes_on_mmap_and_on_sdma(
    shared_host: SharedHost, capsys: pytest.CaptureFixture[str]
) -> None:
    host = shared_host(HostSpec(name="a"))
    said = access(host, "-k", "'not past_2_gib'")
    package = host.ssh("dpkg-query -W libdrm-amdgpu1").strip()
    library = next(line for line in said.splitlines() if "library:" in line)
    with capsys.disabled():
        print(f"\n{package}; {library.strip()}; {said.strip().splitlines()[-1]}")
    assert "libdrm_amdgpu.so.1" in library
    assert "skipped" not in said.strip().splitlines()[-1]
    assert host.ssh("dpkg --verify libdrm-amdgpu1").strip() == ""  # as the distribution made it


def test_doctor_sees_the_cards_and_both_rates(shared_host: SharedHost) -> None:
    host = shared_host(HostSpec(name="a"))
    conformance.install_project(host)
    said = host.ssh("cd /opt/project && python3 -m migrate doctor --json || true")
    report = json.loads(said)
    status = {finding["name"]: finding["status"] for finding in report["findings"]}
    sides = [name for name in status if name.startswith(("mmap ", "sdma "))]
    assert len(sides) == 4
    assert all(status[name] in ("ok", "warn") for name in sides)
    assert status["kfd"] == status["private_data"] == "ok"
