"""Performs the effects of the source's handover machine, in a run and after a restart."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence

from migrate import faults
from migrate.engine import procfs
from migrate.engine.seam import ProcessEngine
from migrate.errors import (
    Cancelled,
    GivenToSource,
    JournalUnusable,
    MigrateError,
    NoSuchProcess,
    OwnerUnknown,
    PeerLost,
    Refused,
    TakenBack,
)
from migrate.journal import Journal
from migrate.kfd.process import KfdProcess
from migrate.model import ProcessRef, Value
from migrate.orchestrator.handover import (
    OPERATOR,
    Answer,
    Answered,
    AskPrepared,
    Done,
    Failed,
    Held,
    Hold,
    Kill,
    Prepared,
    Resolved,
    Restarted,
    SendCancel,
    SendGrant,
    SendRevoke,
    SourceEffect,
    SourceEvent,
    SourceHandover,
    Undo,
    Write,
)
from migrate.orchestrator.host import Host
from migrate.orchestrator.narrator import Narrator
from migrate.orchestrator.peer import GrantReply, Peer
from migrate.status import DestinationState, Owner, SourceState, Status

RETRY = 0.2  # seconds before the first repetition, doubled up to RETRY_MAX
RETRY_MAX = 5.0
ENDING = 30.0  # seconds that a killed process may take to be gone
ENDING_POLL = 0.02  # seconds

_NO_COPY_YET = frozenset({SourceState.SETUP, SourceState.ACTIVE})
_BEFORE_GRANT = _NO_COPY_YET | {SourceState.DEVICE}
# What was decided is done; a next start that does not know does it again, to no effect.
_ENDS = frozenset({SourceState.DONE, SourceState.ROLLED_BACK})
_HAS_COPY = frozenset(
    {
        DestinationState.PREPARED,
        DestinationState.OWNED,
        DestinationState.CONFIRMED,
        DestinationState.OWNED_DEAD,
    }
)

_AFTER_WRITE = {
    SourceState.GRANTED: "source.granted.after-write",
    SourceState.RELEASING: "source.releasing",
    SourceState.DONE: "source.done",
    SourceState.RECLAIMED: "source.reclaimed",
    SourceState.UNDOING: "source.undoing",
}


class StateRecord(Value):
    """The journal's ``source`` record: a state and what it hangs on."""

    state: SourceState
    token: bytes = b""
    store_id: str = ""
    note: str = ""


