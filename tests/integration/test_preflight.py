"""What preflight can see does not fail after the freeze: each reason, provoked on real processes.

Every test makes one condition. ``migrate check`` must report it, and ``migrate run`` must
refuse with it while nothing was frozen: the journal of the source never says DEVICE. These
hosts run the reexec engine; what only concerns processes that are moved whole is in
test_preflight_whole.py.
"""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from migrate import errors
from migrate.errors import by_reason
from migrate.inventory import HostEntry, Inventory, TlsFiles, load, to_toml
from migrate.kfd import uapi
from migrate.orchestrator.host import available_memory
from migrate.preflight.catalogue import BLOCKERS
from migrate.preflight.notes import NOTES
from migrate.rpc.ca import Role, create_ca, issue
from scenarios.cluster import LOOPBACK, AgentSetup, Cluster, SimulatedHost, wait_until
from scenarios.ports import free_port
from tests.conformance import image as raw
from tests.conformance.image import Buffers
from tests.conformance.kit import VRAM
from tests.conformance.tracer import held
from tests.integration import wires
from tests.integration.jobs import Job, migrate, start_job
from tests.integration.lookers import at_rest, states
from tests.integration.test_bad_input import AS_ANOTHER_USER

KNOWN = {cls.reason for cls in BLOCKERS}
provokes = pytest.mark.provokes
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts and other users need root")

# The agent in a mount namespace of its own, with nothing but an empty tmpfs at {target}.
MOUNTED = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
assert libc.unshare(0x00020000) == 0, os.strerror(ctypes.get_errno())
assert libc.mount(b"none", b"/", None, 0x44000, None) == 0, os.strerror(ctypes.get_errno())
assert libc.mount(b"none", {target!r}, b"tmpfs", 0, {options!r}) == 0, ctypes.get_errno()
"""


@dataclass
class Field:
    """Host a with a job, host b where it could go, and what a test adds."""

    cluster: Cluster
    job: Job

    def agent(self, name: str, setup: AgentSetup) -> str:
        """Another agent of host b's node."""
        host = SimulatedHost(name, self.cluster.folder / name, self.cluster.hosts["b"].node)
        host.root.mkdir()
        for part in ("kfd", "dri", "sys", "drm"):
            (host.root / part).symlink_to(self.cluster.hosts["b"].root / part)
        self.cluster.hosts[name] = host
        self.cluster.start_agent(name, setup)
        return name

    def refuses(
        self,
        reason: str,
        destination: str = "b",
        *options: str,
        source: str = "a",
        pid: int | None = None,
        inventory: Path | None = None,
    ) -> list[str]:
        """The reasons that check gives, *reason* among them; run gives the same, and stops.

        Neither prints anything else than its one document, whatever is wrong.
        """
        names = (source, destination, str(pid or self.job.pid))
        found = migrate(self.cluster, "check", *names, *options, inventory=inventory)
        reasons = [blocker["reason"] for blocker in found.document["blockers"]]
        assert reason in reasons, found.document
        assert set(reasons) <= KNOWN
        assert found.code == by_reason(reasons[0]).exit_code
        assert all(b["advice"] and b["message"] for b in found.document["blockers"])

        ran = migrate(self.cluster, "run", *names, *options, inventory=inventory)
        report = ran.document
        assert sorted(b["reason"] for b in report["blockers"]) == sorted(reasons), report
        assert (report["failure"]["reason"], ran.code) == (reasons[0], found.code)
        assert (report["status"], report["owner"], report["running"]) == (
            "failed",
            "source",
            "source",
        )
        assert report["downtime"] is None
        assert "DEVICE" not in states(self.cluster.hosts[source], report["id"], "source")
        at_rest(self.cluster, source, pid or self.job.pid)
        return reasons


@pytest.fixture(scope="module")
def whole() -> Iterator[Field]:
    with Cluster.temporary() as cluster:
        cluster.add_host("a", node_options=("--svm",))
        cluster.add_host("b", node_options=("--svm",))
        job = start_job(cluster, "a", "job", pace=0.05)
        yield Field(cluster, job)
        assert job.finish()["pids"] == [job.pid]


@pytest.fixture
def field(whole: Field) -> Iterator[Field]:
    yield whole
    for name in set(whole.cluster.hosts) - {"a", "b"}:
        whole.cluster.remove_host(name)
    whole.job.runs_on()


