"""The handover: never two, never none. Sans-I/O: events in, effects out.

Two small machines, one for each side. A driver feeds them what happened and performs
the effects they answer with, **in order**; a ``Write`` is durable, and reported back
by ``wrote``, before the effect behind it is begun. So ``state`` is what the journal
says, or, where a full disk may not hold up what a next start would do again to no
effect, one step ahead of it (see ``SourceSide``). Nothing here waits, reads a clock or
does I/O, so that the same code runs in the agents, in a simulation and in an exhaustive
search. docs/handover.md has the states, the sequences and the evidence.

::

    source                                destination
      | <------------- Prepared(token) ----- |  journal PREPARED, then say so
      | Hold: tree frozen so that it stays   |
      | Write GRANTED(token, peer's store)   |
      | ----------------- Grant(token) ----> |
      |                                      |  Write OWNED; Resume; Release; seen alive
      | <------------------------- OWNED --- |
      | Write RELEASING; Kill; Write DONE    |

With a kept source (``hold``) the destination first looks whether its copy lives, and says
WATCHED meanwhile. Then it is one of these, never both, by the record that comes first::

      | <------------------------- OWNED --- |  seen alive or idle; Write CONFIRMED
      |
      | <----------------------- SUSPECT --- |  it did something before and does nothing now
      | --------------- Revoke(token) -----> |  Write REVOKING; Kill; Write REVOKED
      | <----------------------- REVOKED --- |
      | Write RECLAIMED; Undo; ROLLED_BACK   |

Invariants, by name:

ONE-RUNS      At no instant may both copies run: the source's is frozen from Hold until
              UNDOING is durable, the destination's may run only after OWNED is durable,
              and UNDOING after GRANTED needs REFUSED (which needs the copy ended).
NO-TIMEOUT    After GRANTED no timeout, abort, restart or failure moves the source. Only
              the destination's answer or an operator who fenced a host does.
REFUSED-STAYS A destination that refused or aborted never runs that copy: a Grant that
              comes later is refused again. REFUSING is durable before the copy is ended,
              so that a copy found dead in OWNED, and only there, may have run.
OWNED-STAYS   A destination never ends a copy that ran, but a suspect one that a source
              which keeps its own asks back.
CONFIRMED-STAYS  With a kept source OWNED is answered only after CONFIRMED is durable, and
              what is CONFIRMED is never revoked.
REVOKED-DEAD  REVOKED is durable only after the copy is proven dead, and after REVOKING; only
              REVOKED lets a source run again after its copy ran. Idle is never suspect.
SEEN-ALIVE    OWNED is answered only while the copy is seen alive.
NOT-KNOWN     "No record" and an answer from another journal (store id) are not refusals.
WRITE-FIRST   Every decision is durable before its first effect, and every effect may be
              done again, so a crash anywhere resumes from the last record.
TOKEN         An answer or a grant with another token than the journaled one is ignored.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TypeAlias

from migrate.model import Value
from migrate.status import (
    DESTINATION_TRANSITIONS,
    MAY_RUN,
    NEVER_RAN,
    SOURCE_TRANSITIONS,
    UNGRANTED,
    DestinationState,
    SourceState,
    advance,
)

# ------------------------------------------------------------------ what is said


class Answer(StrEnum):
    """What a destination can answer to a Grant (proto: GrantReply.Answer)."""

    OWNED = "OWNED"
    REFUSED = "REFUSED"
    OWNED_DEAD = "OWNED_DEAD"
    WATCHED = "WATCHED"  # it runs; whether it lives is being looked at (a kept source only)
    SUSPECT = "SUSPECT"  # it runs and does nothing: it may be asked back (likewise)
    REVOKED = "REVOKED"  # it was asked back, and is dead
    NO_RECORD = "NO_RECORD"


class Prepared(Value):
    """The destination holds a placed and verified copy."""

    token: bytes
    store_id: str


class Held(Value):
    """The source's tree is frozen, and hook and watchdog will not thaw it."""


class Answered(Value):
    """The destination answered a Grant."""

    answer: Answer
    store_id: str
    token: bytes


