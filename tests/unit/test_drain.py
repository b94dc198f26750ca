"""The policy of a drain, against agents that do as they are told, in a time of their own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest

from migrate.client import HostInfo
from migrate.drain.drain import Drain, Summary, Time
from migrate.drain.policy import Breaker, Policy, Verdict, verdict
from migrate.drain.state import Member, State, StateFile
from migrate.drain.trees import trees
from migrate.errors import (
    AgentBusy,
    AgentUnreachable,
    FreezeTimeout,
    InsufficientMemory,
    MigrateError,
    NoSuchProcess,
    OwnerUnknown,
    SvmUnsupported,
    UnknownMigration,
    UsageError,
)
from migrate.orchestrator.figures import failure
from migrate.orchestrator.plan import Options
from migrate.report import End, ProcessRow, Report
from migrate.status import Owner, Status
from migrate.topology.model import Topology
from tests.unit.topology_kit import GIB, gpu

Fate = Callable[[int, str, int], MigrateError | None]  # pid, destination, attempt
DURATION = 10.0  # seconds that a migration takes


class Clock(Time):
    def __init__(self) -> None:
        self.at = 0.0

    def now(self) -> float:
        return self.at

    def sleep(self, seconds: float) -> None:
        self.at += seconds
        assert self.at < 10_000, "the drain does not end"


class Agents:
    """Hosts a, b, c with one GPU of 64 GiB each; *fate* decides how an attempt ends."""

    def __init__(self, clock: Clock, pids: list[int], fate: Fate) -> None:
        self.clock = clock
        self.fate = fate
        self.pids = dict.fromkeys(pids, 1)
        self.keys: dict[str, str] = {}
        self.begun: dict[str, tuple[int, str, float]] = {}
        self.away: set[str] = set()
        self.most: dict[str, int] = {}
        self.ended: set[str] = set()
        self.fates: dict[str, MigrateError | None] = {}

    def info(self, host: str) -> HostInfo:
        self.reach(host)
        number = "abc".index(host) + 1
        return HostInfo(
            name=host,
            version="1",
            engine="reexec",
            topology=Topology(nodes=(gpu(number),)),
            free_vram={number: 64 * GIB},
            available_memory=GIB,
            hides_gpus=False,
        )

    def reach(self, host: str) -> None:
        if host in self.away:
            raise AgentUnreachable(f"{host} is away")

    def processes(self, host: str) -> list[ProcessRow]:
        self.reach(host)
        if host != "a":
            return []
        return [
            ProcessRow(
                pid=pid,
                command="job",
                uid=0,
                vram={1: GIB},
                queues=1,
                start_time=start,
                boot_id="x",
            )
            for pid, start in self.pids.items()
        ]

    def run(
        self,
        source: str,
        destination: str,
        pid: int,
        *,
        options: Options | None = None,
        key: str = "",
        start_time: int = 0,
    ) -> str:
        del options
        self.reach(source)
        if key in self.keys:
            return self.keys[key]
        if self.pids.get(pid) != start_time:
            raise NoSuchProcess(f"no process {pid}")
        migration = f"m{len(self.begun)}"
        self.keys[key] = migration
        self.begun[migration] = (pid, destination, self.clock.now())
        running = [m for m in self.begun if self.status(m) is Status.ACTIVE]
        there = [m for m in running if self.begun[m][1] == destination]
        self.most["all"] = max(self.most.get("all", 0), len(running))
        self.most[destination] = max(self.most.get(destination, 0), len(there))
        return migration

    def status(self, migration: str) -> Status:
        pid, _, began = self.begun[migration]
        if self.clock.now() < began + DURATION:
            return Status.ACTIVE
        if self.error(migration) is not None:
            return Status.FAILED
        if migration not in self.ended:
            self.ended.add(migration)
            self.pids.pop(pid, None)
        return Status.COMPLETED

    def error(self, migration: str) -> MigrateError | None:
        pid, destination, _ = self.begun[migration]
        mine = [m for m, (p, _, _) in self.begun.items() if p == pid]
        if migration not in self.fates:
            self.fates[migration] = self.fate(pid, destination, mine.index(migration) + 1)
        return self.fates[migration]

    def show(self, source: str, migration: str) -> Report:
        self.reach(source)
        if migration not in self.begun:
            raise UnknownMigration(migration)
        pid, destination, _ = self.begun[migration]
        status, error = self.status(migration), None
        if status is Status.FAILED:
            error = self.error(migration)
        unknown = isinstance(error, OwnerUnknown)
        return Report(
            id=migration,
            status=Status.HANDOVER if unknown else status,
            owner=Owner.UNKNOWN if unknown else Owner.SOURCE,
            running="source",
            source=End(host="a", pid=pid),
            destination=End(host=destination),
            failure=failure(error) if error else None,
        )


def drained(
    tmp_path: Path, pids: list[int], fate: Fate, policy: Policy | None = None
) -> tuple[Agents, Summary, Clock]:
    clock = Clock()
    agents = Agents(clock, pids, fate)
    drain = Drain(agents, "a", ("b", "c"), policy=policy, clock=clock)
    return agents, drain.run(StateFile(tmp_path, "a")), clock


def always(error: MigrateError | None) -> Fate:
    return lambda _pid, _destination, _attempt: error


def outcomes(summary: Summary) -> dict[int, str]:
    return {row.pid: row.outcome for row in summary.rows}


@pytest.mark.parametrize(
    ("policy", "most"),
    [
        (Policy(per_host=1, per_link=5), 1),
        (Policy(per_host=3, per_link=3), 3),
        (Policy(per_host=9, per_link=1), 2),
        (Policy(per_host=9, per_link=2), 4),
    ],
)
def test_all_are_moved_within_the_limits(tmp_path: Path, policy: Policy, most: int) -> None:
    agents, summary, _ = drained(tmp_path, list(range(10, 22)), always(None), policy)
    assert set(outcomes(summary).values()) == {"moved"}
    assert len(agents.begun) == 12
    assert agents.most["all"] == most
    assert max(agents.most.get("b", 0), agents.most.get("c", 0)) <= min(
        policy.per_link, policy.per_host
    )
    assert summary.error() is None


def test_a_failed_attempt_is_repeated_later_and_elsewhere(tmp_path: Path) -> None:
    def fate(_pid: int, destination: str, _attempt: int) -> MigrateError | None:
        return FreezeTimeout("no") if destination == "b" else None

    policy = Policy(backoff=7.0, pause_after=100)
    agents, summary, _ = drained(tmp_path, [10, 11, 12, 13], fate, policy)
    assert set(outcomes(summary).values()) == {"moved"}
    assert {row.destination for row in summary.rows} == {"c"}
    for pid in (10, 11, 12, 13):
        times = [at for p, _, at in agents.begun.values() if p == pid]
        assert all(b - a >= DURATION + 7.0 for a, b in pairwise(times))


def test_attempts_are_bounded_and_waits_double(tmp_path: Path) -> None:
    policy = Policy(attempts=4, backoff=5.0, backoff_limit=12.0, pause_after=100)
    agents, summary, _ = drained(tmp_path, [10], always(FreezeTimeout("no")), policy)
    (row,) = summary.rows
    assert (row.outcome, row.attempts, row.reason) == ("failed", 4, "FREEZE_TIMEOUT")
    times = [at for _, _, at in agents.begun.values()]
    waits = [round(b - a - DURATION) for a, b in pairwise(times)]
    assert waits == [5, 10, 12]
    error = summary.error()
    assert error is not None
    assert error.reason == "DRAIN_INCOMPLETE"


def test_failures_in_a_row_pause_it_one_probe_fails_and_it_stops(tmp_path: Path) -> None:
    policy = Policy(per_host=1, pause_after=3, pause=100.0, attempts=9, backoff=0.0)
    agents, summary, clock = drained(
        tmp_path, list(range(10, 30)), always(FreezeTimeout("no")), policy
    )
    assert len(agents.begun) == 4
    assert clock.now() >= 4 * DURATION + 100
    assert summary.stopped
    assert {"left"} == set(outcomes(summary).values())
    error = summary.error()
    assert error is not None
    assert error.reason == "DRAIN_PAUSED"


def test_after_a_pause_one_success_lets_all_go_on(tmp_path: Path) -> None:
    clock, failures = Clock(), 0

    def fate(_pid: int, _destination: str, _attempt: int) -> MigrateError | None:
        nonlocal failures
        failures += 1
        return FreezeTimeout("no") if failures <= 3 else None

    agents = Agents(clock, list(range(10, 20)), fate)
    policy = Policy(per_host=1, pause_after=3, pause=50.0, attempts=9, backoff=0.0)
    summary = Drain(agents, "a", ("b", "c"), policy=policy, clock=clock).run(
        StateFile(tmp_path, "a")
    )
    assert set(outcomes(summary).values()) == {"moved"}


def test_what_would_fail_again_is_not_tried_again(tmp_path: Path) -> None:
    agents, summary, _ = drained(tmp_path, [10], always(SvmUnsupported("no")))
    assert len(agents.begun) == 1
    assert outcomes(summary) == {10: "failed"}


def test_a_process_that_ended_by_itself_is_no_failure(tmp_path: Path) -> None:
    agents, summary, _ = drained(tmp_path, [10], always(NoSuchProcess("gone")))
    assert len(agents.begun) == 1
    assert outcomes(summary) == {10: "gone"}
    assert summary.error() is None


def test_a_host_that_can_not_take_it_is_not_asked_again(tmp_path: Path) -> None:
    agents, summary, _ = drained(
        tmp_path, [10], always(InsufficientMemory("none")), Policy(attempts=9)
    )
    assert sorted(destination for _, destination, _ in agents.begun.values()) == ["b", "c"]
    (row,) = summary.rows
    assert (row.outcome, row.reason) == ("failed", "NO_PLACEMENT")
    assert "refused the process before" in row.message


def test_an_owner_that_nobody_knows_is_waited_for_and_never_tried_again(tmp_path: Path) -> None:
    agents, summary, clock = drained(tmp_path, [10], always(OwnerUnknown("?")))
    assert len(agents.begun) == 1
    assert outcomes(summary) == {10: "unknown"}
    assert clock.now() > Policy().patience
    error = summary.error()
    assert error is not None
    assert error.exit_code == 90


def test_agents_that_are_away_for_a_while_are_waited_for(tmp_path: Path) -> None:
    clock = Clock()
    agents = Agents(clock, [10, 11, 12], always(None))
    beat = clock.sleep

    def sleep(seconds: float) -> None:
        beat(seconds)
        agents.away = {"a", "b", "c"} if 3 < clock.at < 60 else set()

    clock.sleep = sleep  # type: ignore[method-assign]
    summary = Drain(agents, "a", ("b", "c"), clock=clock).run(StateFile(tmp_path, "a"))
    assert set(outcomes(summary).values()) == {"moved"}
    assert len(agents.begun) == 3


def test_a_drain_that_begins_again_repeats_no_attempt(tmp_path: Path) -> None:
    """Killed at any of its steps: the next one has the same keys and counts the same attempts."""

    class Killed(BaseException):
        pass

    def fate(pid: int, _destination: str, attempt: int) -> MigrateError | None:
        return FreezeTimeout("no") if pid == 11 and attempt < 3 else None

    clock = Clock()
    agents = Agents(clock, [10, 11, 12], fate)
    beat, countdown = clock.sleep, [0]

    def sleep(seconds: float) -> None:
        beat(seconds)
        countdown[0] -= 1
        if countdown[0] == 0:
            raise Killed

    clock.sleep = sleep  # type: ignore[method-assign]
    policy = Policy(attempts=3, backoff=1.0)
    summary = None
    for life in range(1, 200, 6):
        countdown[0] = life
        try:
            summary = Drain(agents, "a", ("b", "c"), policy=policy, clock=clock).run(
                StateFile(tmp_path, "a")
            )
            break
        except Killed:
            continue
    assert summary is not None
    assert outcomes(summary) == {10: "moved", 11: "moved", 12: "moved"}
    assert {row.pid: row.attempts for row in summary.rows} == {10: 1, 11: 3, 12: 1}
    assert len(agents.begun) == 5


def test_a_pid_that_another_process_has_by_now_is_left_alone(tmp_path: Path) -> None:
    agents = Agents(Clock(), [10], always(None))
    file = StateFile(tmp_path, "a")
    old = Member(pid=10, start_time=99, boot_id="x", vram={1: GIB})
    file.save(State(name="n", host="a", members=(old,)))
    summary = Drain(agents, "a", ("b", "c"), clock=agents.clock).run(file)
    assert [(row.outcome, row.attempts) for row in summary.rows] == [("gone", 1), ("moved", 1)]
    assert len(agents.begun) == 1


def test_two_drains_of_a_host_do_not_run_at_once(tmp_path: Path) -> None:
    with StateFile(tmp_path, "a").held():
        code = (
            "import sys, pathlib; from migrate.drain.state import StateFile\n"
            "with StateFile(pathlib.Path(sys.argv[1]), 'a').held(): pass"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False
        )
    assert AgentBusy.__name__ in done.stderr


def test_a_damaged_file_is_an_error(tmp_path: Path) -> None:
    file = StateFile(tmp_path, "a")
    file.save(State(name="n", host="a"))
    (tmp_path / "drain-a.json").write_text("{")
    with pytest.raises(UsageError, match="can't be read"):
        file.load()


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        ("NO_SUCH_PROCESS", Verdict.GONE),
        ("PROCESS_EXITED", Verdict.GONE),
        ("SVM_UNSUPPORTED", Verdict.NEVER),
        ("CANCELLED", Verdict.NEVER),
        ("INSUFFICIENT_VRAM", Verdict.ELSEWHERE),
        ("NO_GPU_MAP", Verdict.ELSEWHERE),
        ("PEER_LOST", Verdict.AGAIN),
        ("STREAM_BROKEN", Verdict.AGAIN),
        ("AGENT_UNREACHABLE", Verdict.AGAIN),
        ("ALREADY_TRACED", Verdict.AGAIN),
        ("SOMETHING_NEW", Verdict.AGAIN),
    ],
)
def test_what_a_reason_means(reason: str, expected: Verdict) -> None:
    assert verdict(reason) is expected


def test_a_failure_of_one_that_began_before_the_pause_is_no_probe() -> None:
    breaker = Breaker(Policy(pause_after=2, pause=10))
    for _ in range(3):
        breaker.failed(0.0)
    assert breaker.paused
    assert not breaker.stopped
    assert not breaker.may_start(5.0, 0)
    assert not breaker.may_start(11.0, 1)
    assert breaker.may_start(11.0, 0)
    breaker.failed(12.0)
    assert breaker.stopped


def test_a_tree_is_placed_as_one_and_a_child_never_alone() -> None:
    def row(pid: int, root: int = 0, **vram: int) -> ProcessRow:
        sizes = {int(gpu[1:]): size for gpu, size in vram.items()}
        return ProcessRow(pid=pid, command="job", uid=0, vram=sizes, queues=1, root=root)

    rows = [row(7, g1=5, g2=0), row(8, 7, g1=1), row(3, g2=2), row(9, 7, g2=4)]
    assert trees(rows) == [
        msgspec.structs.replace(row(7, g1=6, g2=4), queues=3),
        row(3, g2=2),
    ]
    assert trees([]) == []