def troubled(cluster: Cluster, kind: str, *arguments: str) -> subprocess.Popen[bytes]:
    """A program of tests.integration.troubled at host a, once its trouble is there."""
    said = cluster.folder / f"{kind}.out"
    command = ["-m", "tests.integration.troubled", kind, *arguments]
    with said.open("wb") as output:
        program = cluster.workload("a", command, output=output)
    wait_until(
        lambda: said.read_bytes() == b"ready\n" or program.poll() is not None, 60, f"{kind} to be"
    )
    assert program.poll() is None, said.read_text()
    return program


# ---------------------------------------------------------------- nothing is wrong


def test_a_job_that_can_move_is_only_looked_at(field: Field) -> None:
    """And the prediction is of a real sample; nothing is left of it at either host."""
    names = ("a", "b", str(field.job.pid))
    before = migrate(field.cluster, "history", "a").document
    found = migrate(field.cluster, "check", *names)
    assert found.code == 0
    assert found.document["blockers"] == []
    predicted = found.document["prediction"]
    assert predicted["sampled"] > 0
    assert predicted["rate"] > 0
    assert 0 < predicted["downtime"] < predicted["seconds"]
    assert len(found.document["gpu_map"]) == 2
    same = migrate(field.cluster, "run", *names, "--dry-run")
    assert same.code == 0
    assert same.document["schema"] == "migrate.check/1"
    assert migrate(field.cluster, "history", "a").document == before


def test_a_viewer_may_not_check(field: Field) -> None:
    """It stops the process for a moment."""
    tls = field.cluster.certificate("looker", Role.VIEWER)
    path = _inventory(field.cluster, tls)
    names = ("a", "b", str(field.job.pid))
    refused = migrate(field.cluster, "check", *names, inventory=path)
    assert refused.failure["reason"] == errors.PermissionRefused.reason


def test_nothing_to_be_checked(field: Field) -> None:
    """These fail alone."""
    for arguments, error in (
        (("a", "b", str(2**22 - 1)), errors.NoSuchProcess),
        (("a", "b", str(os.getpid())), errors.NotKfdProcess),
        (("a", "a", str(field.job.pid)), errors.SameHost),
        (("a", "nowhere", str(field.job.pid)), errors.UnknownHost),
    ):
        outcome = migrate(field.cluster, "check", *arguments)
        assert outcome.failure["reason"] == error.reason
        assert outcome.code == error.exit_code


# ---------------------------------------------------------------- the process


def test_an_option_that_the_engine_has_not_got(field: Field) -> None:
    assert field.refuses("ENGINE_UNSUPPORTED", "b", "--tcp-close") == ["ENGINE_UNSUPPORTED"]
    # The agent has dialled b and ends all the same when it is told to.
    field.cluster.kill_agent("a", signal.SIGTERM)
    field.cluster.start_agent("a")


@provokes("SVM_UNSUPPORTED")
@provokes("ENGINE_UNSUPPORTED")
def test_svm_ranges_and_no_runtime(field: Field) -> None:
    """Both are said at once, though the first alone would do."""
    program = troubled(field.cluster, "svm")
    reasons = field.refuses("SVM_UNSUPPORTED", pid=program.pid)
    assert "ENGINE_UNSUPPORTED" in reasons
    program.kill()


@provokes("SHARED_BUFFER")
def test_an_event_page_that_two_processes_have(field: Field) -> None:
    program = troubled(field.cluster, "shared")
    assert field.refuses("SHARED_BUFFER", pid=program.pid) == ["SHARED_BUFFER"]
    program.kill()


def test_a_buffer_that_a_stranger_has_mapped(field: Field) -> None:
    """The stranger is this process; it is named, and the job moves when it has let go."""
    with held(field.job.pid, field.cluster.hosts["a"].paths) as file:
        counts = raw.process_info(file)
        try:
            found = Buffers(counts)
            raw.criu(file, uapi.KFD_CRIU_OP_CHECKPOINT, **found.fields)
        finally:
            raw.unpause(file)
    bucket = next(b for b in found.bos if b.alloc_flags & VRAM)
    with mmap.mmap(bucket.dmabuf_fd, bucket.size):
        found.close()
        assert field.refuses("SHARED_BUFFER") == ["SHARED_BUFFER"]
        names = ("a", "b", str(field.job.pid))
        (blocker,) = migrate(field.cluster, "check", *names).document["blockers"]
        assert f"process {os.getpid()} (" in blocker["message"]
        assert f"{bucket.size} bytes" in blocker["message"]
    assert migrate(field.cluster, "check", *names).document["blockers"] == []


