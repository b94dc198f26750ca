"""Bad input: each ends with the source running, and with a message, an advice and a code.

One training job is the process that all of them are about. It must make steps after each,
and come out like a twin that nobody ever touched.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from agents.daemon import JOURNAL_FAILED
from migrate import errors
from migrate.errors import MigrateError, by_reason
from migrate.inventory import HostEntry, Inventory, TlsFiles, load, to_toml
from migrate.orchestrator.host import available_memory
from migrate.orchestrator.plan import PROTOCOL
from migrate.rpc.ca import Role, create_ca, issue
from scenarios.cluster import LOOPBACK, AgentSetup, Cluster, SimulatedHost, wait_until
from scenarios.ports import free_port
from tests.integration import wires
from tests.integration.jobs import Job, Outcome, comes_out_right, migrate, start_job
from tests.integration.lookers import (
    at_rest,
    copy_pid,
    ended,
    is_runnable,
    is_there,
    keyed,
    kill_agent,
    started,
    states,
    wait_state,
)
from tests.integration.wires import Wire

# The last one's includes that of the victim's twin.
pytestmark = pytest.mark.timeout(400)

PACE = 0.05  # seconds between steps: the twin of the victim has to make as many
SLOW = ("--bandwidth", "0.1")  # MiB/s: longer than anybody waits


@dataclass
class Field:
    """Host a with the victim, host b behind a wire, and what a test adds."""

    cluster: Cluster
    wire: Wire
    victim: Job

    def run(self, destination: str = "b", *options: str, pid: int | None = None) -> Outcome:
        """``migrate run`` of the victim."""
        number = str(self.victim.pid if pid is None else pid)
        return migrate(self.cluster, "run", "a", destination, number, *options)

    def agent(self, name: str, setup: AgentSetup | None = None) -> SimulatedHost:
        """An agent alone, for what is refused before anybody looks at a GPU."""
        host = SimulatedHost(name, self.cluster.folder / name, self.cluster.hosts["b"].node)
        self.cluster.hosts[name] = host
        return self.cluster.start_agent(name, setup)

    def inventory(self, tls: TlsFiles) -> Path:
        """The inventory with another client certificate."""
        path = self.cluster.folder / "other.toml"
        hosts = load(self.cluster.inventory).hosts
        path.write_text(to_toml(Inventory(tls=tls, hosts=hosts)))
        return path


@pytest.fixture(scope="module")
def whole() -> Iterator[Field]:
    with Cluster.temporary() as cluster:
        cluster.add_host("a")
        port = free_port()
        with Wire(port) as wire:
            settings = {"data_listen": f"{LOOPBACK}:{port}", "data_advertise": wire.address}
            cluster.add_host("b", setup=AgentSetup(settings=settings))
            victim = start_job(cluster, "a", "victim", pace=PACE)
            yield Field(cluster, wire, victim)
            assert comes_out_right(cluster, victim)["pids"] == [victim.pid]


@pytest.fixture
def trouble(whole: Field) -> Iterator[Field]:
    yield whole
    for name in set(whole.cluster.hosts) - {"a", "b"}:
        whole.cluster.remove_host(name)
    whole.wire.alter = wires.unaltered
    at_rest(whole.cluster, "a", whole.victim.pid)
    assert is_there(whole.victim.pid)
    whole.victim.runs_on()


def refused(outcome: Outcome, error: type[MigrateError], *said: str) -> None:
    """The reason and its own exit code, what is wrong, and what to do about it."""
    failure = outcome.failure
    assert failure["reason"] == error.reason, failure
    assert outcome.code == failure["exit_code"] == error.exit_code
    assert failure["advice"]
    for words in said:
        assert words in failure["message"], failure
    if "status" in outcome.document:
        stays(outcome.document)


def stays(report: dict[str, Any]) -> None:
    """A report that says that the process is where it was."""
    assert (report["status"], report["owner"], report["running"]) == ("failed", "source", "source")
    assert report["destination"]["pid"] is None
    assert by_reason(report["failure"]["reason"]).exit_code == report["failure"]["exit_code"]


# ---------------------------------------------------------------- hosts and agents


@pytest.mark.parametrize("names", [("a", "nowhere"), ("nowhere", "b")])
def test_unknown_host(trouble: Field, names: tuple[str, str]) -> None:
    outcome = migrate(trouble.cluster, "run", *names, str(trouble.victim.pid))
    refused(outcome, errors.UnknownHost, "nowhere", "a, b")


def test_same_host_twice(trouble: Field) -> None:
    refused(trouble.run("a"), errors.SameHost, "a is both")


def test_no_agent_answers_at_the_destination(trouble: Field) -> None:
    inventory = load(trouble.cluster.inventory)
    address = f"{LOOPBACK}:{free_port()}"
    hosts = {**inventory.hosts, "down": HostEntry(address=address)}
    path = trouble.cluster.folder / "down.toml"
    path.write_text(to_toml(Inventory(tls=inventory.tls, hosts=hosts)))
    pid = str(trouble.victim.pid)
    outcome = migrate(trouble.cluster, "run", "a", "down", pid, inventory=path)
    refused(outcome, errors.AgentUnreachable, "down", address)
    outcome = migrate(trouble.cluster, "run", "down", "a", pid, inventory=path)
    refused(outcome, errors.AgentUnreachable, "down", address)


def test_operator_of_another_authority(trouble: Field) -> None:
    folder = trouble.cluster.folder / "strange"
    ca = create_ca(folder / "ca")
    mine = trouble.cluster.certificate("operator", Role.OPERATOR)
    tls = issue(ca, "operator", Role.OPERATOR, folder / "tls")
    # It trusts the agents, and they don't trust it; then neither trusts the other.
    for files in (TlsFiles(ca=mine.ca, cert=tls.cert, key=tls.key), tls):
        pid = str(trouble.victim.pid)
        path = trouble.inventory(files)
        outcome = migrate(trouble.cluster, "run", "a", "b", pid, inventory=path)
        refused(outcome, errors.CertificateRejected, "authority")


def test_operator_with_an_expired_certificate(trouble: Field) -> None:
    then = datetime.now(UTC) - timedelta(days=400)
    folder = trouble.cluster.folder / "expired"
    tls = issue(trouble.cluster.authority, "operator", Role.OPERATOR, folder, now=then)
    path, pid = trouble.inventory(tls), str(trouble.victim.pid)
    outcome = migrate(trouble.cluster, "run", "a", "b", pid, inventory=path)
    refused(outcome, errors.CertificateRejected, "expired", tls.cert)


def test_a_viewer_may_not_run(trouble: Field) -> None:
    path = trouble.inventory(trouble.cluster.certificate("looker", Role.VIEWER))
    pid = str(trouble.victim.pid)
    outcome = migrate(trouble.cluster, "run", "a", "b", pid, inventory=path)
    refused(outcome, errors.PermissionRefused, "looker", "viewer", "operator")
    assert migrate(trouble.cluster, "ps", "a", inventory=path).code == 0


def test_destination_of_another_authority(trouble: Field) -> None:
    folder = trouble.cluster.folder / "other-authority"
    tls = issue(create_ca(folder / "ca"), "other", Role.AGENT, folder, hosts=[LOOPBACK])
    trouble.agent("other", AgentSetup(tls=tls))
    refused(trouble.run("other"), errors.CertificateRejected, "other", "authority")


def test_certificate_of_the_destination_that_expires_while_it_runs(trouble: Field) -> None:
    ca, folder = trouble.cluster.authority, trouble.cluster.folder / "short"
    for seconds in (4, 20, 80):  # a busy machine may take longer to start the agent
        life = timedelta(seconds=seconds)
        end = datetime.now(UTC) + life
        tls = issue(ca, "short", Role.AGENT, folder, hosts=[LOOPBACK], lifetime=life)
        with contextlib.suppress(RuntimeError):
            trouble.agent("short", AgentSetup(tls=tls))
            break
    wait_until(lambda: datetime.now(UTC) > end + timedelta(seconds=1), 100, "its expiry")
    refused(trouble.run("short"), errors.CertificateRejected, "short", "expired")


def test_an_agent_does_not_start_with_an_expired_certificate(trouble: Field) -> None:
    folder = trouble.cluster.folder / "late"
    then = datetime.now(UTC) - timedelta(days=400)
    tls = issue(trouble.cluster.authority, "late", Role.AGENT, folder, now=then)
    with pytest.raises(RuntimeError, match="expired"):
        trouble.agent("late", AgentSetup(tls=tls))
    del trouble.cluster.hosts["late"]


def test_source_that_the_destination_does_not_list(trouble: Field) -> None:
    trouble.agent("closed", AgentSetup(settings={"allow_from": ["c"]}))
    outcome = trouble.run("closed")
    refused(outcome, errors.PermissionRefused, "a may not send")
    assert "allow_from" in outcome.failure["advice"]


def test_another_version_of_the_protocol(trouble: Field) -> None:
    prelude = "import migrate.orchestrator.plan as plan\nplan.PROTOCOL += 1"
    trouble.agent("newer", AgentSetup(prelude=prelude))
    refused(
        trouble.run("newer"), errors.ProtocolMismatch, f"protocol {PROTOCOL}", str(PROTOCOL + 1)
    )


# ---------------------------------------------------------------- the process


def test_pid_that_is_gone(trouble: Field) -> None:
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    refused(trouble.run(pid=done.pid), errors.NoSuchProcess, str(done.pid))


@pytest.mark.parametrize("pid", ["0", "-1", "x", str(1 << 40)])
def test_pid_that_is_none(trouble: Field, pid: str) -> None:
    outcome = migrate(trouble.cluster, "run", "a", "b", "--", pid)
    refused(outcome, errors.UsageError)


def test_process_without_kfd(trouble: Field) -> None:
    refused(trouble.run(pid=os.getpid()), errors.NotKfdProcess, str(os.getpid()), "kfd")


# Python may lie in a home folder, so the other user keeps CAP_DAC_READ_SEARCH (2) alone:
# PR_SET_KEEPCAPS, capset(2), PR_SET_DUMPABLE, PR_CAP_AMBIENT_RAISE for the children.
AS_ANOTHER_USER = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
libc.prctl(8, 1, 0, 0, 0)
os.setgroups([]); os.setgid({user}); os.setuid({user})
header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)(4, 4, 4)
assert libc.capset(header, data) == 0, os.strerror(ctypes.get_errno())
libc.prctl(4, 1, 0, 0, 0)
assert libc.prctl(47, 2, 2, 0, 0) == 0, os.strerror(ctypes.get_errno())
"""


