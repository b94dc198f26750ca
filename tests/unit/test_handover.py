"""The handover's tables: every arrow that matters, and every arrow that must not be."""

import itertools

import pytest

from migrate.orchestrator.handover import (
    Answer,
    Answered,
    AskPrepared,
    Built,
    CancelCame,
    CopyDied,
    DestinationHandover,
    Done,
    Failed,
    FirstResumeFailed,
    GrantCame,
    Held,
    Hold,
    Kill,
    Prepared,
    Reply,
    Resolved,
    Restarted,
    RevokeCame,
    SeenAlive,
    SeenSuspect,
    SendCancel,
    SendGrant,
    SendRevoke,
    SourceHandover,
    Start,
    Undo,
    Write,
)
from migrate.status import DestinationState as D
from migrate.status import IllegalTransition, Owner, owner_of
from migrate.status import SourceState as S

TOKEN, STORE = b"t" * 16, "store"


def shape(effects: tuple[object, ...]) -> list[str]:
    return [str(e.state) if isinstance(e, Write) else type(e).__name__ for e in effects]


def on(machine: SourceHandover | DestinationHandover, event: object) -> tuple[object, ...]:
    """Feed an event as a driver does, every record reaching the disk."""
    effects = machine.on(event)  # type: ignore[arg-type]
    for effect in effects:
        if isinstance(effect, Write):
            machine.wrote(effect)
    return effects


def in_device() -> SourceHandover:
    machine = SourceHandover()
    for state in (S.SETUP, S.ACTIVE, S.DEVICE):
        machine.wrote(machine.to(state))
    return machine


def granted() -> SourceHandover:
    machine = in_device()
    assert on(machine, Prepared(token=TOKEN, store_id=STORE)) == (Hold(),)
    effects = on(machine, Held())
    assert shape(effects) == ["GRANTED", "SendGrant"]
    return machine


def answered(answer: Answer, token: bytes = TOKEN, store: str = STORE) -> Answered:
    return Answered(answer=answer, store_id=store, token=token)


def test_the_straight_way_writes_before_it_acts() -> None:
    machine = granted()
    assert owner_of(S.GRANTED) is Owner.UNKNOWN
    assert shape(on(machine, answered(Answer.OWNED))) == ["RELEASING", "Kill"]
    assert shape(on(machine, Done())) == ["DONE"]


def kept(state: D = D.OWNED, **more: bool) -> DestinationHandover:
    return DestinationHandover(state, TOKEN, hold=True, **more)


def test_a_kept_source_waits_until_the_copy_is_confirmed() -> None:
    machine = kept()
    assert on(machine, GrantCame(token=TOKEN))[-1] == Reply(answer=Answer.WATCHED)
    assert shape(on(machine, SeenAlive())) == ["CONFIRMED"]
    assert on(machine, GrantCame(token=TOKEN)) == (Start(), Reply(answer=Answer.OWNED))
    assert on(machine, RevokeCame(token=TOKEN)) == (Start(), Reply(answer=Answer.OWNED))
    assert shape(on(granted(), answered(Answer.WATCHED))) == []


def test_a_suspect_copy_is_given_back_once_it_is_dead() -> None:
    machine = kept()
    assert on(machine, RevokeCame(token=TOKEN))[-1] == Reply(answer=Answer.WATCHED)
    assert on(machine, SeenSuspect()) == ()
    assert on(machine, GrantCame(token=TOKEN))[-1] == Reply(answer=Answer.SUSPECT)
    assert shape(on(machine, RevokeCame(token=TOKEN))) == ["REVOKING", "Kill"]
    assert shape(on(machine, SeenAlive())) == []
    assert shape(on(machine, GrantCame(token=TOKEN))) == ["Kill"]
    assert shape(on(machine, Done())) == ["REVOKED", "Reply"]
    assert on(machine, GrantCame(token=TOKEN)) == (Reply(answer=Answer.REVOKED),)
    source = granted()
    assert on(source, answered(Answer.SUSPECT)) == (SendRevoke(token=TOKEN),)
    assert shape(on(source, answered(Answer.REVOKED))) == ["RECLAIMED", "Undo"]
    assert shape(on(source, Restarted(copy_present=True))) == ["Undo"]
    assert shape(on(source, Done())) == ["ROLLED_BACK"]