@provokes("GPU_WITHOUT_VM")
def test_a_visible_gpu_without_vm(field: Field) -> None:
    """The kernel is not asked: PROCESS_INFO and UNPAUSE would oops it."""
    program = troubled(field.cluster, "no_vm")
    field.refuses("GPU_WITHOUT_VM", pid=program.pid)
    program.kill()
    for host in field.cluster.hosts.values():
        log = host.root / "run" / "kernel.log"
        assert not log.exists() or log.read_text() == ""


@provokes("ALREADY_TRACED")
def test_a_debugger(field: Field) -> None:
    program = troubled(field.cluster, "tracer", str(field.job.pid))
    assert field.refuses("ALREADY_TRACED") == ["ALREADY_TRACED"]
    program.kill()
    program.wait()


# Neither this process nor those that it starts have CAP_SYS_ADMIN and CAP_CHECKPOINT_RESTORE.
WEAK = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
for number in (21, 40):
    assert libc.prctl(24, number, 0, 0, 0) == 0, os.strerror(ctypes.get_errno())
"""


@needs_root
@provokes("MISSING_CAPABILITY")
def test_an_agent_without_the_capability(field: Field) -> None:
    """Its helpers are those that ask KFD."""
    cluster = field.cluster
    cluster.add_host("strict", allow_unprivileged=False, setup=AgentSetup(prelude=WEAK))
    job = start_job(cluster, "strict", "strict")
    field.refuses("MISSING_CAPABILITY", source="strict", pid=job.pid)
    job.finish()


# ---------------------------------------------------------------- the other host


def _inventory(cluster: Cluster, tls: TlsFiles | None = None, **hosts: str) -> Path:
    known = load(cluster.inventory)
    more = {name: HostEntry(address=address) for name, address in hosts.items()}
    path = cluster.folder / "other.toml"
    path.write_text(to_toml(Inventory(tls=tls or known.tls, hosts={**known.hosts, **more})))
    return path


@provokes("AGENT_UNREACHABLE")
def test_no_agent(field: Field) -> None:
    down = _inventory(field.cluster, down=f"{LOOPBACK}:{free_port()}")
    field.refuses("AGENT_UNREACHABLE", "down", inventory=down)


@provokes("CERTIFICATE_REJECTED")
def test_an_agent_of_another_authority(field: Field) -> None:
    ca = create_ca(field.cluster.folder / "other-ca")
    tls = issue(ca, "alien", Role.AGENT, field.cluster.folder / "other-tls", hosts=[LOOPBACK])
    field.refuses("CERTIFICATE_REJECTED", field.agent("alien", AgentSetup(tls=tls)))


@provokes("PERMISSION_REFUSED")
def test_a_destination_that_allows_nobody(field: Field) -> None:
    setup = AgentSetup(settings={"allow_from": []})
    field.refuses("PERMISSION_REFUSED", field.agent("closed", setup))


@provokes("PROTOCOL_MISMATCH")
def test_another_protocol(field: Field) -> None:
    prelude = "import migrate.orchestrator.plan as plan\nplan.PROTOCOL += 1"
    field.refuses("PROTOCOL_MISMATCH", field.agent("later", AgentSetup(prelude=prelude)))


@pytest.mark.parametrize(
    ("reason", "profile", "options"),
    [
        pytest.param("NO_GPU_MAP", "w7900x2", (), marks=provokes("NO_GPU_MAP")),
        pytest.param("VISIBLE_GPUS", "mi100x4", (), marks=provokes("VISIBLE_GPUS")),
        pytest.param(
            "INSUFFICIENT_VRAM",
            "mi210x2",
            ("--vram", str(1 << 20)),
            marks=provokes("INSUFFICIENT_VRAM"),
        ),
        pytest.param(
            "PRIVATE_DATA_LAYOUT",
            "mi210x2",
            ("--bo-record", "272"),
            marks=provokes("PRIVATE_DATA_LAYOUT"),
        ),
    ],
)
def test_gpus_that_do_not_fit(
    field: Field, reason: str, profile: str, options: tuple[str, ...]
) -> None:
    name = reason.lower().replace("_", "-")
    field.cluster.add_host(name, profile, node_options=options)
    field.refuses(reason, name)


@provokes("KFD_UNAVAILABLE")
def test_a_destination_without_kfd(field: Field) -> None:
    name = field.agent("kfdless", AgentSetup())
    (field.cluster.hosts[name].root / "kfd").unlink()
    field.refuses("KFD_UNAVAILABLE", name)


@provokes("INSUFFICIENT_MEMORY")
def test_too_little_host_memory(own_cluster: Cluster) -> None:
    """A sparse buffer that is larger than this machine's memory."""
    size = (available_memory() * 2) >> 21 << 21
    for name in ("a", "b"):
        own_cluster.add_host(name, node_options=("--vram", str(2 * size)))
    log, end = own_cluster.folder / "hold.log", own_cluster.folder / "hold.end"
    command = ["-m", "tests.integration.churn", "--log", str(log), "--until", str(end)]
    program = own_cluster.workload("a", [*command, "--hold", str(size)])
    wait_until(lambda: log.exists() and b"holds" in log.read_bytes(), what="the buffer")
    job = Job(program.pid, log, log, program, end)
    Field(own_cluster, job).refuses("INSUFFICIENT_MEMORY")


