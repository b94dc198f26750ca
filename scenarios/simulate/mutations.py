"""Bugs planted in the real drivers, journal and recovery: the simulation must find each.

``plant`` changes the classes of this process for good; a run with a mutation is a process
of its own.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Mapping
from typing import Any

from agents import destination as agents_destination
from agents import watchdog
from agents.destination import Destinations
from migrate.errors import JournalUnusable, MigrateError, PeerLost
from migrate.orchestrator import destination, source_handover
from migrate.orchestrator.destination import DestinationMigration
from migrate.orchestrator.handover import (
    Answer,
    Answered,
    Done,
    Failed,
    FirstResumeFailed,
    Reply,
    SeenSuspect,
    SendGrant,
    Start,
    Write,
)
from migrate.orchestrator.life import IDLE
from migrate.orchestrator.peer import GrantReply
from migrate.orchestrator.source_handover import SourceSide, undo
from migrate.status import DestinationState, SourceState


def _wrap(cls: Any, name: str, change: Callable[..., Any]) -> None:
    """Replace a method by ``change(original, self, *arguments)``."""
    original = getattr(cls, name)

    def method(self: Any, *arguments: Any) -> Any:
        return change(original, self, *arguments)

    setattr(cls, name, method)


def skip_fsync() -> None:
    """The journal commits without fsync."""
    connect = sqlite3.connect

    def careless(*arguments: Any, **options: Any) -> Any:
        database = connect(*arguments, **options)

        class Careless:
            def execute(self, statement: str, *rest: Any) -> Any:
                return database.execute(
                    statement.replace("synchronous=FULL", "synchronous=NORMAL"), *rest
                )

            def __getattr__(self, name: str) -> Any:
                return getattr(database, name)

        return Careless()

    sqlite3.connect = careless


def stale_token() -> None:
    """The destination starts on any token, such as that of an attempt before this one."""

    def grant(original: Any, self: DestinationMigration, token: bytes) -> GrantReply:
        found: GrantReply = original(self, self.machine.token or token)
        return found

    def restore(original: Any, self: Any, *arguments: Any) -> Any:
        # A grant of an earlier attempt, late on the way, is what the token is there for.
        reply = original(self, *arguments)
        with contextlib.suppress(MigrateError):
            self.grant(b"stale")
        return reply

    _wrap(DestinationMigration, "grant", grant)
    _wrap(DestinationMigration, "restore", restore)


def thaw_on_timeout_after_granted() -> None:
    """A grant that is not answered in time is taken back."""

    def impatient(_original: Any, self: SourceSide, token: bytes, _call: Any) -> Any:
        try:
            reply = self.peer.grant(self.migration, token)
        except PeerLost as error:
            self._write(self.machine.to(SourceState.UNDOING, str(error)))
            undo(self.journal, self.engine, self.migration, self.process)
            return Done()
        return Answered(answer=reply.answer, store_id=reply.store_id, token=token)

    _wrap(SourceSide, "_ask", impatient)


def thaw_on_failure_after_granted() -> None:
    """Whatever fails after GRANTED undoes, as before it."""

    def again(_original: Any, self: SourceSide, event: Any, error: Any) -> Any:
        if self.machine.state is SourceState.GRANTED:
            self._write(self.machine.to(SourceState.UNDOING))
            undo(self.journal, self.engine, self.migration, self.process)
            return Done()
        return event if error is None else Failed(why=str(error))

    _wrap(SourceSide, "_again", again)


def resume_before_owned() -> None:
    """The copy's queues are let run while OWNED is on its way to the disk."""

    def perform(original: Any, self: DestinationMigration, effects: Any) -> Any:
        if len(effects) == 3 and isinstance(effects[1], Start) and self.copy is not None:
            self._resume_all(self.copy.restored)
        return original(self, effects)

    _wrap(DestinationMigration, "_perform", perform)


def owned_after_first_task() -> None:
    """OWNED is journaled when the copy was seen alive, so after its tasks were let go."""

    def perform(original: Any, self: DestinationMigration, effects: Any) -> Any:
        if len(effects) == 3 and isinstance(effects[1], Start):
            effects = (effects[1], effects[0], effects[2])
        return original(self, effects)

    _wrap(DestinationMigration, "_perform", perform)