def test_process_of_another_user(trouble: Field) -> None:
    """The agent is another user than the process; where nobody can be that, pid 1 is one."""
    if os.geteuid():
        refused(trouble.run(pid=1), errors.ForeignProcess, "process 1 ")
        return
    nobody = 65534
    folder = trouble.cluster.folder / "nobody"
    prelude = AS_ANOTHER_USER.format(user=nobody)
    files = issue(trouble.cluster.authority, "nobody", Role.AGENT, folder, hosts=[LOOPBACK])
    (folder / "ca.crt").write_bytes(Path(files.ca).read_bytes())
    tls = TlsFiles(ca=str(folder / "ca.crt"), cert=files.cert, key=files.key)
    for path in (folder, *folder.iterdir()):
        os.chown(path, nobody, nobody)
    trouble.cluster.folder.chmod(0o711)
    trouble.agent("nobody", AgentSetup(tls=tls, prelude=prelude))
    for pid in (1, trouble.victim.pid):
        outcome = migrate(trouble.cluster, "run", "nobody", "b", str(pid))
        refused(outcome, errors.ForeignProcess, f"process {pid} ", "user 0")


def test_two_migrations_of_one_process(trouble: Field) -> None:
    first = started(trouble.cluster, "a", "b", str(trouble.victim.pid), *SLOW)
    wait_state(trouble.cluster.hosts["a"], first, "source", "ACTIVE")
    refused(trouble.run(), errors.AgentBusy, first, str(trouble.victim.pid))
    assert migrate(trouble.cluster, "abort", first).code == 0
    report = ended(trouble.cluster.hosts["a"], first)
    assert (report["status"], report["owner"]) == ("cancelled", "source")