@needs_root
@provokes("INSUFFICIENT_DISK")
def test_a_full_disk(field: Field) -> None:
    folder = field.cluster.folder / "full" / "run"
    folder.mkdir(parents=True)
    prelude = MOUNTED.format(target=bytes(folder), options=b"size=4m")
    host = SimulatedHost("full", folder.parent, field.cluster.hosts["b"].node)
    for part in ("kfd", "dri", "sys", "drm"):
        (host.root / part).symlink_to(field.cluster.hosts["b"].root / part)
    field.cluster.hosts["full"] = host
    field.cluster.start_agent("full", AgentSetup(prelude=prelude))
    field.refuses("INSUFFICIENT_DISK", "full")


@needs_root
@provokes("FILE_MISSING")
def test_a_folder_that_is_not_there(field: Field) -> None:
    """The job's folder is hidden from the destination's agent, as on another machine."""
    place = field.cluster.folder / "place"
    (place / "inner").mkdir(parents=True)
    end = field.cluster.folder / "placed.end"
    log, result = field.cluster.folder / "placed.log", field.cluster.folder / "placed.json"
    with (place / "inner" / "out").open("wb") as output:
        program = field.cluster.workload(
            "a",
            [
                "-m", "scenarios.workloads.train", "--vram", "4194304", "--pace", "0.05",
                "--until", str(end), "--log", str(log), "--result", str(result),
            ],
            output=output,
        )  # fmt: skip
    job = Job(program.pid, log, result, program, end)
    job.wait_steps(2)
    # A folder of the same name above it: what is below is not there for this agent alone.
    prelude = MOUNTED.format(target=bytes(place), options=b"size=1m")
    name = field.agent("bare", AgentSetup(prelude=prelude))
    field.refuses("FILE_MISSING", name, pid=job.pid)
    job.finish()


@needs_root
@provokes("USER_MISSING")
def test_an_agent_of_another_user(field: Field) -> None:
    """The copy would run as somebody else."""
    nobody = 65534
    folder = field.cluster.folder / "nobody"
    files = issue(field.cluster.authority, "nobody", Role.AGENT, folder, hosts=[LOOPBACK])
    (folder / "ca.crt").write_bytes(Path(files.ca).read_bytes())
    for part in ("kfd", "dri", "sys", "drm"):
        (folder / part).symlink_to(field.cluster.hosts["b"].root / part)
    for path in (folder, *(p for p in folder.iterdir() if not p.is_symlink())):
        os.chown(path, nobody, nobody)
    field.cluster.folder.chmod(0o711)
    field.cluster.hosts["b"].root.chmod(0o755)
    (field.cluster.hosts["b"].root / "kfd").chmod(0o666)
    host = SimulatedHost("nobody", folder, field.cluster.hosts["b"].node)
    field.cluster.hosts["nobody"] = host
    tls = TlsFiles(ca=str(folder / "ca.crt"), cert=files.cert, key=files.key)
    prelude = AS_ANOTHER_USER.format(user=nobody)
    field.cluster.start_agent("nobody", AgentSetup(tls=tls, prelude=prelude))
    field.refuses("USER_MISSING", "nobody")


