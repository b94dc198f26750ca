"""Bugs planted in the machines and in the drivers' rules: the check must find each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from migrate.orchestrator.handover import (
    Answer,
    Answered,
    CancelCame,
    DestinationHandover,
    Failed,
    GrantCame,
    Kill,
    Reply,
    SeenAlive,
    SendGrant,
    SourceHandover,
    Start,
    Undo,
    Write,
)
from migrate.status import DestinationState, SourceState
from scenarios.simulate.model import destination, source
from scenarios.simulate.model.policy import POLICY

Mutation = Callable[[ExitStack], None]
On = Callable[[Any, Any], tuple[Any, ...]]


def _replace(stack: ExitStack, owner: Any, name: str, new: object) -> None:
    stack.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, new)


def _machine(cls: type, change: Callable[[On, Any, Any], tuple[Any, ...]]) -> Mutation:
    """A machine whose ``on`` is changed."""

    def apply(stack: ExitStack) -> None:
        on: On = cls.on  # type: ignore[attr-defined]
        _replace(stack, cls, "on", lambda machine, event: change(on, machine, event))

    return apply


def _policy(name: str) -> Mutation:
    return lambda stack: _replace(stack, POLICY, name, False)


def _undo(machine: Any) -> tuple[Any, ...]:
    return (machine.to(SourceState.UNDOING), Undo())


def _thaw_on_timeout(on: On, machine: Any, event: Any) -> tuple[Any, ...]:
    if isinstance(event, Failed) and machine.state is SourceState.GRANTED:
        return _undo(machine)
    return on(machine, event)


def _unknown_is_refused(on: On, machine: Any, event: Any) -> tuple[Any, ...]:
    unknown = isinstance(event, Answered) and event.answer is Answer.NO_RECORD
    if unknown and machine.state is SourceState.GRANTED:
        return _undo(machine)
    return on(machine, event)


def _owned_dead_is_owned(on: On, machine: Any, event: Any) -> tuple[Any, ...]:
    dead = isinstance(event, Answered) and event.answer is Answer.OWNED_DEAD
    if dead and machine.state is SourceState.GRANTED:
        return (machine.to(SourceState.RELEASING), Kill())
    return on(machine, event)


def _stale_answer(on: On, machine: Any, event: Any) -> tuple[Any, ...]:
    if isinstance(event, Answered):
        event = Answered(answer=event.answer, store_id=event.store_id, token=machine.token)
    return on(machine, event)


def _grant_first(on: On, machine: Any, event: Any) -> tuple[Any, ...]:
    effects = on(machine, event)
    if len(effects) == 2 and isinstance(effects[1], SendGrant) and isinstance(effects[0], Write):
        return effects[::-1]
    return effects


def _stale_token(on: On, machine: Any, event: Any) -> tuple[Any, ...]:
    return on(machine, GrantCame(token=machine.token) if isinstance(event, GrantCame) else event)


def _start_first(on: On, machine: Any, event: Any) -> tuple[Any, ...]:
    effects = on(machine, event)
    if len(effects) == 3 and isinstance(effects[1], Start):
        return (effects[1], effects[0], effects[2])
    return effects


def _reply_first(on: On, machine: Any, event: Any) -> tuple[Any, ...]:
    effects = on(machine, event)
    if len(effects) == 3 and isinstance(effects[1], Start):
        return (effects[2], effects[0], effects[1])
    return effects


def _cancel_ends_owned(on: On, machine: Any, event: Any) -> tuple[Any, ...]:
    if isinstance(event, CancelCame) and machine.state is DestinationState.OWNED:
        return (Kill(),)
    return on(machine, event)


def _restart_aborts(on: On, machine: Any, event: Any) -> tuple[Any, ...]:
    if type(event).__name__ == "Restarted" and machine.state is SourceState.GRANTED:
        return _undo(machine)
    return on(machine, event)


def _reclaim_a_suspect(on: On, machine: Any, event: Any) -> tuple[Any, ...]:
    suspect = isinstance(event, Answered) and event.answer is Answer.SUSPECT
    if suspect and on(machine, event):
        return (machine.to(SourceState.RECLAIMED), Undo())
    return on(machine, event)


def _owned_before_confirmed(on: On, machine: Any, event: Any) -> tuple[Any, ...]:
    return tuple(
        Reply(answer=Answer.OWNED)
        if isinstance(effect, Reply) and effect.answer is Answer.WATCHED
        else effect
        for effect in on(machine, event)
    )


def _revoke_what_is_confirmed(on: On, machine: Any, event: Any) -> tuple[Any, ...]:
    """A machine that forgets CONFIRMED, as if it were in memory only."""
    if isinstance(event, SeenAlive):
        machine.hold = False
        return ()
    return on(machine, event)


def _revoked_before_dead(on: On, machine: Any, event: Any) -> tuple[Any, ...]:
    effects = on(machine, event)
    if effects and isinstance(effects[0], Write) and effects[0].state is DestinationState.REVOKING:
        return (effects[0], Reply(answer=Answer.REVOKED), *effects[1:])
    return effects


# These show with a kept source only.
OF_HOLD: Mapping[str, Mutation] = {
    "reclaim_a_suspect": _machine(SourceHandover, _reclaim_a_suspect),
    "owned_before_confirmed": _machine(DestinationHandover, _owned_before_confirmed),
    "confirmed_in_memory_only": _machine(DestinationHandover, _revoke_what_is_confirmed),
    "revoked_before_dead": _machine(DestinationHandover, _revoked_before_dead),
}
MUTATIONS: Mapping[str, Mutation] = {
    **OF_HOLD,
    "thaw_on_timeout_after_granted": _machine(SourceHandover, _thaw_on_timeout),
    "unknown_is_refused": _machine(SourceHandover, _unknown_is_refused),
    "owned_dead_is_owned": _machine(SourceHandover, _owned_dead_is_owned),
    "stale_answer": _machine(SourceHandover, _stale_answer),
    "grant_before_granted": _machine(SourceHandover, _grant_first),
    "restart_aborts_granted": _machine(SourceHandover, _restart_aborts),
    "stale_token": _machine(DestinationHandover, _stale_token),
    "resume_before_owned": _machine(DestinationHandover, _start_first),
    "reply_before_owned": _machine(DestinationHandover, _reply_first),
    "cancel_ends_owned": _machine(DestinationHandover, _cancel_ends_owned),
    "forget_refused_on_restart": _policy("remembers_refused"),
    "skip_fsync": _policy("writes_are_durable"),
    "undo_without_record": _policy("records_undo_before_thaw"),
    "refuse_what_ran": _policy("refuses_only_what_never_ran"),
    "watchdog_ignores_granted": _policy("watchdog_spares_granted"),
    "watchdog_keeps_no_record": _policy("watchdog_records_first"),
    "a_dead_prepared_copy_is_owned": _policy("reports_a_dead_prepared_copy"),
    "no_retry": _policy("retries"),
}


@contextmanager
def planted(name: str) -> Iterator[None]:
    """The bug *name* in place; all is as before afterwards."""
    caches = (source.tell, source.wrote, destination.tell, destination.wrote)
    with ExitStack() as stack:
        for cache in caches:
            cache.cache_clear()
            stack.callback(cache.cache_clear)
        if name:
            MUTATIONS[name](stack)
        yield
