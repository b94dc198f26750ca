"""The migrations that this host drives: started, followed, found again after a restart."""

from __future__ import annotations

import contextlib
import logging
import secrets
from collections.abc import Callable, Collection

from migrate import faults
from migrate.dataplane.channel import Channel, connect_tcp
from migrate.dataplane.sender import Sender
from migrate.engine.seam import Survey
from migrate.errors import AgentBusy, MigrateError, NoSuchProcess, SameHost, UnknownMigration
from migrate.model import ProcessRef, Value
from migrate.orchestrator.clock import Thread
from migrate.orchestrator.estimate import MAX_HISTORY
from migrate.orchestrator.figures import gpu_rows
from migrate.orchestrator.handover import SourceHandover
from migrate.orchestrator.host import Host
from migrate.orchestrator.image_peer import ImagePeer
from migrate.orchestrator.peer import Peer, Reservation
from migrate.orchestrator.plan import Options
from migrate.orchestrator.source import SourceMigration, check, unpause
from migrate.orchestrator.source_handover import StateRecord, is_paused, note_unpaused
from migrate.report import Check, End, Report
from migrate.status import SOURCE_FINAL, SourceState

_log = logging.getLogger(__name__)

PeerFactory = Callable[[str, str], Peer]  # name, address
# A process of ours may still stand, and it is the source's.
UNFINISHED = frozenset(
    {
        SourceState.SETUP,
        SourceState.ACTIVE,
        SourceState.DEVICE,
        SourceState.RECLAIMED,
        SourceState.UNDOING,
    }
)
REMEMBERED = 100  # ended migrations whose events can still be followed; the journal keeps all


class RequestRecord(Value):
    """The journal's ``request`` record: everything that is needed to go on after a restart."""

    survey: Survey
    destination: str
    destination_address: str
    options: Options


