"""Agents deployed by ``migrate agent deploy`` to hosts with sshd and systemd, the real driver
and CRIU, and a job moved between them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrate.deploy.place import UNIT
from scenarios.lab import conformance
from scenarios.lab.cluster import LabCluster
from scenarios.lab.host import Host, HostSpec
from scenarios.lab.layout import Layout
from tests.lab.conftest import Hosts
from tests.lab.jobs import FIRST_PID, GpuJob, exists, wait_for
from tests.lab.moves import Keep, check_map, move

pytestmark = [pytest.mark.lab, pytest.mark.timeout(3000)]

HOST_KEY = "etc/ssh/ssh_host_ed25519_key.pub"
FIRST = ["release", "authority", "certificate", "configuration", "unit", "started"]


@pytest.fixture
def site(layout: Layout, hosts: Hosts) -> Iterator[LabCluster]:
    """Hosts with a service manager and no agent."""
    with LabCluster(layout) as cluster:
        for name in ("a", "b"):
            host = hosts.fresh(HostSpec(name=name, systemd=True))
            cluster.hosts[name] = host
            conformance.install_project(host)  # for the job; agents are deployed
            host.ssh(f"echo {FIRST_PID[name]} > /proc/sys/kernel/ns_last_pid")
        cluster.write_inventory()
        yield cluster
    hosts.stop_fresh()


def ssh_config(cluster: LabCluster) -> Path:
    """How an operator's ssh gets to the hosts; their keys are known."""
    key = " ".join((cluster.layout.guest_root / HOST_KEY).read_text().split()[:2])
    known, lines = cluster.folder / "known_hosts", []
    with known.open("w") as file:
        for name, host in cluster.hosts.items():
            assert host.running is not None
            file.write(f"[127.0.0.1]:{host.running.port} {key}\n")
            lines += [f"Host {name}", "HostName 127.0.0.1", f"Port {host.running.port}"]
    lines += ["Host *", "User root", f"IdentityFile {cluster.layout.key}", "IdentitiesOnly yes"]
    lines += [f"UserKnownHostsFile {known}"]
    config = cluster.folder / "ssh_config"
    config.write_text("\n".join(lines) + "\n")
    return config


def deploy(cluster: LabCluster, *arguments: str) -> dict[str, list[str]]:
    """What was changed, by host."""
    said = cluster.run(
        *("--json", "agent", "deploy", "a", "b", "--ca", str(cluster.folder / "ca")),
        *("--ssh-config", str(ssh_config(cluster)), "--allow-from", "a,b", *arguments),
    )
    return {row["host"]: row["changed"] for row in json.loads(said.stdout)["hosts"]}


def main_pid(host: Host) -> int:
    return int(host.ssh(f"systemctl show -P MainPID {UNIT}"))


def is_active(host: Host, unit: str) -> bool:
    return host.ssh(f"systemctl is-active {unit} || true").strip() == "active"


def test_deployed_agents_move_a_job_and_the_service_manager_keeps_both(
    site: LabCluster, keep: Keep
) -> None:
    a, b = site.hosts.values()
    wait_for(lambda: is_active(a, "basic.target") and is_active(b, "basic.target"), "no systemd")
    assert deploy(site) == {"a": FIRST, "b": FIRST}
    job = GpuJob(a, 7401)
    pid = site.spawn("a", job.command)
    before = job.started()
    report = move(site, pid, "ab")
    job.host = b
    job.after(before["step"] + 20)
    check_map(report, before["gpu_ids"])

    # The same again changes nothing and restarts nothing.
    agents = main_pid(a), main_pid(b)
    assert deploy(site) == {"a": [], "b": []}
    assert (main_pid(a), main_pid(b)) == agents

    # kill -9: it is started again, and what it owns runs on, in the unit's own control group.
    b.ssh(f"kill -9 {agents[1]}")
    wait_for(lambda: main_pid(b) not in (0, agents[1]), "systemd starts no new agent")
    wait_for(lambda: is_active(b, UNIT), "it is not ready")
    job.after(job.ask()["step"] + 5)
    assert site.run("ps", "b").stdout.count(str(pid)) == 1
    b.ssh(f"systemctl stop {UNIT}")
    job.after(job.ask()["step"] + 5)
    b.ssh(f"systemctl start {UNIT}")

    assert deploy(site, "--remove", "--purge") == {"a": ["removed"], "b": ["removed"]}
    assert b.ssh(f"ls -d /opt/migrate /etc/migrate /etc/systemd/system/{UNIT} || true") == ""
    assert exists(b, pid)
    keep(site, "deployed", [report], before=before, after=job.finish())
