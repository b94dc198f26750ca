"""The migrations that come to this host: reserved, built, owned, and found after a restart."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from migrate.dataplane.receiver import Receiver
from migrate.dataplane.receiver import Session as DataSession
from migrate.errors import AgentBusy, MigrateError, UnknownMigration
from migrate.model import GpuMap
from migrate.orchestrator.checks import (
    check_facts,
    check_move,
    check_order,
)
from migrate.orchestrator.clock import Thread
from migrate.orchestrator.destination import (
    CopyRecord,
    DestinationMigration,
    DestinationRecord,
    KeptRecord,
    SourceRecord,
)
from migrate.orchestrator.handover import DestinationHandover
from migrate.orchestrator.host import Host
from migrate.orchestrator.peer import Examined, Peer, Session
from migrate.orchestrator.plan import Move
from migrate.orchestrator.preflight import check_room, choose_map, examine
from migrate.preflight.facts import Facts
from migrate.status import DESTINATION_FINAL, MAY_RUN, UNGRANTED, DestinationState, SourceState

_log = logging.getLogger(__name__)

UPKEEP = 2.0  # seconds between looks at what waits
SILENCE = 10.0  # seconds without a word before the source is asked
MAX_WAITING = 64  # reserved and not granted, all sources together
SAMPLE_LIFE = 60.0  # seconds that a session for a sample is open
MAX_SAMPLES, MAX_SAMPLE = 8, 16 << 20  # at once, bytes each
RESERVATION_LIFE = 300.0  # seconds a reservation outlives a source that can't be reached
REMEMBERED = 600.0  # seconds that an ended migration is kept in memory; the journal keeps it

# A source that reclaimed had granted, and this copy was revoked: nothing to be asked about.
NOT_GRANTED = frozenset({SourceState.UNDOING, SourceState.ROLLED_BACK})


@dataclass
class _Sample:
    """A data session that preflight measures by."""

    source: str
    ends: float  # by the host's clock
    session: DataSession


class Destinations:
    """All migrations whose destination is this host."""

    def __init__(
        self,
        host: Host,
        receiver: Receiver,
        data: tuple[str, int],
        dial: Callable[[str, str], Peer],
        is_revoked: Callable[[int], bool] = lambda _serial: False,
    ) -> None:
        self._host = host
        self._receiver = receiver
        self._data = data  # host (empty: the one of the control channel) and port
        self._dial = dial
        self._is_revoked = is_revoked
        self._lock = host.clock.lock()
        self._live: dict[str, DestinationMigration] = {}
        self._samples: dict[bytes, _Sample] = {}
        self._stop = host.clock.event()
        self._upkeep: Thread | None = None

    def start(self) -> None:
        """Begin to look after what waits."""
        self._upkeep = self._host.clock.start("upkeep", self._look_after)

    def examine(
        self,
        source: str,
        move: Move,
        facts: Facts,
        sample: int,
    ) -> Examined:
        """Everything that speaks against it, and a session that takes *sample* bytes.

        The session ends with the next call of the same source, or after SAMPLE_LIFE.
        """
        check_move(move)
        check_facts(facts)
        findings, gpu_map = examine(self._host, move, facts)
        self._end_samples(lambda found: found.source == source)
        return Examined(
            findings=findings,
            gpu_map=gpu_map,
            clock=time.time(),
            session=self._take_sample(source, sample) if 0 < sample <= MAX_SAMPLE else None,
        )

    def _take_sample(self, source: str, size: int) -> Session | None:
        """None: enough are under way."""
        session_id, secret = secrets.token_bytes(16), secrets.token_bytes(32)
        with self._lock:
            if len(self._samples) >= MAX_SAMPLES:
                return None
            session = self._receiver.open_session(session_id, secret, size)
            ends = self._host.clock.monotonic() + SAMPLE_LIFE
            self._samples[session_id] = _Sample(source, ends, session)
        host, port = self._data
        return Session(
            data_address=host, data_port=port, session_id=session_id, session_secret=secret
        )

    def _end_samples(self, which: Callable[[_Sample], bool]) -> None:
        with self._lock:
            ended = [number for number, sample in self._samples.items() if which(sample)]
            for number in ended:
                del self._samples[number]
        for number in ended:
            self._receiver.close_session(number)

    def reserve(
        self,
        migration: str,
        source: SourceRecord,
        move: Move,
        ahead: bytes = b"",
    ) -> tuple[GpuMap, tuple[str, int], bytes, bytes]:
        """Check and make room. Returns GPU map, data address, session id, secret."""
        check_move(move)
        engine, needs = move.engine, move.needs
        check_room(self._host, engine, needs)
        self._end_samples(lambda sample: sample.source == source.name)
        gpu_map = choose_map(self._host, move.topology, needs, move.options)
        with self._lock:
            known = self._host.journal.last(migration, "destination")
            if migration in self._live or known is not None:
                raise AgentBusy(f"migration {migration} is known here already")
            waiting = sum(m.machine.state in UNGRANTED for m in self._live.values())
            if waiting >= MAX_WAITING:
                raise AgentBusy(f"{waiting} migrations to {self._host.name} wait already")
            session_id, secret = secrets.token_bytes(16), secrets.token_bytes(32)
            session = self._receiver.open_session(session_id, secret, needs.quota)
            built = DestinationMigration(
                migration,
                self._host,
                DestinationHandover(),
                source=source,
                check=partial(check_order, reserved=gpu_map, quota=needs.quota, engine=engine),
                staging=session.staging,
                close_session=lambda: self._receiver.close_session(session_id),
            )
            try:
                built.reserved()
            except MigrateError:
                self._receiver.close_session(session_id)
                raise
            self._live[migration] = built
        if ahead:
            built.prepare(ahead)
        return gpu_map, self._data, session_id, secret

    def session(self, session_id: bytes) -> DataSession:
        """The data session of a reservation made here. Raises UnknownMigration."""
        found = self._receiver.find(session_id)
        if found is None:
            raise UnknownMigration("the reservation was ended")
        return found

    def get(self, migration: str) -> DestinationMigration:
        """Raises UnknownMigration. That is never a refusal of a grant."""
        with self._lock:
            found = self._live.get(migration) or self._from_journal(migration)
            if found is None:
                raise UnknownMigration(f"{self._host.name} has no record of {migration!r}")
            self._live[migration] = found
            return found

    def find(self, migration: str) -> DestinationMigration | None:
        """As ``get``, None if there is no record."""
        try:
            return self.get(migration)
        except UnknownMigration:
            return None

    def recover(self) -> None:
        """End copies that were never granted; let owned ones run."""
        for migration in self._host.journal.migrations():
            try:
                if self._host.journal.last(migration, "destination") is not None:
                    self.get(migration).go_on()
            except MigrateError as error:
                _log.error("recovering %s: %s", migration, error)

    def states(self) -> list[tuple[DestinationState | None, bool]]:
        """Of each migration to this host that is known in memory: state, and if a copy lives."""
        with self._lock:
            live = list(self._live.values())
        return [(migration.machine.state, migration.is_present()) for migration in live]

    def forget_ended(self, silent: float = REMEMBERED) -> None:
        """Drop from memory what has ended and was not spoken of for *silent* seconds.

        Whoever asks later is answered from the journal.
        """
        now = self._host.clock.monotonic()
        with self._lock:
            old = [m for m in self._live.values() if now - m.last_heard >= silent]
        ended = [m for m in old if _is_over(m)]
        with self._lock:
            for migration in ended:
                self._live.pop(migration.id, None)

    def go_on(self, migration: str) -> tuple[str, str] | None:
        """State and what was done, "" if nothing is unfinished; None if it does not come here.

        Raises MigrateError if it could not be done now; then it is done again by itself.
        """
        if self._host.journal.last(migration, "destination") is None:
            return None
        found = self.get(migration)
        if found.machine.state in UNGRANTED:
            self._ask_source(found, at_least=0.0)
            left = found.machine.state in UNGRANTED
            text = f"{found.source.name} was asked: " + ("it is kept" if left else "it is ended")
            return str(found.machine.state), text
        if not found.unfinished:
            return str(found.machine.state), ""
        found.go_on()
        return str(found.machine.state), "it was gone on with"

    def staging_ranges(self) -> tuple[tuple[int, int], ...]:
        """Addresses of all staging in this process, for the accounting of memory."""
        with self._lock:
            live = list(self._live.values())
            samples = [sample.session.staging for sample in self._samples.values()]
        return tuple(r for migration in live for r in migration.staging_ranges()) + tuple(
            r for staging in samples for r in staging.address_ranges()
        )

    def stop(self) -> None:
        """Stop looking; what waits stays as it is and is recovered at the next start."""
        self._stop.set()
        if self._upkeep is not None:
            self._upkeep.join(timeout=10)

    def _from_journal(self, migration: str) -> DestinationMigration | None:
        journal = self._host.journal
        state, source = journal.last(migration, "destination"), journal.last(migration, "peer")
        if state is None or source is None:
            return None
        record = state.decode(DestinationRecord)
        copy, kept = journal.last(migration, "copy"), journal.last(migration, "kept")
        return DestinationMigration(
            migration,
            self._host,
            DestinationHandover(record.state, record.token, hold=kept is not None),
            source=source.decode(SourceRecord),
            copy=copy.decode(CopyRecord) if copy is not None else None,
            ran=kept.decode(KeptRecord).ran if kept is not None else None,
        )

    def _look_after(self) -> None:
        while not self._stop.wait(UPKEEP):
            now = self._host.clock.monotonic()
            self._end_samples(lambda sample, now=now: sample.ends < now)  # type: ignore[misc]
            self.forget_ended()
            with self._lock:
                live = list(self._live.values())
            for migration in live:
                try:
                    self._end_if_revoked(migration)
                    migration.undo_failed_build()
                    if migration.machine.state in UNGRANTED:
                        self._ask_source(migration)
                    elif migration.unfinished:
                        migration.go_on()
                except MigrateError as error:
                    _log.error("looking after %s: %s", migration.id, error)

    def _end_if_revoked(self, migration: DestinationMigration) -> None:
        """What a revoked source has begun is given up.

        Not a copy that is prepared: the source may have granted it, and it may be the only one.
        """
        if migration.machine.state not in (DestinationState.RESERVED, DestinationState.RESTORING):
            return
        serial = migration.source.serial
        if serial and self._is_revoked(int(serial, 16)):
            _log.warning(
                "%s: the certificate of %s was revoked", migration.id, migration.source.name
            )
            migration.cancel()

    def _ask_source(self, migration: DestinationMigration, at_least: float = SILENCE) -> None:
        """A source that undid, or a reservation whose source is gone, ends the attempt.

        A prepared copy is kept while the source can't be reached: it may be the only one.
        """
        silent = self._host.clock.monotonic() - migration.last_heard
        if silent < at_least:
            return
        source = migration.source
        try:
            said = self._dial(source.name, source.address).query(migration.id)
        except MigrateError as error:
            if migration.machine.state is DestinationState.RESERVED and silent > RESERVATION_LIFE:
                _log.warning("%s: the source is gone (%s); reservation ended", migration.id, error)
                migration.cancel()
            return
        if said.store_id == source.store_id and said.state in NOT_GRANTED:
            migration.cancel()
        elif said.store_id == source.store_id and said.state:
            migration.last_heard = self._host.clock.monotonic()


def _is_over(migration: DestinationMigration) -> bool:
    """Whether nothing will ever be done about it again, but answering."""
    state = migration.machine.state
    if migration.unfinished:
        return False
    return state in DESTINATION_FINAL or (state in MAY_RUN and not migration.is_present())