def owned_answered_before_the_start() -> None:
    """OWNED is answered before anybody saw the copy alive."""

    def perform(original: Any, self: DestinationMigration, effects: Any) -> Any:
        if any(isinstance(e, Start) for e in effects) and isinstance(effects[-1], Reply):
            for effect in effects:
                if isinstance(effect, Write):
                    self._write(effect)
            self._reply = self._answer(Answer.OWNED)
            return []
        return original(self, effects)

    _wrap(DestinationMigration, "_perform", perform)


def forget_refused_on_restart() -> None:
    """A restarted destination has no record of what it refused or aborted."""

    def from_journal(original: Any, self: Destinations, migration: str) -> Any:
        found = original(self, migration)
        gone = (DestinationState.REFUSED, DestinationState.ABORTED)
        return None if found is not None and found.machine.state in gone else found

    _wrap(Destinations, "_from_journal", from_journal)


def watchdog_ignores_granted() -> None:
    """The watchdog thaws whatever stands still."""
    watchdog.MAY_RUN = watchdog.MAY_RUN | {SourceState.GRANTED}


def watchdog_keeps_no_record() -> None:
    """The watchdog thaws without a note, and a restarted agent takes DEVICE for frozen."""
    _wrap(watchdog.Rescue, "_note", lambda *_: None)


def hook_unpause_in_hold() -> None:
    """Whoever held the queues lets them go when the source holds for the grant."""

    def hold(original: Any, self: SourceSide) -> Any:
        self.engine.visit_frozen(self.process, source_handover._unpause)
        return original(self)

    _wrap(SourceSide, "_hold", hold)


def unknown_is_refused() -> None:
    """NO_RECORD is taken for a refusal, whichever journal says it."""

    def ask(original: Any, self: SourceSide, token: bytes, _call: Any) -> Any:
        grant = self.peer.grant

        class Credulous:
            name = self.peer.name

            def __getattr__(self, name: str) -> Any:
                return getattr(peer, name)

            def grant(self, migration: str, token: bytes) -> GrantReply:
                reply = grant(migration, token)
                if reply.answer is not Answer.NO_RECORD:
                    return reply
                return GrantReply(
                    answer=Answer.REFUSED,
                    store_id=store,
                    message=reply.message,
                    figures=reply.figures,
                )

        peer, store = self.peer, self.machine.peer_store
        self.peer = Credulous()
        return original(self, token, self.peer.grant)

    _wrap(SourceSide, "_ask", ask)


def owned_dead_is_owned() -> None:
    """A copy that ran and died is answered as owned."""

    def answer(original: Any, self: DestinationMigration, said: Answer) -> Any:
        return original(self, Answer.OWNED if said is Answer.OWNED_DEAD else said)

    _wrap(DestinationMigration, "_answer", answer)


def grant_before_granted() -> None:
    """The grant is sent while GRANTED is on its way to the disk."""

    def perform(original: Any, self: SourceSide, effects: Any) -> Any:
        if len(effects) == 2 and isinstance(effects[1], SendGrant):
            with contextlib.suppress(MigrateError):
                self.peer.grant(self.migration, effects[1].token)
        return original(self, effects)

    _wrap(SourceSide, "_perform", perform)


def undo_without_record() -> None:
    """On a full disk the source undoes at once, without the destination's word."""
    _wrap(
        SourceSide,
        "_may_go_unrecorded",
        lambda original, self, state: (
            original(self, state)
            or (state is SourceState.UNDOING and self.machine.state is SourceState.DEVICE)
        ),
    )


def undo_of_granted_without_record() -> None:
    """The driver goes on though a record could not be written."""

    def append(original: Any, self: SourceSide, write: Write) -> None:
        try:
            original(self, write)
        except JournalUnusable:
            self.machine.wrote(write)

    _wrap(SourceSide, "_append", append)


def refuse_what_ran() -> None:
    """Any failed RESUME refuses, also after a restart."""
    _wrap(DestinationMigration, "_never_ran", lambda *_: True)


def refuse_before_the_record() -> None:
    """The copy is ended before REFUSING is durable."""

    def start(original: Any, self: DestinationMigration) -> Any:
        failed = original(self)
        if isinstance(failed, FirstResumeFailed):
            self._kill()
        return failed

    _wrap(DestinationMigration, "_start", start)


