"""Hostile peers against running agents, while a process migrates between them unharmed."""

from __future__ import annotations

import base64
import contextlib
import os
import re
import socket
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from migrate.errors import (
    AgentUnreachable,
    CertificateRejected,
    MigrateError,
    PermissionRefused,
    UnknownMigration,
)
from migrate.inventory import Inventory, TlsFiles, load, to_toml
from migrate.kfd.probe import bo_record_size
from migrate.kfd.sysfs import read_topology
from migrate.orchestrator.handover import Answer
from migrate.orchestrator.peer import Reservation
from migrate.orchestrator.plan import KfdNeeds, Move, Needs, Options
from migrate.rpc.ca import Role, issue, revoke
from migrate.rpc.peer import GrpcPeer
from scenarios.cluster import Cluster, wait_until
from scenarios.ports import free_port
from tests.integration.jobs import comes_out_right, migrate, start_job
from tests.integration.lookers import ended, started, states, wait_state

SLOW = ("--bandwidth", "2")  # MiB/s
STRANGERS = 1000


def caller(pair: Cluster, files: TlsFiles, name: str = "a") -> GrpcPeer:
    return GrpcPeer(
        "b",
        pair.hosts["b"].address,
        files,
        source=name,
        source_address="127.0.0.1:1",
        store_id="0" * 32,
    )


def reserve(pair: Cluster, peer: GrpcPeer, migration: str) -> Reservation:
    topology = read_topology(pair.hosts["a"].paths.topology)
    gpus = tuple(gpu.gpu_id for gpu in topology.gpus)
    kfd = KfdNeeds(
        identities=tuple((gpu, gpu) for gpu in gpus),
        gpus=gpus,
        vram=dict.fromkeys(gpus, 4096),
        priv_bo_size=bo_record_size(pair.hosts["a"].paths),
    )
    needs = Needs(processes=(kfd,), memory=1 << 20, quota=1 << 20)
    move = Move(engine="reexec", needs=needs, topology=topology, options=Options())
    return peer.reserve(migration, move)


def is_refused(pair: Cluster, files: TlsFiles, *errors: type[MigrateError]) -> None:
    """Nothing of the Peer service is answered to these files."""
    calls: tuple[Callable[[GrpcPeer], object], ...] = (
        lambda peer: reserve(pair, peer, "feed"),
        lambda peer: peer.grant("feed", b"token"),
        lambda peer: peer.cancel("feed", "why"),
        lambda peer: peer.query("feed"),
    )
    for call in calls:
        peer = caller(pair, files)
        with pytest.raises(errors):
            call(peer)
        peer.close()
    assert states(pair.hosts["b"], "feed", "destination") == []


# ---------------------------------------------------------------- who is who


@pytest.mark.parametrize("role", [Role.VIEWER, Role.OPERATOR, Role.ADMIN])
def test_no_person_is_an_agent(pair: Cluster, role: Role) -> None:
    is_refused(pair, pair.certificate(f"person-{role}", role), PermissionRefused)


def test_an_agent_that_is_not_allowed(pair: Cluster) -> None:
    files = pair.certificate("stranger", Role.AGENT)
    is_refused(pair, files, PermissionRefused)
    with pytest.raises(PermissionRefused, match="may not send processes here"):
        reserve(pair, caller(pair, files, "stranger"), "feed")


def test_an_agent_can_not_speak_for_another(pair: Cluster) -> None:
    files = pair.certificate("c", Role.AGENT)  # c is in allow_from, too
    with pytest.raises(PermissionRefused, match="can't speak for 'a'"):
        reserve(pair, caller(pair, files, "a"), "feed")