class SourceSide:
    """One migration's handover at the source.

    After GRANTED it asks until it has an answer: ``stop`` lets it go, with the record in
    the journal and the process frozen. ``cancel`` is an operator's wish, which counts
    until GRANTED is written.
    """

    def __init__(
        self,
        migration: str,
        process: ProcessRef,
        machine: SourceHandover,
        *,
        host: Host,
        peer: Peer,
        narrator: Narrator,
        patience: float,
        stop: threading.Event,
        cancel: threading.Event,
    ) -> None:
        self.migration = migration
        self.process = process
        self.machine = machine
        self.journal = host.journal
        self.engine = host.engine
        self.clock = host.clock
        self.peer = peer
        self.narrator = narrator
        self.patience = patience
        self.stop = stop
        self.cancel = cancel
        self.wake = self.clock.event()  # what waits to be tried again is tried now
        self.answer: GrantReply | None = None
        self.answered_at = 0.0  # monotonic seconds
        self.heard: GrantReply | None = None  # the last answer, whether it moved us or not
        self.lock = self.clock.lock()  # one event at a time
        self._deciding = self.clock.lock()  # an abort and GRANTED exclude each other
        self._resolution: Resolved | None = None
        self._cancelled = False  # the destination's word: it holds no copy, nor ever will

    def feed(self, event: SourceEvent) -> None:
        """Tell the machine and perform what it answers, until it has nothing more to do."""
        with self.lock:
            pending: list[SourceEvent] = [event]
            while pending:
                pending.extend(self._perform(self.machine.on(pending.pop(0))))

    def pursue(self, event: SourceEvent) -> None:
        """As ``feed``, and again until nothing fails any more, or until we are stopped.

        Nothing that was decided stays half done because a disk was full or a process did
        not go on at once.
        """
        delay = RETRY
        while True:
            try:
                self.feed(event)
                return
            except (MigrateError, OSError) as error:
                self.narrator.say(f"this will be tried again: {error}")
                event = self._again(event, error)
            if self.stop.is_set():
                return
            self._rest(delay)
            delay = min(delay * 2, RETRY_MAX)

    def _rest(self, seconds: float) -> None:
        """Between attempts; whoever sets ``stop`` sets ``wake``, too."""
        self.wake.wait(seconds)
        self.wake.clear()

    def settle(self, why: str) -> None:
        """Something failed: undo before the grant, go on after it."""
        failed = Failed(why=why)
        self.pursue(self._again(failed, None))

    def _again(self, event: SourceEvent, error: Exception | None) -> SourceEvent:
        if isinstance(error, Cancelled):
            return Failed(why=str(error))
        if self.machine.state is None or self.machine.state in _BEFORE_GRANT:
            return event
        return Restarted(copy_present=self.engine.is_alive(self.process))

    def resolve(self, resolution: Resolved) -> None:
        """An operator decides, who fenced the other host; whoever asks there stops asking."""
        self._resolution = resolution
        self.wake.set()

    def abort(self) -> bool:
        """An operator's wish to end it. False: too late, the grant is given."""
        with self._deciding:
            if self.machine.state is not None and self.machine.state not in _BEFORE_GRANT:
                return False
            self.cancel.set()
            self.wake.set()
            return True

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
                return self._ask(token, self.peer.grant)
            case SendRevoke(token=token):
                return self._ask(token, self.peer.revoke)
            case AskPrepared():
                return self._ask_prepared()
            case SendCancel():
                self._cancel()
            case Undo():
                undo(self.journal, self.engine, self.migration, self.process)
                return Done()
            case Kill():
                self.engine.kill(self.process)
                faults.point("source.killed")
                return Done()
        return None

    # ------------------------------------------------------------ single effects

    def _write(self, write: Write) -> None:
        if write.state is SourceState.GRANTED:
            with self._deciding:
                if self.cancel.is_set():
                    raise Cancelled("the migration was aborted")
                self._append(write)
        else:
            self._append(write)

    def _append(self, write: Write) -> None:
        assert isinstance(write.state, SourceState)
        if write.state is SourceState.GRANTED:
            faults.point("source.granted.before-write")
        record = StateRecord(
            state=write.state, token=write.token, store_id=write.store_id, note=write.note
        )
        try:
            self.journal.append(self.migration, "source", record)
        except JournalUnusable:
            if not self._may_go_unrecorded(write.state):
                raise
            self.narrator.say("the journal can't be written; going on all the same")
        self.machine.wrote(write)
        if write.state in _AFTER_WRITE:
            faults.point(_AFTER_WRITE[write.state])

    def _may_go_unrecorded(self, state: SourceState) -> bool:
        """The disk is full. Must *state* wait until it is not?

        An undo need not if no copy was ordered, or the destination said that it will never
        run one. Without that word it must: the process could run, end by itself, and a
        restarted agent that reads DEVICE would take the copy for the only one.
        """
        if state in _ENDS:
            return True
        if state is not SourceState.UNDOING:
            return False
        return self.machine.state in _NO_COPY_YET or (
            self.machine.state is SourceState.DEVICE and self._cancelled
        )

    def _hold(self) -> SourceEvent:
        self._wait_for_its_end()
        if not self.engine.is_alive(self.process) or self.engine.is_frozen(self.process):
            return Held()
        # An agent that was away may find it running (the engine's own freeze was undone
        # by force): freeze it again, so that GRANTED always means frozen.
        if self.machine.state is SourceState.GRANTED:
            self.engine.freeze(self.process)
            return Held()
        return Failed(why="the process is not frozen any more")

    def _wait_for_its_end(self) -> None:
        """One that somebody killed is woken to die. It does not run: it is about to be gone."""
        deadline = self.clock.monotonic() + ENDING
        while procfs.is_ending(self.process) and self.clock.monotonic() < deadline:
            if not self.engine.is_alive(self.process):
                return
            self.stop.wait(ENDING_POLL)

    def _ask(self, token: bytes, call: Callable[[str, bytes], GrantReply]) -> SourceEvent | None:
        """*call*, then Grants, until one is answered in a way that moves us, or we are stopped."""
        since, delay, told = self.clock.monotonic(), RETRY, False
        while not self.stop.is_set():
            if self._resolution is not None:
                return self._resolution
            try:
                reply = call(self.migration, token)
            except MigrateError as error:
                why = str(error)
            else:
                self.heard = reply
                event = Answered(answer=reply.answer, store_id=reply.store_id, token=token)
                if self._moves(event):
                    self.answer, self.answered_at = reply, self.clock.monotonic()
                    faults.point("source.answered")
                    return event
                why = f"the destination answered {reply.answer} {reply.message}".rstrip()
                if reply.store_id != self.machine.peer_store:
                    why += f" from another journal ({reply.store_id})"
                if reply.answer is Answer.WATCHED:  # who answers so is there, and looks
                    since, delay = self.clock.monotonic(), RETRY
            call = self.peer.grant
            if not told and self.clock.monotonic() - since >= self.patience:
                told = True
                self._owner_unknown(why)
            self._rest(delay)
            delay = min(delay * 2, RETRY_MAX)
        return None

    def _moves(self, event: Answered) -> bool:
        """Whether there is something to do about an answer.

        Nothing is asked back that we could not go on with: our copy may be gone.
        """
        effects = self.machine.on(event)
        if any(isinstance(effect, SendRevoke) for effect in effects):
            return self.engine.is_frozen(self.process)
        return bool(effects)

    def _owner_unknown(self, why: str) -> None:
        self.narrator.owner = Owner.UNKNOWN
        self.narrator.status = Status.HANDOVER
        self.narrator.say(f"OWNER_UNKNOWN: {why}; the source stays frozen and keeps asking")

    def _ask_prepared(self) -> SourceEvent | None:
        """Our copy is gone: does the destination hold one? It may be the only one left.

        Asks until it is answered: only an operator, by an abort, gives that copy up.
        """
        delay = RETRY
        while not self.stop.is_set():
            if self.cancel.is_set():
                return Failed(why="aborted while the destination did not answer")
            try:
                state = self.peer.query(self.migration)
            except MigrateError:
                self._rest(delay)
                delay = min(delay * 2, RETRY_MAX)
                continue
            if state.state in _HAS_COPY and state.token:
                return Prepared(token=state.token, store_id=state.store_id)
            return Failed(why="the process is gone and the destination holds no copy of it")
        return None

    def _cancel(self) -> None:
        try:
            cancelled = self.peer.cancel(self.migration, "the source undoes")
        except PeerLost:
            # It asks us by itself, and a Grant will never come.
            self.narrator.say("the destination could not be told; it will ask")
        except MigrateError as error:
            self.narrator.say(f"the destination's answer to the cancel: {error}")
        else:
            if not cancelled:
                # Our journal must have lost a grant. Nobody runs here before that is clear.
                raise OwnerUnknown("the destination owns the process, says its answer to a cancel")
            self._cancelled = True