class Failed(Value):
    """Something before the grant failed, or an operator aborts."""

    why: str


class Restarted(Value):
    """The agent came back from its journal. ``copy_present``: our copy still exists."""

    copy_present: bool


class Resolved(Value):
    """An operator fenced a host and decided. ``source_owns``: who runs it from now on."""

    source_owns: bool
    fenced: str


class Done(Value):
    """The effects of the last decision are done (killed, or unpaused and thawed)."""


SourceEvent: TypeAlias = Prepared | Held | Answered | Failed | Restarted | Resolved | Done


class Built(Value):
    """The copy is placed, verified and held."""

    token: bytes


class GrantCame(Value):
    """A Grant arrived."""

    token: bytes


class RevokeCame(Value):
    """A source that kept its copy asks a suspect one back."""

    token: bytes


class SeenAlive(Value):
    """The released copy is alive, or idle as it was before."""


class SeenSuspect(Value):
    """The released copy does nothing, though it did something before."""


class CancelCame(Value):
    """The source says that it did not and will not grant."""


class FirstResumeFailed(Value):
    """No queue and no task of the copy was started, and none will be."""


class CopyDied(Value):
    """The copy is gone though it was ours to run."""


DestinationEvent: TypeAlias = (
    Built
    | GrantCame
    | RevokeCame
    | SeenAlive
    | SeenSuspect
    | CancelCame
    | Failed
    | FirstResumeFailed
    | CopyDied
    | Restarted
    | Resolved
    | Done
)

# ------------------------------------------------------------------ what is to be done


class Write(Value):
    """Make a state durable."""

    state: SourceState | DestinationState
    token: bytes = b""
    store_id: str = ""
    note: str = ""


class Hold(Value):
    """Freeze the tree so that it outlives us; nobody thaws it from now on."""


class SendGrant(Value):
    """Send or repeat the Grant; its reply comes back as Answered."""

    token: bytes


class SendRevoke(Value):
    """Ask a suspect copy back, while our own is there; the reply comes back as Answered."""

    token: bytes


class AskPrepared(Value):
    """Ask the destination whether it holds a prepared copy."""


class SendCancel(Value):
    """Tell the destination that there will be no grant (best effort)."""


class Undo(Value):
    """UNPAUSE the queues, then thaw the tree. Then Done."""


class Kill(Value):
    """End our copy and wait until it is gone. Then Done."""


class Start(Value):
    """RESUME every KFD process, then release the tasks (idempotent)."""


class Reply(Value):
    """Answer the Grant at hand. OWNED only after the copy was seen alive."""

    answer: Answer


SourceEffect: TypeAlias = (
    Write | Hold | SendGrant | SendRevoke | AskPrepared | SendCancel | Undo | Kill
)
DestinationEffect: TypeAlias = Write | Start | Kill | Reply

OPERATOR = "operator: "  # begins the note of a decision that a person took
_BEFORE_GRANT = frozenset({SourceState.SETUP, SourceState.ACTIVE, SourceState.DEVICE})
_UNDOES = frozenset({SourceState.UNDOING, SourceState.RECLAIMED})