@pytest.mark.parametrize("precopy", [True, False], ids=["pre-copy", "final-round"])
def test_process_that_exits_in_the_middle(whole: Field, precopy: bool) -> None:
    cluster = whole.cluster
    job = start_job(cluster, "a", f"exits-{precopy}")
    options = () if precopy else ("--no-precopy",)
    migration = started(cluster, "a", "b", str(job.pid), *SLOW, *options)
    wait_state(cluster.hosts["a"], migration, "source", "ACTIVE" if precopy else "DEVICE")
    if not precopy:
        wait_until(lambda: not is_runnable(job.pid), what="the process to be frozen")
    job.started.kill()
    report = ended(cluster.hosts["a"], migration)
    assert report["failure"]["reason"] == errors.ProcessExited.reason
    assert (report["status"], report["running"]) == ("failed", "nowhere")
    assert str(job.pid) in report["failure"]["message"]
    # Its reservation over there is gone, and nothing was built from half of it.
    wait_state(cluster.hosts["b"], migration, "destination", "ABORTED")
    assert not is_there(copy_pid(cluster.hosts["b"], migration))


def test_buffers_made_and_freed_in_the_middle(whole: Field) -> None:
    """Nothing is refused: what was freed is forgotten, what is new is sent."""
    log, end = whole.cluster.folder / "churn.log", whole.cluster.folder / "churn.end"
    command = ["-m", "tests.integration.churn", "--log", str(log), "--until", str(end)]

    def lines() -> int:
        return log.read_bytes().count(b"\n") if log.exists() else 0

    program = whole.cluster.workload("a", command)
    wait_until(lambda: lines() > 10, what="buffers")
    outcome = whole.run("b", "--bandwidth", "20", "--max-rounds", "3", pid=program.pid)
    assert outcome.code == 0, outcome.document
    assert len(outcome.document["rounds"]) > 1
    before = lines()
    wait_until(lambda: lines() > before + 20, what="buffers after the move")
    end.touch()
    wait_until(lambda: log.read_bytes().endswith(b"ok\n"), what="every buffer to be checked")