def kill_before_releasing() -> None:
    """The source ends its copy when an answer comes, whichever it is."""

    def ask(original: Any, self: SourceSide, token: bytes, call: Any) -> Any:
        event = original(self, token, call)
        if isinstance(event, Answered):
            self.engine.kill(self.process)
        return event

    _wrap(SourceSide, "_ask", ask)


def no_retry() -> None:
    """What was decided is tried once."""
    _wrap(SourceSide, "pursue", lambda _original, self, event: _once(self, event))


def _once(self: SourceSide, event: Any) -> None:
    try:
        self.feed(event)
    except (MigrateError, OSError):
        return


def no_upkeep() -> None:
    """The destination never asks the source what became of it."""
    agents_destination.UPKEEP = 1e9


def leave_failed_build() -> None:
    """A build that failed while the disk was full is left to the source to end."""
    _wrap(DestinationMigration, "undo_failed_build", lambda _original, _self: None)


def undo_forgets_the_queues() -> None:
    """The undo thaws the tasks and leaves the queues paused."""

    def forgetful(journal: Any, engine: Any, migration: str, process: Any) -> None:
        engine.thaw(process)

    source_handover.undo = forgetful


# ------------------------------------------------------------ of a kept source


def reclaim_on_suspect() -> None:
    """The source thaws as soon as the copy is called suspect, dead or not."""

    def ask(original: Any, self: SourceSide, token: bytes, call: Any) -> Any:
        event = original(self, token, call)
        if isinstance(event, Answered) and event.answer is Answer.SUSPECT:
            return Answered(answer=Answer.REVOKED, store_id=event.store_id, token=event.token)
        return event

    _wrap(SourceSide, "_ask", ask)


def owned_before_confirmed() -> None:
    """OWNED is answered of a kept copy that nobody saw alive yet."""

    def answer(original: Any, self: DestinationMigration, said: Answer) -> Any:
        return original(self, Answer.OWNED if said is Answer.WATCHED else said)

    _wrap(DestinationMigration, "_answer", answer)


def revoked_before_dead() -> None:
    """REVOKED is answered while the suspect copy is being ended."""

    def kill(original: Any, self: DestinationMigration) -> None:
        if self.machine.state is DestinationState.REVOKING:
            self.host.clock.start("end", lambda: original(self))
        else:
            original(self)

    _wrap(DestinationMigration, "_kill", kill)


def idle_is_suspect() -> None:
    """A process that did too little to be missed is taken for one that hangs."""
    destination._SEEN = {**destination._SEEN, IDLE: SeenSuspect()}


def end_before_revoking() -> None:
    """The suspect copy is ended before REVOKING is durable."""

    def write(original: Any, self: DestinationMigration, record: Write) -> None:
        if record.state is DestinationState.REVOKING:
            self._kill()
        original(self, record)

    _wrap(DestinationMigration, "_write", write)


def life_is_not_looked_at_again() -> None:
    """A restarted destination does not look at a copy that nobody decided about."""

    def decide(original: Any, self: DestinationMigration, copy: Any) -> None:
        if self._held is not None:
            original(self, copy)

    _wrap(DestinationMigration, "_decide_by_life", decide)


MUTATIONS: Mapping[str, Callable[[], None]] = {
    mutation.__name__: mutation
    for mutation in (
        skip_fsync,
        stale_token,
        thaw_on_timeout_after_granted,
        thaw_on_failure_after_granted,
        resume_before_owned,
        owned_after_first_task,
        owned_answered_before_the_start,
        forget_refused_on_restart,
        watchdog_ignores_granted,
        watchdog_keeps_no_record,
        hook_unpause_in_hold,
        unknown_is_refused,
        owned_dead_is_owned,
        grant_before_granted,
        undo_without_record,
        undo_of_granted_without_record,
        refuse_what_ran,
        refuse_before_the_record,
        kill_before_releasing,
        no_retry,
        no_upkeep,
        leave_failed_build,
        undo_forgets_the_queues,
        reclaim_on_suspect,
        owned_before_confirmed,
        revoked_before_dead,
        idle_is_suspect,
        end_before_revoking,
        life_is_not_looked_at_again,
    )
}
