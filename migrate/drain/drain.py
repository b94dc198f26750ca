"""A drain: moves every GPU process off a host, by a plan that is made anew as things change.

It runs in one thread of a client of the agents. The agents do the moving and go on without
it; every attempt has an idempotency key (see state.py), so that a drain that was killed and
begins again starts nothing twice and counts its attempts right.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from migrate.client import HostInfo
from migrate.drain.placement import Job, Plan, Target, plan
from migrate.drain.policy import Breaker, Policy, Verdict, verdict
from migrate.drain.state import Member, State, StateFile
from migrate.drain.trees import trees
from migrate.errors import (
    AgentUnreachable,
    CertificateRejected,
    DrainIncomplete,
    DrainPaused,
    MigrateError,
    NoPlacement,
    OwnedDead,
    OwnerUnknown,
    UnknownMigration,
)
from migrate.model import Value
from migrate.orchestrator.plan import Options
from migrate.report import ProcessRow, Report
from migrate.status import Owner, Status

SCHEMA = "migrate.drain/1"
LOOK = 0.25  # seconds between looks at what is under way

MOVED, GONE, FAILED, LEFT, UNKNOWN = "moved", "gone", "failed", "left", "unknown"


class Fleet(Protocol):
    """What a drain asks of agents: see migrate.client.Client."""

    def info(self, host: str) -> HostInfo:
        """See Client."""

    def processes(self, host: str) -> list[ProcessRow]:
        """See Client."""

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
        """See Client."""

    def show(self, source: str, migration: str) -> Report:
        """See Client."""


class Time:
    """The machine's time, in seconds; a test has its own."""

    def now(self) -> float:
        """Never goes back."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Wait."""
        time.sleep(seconds)


class Row(Value):
    """What became of one process.

    ``outcome``: moved, gone (it ended by itself), failed, left (nothing was tried, or the
    drain stopped), unknown (only an operator can tell who owns it). ``attempts`` counts
    migrations that were begun.
    """

    pid: int
    command: str
    outcome: str
    destination: str = ""
    destination_pid: int | None = None
    migration: str = ""
    attempts: int = 0
    downtime: float | None = None
    reason: str = ""
    message: str = ""


class Summary(Value):
    """A drain's end."""

    host: str
    rows: tuple[Row, ...]
    stopped: bool = False  # by failures in a row
    schema: str = SCHEMA

    def error(self) -> MigrateError | None:
        """None if nothing of what was there is left at the host."""
        count = {o: sum(r.outcome == o for r in self.rows) for o in (UNKNOWN, FAILED, LEFT)}
        if count[UNKNOWN]:
            reasons = {row.reason for row in self.rows if row.outcome == UNKNOWN}
            kind = OwnedDead if reasons == {OwnedDead.reason} else OwnerUnknown
            return kind(f"{count[UNKNOWN]} of {len(self.rows)} processes need an operator")
        remain = count[FAILED] + count[LEFT]
        if not remain:
            return None
        said = f"{remain} of {len(self.rows)} processes run on at {self.host}"
        return DrainPaused(said) if self.stopped else DrainIncomplete(said)


@dataclass
class _Task:
    """One process on its way."""

    member: Member
    attempt: int = 0
    migration: str = ""
    destination: str = ""
    not_before: float = 0.0
    last_seen: float = 0.0
    excluded: set[str] = field(default_factory=set)  # can't take it
    avoided: str = ""  # failed the last time
    reason: str = ""
    message: str = ""
    ended: Row | None = None