class Sources:
    """All migrations whose source is this host."""

    def __init__(self, host: Host, dial: PeerFactory) -> None:
        self._host = host
        self._dial = dial
        self._lock = host.clock.lock()
        self._live: dict[str, SourceMigration] = {}
        self._let_go: frozenset[str] = frozenset()
        self._threads: dict[str, Thread] = {}
        # Called with the report when this agent has done what it can for a migration.
        self.listeners: list[Callable[[Report], None]] = []

    def start(
        self,
        pid: int,
        destination: str,
        address: str,
        options: Options,
        key: str,
        start_time: int = 0,
    ) -> str:
        """Begin a migration; the id of the one begun before for the same *key*.

        *start_time*: that of the process that is meant (see ProcessRef), 0 for any.
        Raises NoSuchProcess, NotKfdProcess, AgentBusy, SameHost, JournalUnusable and what
        the engine's survey raises.
        """
        with self._lock:
            if key:
                known = self._host.journal.find("key", key)
                if known is not None:
                    return known
            if destination == self._host.name:
                raise SameHost(f"{destination} is both source and destination")
            survey = self._host.engine.survey(pid)
            if start_time and survey.process.start_time != start_time:
                raise NoSuchProcess(f"pid {pid} is another process by now")
            for other in self._live.values():
                if other.process == survey.process and other.id in self._running():
                    raise AgentBusy(f"process {pid} is being migrated already: {other.id}")
            migration = secrets.token_hex(8)
            request = RequestRecord(
                survey=survey,
                destination=destination,
                destination_address=address,
                options=options,
            )
            # The key last: one that leads to a migration without a request would lead nowhere.
            self._host.journal.append(migration, "request", request)
            if key:
                self._host.journal.append(migration, "key", key)
            faults.point("source.requested")
            self._launch(self._build(migration, request, SourceHandover()), restarted=False)
        self.forget_ended()
        return migration

    def check(self, pid: int, destination: str, address: str, options: Options) -> Check:
        """Everything that speaks against a migration, and what it would cost.

        Raises NoSuchProcess, NotKfdProcess, ForeignProcess, AgentBusy, SameHost and what else
        leaves nothing to be checked.
        """
        began = self._host.clock.monotonic()
        if destination == self._host.name:
            raise SameHost(f"{destination} is both source and destination")
        survey = self._host.engine.survey(pid)
        running = self.migration_of(pid)
        if running is not None:
            raise AgentBusy(f"process {pid} is being migrated already: {running}")
        peer = self._dial(destination, address)
        found = check(self._host, peer, survey, options, self._known(destination))
        return Check(
            source=End(host=self._host.name, pid=pid),
            destination=End(host=destination),
            command=survey.command,
            engine=self._host.engine.name,
            blockers=found.blockers(),
            warnings=found.warnings(),
            prediction=found.prediction,
            gpu_map=gpu_rows(found.gpu_map, found.user_gpu_ids),
            seconds=self._host.clock.monotonic() - began,
        )

    def _known(self, destination: str) -> list[Report]:
        """The newest reports of migrations that came to *destination*."""
        reports = self.reports(MAX_HISTORY)
        return [r for r in reports if r.destination.host == destination and r.downtime is not None]

    def recover(self, let_go: Collection[str] = ()) -> list[str]:
        """Go on with every migration that had not ended. Returns their ids.

        *let_go*: migrations whose process the watchdog let go, see there.
        One whose record can't be read is not touched: its process may be granted.
        """
        self._let_go = frozenset(let_go)
        found = []
        for migration in self._host.journal.migrations():
            try:
                built = self._recovered(migration)
            except MigrateError as error:
                _log.error("migration %s is left as it is: %s", migration, error)
                continue
            if built is not None:
                built.let_go = migration in let_go
                with self._lock:
                    self._launch(built, restarted=True)
                found.append(migration)
        return found

    def go_on(self, migration: str) -> tuple[str, str] | None:
        """State and what is being done, "" if it has ended; None if it is not from here.

        Raises JournalUnusable for a record that can't be read: its process is not touched.
        """
        if self._host.journal.last(migration, "request") is None:
            return None
        with self._lock:
            if migration in self._running():
                live = self._live[migration]
                live.hurry()
                return str(live.side.machine.state), live.doing()
            built = self._recovered(migration)
            if built is None:
                return str(self.state(migration)), ""
            built.let_go = migration in self._let_go
            self._launch(built, restarted=True)
        return str(built.side.machine.state), "it was left, and is taken up again"

    def _recovered(self, migration: str) -> SourceMigration | None:
        request = self._host.journal.last(migration, "request")
        if request is None:
            self._end_check(migration)
            return None
        state = self._state(migration)
        machine = SourceHandover(SourceState.SETUP)
        if state is not None:
            machine = SourceHandover(state.state, state.token, state.store_id)
        ended = state is not None and state.state in SOURCE_FINAL
        if ended and self._host.journal.last(migration, "report") is not None:
            return None
        built = self._build(migration, request.decode(RequestRecord), machine)
        if ended:
            built.conclude()
            return None
        return built

    def _end_check(self, name: str) -> None:
        """Start the queues of a process whose check ended in the middle."""
        checked = self._host.journal.last(name, "check")
        if checked is None or not is_paused(self._host.journal, name):
            return
        process = checked.decode(ProcessRef)
        with contextlib.suppress(NoSuchProcess):
            self._host.engine.snapshot(process, unpause)
        note_unpaused(self._host.journal, name)

    def get(self, migration: str) -> SourceMigration:
        """A migration of this run of the agent. Raises UnknownMigration."""
        with self._lock:
            found = self._live.get(migration)
        if found is None:
            raise UnknownMigration(f"{self._host.name} knows no migration {migration!r}")
        return found

    def report(self, migration: str) -> Report:
        """The journaled report, or that of a running migration. Raises UnknownMigration."""
        record = self._host.journal.last(migration, "report")
        if record is not None:
            return record.decode(Report)
        return self.get(migration).report_now()

    def reports(self, limit: int) -> list[Report]:
        """The newest *limit* reports."""
        result: list[Report] = []
        for migration in self._host.journal.migrations():
            if len(result) == limit:
                break
            if self._host.journal.last(migration, "request") is not None:
                try:
                    result.append(self.report(migration))
                except UnknownMigration:
                    continue
        return result

    def running(self) -> list[SourceMigration]:
        """Migrations under way."""
        with self._lock:
            running = self._running()
            return [m for m in self._live.values() if m.id in running]

    def is_paused(self, migration: str) -> bool:
        """Whether the journal says that queues of the process may be paused."""
        record = self._host.journal.last(migration, "paused")
        return record is not None and record.decode(bool)

    def state(self, migration: str) -> SourceState | None:
        """What the journal says, None if it says nothing of a migration from here."""
        record = self._state(migration)
        return record.state if record is not None else None

    def migration_of(self, pid: int) -> str | None:
        """The running migration of a process."""
        with self._lock:
            running = self._running()
            return next(
                (m.id for m in self._live.values() if m.process.pid == pid and m.id in running),
                None,
            )

    def destination_of(self, migration: str) -> str | None:
        """The host that a migration goes to."""
        record = self._host.journal.last(migration, "request")
        return record.decode(RequestRecord).destination if record is not None else None

    def command_of(self, migration: str) -> tuple[str, ...]:
        """The command line of a migration's process, empty if there is no record."""
        record = self._host.journal.last(migration, "request")
        return record.decode(RequestRecord).survey.command if record is not None else ()

    def stop(self) -> bool:
        """Let go of all: granted ones stay frozen and on record, others are undone.

        False if an undo takes too long or failed: the watchdog has to do it.
        """
        with self._lock:
            live, threads = list(self._live.values()), list(self._threads.values())
        for migration in live:
            migration.stop.set()
            migration.cancel.set()
            migration.hurry()
        for thread in threads:
            thread.join(timeout=30)
        return not any(thread.is_alive() for thread in threads) and not any(
            migration.side.machine.state in UNFINISHED for migration in live
        )

    def forget_ended(self, keep: int = REMEMBERED) -> None:
        """Drop all but the newest *keep* ended migrations from memory.

        Their reports stay in the journal.
        """
        with self._lock:
            running = self._running()
            ended = [
                m.id
                for m in self._live.values()
                if m.id not in running and m.side.machine.state in SOURCE_FINAL
            ]
            for migration in ended[: max(len(ended) - keep, 0)]:
                del self._live[migration], self._threads[migration]

    def _running(self) -> set[str]:
        return {m for m, thread in self._threads.items() if thread.is_alive()}

    def _state(self, migration: str) -> StateRecord | None:
        record = self._host.journal.last(migration, "source")
        return record.decode(StateRecord) if record is not None else None

    def _build(
        self, migration: str, request: RequestRecord, machine: SourceHandover
    ) -> SourceMigration:
        peer = self._dial(request.destination, request.destination_address)
        built = SourceMigration(
            migration,
            request.survey,
            self._host,
            peer,
            request.options,
            peer.connect if isinstance(peer, ImagePeer) else self._sender,
            machine,
        )
        built.known = self._known(request.destination)
        return built

    def _launch(self, migration: SourceMigration, *, restarted: bool) -> None:
        def drive() -> None:
            report = migration.resume() if restarted else migration.run()
            for listener in self.listeners:
                listener(report)

        self._live[migration.id] = migration
        self._threads[migration.id] = self._host.clock.start(f"migrate-{migration.id}", drive)

    def _sender(self, migration: str, reservation: Reservation, options: Options) -> Sender:
        def connect(_stream: int) -> Channel:
            return connect_tcp(reservation.data_address, reservation.data_port)

        return Sender(
            connect,
            reservation.session_secret,
            reservation.session_id,
            lambda: self._host.journal.next_number(migration, "epoch"),
            streams=options.streams,
            bandwidth_limit=options.bandwidth,
            reconnect_timeout=options.patience,
        )
