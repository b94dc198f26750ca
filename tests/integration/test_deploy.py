"""Agents deployed to two hosts by real SSH servers, and a process moved between them."""

from __future__ import annotations

import ctypes
import os
import signal
import stat
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from migrate.client import Client
from migrate.inventory import HostEntry, Inventory, to_toml
from migrate.rpc.ca import Role
from scenarios.cluster import Cluster
from scenarios.ports import free_port
from tests.integration.jobs import Outcome, comes_out_right, command, migrate, start_job
from tests.integration.sshd import SSHD, Servers

pytestmark = [
    pytest.mark.skipif(not SSHD, reason="no sshd (Debian: openssh-server)"),
    pytest.mark.timeout(600),
]
PR_SET_CHILD_SUBREAPER = 36


@dataclass
class Site:
    """Two hosts with an sshd and a KFD node each, and no agent; b is reached through a."""

    cluster: Cluster
    servers: Servers
    inventory: Path

    def prefix(self, host: str) -> Path:
        return self.cluster.folder / "installed" / host

    def deploy(self, *arguments: str, hosts: tuple[str, ...] = ("a", "b")) -> Outcome:
        return command(
            self.cluster,
            "agent", "deploy", *hosts,
            "--ca", str(self.cluster.folder / "ca"),
            "--ssh-config", str(self.servers.config),
            "--prefix", f"{self.cluster.folder}/installed/{{host}}",
            "--root", f"{self.cluster.folder}/{{host}}",
            "--service", "background",
            "--python", os.path.realpath(sys.executable),
            *arguments,
            inventory=self.inventory,
            timeout=500,
        )  # fmt: skip

    def pid(self, host: str) -> int:
        return int((self.prefix(host) / "state" / "agent.pid").read_text())


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    libc = ctypes.CDLL(None)
    # Daemons that sshd leaves behind become our children, as they would init's: the kernel's
    # Yama lets our descendants trace the jobs, and we can end them.
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1)
    with Cluster.temporary() as cluster:
        servers = Servers(cluster.folder / "ssh")
        try:
            for name, jump in (("a", ""), ("b", "a")):
                cluster.add_node(name)
                servers.start(name, jump=jump)
            entries = {n: HostEntry(address=f"127.0.0.1:{free_port()}") for n in ("a", "b")}
            operator = cluster.certificate("someone", Role.OPERATOR)
            inventory = cluster.folder / "site.toml"
            inventory.write_text(to_toml(Inventory(tls=operator, hosts=entries)))
            yield Site(cluster, servers, inventory)
        finally:
            for host in ("a", "b"):
                pid_file = cluster.folder / "installed" / host / "state" / "agent.pid"
                if pid_file.exists():
                    os.kill(int(pid_file.read_text()), signal.SIGKILL)
            servers.stop()
            libc.prctl(PR_SET_CHILD_SUBREAPER, 0)


def changed(outcome: Outcome) -> dict[str, list[str]]:
    assert outcome.code == 0, outcome.document
    return {row["host"]: row["changed"] for row in outcome.document["hosts"]}


@pytest.mark.soak
def test_deploy_and_move_and_deploy_again_and_remove(site: Site) -> None:
    """One story, because each deployment stands on the one before."""
    first = site.deploy("--allow-from", "a,b")
    assert changed(first) == {
        host: ["release", "authority", "certificate", "configuration", "started"]
        for host in ("a", "b")
    }
    etc = site.prefix("a") / "etc"
    assert stat.S_IMODE((etc / "a.key").stat().st_mode) == 0o600
    assert stat.S_IMODE(etc.stat().st_mode) == 0o700
    assert not list(site.cluster.folder.glob("ca/a.key"))  # it was made there and stayed there
    assert site.servers.log("a").count("Accepted publickey") >= 2  # the second on the way to b

    job = start_job(site.cluster, "a", "moved")
    moved = migrate(site.cluster, "run", "a", "b", str(job.pid), inventory=site.inventory)
    assert moved.code == 0, moved.document
    copy = moved.report.destination.pid
    assert copy is not None

    # The same again changes nothing, and restarts nothing.
    pids = site.pid("a"), site.pid("b")
    assert changed(site.deploy("--allow-from", "b", hosts=("a",))) == {"a": []}
    assert (site.pid("a"), site.pid("b")) == pids

    # Another configuration restarts the agent; what it owns runs on.
    assert changed(site.deploy("--allow-from", "a,c", hosts=("b",))) == {
        "b": ["configuration", "started"]
    }
    assert site.pid("b") != pids[1]
    assert Path(f"/proc/{copy}").exists()
    with Client(site.inventory) as client:
        assert [row.pid for row in client.processes("b")] == [copy]
    assert comes_out_right(site.cluster, job)["pids"] == [job.pid, copy]

    removed = site.deploy("--remove", "--purge")
    assert removed.code == 0, removed.document
    assert not site.prefix("a").exists()
    assert migrate(site.cluster, "ps", "a", inventory=site.inventory).code == 11


def test_a_host_whose_key_is_not_known_is_refused_and_not_added(site: Site) -> None:
    before = site.servers.known_hosts.read_bytes()
    known = before.splitlines(keepends=True)
    try:
        # Nobody vouched for a; and b's key is another one than it was.
        other = known[0].split(b" ", 1)[1]
        site.servers.known_hosts.write_bytes(known[1].split(b" ", 1)[0] + b" " + other)
        outcome = site.deploy(hosts=("a",))
        assert outcome.code == 21
        assert "ssh-ed25519 SHA256:" in outcome.document["hosts"][0]["error"]["message"]
        site.servers.known_hosts.write_bytes(known[0] + known[1].split(b" ", 1)[0] + b" " + other)
        elsewhere = site.cluster.folder / "never"
        outcome = site.deploy("--prefix", str(elsewhere), hosts=("b",))
        assert outcome.code == 21
        assert "not the one that is known" in outcome.document["hosts"][0]["error"]["message"]
        assert not elsewhere.exists()
    finally:
        site.servers.known_hosts.write_bytes(before)


def test_a_host_that_is_unfit_is_not_touched(site: Site) -> None:
    elsewhere = site.cluster.folder / "unfit"
    outcome = site.deploy("--root", "/nonexistent", "--prefix", str(elsewhere), hosts=("a",))
    assert outcome.code == 22
    assert "/nonexistent/kfd" in outcome.document["hosts"][0]["error"]["message"]
    assert not elsewhere.exists()
    if not Path("/run/systemd/system").exists():
        outcome = site.deploy("--service", "systemd", hosts=("a",))
        assert outcome.code == 22
        assert "systemd" in outcome.document["hosts"][0]["error"]["message"]


def test_nobody_gets_in_without_the_key(site: Site) -> None:
    key = site.servers.folder / "user"
    kept = key.rename(key.with_name("kept"))
    try:
        outcome = site.deploy(hosts=("a",))
    finally:
        kept.rename(key)
    assert outcome.code == 20
    assert outcome.document["hosts"][0]["error"]["reason"] == "SSH_FAILED"