class SourceHandover:
    """The source's half. ``state`` is what its journal says."""

    def __init__(
        self,
        state: SourceState | None = None,
        token: bytes = b"",
        peer_store: str = "",
    ) -> None:
        self.state = state
        self.token = token
        self.peer_store = peer_store

    def to(self, state: SourceState, note: str = "") -> Write:
        """The record that moves on to *state*. Raises IllegalTransition."""
        advance(SOURCE_TRANSITIONS, self.state, state)
        return Write(state=state, token=self.token, store_id=self.peer_store, note=note)

    def wrote(self, record: Write) -> None:
        """*record* is durable."""
        assert isinstance(record.state, SourceState)
        self.state = advance(SOURCE_TRANSITIONS, self.state, record.state)

    def on(self, event: SourceEvent) -> tuple[SourceEffect, ...]:
        """What to do about *event*; nothing for one that changes nothing."""
        match event:
            case Prepared(token=token, store_id=store) if self.state is SourceState.DEVICE:
                self.token, self.peer_store = token, store
                return (Hold(),)
            case Held() if self.state is SourceState.DEVICE and self.token:
                return self._grant()
            case Answered():
                return self._answered(event)
            case Failed(why=why) if self.state in _BEFORE_GRANT:
                return (SendCancel(), self.to(SourceState.UNDOING, why), Undo())
            case Restarted(copy_present=present):
                return self._restarted(present)
            case Resolved() if self.state is SourceState.GRANTED:
                why = f"{OPERATOR}{event.fenced} was fenced"
                if event.source_owns:
                    return (self.to(SourceState.UNDOING, why), Undo())
                return (self.to(SourceState.RELEASING, why), Kill())
            case Done() if self.state is SourceState.RELEASING:
                return (self.to(SourceState.DONE),)
            case Done() if self.state in _UNDOES:
                return (self.to(SourceState.ROLLED_BACK),)
        return ()

    def _grant(self) -> tuple[SourceEffect, ...]:
        # The point of no return: from this record on we alone may not thaw.
        return (self.to(SourceState.GRANTED), SendGrant(token=self.token))

    def _answered(self, event: Answered) -> tuple[SourceEffect, ...]:
        if self.state is not SourceState.GRANTED:
            return ()
        if event.store_id != self.peer_store or event.token != self.token:
            return ()  # NOT-KNOWN, TOKEN
        if event.answer is Answer.OWNED:
            return (self.to(SourceState.RELEASING), Kill())
        if event.answer is Answer.REFUSED:
            return (self.to(SourceState.UNDOING, "the destination refused the grant"), Undo())
        if event.answer is Answer.SUSPECT:
            return (SendRevoke(token=self.token),)
        if event.answer is Answer.REVOKED:
            why = "the destination gave its suspect copy back"
            return (self.to(SourceState.RECLAIMED, why), Undo())
        return ()  # WATCHED: ask again. OWNED_DEAD, NO_RECORD: an operator decides

    def _restarted(self, copy_present: bool) -> tuple[SourceEffect, ...]:
        if self.state is SourceState.GRANTED:
            return (Hold(), SendGrant(token=self.token))
        if self.state is SourceState.RELEASING:
            return (Kill(),)
        if self.state in _UNDOES:
            return (Undo(),)
        if self.state is SourceState.DEVICE and not copy_present:
            # The destination's copy may be the only one left: do not abort it.
            return (AskPrepared(),)
        if self.state in _BEFORE_GRANT:
            return (SendCancel(), self.to(SourceState.UNDOING, "the agent was restarted"), Undo())
        return ()


_ENDS_IT = frozenset({DestinationState.REFUSING, DestinationState.REVOKING})