# ---------------------------------------------------------------- the link


@provokes("DATA_PORT_UNREACHABLE")
def test_a_data_port_behind_a_firewall(field: Field) -> None:
    settings = {"data_advertise": f"{LOOPBACK}:{free_port()}"}
    field.refuses("DATA_PORT_UNREACHABLE", field.agent("walled", AgentSetup(settings=settings)))


@provokes("STREAM_BROKEN")
def test_a_link_that_damages_everything(field: Field) -> None:
    port = free_port()
    with wires.Wire(port) as wire:
        settings = {"data_listen": f"{LOOPBACK}:{port}", "data_advertise": wire.address}
        name = field.agent("noisy", AgentSetup(settings=settings))
        wire.alter = wires.flip(70_000)
        names = ("a", name, str(field.job.pid))
        found = migrate(field.cluster, "check", *names)
        assert [b["reason"] for b in found.document["blockers"]] == ["STREAM_BROKEN"]
        ran = migrate(field.cluster, "run", *names, "--patience", "1", "--no-precopy")
        assert ran.failure["reason"] == "STREAM_BROKEN"
        assert "DEVICE" not in states(field.cluster.hosts["a"], ran.document["id"], "source")
        at_rest(field.cluster, "a", field.job.pid)


# ---------------------------------------------------------------- warnings


def warned(field: Field, reason: str, destination: str, *options: str) -> str:
    """The message of a warning, which forbids nothing."""
    assert reason in {note.reason for note in NOTES}
    found = migrate(field.cluster, "check", "a", destination, str(field.job.pid), *options)
    assert found.code == 0
    warnings: dict[str, str] = {w["reason"]: w["message"] for w in found.document["warnings"]}
    assert reason in warnings, found.document
    return warnings[reason]


@provokes("DOWNTIME_LIMIT")
def test_a_downtime_that_can_not_be_kept(field: Field) -> None:
    assert "0.001 s were asked for" in warned(
        field, "DOWNTIME_LIMIT", "b", "--max-downtime", "0.001"
    )


@provokes("CLOCK_SKEW")
def test_a_clock_that_is_wrong(field: Field) -> None:
    prelude = (
        "import agents.destination as d, time, types\n"
        "d.time = types.SimpleNamespace(time=lambda: time.time() + 3600)"
    )
    message = warned(field, "CLOCK_SKEW", field.agent("ahead", AgentSetup(prelude=prelude)))
    assert "off by 3" in message


@provokes("LOW_MEMORY")
def test_a_destination_that_would_be_nearly_full(field: Field) -> None:
    """How much must be left is set so high that no machine has it."""
    prelude = "import migrate.orchestrator.preflight as p\np.MEMORY_RESERVE = 1 << 60"
    name = field.agent("tight", AgentSetup(prelude=prelude))
    assert "will be in use" in warned(field, "LOW_MEMORY", name)


@provokes("LINK_UNMEASURED")
def test_too_many_samples_at_once(field: Field) -> None:
    prelude = "import agents.destination as d\nd.MAX_SAMPLES = 0"
    name = field.agent("shy", AgentSetup(prelude=prelude))
    assert "takes no sample" in warned(field, "LINK_UNMEASURED", name)


# ---------------------------------------------------------------- the prediction


def test_the_report_has_the_prediction_beside_what_came_true(own_cluster: Cluster) -> None:
    for name in ("a", "b"):
        own_cluster.add_host(name)
    job = start_job(own_cluster, "a", "predicted")
    report = migrate(own_cluster, "run", "a", "b", str(job.pid)).document
    assert report["status"] == "completed", report
    assert report["blockers"] == []
    predicted = report["prediction"]
    assert predicted["sampled"] > 0
    assert predicted["seconds"] > predicted["downtime"] > 0
    assert report["downtime"]["seconds"] > 0
    # Its fixed part and its rates are now those of that migration, not guesses.
    second = start_job(own_cluster, "a", "second")
    found = migrate(own_cluster, "check", "a", "b", str(second.pid)).document["prediction"]
    down = report["downtime"]
    fixed = sum(down[part] for part in ("stop", "checkpoint", "build", "engine", "handover"))
    assert found["downtime"] >= fixed
    job.finish()
    second.finish()