# ---------------------------------------------------------------- the destination


@pytest.mark.parametrize(
    ("name", "profile", "options", "error", "said"),
    [
        ("other-gpus", "w7900x2", (), errors.NoGpuMap, "gfx"),
        ("fewer", "mi210x2", ("--gpus", "1"), errors.VisibleGpus, "2 GPUs"),
        ("more", "mi100x4", (), errors.VisibleGpus, "4"),
        ("small", "mi210x2", ("--vram", str(1 << 20)), errors.InsufficientVram, "VRAM"),
    ],
)
def test_destination_that_does_not_fit(
    trouble: Field,
    name: str,
    profile: str,
    options: tuple[str, ...],
    error: type[MigrateError],
    said: str,
) -> None:
    trouble.cluster.add_host(name, profile, node_options=options)
    refused(trouble.run(name), error, said)


def test_destination_with_too_little_host_memory(own_cluster: Cluster) -> None:
    """A buffer larger than this machine's memory; it is sparse, nobody fills it."""
    size = (available_memory() * 2) >> 21 << 21
    for name in ("a", "b"):
        own_cluster.add_host(name, node_options=("--vram", str(2 * size)))
    log, end = own_cluster.folder / "hold.log", own_cluster.folder / "hold.end"
    command = ["-m", "tests.integration.churn", "--log", str(log), "--until", str(end)]
    program = own_cluster.workload("a", [*command, "--hold", str(size)])
    wait_until(lambda: log.exists() and b"holds" in log.read_bytes(), what="the buffer")
    outcome = migrate(own_cluster, "run", "a", "b", str(program.pid))
    refused(outcome, errors.InsufficientMemory, "b", "staging")
    size_before = log.stat().st_size
    wait_until(lambda: log.stat().st_size > size_before, what="the program to run on")


# ---------------------------------------------------------------- the journal


