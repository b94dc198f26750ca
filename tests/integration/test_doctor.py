"""``migrate doctor`` of a machine without a card and of a simulated host."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from agents.doctor import machine
from agents.doctor.examine import examine
from agents.doctor.finding import Finding, Patient, Report, Status, perform, unseen
from agents.hook import NAME
from migrate.engine import cgroup
from migrate.engine.criu import HOOK
from migrate.errors import CgroupUnusable, HostUnfit, KfdUnavailable
from migrate.inventory import Inventory, load, to_toml
from migrate.kfd.sysfs import read_topology
from migrate.model import HostPaths
from migrate.rpc.ca import Role, create_ca, issue
from scenarios.cluster import LOOPBACK, Cluster
from tests.conformance.hosts import simulated_host

pytestmark = pytest.mark.timeout(300)


def ask(*arguments: str, inventory: Path | None = None) -> tuple[int, dict[str, Any]]:
    command = [sys.executable, "-m", "migrate", "--json"]
    command += ["--inventory", str(inventory)] if inventory else []
    command += ["doctor", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    document: dict[str, Any] = json.loads(done.stdout)
    return done.returncode, document


def by_name(report: Report) -> dict[str, Finding]:
    return {finding.name: finding for finding in report.findings}


def test_a_machine_without_kfd_is_unfit_and_says_why(tmp_path: Path) -> None:
    code, document = ask("--root", str(tmp_path))
    assert code == HostUnfit.exit_code
    status = {finding["name"]: finding["status"] for finding in document["findings"]}
    assert status["kfd"] == "fail"
    assert status["gpus"] == status["private_data"] == "unseen"
    assert document["schema"] == "migrate.doctor/1"


def test_whatever_is_not_well_says_what_it_limits(tmp_path: Path) -> None:
    report = examine(Patient(paths=HostPaths.under(tmp_path)))
    assert report.worst is Status.FAIL
    for finding in report.findings:
        assert finding.found
        assert finding.limits or finding.status is Status.OK
        assert finding.mend or finding.status is not Status.FAIL


def test_a_simulated_host_is_seen_whole() -> None:
    with simulated_host() as host:
        report = examine(Patient(paths=host.paths, simulated=True))
        topology = read_topology(host.paths.topology)
    found = by_name(report)
    assert report.worst is Status.WARN
    assert found["kfd"].status is found["private_data"].status is Status.OK
    assert found["private_data"].data == {"bo_record_size": 80}
    for gpu in topology.gpus:
        assert found[f"gpu {gpu.gpu_id:#x}"].data["fw_version"] == gpu.fw_version
        rate = found[f"mmap {gpu.gpu_id:#x}"].data["read"]
        assert isinstance(rate, float)
        assert rate > 0
        assert found[f"sdma {gpu.gpu_id:#x}"].status is Status.UNSEEN


def test_a_peer_that_does_not_listen_is_a_failure(tmp_path: Path) -> None:
    report = examine(Patient(paths=HostPaths.under(tmp_path), peer="127.0.0.1:1"))
    assert by_name(report)["network"].status is Status.FAIL


def test_the_way_to_a_peer_is_measured() -> None:
    with Cluster.temporary() as cluster:
        cluster.add_host("a")
        _, document = ask("--root", str(cluster.hosts["a"].root), "a", inventory=cluster.inventory)
    found = {finding["name"]: finding for finding in document["findings"]}
    assert found["network"]["status"] == found["network_rate"]["status"] == "ok"
    assert found["network_rate"]["data"]["bytes_per_second"] > 0


def test_a_peer_that_shows_another_certificate_is_not_measured() -> None:
    with Cluster.temporary() as cluster:
        cluster.add_host("a")
        strangers = create_ca(cluster.folder / "strangers")
        files = issue(
            strangers, "operator", Role.OPERATOR, cluster.folder / "other", hosts=[LOOPBACK]
        )
        hosts = load(cluster.inventory).hosts
        path = cluster.folder / "other.toml"
        path.write_text(to_toml(Inventory(tls=files, hosts=hosts)))
        _, document = ask("--root", str(cluster.hosts["a"].root), "a", inventory=path)
    found = {finding["name"]: finding for finding in document["findings"]}
    assert found["network_rate"]["status"] == "unseen"


def test_cgroup_v2_counts_wherever_it_is_mounted(tmp_path: Path) -> None:
    """Beside version 1 it is not at /sys/fs/cgroup, and the engine criu uses it all the same."""
    status = by_name(examine(Patient(paths=HostPaths.under(tmp_path))))["cgroup_v2"].status
    try:
        cgroup.mount_point()
    except CgroupUnusable:
        assert status is Status.FAIL
    else:
        assert status is Status.OK


def test_the_hook_is_looked_for_where_an_agent_builds_it(tmp_path: Path) -> None:
    patient = Patient(paths=HostPaths.under(tmp_path))
    (before,) = machine.hook(patient)
    assert before.status is Status.WARN
    folder = Path(patient.paths.run) / HOOK
    folder.mkdir(parents=True)
    (folder / NAME).touch()
    assert by_name(examine(patient))["hook"].status is Status.OK


CRIU = """#!/bin/sh
case "$*" in
--version) echo Version: 4.2 ;;
"check --feature mem_dirty_track") exit 1 ;;
check) echo Looks good. ;;
esac
"""


def test_what_this_kernel_gives_criu_is_told_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.geteuid():
        pytest.skip("needs root")
    program = tmp_path / "criu"
    program.write_text(CRIU)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found = by_name(examine(Patient(paths=HostPaths.under(tmp_path))))
    assert found["criu"].data == {"version": "4.2"}
    assert found["criu_check"].status is Status.OK
    assert found["criu_features"].status is Status.WARN
    assert found["criu_features"].data["mem_dirty_track"] is False
    assert found["criu_features"].data["clone3_set_tid"] is True
    assert "sent whole" in found["criu_features"].limits


def test_a_check_that_can_not_look_is_unseen(tmp_path: Path) -> None:
    def blind(_: Patient) -> list[Finding]:
        raise KfdUnavailable("it is dark")

    patient = Patient(paths=HostPaths.under(tmp_path))
    assert perform("thing", blind, patient) == [unseen("thing", "it is dark")]