def test_nothing_is_given_back_without_a_kept_source_a_token_or_a_suspicion() -> None:
    for machine in (
        DestinationHandover(D.OWNED, TOKEN, suspect=True),
        kept(suspect=False),
        kept(D.PREPARED, suspect=True),
        kept(D.CONFIRMED, suspect=True),
        kept(D.OWNED_DEAD, suspect=True),
    ):
        assert "REVOKING" not in shape(on(machine, RevokeCame(token=TOKEN)))
    assert on(kept(suspect=True), RevokeCame(token=b"stale")) == ()
    assert on(kept(D.PREPARED), RevokeCame(token=TOKEN)) == ()
    assert shape(on(kept(D.REVOKED), Restarted(copy_present=True))) == ["Kill"]


def test_an_operator_confirms_a_copy_that_nobody_saw_alive() -> None:
    machine = kept(suspect=True)
    assert shape(on(machine, Resolved(source_owns=False, fenced="a"))) == ["CONFIRMED", "Start"]


def test_a_refusal_undoes_only_after_it_is_durable() -> None:
    machine = granted()
    assert shape(on(machine, answered(Answer.REFUSED))) == ["UNDOING", "Undo"]
    assert shape(on(machine, Done())) == ["ROLLED_BACK"]


@pytest.mark.parametrize(
    "event",
    [
        Failed(why="timeout"),
        Prepared(token=b"other", store_id="other"),
        Held(),
        Done(),
        answered(Answer.OWNED, token=b"stale"),
        answered(Answer.REFUSED, token=b"stale"),
        answered(Answer.OWNED, store="another journal"),
        answered(Answer.REFUSED, store="another journal"),
        answered(Answer.OWNED_DEAD),
        answered(Answer.NO_RECORD),
    ],
)
def test_nothing_else_moves_a_granted_source(event: object) -> None:
    machine = granted()
    assert on(machine, event) == ()
    assert machine.state is S.GRANTED


@pytest.mark.parametrize("state", [S.SETUP, S.ACTIVE, S.DEVICE])
def test_a_failure_before_the_grant_undoes(state: S) -> None:
    machine = SourceHandover(state)
    assert shape(on(machine, Failed(why="x"))) == ["SendCancel", "UNDOING", "Undo"]


def test_an_answer_before_the_grant_changes_nothing() -> None:
    for answer in Answer:
        machine = in_device()
        assert on(machine, answered(answer)) == ()
        assert machine.state is S.DEVICE


def test_restart_of_the_source_goes_on_from_its_record() -> None:
    def again(state: S, present: bool = True) -> list[str]:
        machine = SourceHandover(state, TOKEN, STORE)
        return shape(on(machine, Restarted(copy_present=present)))

    assert again(S.GRANTED) == ["Hold", "SendGrant"]
    assert again(S.RELEASING) == ["Kill"]
    assert again(S.UNDOING) == ["Undo"]
    assert again(S.DEVICE) == ["SendCancel", "UNDOING", "Undo"]
    assert again(S.DEVICE, present=False) == ["AskPrepared"]
    assert again(S.DONE) == []
    assert again(S.ROLLED_BACK) == []


def test_a_source_whose_copy_is_gone_grants_instead_of_aborting() -> None:
    machine = SourceHandover(S.DEVICE)
    assert on(machine, Restarted(copy_present=False)) == (AskPrepared(),)
    assert on(machine, Prepared(token=TOKEN, store_id=STORE)) == (Hold(),)
    assert on(machine, Held())[1] == SendGrant(token=TOKEN)


def test_an_operator_resolves_only_what_is_granted() -> None:
    machine = granted()
    assert shape(on(machine, Resolved(source_owns=True, fenced="b"))) == ["UNDOING", "Undo"]
    machine = granted()
    assert shape(on(machine, Resolved(source_owns=False, fenced="a"))) == ["RELEASING", "Kill"]
    assert on(in_device(), Resolved(source_owns=True, fenced="b")) == ()


def prepared() -> DestinationHandover:
    machine = DestinationHandover()
    machine.wrote(machine.to(D.RESERVED))
    machine.wrote(machine.to(D.RESTORING))
    assert shape(on(machine, Built(token=TOKEN))) == ["PREPARED"]
    return machine


def test_a_grant_is_owned_before_anything_runs() -> None:
    machine = prepared()
    assert shape(on(machine, GrantCame(token=TOKEN))) == ["OWNED", "Start", "Reply"]