class DestinationHandover:
    """The destination's half. ``state`` is what its journal says; None: no record.

    ``hold``: the source keeps its copy until ours was seen alive (journaled with the order).
    ``suspect``: what was seen of ours; a restarted agent looks anew.
    """

    def __init__(
        self,
        state: DestinationState | None = None,
        token: bytes = b"",
        hold: bool = False,
        suspect: bool = False,
    ) -> None:
        self.state = state
        self.token = token
        self.hold = hold
        self.suspect = suspect

    def to(self, state: DestinationState) -> Write:
        """The record that moves on to *state*. Raises IllegalTransition."""
        advance(DESTINATION_TRANSITIONS, self.state, state)
        return Write(state=state, token=self.token)

    def wrote(self, record: Write) -> None:
        """*record* is durable."""
        assert isinstance(record.state, DestinationState)
        self.state = advance(DESTINATION_TRANSITIONS, self.state, record.state)

    def on(self, event: DestinationEvent) -> tuple[DestinationEffect, ...]:
        """What to do about *event*; nothing for one that changes nothing."""
        match event:
            case Built(token=token) if self.state is DestinationState.RESTORING:
                self.token = token
                return (self.to(DestinationState.PREPARED),)
            case GrantCame(token=token):
                return self._granted(token)
            case RevokeCame() | SeenAlive() | SeenSuspect():
                return self._kept(event)
            case CancelCame() | Failed() if self.state in UNGRANTED:
                return (Kill(), self.to(DestinationState.ABORTED))
            case FirstResumeFailed() if self.state is DestinationState.OWNED:
                # Nothing ran and nobody was told OWNED: it may still be refused. The record
                # comes first: a copy found dead later must not be taken for one that ran.
                return (self.to(DestinationState.REFUSING), Kill())
            case Done() if self.state is DestinationState.REFUSING:
                return (self.to(DestinationState.REFUSED), Reply(answer=Answer.REFUSED))
            case Done() if self.state is DestinationState.REVOKING:
                return (self.to(DestinationState.REVOKED), Reply(answer=Answer.REVOKED))
            case Resolved(source_owns=False):
                return self._resolved()
            case CopyDied() if self.state in MAY_RUN:
                return (self.to(DestinationState.OWNED_DEAD), Reply(answer=Answer.OWNED_DEAD))
            case Restarted(copy_present=present):
                return self._restarted(present)
        return ()

    def _granted(self, token: bytes) -> tuple[DestinationEffect, ...]:
        if self.state is None:
            return (Reply(answer=Answer.NO_RECORD),)
        if self.state in NEVER_RAN:
            return (Reply(answer=Answer.REFUSED),)
        if self.state in _ENDS_IT:
            return (Kill(),)
        if self.state is DestinationState.REVOKED:
            return (Reply(answer=Answer.REVOKED),)
        if self.state is DestinationState.OWNED_DEAD:
            return (Reply(answer=Answer.OWNED_DEAD),)
        if token != self.token or self.state in {
            DestinationState.RESERVED,
            DestinationState.RESTORING,
        }:
            return ()  # TOKEN: not the grant of this copy
        if self.state in MAY_RUN:
            return (Start(), Reply(answer=self._what_it_is()))
        return (
            self.to(DestinationState.OWNED),
            Start(),
            Reply(answer=self._what_it_is()),
        )

    def _what_it_is(self) -> Answer:
        """The answer about a copy that runs."""
        if not self.hold or self.state is DestinationState.CONFIRMED:
            return Answer.OWNED
        return Answer.SUSPECT if self.suspect else Answer.WATCHED

    def _resolved(self) -> tuple[DestinationEffect, ...]:
        """An operator gives the process to us: one that is held, or that nobody saw alive."""
        if self.state is DestinationState.PREPARED:
            return (self.to(DestinationState.OWNED), Start())
        if self.state is DestinationState.OWNED and self.hold:
            return (self.to(DestinationState.CONFIRMED), Start())
        return ()

    def _kept(self, event: DestinationEvent) -> tuple[DestinationEffect, ...]:
        """What only a source that keeps its copy brings about."""
        undecided = self.state is DestinationState.OWNED and self.hold
        match event:
            case RevokeCame(token=token):
                return self._asked_back(token)
            case SeenAlive() if undecided:
                # The other way of a kept source, closed for ever before anybody hears OWNED.
                return (self.to(DestinationState.CONFIRMED),)
            case SeenSuspect() if undecided:
                self.suspect = True
        return ()

    def _asked_back(self, token: bytes) -> tuple[DestinationEffect, ...]:
        """A Revoke: only what runs, is suspect and was never confirmed is given back."""
        held = self.state is DestinationState.PREPARED
        if held or (self.state is not None and token != self.token):
            return ()  # TOKEN; and one that is only held was never told of
        if self.state is DestinationState.OWNED and self.hold and self.suspect:
            return (self.to(DestinationState.REVOKING), Kill())
        return self._granted(token)

    def _restarted(self, copy_present: bool) -> tuple[DestinationEffect, ...]:
        if self.state in UNGRANTED:
            return (Kill(), self.to(DestinationState.ABORTED))
        if self.state in NEVER_RAN | _ENDS_IT or self.state is DestinationState.REVOKED:
            return (Kill(),)  # leavings of a crash between the record and the kill
        if self.state in MAY_RUN:
            if copy_present:
                return (Start(),)
            return (self.to(DestinationState.OWNED_DEAD),)
        return ()