@contextmanager
def no_room(cluster: Cluster, name: str) -> Iterator[subprocess.Popen[bytes]]:
    """The agent's journal can't grow any more; afterwards it can, and the agent runs.

    Unlike a full disk (ENOSPC) a limit (EFBIG) is an I/O error to SQLite: the agent may not
    go on with a journal that it does not know, and a service manager starts it again.
    Smaller files can grow, as memory in memfds must.
    """
    host = cluster.hosts[name]
    agent = host.agent
    assert agent is not None
    size = (Path(host.paths.run) / "journal.db-wal").stat().st_size
    _, hard = resource.prlimit(agent.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(agent.pid, resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield agent
    finally:
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(agent.pid, resource.RLIMIT_FSIZE, (hard, hard))
        if agent.poll() is not None:
            assert agent.returncode == JOURNAL_FAILED
            cluster.start_agent(name)


NO_ROOM = {
    error.reason
    for error in (
        errors.JournalUnusable,
        errors.AgentUnreachable,
        errors.PeerLost,
        errors.StreamBroken,
        errors.MigrationFailed,
    )
}


def test_journal_without_room_at_the_source(trouble: Field) -> None:
    with no_room(trouble.cluster, "a"):
        outcome = trouble.run()
        assert outcome.failure["reason"] in NO_ROOM, outcome.document
        assert outcome.code == by_reason(outcome.failure["reason"]).exit_code


def test_journal_without_room_at_the_source_in_the_middle(trouble: Field) -> None:
    source = trouble.cluster.hosts["a"]
    migration = started(trouble.cluster, "a", "b", str(trouble.victim.pid), "--bandwidth", "2")
    wait_state(source, migration, "source", "ACTIVE")
    with no_room(trouble.cluster, "a") as agent:
        wait_until(lambda: agent.poll() is not None, 60, "the agent to end")
        trouble.victim.runs_on()
    report = ended(source, migration)
    assert report["failure"]["reason"] in NO_ROOM
    stays(report)


@pytest.mark.parametrize("middle", [False, True], ids=["at-once", "in-the-middle"])
def test_journal_without_room_at_the_destination(trouble: Field, middle: bool) -> None:
    source, pid = trouble.cluster.hosts["a"], str(trouble.victim.pid)
    options = ("--bandwidth", "2", "--max-rounds", "1", "--patience", "2")
    if middle:
        migration = started(trouble.cluster, "a", "b", pid, *options)
        wait_state(source, migration, "source", "ACTIVE")
    with no_room(trouble.cluster, "b"):
        if not middle:
            migration = started(trouble.cluster, "a", "b", pid, *options)
        report = ended(source, migration)
    assert report["failure"]["reason"] in NO_ROOM
    stays(report)


def test_damaged_journal(trouble: Field) -> None:
    """The agent says so and does not start: what it would not know, it might do twice."""
    host = trouble.agent("damaged")
    kill_agent(host)
    journal = Path(host.paths.run) / "journal.db"
    for extra in ("-wal", "-shm"):
        journal.with_name(journal.name + extra).unlink(missing_ok=True)
    journal.write_bytes(b"this was a journal" * 1000)
    command = [sys.executable, "-m", "migrate", "agent", "serve"]
    command += ["--config", str(trouble.cluster.folder / "damaged.toml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == errors.JournalUnusable.exit_code
    assert str(journal) in done.stderr
    assert "Traceback" not in done.stderr
    refused(trouble.run("damaged"), errors.AgentUnreachable, "damaged")


# ---------------------------------------------------------------- the wire


@pytest.mark.parametrize("alter", [wires.flip(70_000), wires.cut(70_000)], ids=["flip", "cut"])
def test_streams_that_are_always_damaged(trouble: Field, alter: wires.Alter) -> None:
    trouble.wire.alter = alter
    outcome = trouble.run("b", "--patience", "1")
    refused(outcome, errors.StreamBroken, "no progress")
    # Preflight's sample fails, so that nothing is reserved and nothing is stopped.
    assert not states(trouble.cluster.hosts["b"], outcome.document["id"], "destination")
    assert "DEVICE" not in states(trouble.cluster.hosts["a"], outcome.document["id"], "source")


# ---------------------------------------------------------------- the person


def test_ctrl_c_detaches_and_the_migration_goes_on(whole: Field) -> None:
    cluster = whole.cluster
    job = start_job(cluster, "a", "watched")
    command = [sys.executable, "-m", "migrate", "--inventory", str(cluster.inventory)]
    command += ["run", "a", "b", str(job.pid), "--bandwidth", "2", "--idempotency-key", "watched"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL) as cli:
        source = cluster.hosts["a"]
        migration = keyed(source, "watched")
        assert cli.stderr is not None
        assert migration in cli.stderr.readline().decode()  # from now on it watches
        wait_state(source, migration, "source", "ACTIVE")
        cli.send_signal(signal.SIGINT)
        said = cli.stderr.read().decode()
        assert cli.wait(100) == errors.Interrupted.exit_code, said
        assert f"detached; migration {migration} goes on" in said
    report = ended(source, migration)
    assert (report["status"], report["running"]) == ("completed", "destination"), report["failure"]
    comes_out_right(cluster, job)