def test_a_repeated_grant_is_answered_again() -> None:
    machine = prepared()
    on(machine, GrantCame(token=TOKEN))
    assert on(machine, GrantCame(token=TOKEN)) == (Start(), Reply(answer=Answer.OWNED))


def test_a_stale_token_starts_nothing() -> None:
    assert on(prepared(), GrantCame(token=b"stale")) == ()
    machine = prepared()
    on(machine, GrantCame(token=TOKEN))
    assert on(machine, GrantCame(token=b"stale")) == ()


@pytest.mark.parametrize("end", [CancelCame(), Failed(why="x"), Restarted(copy_present=True)])
def test_an_ungranted_copy_is_ended_then_recorded_and_refused_for_ever(end: object) -> None:
    machine = prepared()
    effects = on(machine, end)
    assert shape(effects) == ["Kill", "ABORTED"]
    assert on(machine, GrantCame(token=TOKEN)) == (Reply(answer=Answer.REFUSED),)


def test_a_cancel_never_ends_an_owned_copy() -> None:
    machine = prepared()
    on(machine, GrantCame(token=TOKEN))
    assert on(machine, CancelCame()) == ()
    assert on(machine, Failed(why="x")) == ()
    assert machine.state is D.OWNED


def test_a_failed_first_resume_is_refused_once_the_copy_is_gone() -> None:
    machine = prepared()
    on(machine, GrantCame(token=TOKEN))
    assert shape(on(machine, FirstResumeFailed())) == ["REFUSING", "Kill"]
    assert shape(on(machine, GrantCame(token=TOKEN))) == ["Kill"]
    assert shape(on(machine, Done())) == ["REFUSED", "Reply"]
    assert on(machine, GrantCame(token=TOKEN)) == (Reply(answer=Answer.REFUSED),)


def test_a_refusal_that_was_decided_is_finished_after_a_restart() -> None:
    """A copy found dead then is not one that ran: the source gets its process back."""
    machine = DestinationHandover(D.REFUSING, TOKEN)
    assert shape(on(machine, Restarted(copy_present=False))) == ["Kill"]
    assert shape(on(machine, Done())) == ["REFUSED", "Reply"]


def test_an_operator_gives_a_prepared_copy_its_life() -> None:
    machine = prepared()
    assert on(machine, Resolved(source_owns=True, fenced="b")) == ()
    assert shape(on(machine, Resolved(source_owns=False, fenced="a"))) == ["OWNED", "Start"]


def test_a_copy_that_died_is_never_called_owned_or_refused() -> None:
    machine = prepared()
    on(machine, GrantCame(token=TOKEN))
    assert shape(on(machine, CopyDied())) == ["OWNED_DEAD", "Reply"]
    assert on(machine, GrantCame(token=TOKEN)) == (Reply(answer=Answer.OWNED_DEAD),)


def test_no_record_is_said_so() -> None:
    assert on(DestinationHandover(), GrantCame(token=TOKEN)) == (Reply(answer=Answer.NO_RECORD),)


def test_restart_of_the_destination() -> None:
    machine = DestinationHandover(D.OWNED, TOKEN)
    assert on(machine, Restarted(copy_present=True)) == (Start(),)
    assert shape(on(machine, Restarted(copy_present=False))) == ["OWNED_DEAD"]
    for state in (D.REFUSED, D.ABORTED):
        assert on(DestinationHandover(state), Restarted(copy_present=True)) == (Kill(),)


def test_illegal_transitions_raise() -> None:
    for state, new in itertools.product([S.DONE, S.ROLLED_BACK], list(S)):
        with pytest.raises(IllegalTransition):
            SourceHandover(state).to(new)
    with pytest.raises(IllegalTransition):
        DestinationHandover(D.ABORTED).to(D.OWNED)


def test_undo_and_cancel_are_different_things() -> None:
    """The peer is told before the undo begins, so that a late Grant meets a refusal."""
    effects = on(in_device(), Failed(why="x"))
    assert isinstance(effects[0], SendCancel)
    assert isinstance(effects[-1], Undo)


def test_a_record_that_did_not_reach_the_disk_moved_nothing() -> None:
    machine = in_device()
    on(machine, Prepared(token=TOKEN, store_id=STORE))
    assert shape(machine.on(Held())) == ["GRANTED", "SendGrant"]  # and the disk was full
    assert machine.state is S.DEVICE
    assert shape(on(machine, Failed(why="disk full"))) == ["SendCancel", "UNDOING", "Undo"]