def test_only_the_source_of_a_migration_may_speak_of_it(pair: Cluster) -> None:
    """c is allowed to send processes, and still nothing of a's is its business."""
    ours = caller(pair, pair.certificate("a", Role.AGENT))
    other = caller(pair, pair.certificate("c", Role.AGENT), "c")
    reserve(pair, ours, "cafe")
    for attempt in (
        lambda: other.grant("cafe", b""),
        lambda: other.cancel("cafe", "why"),
        lambda: other.query("cafe"),
    ):
        with pytest.raises(PermissionRefused, match="not c's"):
            attempt()
    assert states(pair.hosts["b"], "cafe", "destination") == ["RESERVED"]
    with pytest.raises(MigrateError, match="known here already"):  # replayed
        reserve(pair, ours, "cafe")
    with pytest.raises(MigrateError, match="not of the copy at hand"):
        ours.grant("cafe", b"a token from another time")
    assert ours.cancel("cafe", "done")
    assert ours.grant("beef", b"").answer is Answer.NO_RECORD  # never a refusal


def test_an_expired_certificate(pair: Cluster) -> None:
    then = datetime.now(UTC) - timedelta(days=400)
    files = issue(pair.authority, "a", Role.AGENT, pair.folder / "expired", now=then)
    is_refused(pair, files, CertificateRejected)


def test_a_revoked_agent_and_its_reservation(pair: Cluster) -> None:
    """Refused at once, on the connection that it has; what it had reserved is given up."""
    files = pair.certificate("d", Role.AGENT)
    peer = caller(pair, files, "d")
    reserve(pair, peer, "dead")
    revoke(pair.authority, "d")
    with pytest.raises(CertificateRejected, match="d was revoked"):
        peer.query("dead")
    is_refused(pair, files, CertificateRejected)
    wait_until(
        lambda: states(pair.hosts["b"], "dead", "destination")[-1] == "ABORTED",
        60,
        "its reservation to end",
    )


def test_the_roles_of_people_on_a_running_agent(pair: Cluster) -> None:
    hosts = load(pair.inventory).hosts

    def as_(role: Role, *command: str) -> int:
        path = pair.folder / f"{role}.toml"
        tls = pair.certificate(f"a-{role}", role)
        path.write_text(to_toml(Inventory(tls=tls, hosts=hosts)))
        return migrate(pair, *command, inventory=path).code

    denied, unknown = PermissionRefused.exit_code, UnknownMigration.exit_code
    decision = ("resolve", "feed", "--owner", "a", "--fenced", "b")
    assert as_(Role.VIEWER, "ps", "a") == 0
    assert as_(Role.VIEWER, "run", "a", "b", "1") == denied
    assert as_(Role.VIEWER, "abort", "feed", "--host", "a") == denied
    assert as_(Role.OPERATOR, "abort", "feed", "--host", "a") == unknown
    assert as_(Role.OPERATOR, *decision) == denied
    assert as_(Role.ADMIN, *decision) == unknown
    assert as_(Role.AGENT, "ps", "a") == denied


# ---------------------------------------------------------------- crowds and secrets


def crowd(port: int, said: bytes, held: list[socket.socket], count: int) -> None:
    for _ in range(count):
        with contextlib.suppress(OSError):
            sock = socket.create_connection(("127.0.0.1", port), 60)
            held.append(sock)
            sock.sendall(said)


def drip(held: list[socket.socket], stop: threading.Event) -> None:
    """A byte now and then from each: busy enough to look alive."""
    while not stop.wait(0.5):
        for sock in list(held):
            with contextlib.suppress(OSError):
                sock.send(b"\x16", socket.MSG_DONTWAIT)


@pytest.mark.timeout(600)
def test_a_thousand_strangers_and_a_migration(pair: Cluster) -> None:
    job = start_job(pair, "a", "crowded")
    source, destination = pair.hosts["a"], pair.hosts["b"]
    agent = destination.agent
    assert agent is not None
    held: list[socket.socket] = []
    stop = threading.Event()
    dripping = threading.Thread(target=drip, args=(held, stop))
    dripping.start()
    try:
        migration = started(pair, "a", "b", str(job.pid), *SLOW)
        wait_state(source, migration, "source", "ACTIVE")
        control = int(destination.address.rpartition(":")[2])
        for port in (control, *listening(agent.pid, control)):
            crowd(port, b"\x16\x03\x01", held, STRANGERS)
        assert len(held) >= STRANGERS
        report = ended(source, migration)
    finally:
        stop.set()
        dripping.join()
        for sock in held:
            sock.close()
    assert (report["status"], report["running"]) == ("completed", "destination"), report
    assert agent.poll() is None
    comes_out_right(pair, job)
    deadline = time.monotonic() + 60
    while len(os.listdir(f"/proc/{agent.pid}/fd")) > 200:
        assert time.monotonic() < deadline, "connections of strangers stay"
        time.sleep(0.5)
    assert migrate(pair, "hosts").code == 0