def undo(journal: Journal, engine: ProcessEngine, migration: str, process: ProcessRef) -> None:
    """UNPAUSE what we paused, then thaw. Idempotent; a process that is gone is fine."""
    if not engine.is_alive(process):
        return
    if is_paused(journal, migration):
        try:
            engine.visit_frozen(process, _unpause)
        except NoSuchProcess:
            return
        note_unpaused(journal, migration)
    faults.point("source.unpaused")
    engine.thaw(process)
    faults.point("source.thawed")


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


def given_back(journal: Journal, migration: str) -> MigrateError | None:
    """The error to report of a source that runs though a grant was given and not refused.

    Its copy ran, or may have: it was taken back, or an operator decided so. None otherwise.
    """
    with contextlib.suppress(JournalUnusable):
        for record in journal.history(migration):
            if record.kind != "source":
                continue
            found = record.decode(StateRecord)
            if found.state is SourceState.RECLAIMED:
                return TakenBack("the destination's copy was suspect; the kept source runs on")
            if found.state is SourceState.UNDOING and found.note.startswith(OPERATOR):
                return GivenToSource(f"{found.note}; the source runs on")
    return None


def refusal(answer: GrantReply | None) -> MigrateError:
    """The error to report after a refused grant."""
    why = answer.message if answer is not None and answer.answer is Answer.REFUSED else ""
    return Refused(f"the destination refused the grant: {why or 'no reason was given'}")
