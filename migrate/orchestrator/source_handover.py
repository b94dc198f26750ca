"""Performs the effects of the source's handover machine, in a run and after a restart."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from migrate.engine.seam import ProcessEngine
from migrate.errors import JournalUnusable, MigrateError, NoSuchProcess, PeerLost, Refused
from migrate.journal import Journal
from migrate.kfd.process import KfdProcess
from migrate.model import ProcessRef, Value
from migrate.orchestrator.handover import (
    Answer,
    Answered,
    AskPrepared,
    Done,
    Failed,
    Held,
    Hold,
    Kill,
    Prepared,
    SendCancel,
    SendGrant,
    SourceEffect,
    SourceEvent,
    SourceHandover,
    Undo,
    Write,
)
from migrate.orchestrator.narrator import Narrator
from migrate.orchestrator.peer import GrantReply, Peer
from migrate.status import DestinationState, Owner, SourceState, Status

GRANT_RETRY = 0.2  # seconds before the first repeated Grant, doubled up to GRANT_RETRY_MAX
GRANT_RETRY_MAX = 5.0


class StateRecord(Value):
    """The journal's ``source`` record: a state and what it hangs on."""

    state: SourceState
    token: bytes = b""
    store_id: str = ""
    note: str = ""


class SourceSide:
    """One migration's handover at the source.

    After GRANTED it asks until it has an answer: ``stop`` lets it go, with the record in
    the journal and the process frozen.
    """

    def __init__(
        self,
        migration: str,
        process: ProcessRef,
        machine: SourceHandover,
        *,
        journal: Journal,
        engine: ProcessEngine,
        peer: Peer,
        narrator: Narrator,
        patience: float,
        stop: threading.Event,
    ) -> None:
        self.migration = migration
        self.process = process
        self.machine = machine
        self.journal = journal
        self.engine = engine
        self.peer = peer
        self.narrator = narrator
        self.patience = patience
        self.stop = stop
        self.answer: GrantReply | None = None
        self.answered_at = 0.0  # monotonic seconds
        self.lock = threading.Lock()  # one event at a time

    def feed(self, event: SourceEvent) -> None:
        """Tell the machine and perform what it answers, until it has nothing more to do."""
        with self.lock:
            pending: list[SourceEvent] = [event]
            while pending:
                pending.extend(self._perform(self.machine.on(pending.pop(0))))

    def record(self, state: SourceState) -> None:
        """Move on before the handover. Raises JournalUnusable, and then nothing moved."""
        with self.lock:
            self._write(self.machine.to(state))

    def _perform(self, effects: Sequence[SourceEffect]) -> list[SourceEvent]:
        came: list[SourceEvent] = []
        for effect in effects:
            event = self._perform_one(effect)
            if event is not None:
                came.append(event)
        return came

    def _perform_one(self, effect: SourceEffect) -> SourceEvent | None:
        match effect:
            case Write():
                self._write(effect)
            case Hold():
                return self._hold()
            case SendGrant(token=token):
                return self._ask(token)
            case AskPrepared():
                return self._ask_prepared()
            case SendCancel():
                self._cancel()
            case Undo():
                self.undo()
                return Done()
            case Kill():
                self.engine.kill(self.process)
                return Done()
        return None

    # ------------------------------------------------------------ single effects

    def _write(self, write: Write) -> None:
        assert isinstance(write.state, SourceState)
        record = StateRecord(
            state=write.state, token=write.token, store_id=write.store_id, note=write.note
        )
        try:
            self.journal.append(self.migration, "source", record)
        except JournalUnusable:
            # The disk is full. Before the grant the source must run on all the same, and
            # the older record leads a restarted agent to the same undo. After it nothing
            # may move without a record.
            if write.state is not SourceState.UNDOING or self.machine.state is SourceState.GRANTED:
                raise
            self.narrator.say("the journal can't be written; undoing all the same")
        self.machine.wrote(write)

    def _hold(self) -> SourceEvent:
        if not self.engine.is_alive(self.process) or self.engine.is_frozen(self.process):
            return Held()
        # An agent that was away may find it running (the engine's own freeze was undone
        # by force): freeze it again, so that GRANTED always means frozen.
        if self.machine.state is SourceState.GRANTED:
            self.engine.freeze(self.process)
            return Held()
        return Failed(why="the process is not frozen any more")

    def _ask(self, token: bytes) -> SourceEvent | None:
        """Send the Grant until it is answered in a way that moves us, or we are stopped."""
        since, delay, told = time.monotonic(), GRANT_RETRY, False
        while not self.stop.is_set():
            try:
                reply = self.peer.grant(self.migration, token)
            except MigrateError as error:
                why = str(error)
            else:
                event = Answered(answer=reply.answer, store_id=reply.store_id, token=token)
                if self.machine.on(event):
                    self.answer, self.answered_at = reply, time.monotonic()
                    return event
                why = f"the destination answered {reply.answer} {reply.message}".rstrip()
                if reply.store_id != self.machine.peer_store:
                    why += f" from another journal ({reply.store_id})"
            if not told and time.monotonic() - since >= self.patience:
                told = True
                self._owner_unknown(why)
            self.stop.wait(delay)
            delay = min(delay * 2, GRANT_RETRY_MAX)
        return None

    def _owner_unknown(self, why: str) -> None:
        self.narrator.owner = Owner.UNKNOWN
        self.narrator.status = Status.HANDOVER
        self.narrator.say(f"OWNER_UNKNOWN: {why}; the source stays frozen and keeps asking")

    def _ask_prepared(self) -> SourceEvent | None:
        """Our copy is gone: does the destination hold one that was never granted?"""
        delay = GRANT_RETRY
        while not self.stop.is_set():
            try:
                state = self.peer.query(self.migration)
            except MigrateError:
                self.stop.wait(delay)
                delay = min(delay * 2, GRANT_RETRY_MAX)
                continue
            if state.state == DestinationState.PREPARED and state.token:
                return Prepared(token=state.token, store_id=state.store_id)
            return Failed(why="the process is gone and the destination holds no copy of it")
        return None

    def _cancel(self) -> None:
        try:
            self.peer.cancel(self.migration, "the source undoes")
        except PeerLost:
            # It asks us by itself, and a Grant will never come.
            self.narrator.say("the destination could not be told; it will ask")
        except MigrateError as error:
            self.narrator.say(f"the destination's answer to the cancel: {error}")

    def undo(self) -> None:
        """UNPAUSE what we paused, then thaw. Idempotent; a process that is gone is fine."""
        if not self.engine.is_alive(self.process):
            return
        if is_paused(self.journal, self.migration):
            try:
                self.engine.visit_frozen(self.process, _unpause)
            except NoSuchProcess:
                return
            note_unpaused(self.journal, self.migration)
        self.engine.thaw(self.process)


def _unpause(kfd: Sequence[KfdProcess]) -> None:
    for process in kfd:
        process.unpause_if_paused()


# ------------------------------------------------------------ the pause's record


def note_pausing(journal: Journal, migration: str) -> None:
    """Before PROCESS_INFO: whoever comes after us knows that queues may be paused."""
    journal.append(migration, "paused", True)


def note_unpaused(journal: Journal, migration: str) -> None:
    """After UNPAUSE. A full disk is no reason to fail: a second UNPAUSE is harmless."""
    try:
        journal.append(migration, "paused", False)
    except JournalUnusable:
        return


def is_paused(journal: Journal, migration: str) -> bool:
    """Whether queues may be paused, as the journal knows."""
    record = journal.last(migration, "paused")
    return record is not None and record.decode(bool)


def refusal(answer: GrantReply | None) -> MigrateError:
    """The error to report after a refused grant."""
    why = answer.message if answer is not None and answer.answer is Answer.REFUSED else ""
    return Refused(f"the destination refused the grant: {why or 'no reason was given'}")