def listening(pid: int, *known: int) -> list[int]:
    """TCP ports at which a process listens (proc(5)), but for those known."""
    inodes = set()
    for number in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            found = re.fullmatch(r"socket:\[(\d+)\]", os.readlink(f"/proc/{pid}/fd/{number}"))
            inodes.add(found[1] if found else "")
    rows = (line.split() for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:])
    ports = {
        int(row[1].partition(":")[2], 16) for row in rows if row[3] == "0A" and row[9] in inodes
    }
    return sorted(ports - set(known))


def test_secrets_are_nowhere(pair: Cluster) -> None:
    """Keys and session secrets: in no log, journal, argument, environment or title."""
    ours = caller(pair, pair.certificate("a", Role.AGENT))
    got = reserve(pair, ours, "5ec3e7")
    job = start_job(pair, "a", "secretive")
    outcome = migrate(pair, "run", "a", "b", str(job.pid))
    assert outcome.code == 0, outcome.document
    secrets = [form(got.session_secret) for form in (bytes, base64.b64encode, _hex)]
    keys = list(pair.folder.rglob("*.key"))
    for key in keys:
        assert key.stat().st_mode & 0o777 == 0o600, key
        # PKCS #8 of a P-256 key: its private number lies in the first 69 bytes, so in the first
        # two lines. What follows is the public key, which a certificate may well repeat.
        secrets += key.read_bytes().splitlines()[1:3]
    assert len(secrets) > 3
    texts: dict[str, bytes] = {"the report": repr(outcome.document).encode()}
    for path in pair.folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # gone again
            if path.is_file() and path.suffix != ".key":
                texts[str(path)] = path.read_bytes()
    assert any("audit.jsonl" in name for name in texts)
    assert any("journal.db" in name for name in texts)
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        for name in ("cmdline", "environ", "comm"):
            with contextlib.suppress(OSError):
                texts[f"/proc/{pid}/{name}"] = Path(f"/proc/{pid}/{name}").read_bytes()
    for name, text in texts.items():
        for secret in secrets:
            assert secret not in text, name
    ours.cancel("5ec3e7", "done")
    job.finish()


def _hex(data: bytes) -> bytes:
    return data.hex().encode()


def test_who_speaks_no_tls_hears_nothing(pair: Cluster) -> None:
    host, _, port = pair.hosts["b"].address.rpartition(":")
    with socket.create_connection((host, int(port)), 60) as sock:
        sock.settimeout(60)
        with contextlib.suppress(OSError):
            sock.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\x04\0\0\0\0\0" * 10)
            assert b"grpc" not in sock.recv(4096)


def test_a_message_that_is_too_large(pair: Cluster) -> None:
    ours = caller(pair, pair.certificate("a", Role.AGENT))
    with pytest.raises(MigrateError, match=r"RESOURCE_EXHAUSTED|larger than max"):
        ours.cancel("feed", "x" * (65 << 20))
    assert ours.grant("feed", b"").answer is Answer.NO_RECORD


def test_nobody_listens_at_a_port_of_the_past(pair: Cluster) -> None:
    files = pair.certificate("a", Role.AGENT)
    peer = GrpcPeer(
        "b",
        f"127.0.0.1:{free_port()}",
        files,
        source="a",
        source_address="127.0.0.1:1",
        store_id="0" * 32,
    )
    with pytest.raises(AgentUnreachable):
        reserve(pair, peer, "feed")