class Drain:
    """Empties host *source* onto *targets*."""

    def __init__(
        self,
        fleet: Fleet,
        source: str,
        targets: Sequence[str],
        *,
        policy: Policy | None = None,
        options: Options | None = None,
        clock: Time | None = None,
        say: Callable[[str], None] = lambda _text: None,
    ) -> None:
        self._fleet = fleet
        self._source = source
        self._names = tuple(name for name in targets if name != source)
        self._policy = policy or Policy()
        self._options = options or Options()
        self._clock = clock or Time()
        self._say = say
        self._breaker = Breaker(self._policy)
        self._tasks: list[_Task] = []
        self._drain = ""
        self._silent: str = ""  # why a destination could not be asked the last time
        self._silent_since: float | None = None

    # ------------------------------------------------------------ the whole

    def preview(self) -> tuple[list[ProcessRow], Plan]:
        """Who would go where, if all went at once. Changes nothing. Raises MigrateError."""
        rows = trees(self._fleet.processes(self._source))
        return rows, self._plan([_Task(Member.of(row)) for row in rows], ())

    def run(self, file: StateFile) -> Summary:
        """Move everything, or as much as can be moved. Raises MigrateError before it begins."""
        state = file.load()
        rows = self._rows(wait=bool(state.members))
        known = {(m.pid, m.start_time, m.boot_id) for m in state.members}
        new = [Member.of(r) for r in rows if (r.pid, r.start_time, r.boot_id) not in known]
        if state.members:
            self._say(f"Going on with a drain of {len(state.members)} processes")
        state = State(name=state.name, host=state.host, members=(*state.members, *new))
        file.save(state)
        self._drain = state.name
        self._tasks = [_Task(member) for member in state.members]
        self._adopt(rows)
        while any(task.ended is None for task in self._tasks):
            self._look()
            self._start()
            if self._settled():
                break
            self._clock.sleep(LOOK)
        file.remove()
        return Summary(
            host=self._source,
            rows=tuple(task.ended or self._row(task, LEFT) for task in self._tasks),
            stopped=self._breaker.stopped,
        )

    def _rows(self, *, wait: bool) -> list[ProcessRow]:
        """The source's processes. *wait*: its agent may be away, for it was there before."""
        deadline = self._clock.now() + self._policy.patience
        while True:
            try:
                return trees(self._fleet.processes(self._source))
            except (AgentUnreachable, CertificateRejected):
                if not wait or self._clock.now() > deadline:
                    raise
            self._clock.sleep(LOOK * 4)

    def _adopt(self, rows: Iterable[ProcessRow]) -> None:
        """Processes that somebody else is migrating already are followed, not started."""
        under_way = {row.pid: row.migration for row in rows if row.migration}
        for task in self._tasks:
            if (migration := under_way.get(task.member.pid)) is not None:
                task.migration, task.last_seen = migration, self._clock.now()

    def _settled(self) -> bool:
        """Nothing is under way, and nothing more will be started."""
        active = any(task.migration for task in self._tasks if task.ended is None)
        return self._breaker.stopped and not active

    # ------------------------------------------------------------ what is under way

    def _look(self) -> None:
        for task in self._tasks:
            if task.migration and task.ended is None:
                self._look_at(task)

    def _look_at(self, task: _Task) -> None:
        now = self._clock.now()
        try:
            report = self._fleet.show(self._source, task.migration)
        except (AgentUnreachable, CertificateRejected, UnknownMigration) as error:
            # Also unknown: an agent that has just been started reads its journal yet.
            if now - task.last_seen > self._policy.patience:
                task.reason, task.message = error.reason, error.message
                self._end(task, UNKNOWN)
            return
        task.destination = report.destination.host
        if report.status is Status.COMPLETED:
            self._breaker.succeeded()
            self._end(task, MOVED, report)
        elif report.owner is Owner.UNKNOWN and report.failure is not None:
            # The source's agent goes on asking; perhaps it gets an answer.
            if now - task.last_seen > self._policy.patience:
                task.reason, task.message = report.failure.reason, report.failure.message
                self._end(task, UNKNOWN)
        elif report.status in (Status.FAILED, Status.CANCELLED):
            failure = report.failure
            self._failed(
                task,
                failure.reason if failure else MigrateError.reason,
                failure.message if failure else report.status,
            )
        else:
            task.last_seen = now

    def _failed(self, task: _Task, reason: str, message: str) -> None:
        """An attempt failed; the process runs on at the source, or ended by itself."""
        task.reason, task.message = reason, message
        what = verdict(reason)
        self._say(f"pid {task.member.pid} to {task.destination}: {reason}: {message}")
        now = self._clock.now()
        if what is Verdict.AGAIN:
            self._breaker.failed(now)
            if self._breaker.paused and not self._breaker.stopped:
                self._say(f"Too many failures in a row: a pause of {self._policy.pause:g} s")
        if what is Verdict.GONE:
            self._end(task, GONE)
        elif what is Verdict.NEVER or task.attempt >= self._policy.attempts:
            self._end(task, FAILED)
        else:
            if what is Verdict.ELSEWHERE:
                task.excluded.add(task.destination)
            task.avoided = task.destination
            task.not_before = now + self._policy.wait_after(max(task.attempt, 1))
            task.migration = task.destination = ""

    def _end(self, task: _Task, outcome: str, report: Report | None = None) -> None:
        task.ended = self._row(task, outcome, report)
        self._say(f"pid {task.member.pid}: {outcome} {task.destination}".rstrip())

    def _row(self, task: _Task, outcome: str, report: Report | None = None) -> Row:
        down = report.downtime if report is not None else None
        return Row(
            pid=task.member.pid,
            command=task.member.command,
            outcome=outcome,
            destination=task.destination,
            destination_pid=report.destination.pid if report is not None else None,
            migration=task.migration,
            attempts=task.attempt,
            downtime=down.seconds if down is not None else None,
            reason="" if outcome == MOVED else task.reason,
            message="" if outcome == MOVED else task.message,
        )

    # ------------------------------------------------------------ what begins

    def _start(self) -> None:
        now = self._clock.now()
        active = [t for t in self._tasks if t.migration and t.ended is None]
        # A pid may stand there twice, as the process that was and the one that is.
        ready: dict[int, _Task] = {}
        for task in self._tasks:
            if not task.migration and task.ended is None and task.not_before <= now:
                ready.setdefault(task.member.pid, task)
        if not ready or not self._breaker.may_start(now, len(active)):
            return
        if not self._policy.room(self._source, "", [t.destination for t in active]):
            return
        try:
            made = self._plan(list(ready.values()), active)
        except (AgentUnreachable, CertificateRejected) as error:
            self._source_away(ready.values(), error)
            return
        for placement in made.placements:
            task = ready[placement.pid]
            places = [t.destination for t in active]
            if not self._policy.room(self._source, placement.host, places):
                continue
            if not self._breaker.may_start(now, len(active)):
                return
            self._begin(task, placement.host)
            if task.migration:
                active.append(task)
        waiting = [t for t in self._tasks if t.ended is None and t not in ready.values()]
        if not active and not waiting and not made.placements and not self._awaited(now):
            for unplaced in made.unplaced:
                task = ready[unplaced.pid]
                task.reason = NoPlacement.reason
                reasons = [f"{host}: {why}" for host, why in unplaced.reasons.items()]
                task.message = "; ".join([*reasons, *([self._silent] if self._silent else [])])
                self._end(task, FAILED)

    def _awaited(self, now: float) -> bool:
        """Whether a destination did not answer, and may yet."""
        if not self._silent:
            self._silent_since = None
            return False
        self._silent_since = now if self._silent_since is None else self._silent_since
        return now - self._silent_since <= self._policy.patience

    def _begin(self, task: _Task, destination: str) -> None:
        task.attempt += 1
        task.destination, task.last_seen = destination, self._clock.now()
        member = task.member
        try:
            task.migration = self._fleet.run(
                self._source,
                destination,
                member.pid,
                options=self._options,
                key=member.key(self._drain, task.attempt),
                start_time=member.start_time,
            )
        except (AgentUnreachable, CertificateRejected) as error:
            # Perhaps it did begin: the same key asks again.
            task.attempt -= 1
            self._source_away([task], error)
        except MigrateError as error:
            self._failed(task, error.reason, error.message)
        else:
            self._say(f"pid {member.pid} to {destination}: migration {task.migration}")

    def _source_away(self, tasks: Iterable[_Task], error: MigrateError) -> None:
        now = self._clock.now()
        for task in tasks:
            task.destination = ""
            task.last_seen = task.last_seen or now
            task.not_before = now + LOOK * 4
            task.reason, task.message = error.reason, error.message
            if now - task.last_seen > self._policy.patience:
                self._end(task, LEFT)

    # ------------------------------------------------------------ who goes where

    def _plan(self, tasks: Sequence[_Task], active: Sequence[_Task]) -> Plan:
        """Where *tasks* would go now, beside those under way. Raises MigrateError."""
        topology = self._fleet.info(self._source).topology
        self._silent = ""
        targets = [t for name in self._names if (t := self._target(name, active)) is not None]
        jobs = [Job(pid=task.member.pid, vram=task.member.vram) for task in tasks]
        refused = {task.member.pid: frozenset(task.excluded) for task in tasks}
        # One that failed at a host is tried at another, if another would have it.
        avoiding = {task.member.pid: frozenset(task.excluded | {task.avoided}) for task in tasks}
        relax = self._options.relax
        made = plan(topology, jobs, targets, excluded=avoiding, relax=relax)
        if made.unplaced and avoiding != refused:
            made = plan(topology, jobs, targets, excluded=refused, relax=relax)
        return made

    def _target(self, name: str, active: Sequence[_Task]) -> Target | None:
        """A destination as it is now; None while its agent does not answer."""
        try:
            info, rows = self._fleet.info(name), self._fleet.processes(name)
        except (AgentUnreachable, CertificateRejected) as error:
            self._silent = f"{name} can't be asked: {error.message}"
            return None
        coming = [task.member for task in active if task.destination == name]
        free = dict(info.free_vram)
        for member in coming:
            # Which GPUs it gets is the agent's choice: none of them may be counted on.
            largest = max(member.vram.values(), default=0)
            free = {gpu: size - largest for gpu, size in free.items()}
        return Target(
            name=name,
            topology=info.topology,
            free=free,
            busy=frozenset(gpu for row in rows for gpu, size in row.vram.items() if size),
            hides_gpus=info.hides_gpus,
        )
