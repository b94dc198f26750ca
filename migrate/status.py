"""States of a migration and THE transition tables, one for each side.

``Status`` carries QEMU's migration status names and is what people see. ``Owner``
is the second axis: "failed" alone does not say what is running where.

``SourceState`` and ``DestinationState`` are what the journals hold. A transition
that is not in the table raises :class:`IllegalTransition`; :func:`advance` is the
only function that moves a state.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import TypeVar


class Status(StrEnum):
    """What is going on, in QEMU's words (``query-migrate``)."""

    SETUP = "setup"
    ACTIVE = "active"
    PRE_SWITCHOVER = "pre-switchover"
    DEVICE = "device"
    HANDOVER = "handover"
    COMPLETED = "completed"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"
    FAILED = "failed"


ENDED = frozenset({Status.COMPLETED, Status.CANCELLED, Status.FAILED})


class Owner(StrEnum):
    """Which host may run the process."""

    SOURCE = "source"
    DESTINATION = "destination"
    UNKNOWN = "unknown"


class SourceState(StrEnum):
    """What the source's journal says."""

    SETUP = "SETUP"  # looking; snapshots may pause queues for milliseconds
    ACTIVE = "ACTIVE"  # pre-copy rounds
    DEVICE = "DEVICE"  # about to freeze, or frozen; not granted
    GRANTED = "GRANTED"  # point of no return: only an answer of the destination moves it
    RELEASING = "RELEASING"  # the destination owns it; the frozen copy is being ended
    DONE = "DONE"
    RECLAIMED = "RECLAIMED"  # the destination gave it back: the source owns it, and undoes
    UNDOING = "UNDOING"  # the source owns it; it is being unpaused and thawed
    ROLLED_BACK = "ROLLED_BACK"


class DestinationState(StrEnum):
    """What the destination's journal says."""

    RESERVED = "RESERVED"  # receiving into staging
    RESTORING = "RESTORING"  # the copy is being built; nothing of it runs
    PREPARED = "PREPARED"  # placed, verified, held
    OWNED = "OWNED"  # granted: the copy may run
    CONFIRMED = "CONFIRMED"  # seen alive while the source was kept: it is not given back any more
    REVOKING = "REVOKING"  # suspect and asked back: it is being ended, nobody is told OWNED
    REVOKED = "REVOKED"  # and proven dead: the source may run its own again
    REFUSING = "REFUSING"  # granted and could not start: nothing of it ran, nor ever will
    REFUSED = "REFUSED"  # and the copy is ended, for ever
    ABORTED = "ABORTED"  # never granted; copy ended
    OWNED_DEAD = "OWNED_DEAD"  # the copy ran and ended


class IllegalTransition(RuntimeError):
    """A state was asked to move where the table has no arrow: a bug, not a condition."""


_S = SourceState
SOURCE_TRANSITIONS: Mapping[SourceState | None, frozenset[SourceState]] = {
    None: frozenset({_S.SETUP}),
    _S.SETUP: frozenset({_S.ACTIVE, _S.DEVICE, _S.UNDOING}),
    _S.ACTIVE: frozenset({_S.DEVICE, _S.UNDOING}),
    _S.DEVICE: frozenset({_S.GRANTED, _S.UNDOING}),
    _S.GRANTED: frozenset({_S.RELEASING, _S.UNDOING, _S.RECLAIMED}),
    _S.RELEASING: frozenset({_S.DONE}),
    _S.RECLAIMED: frozenset({_S.ROLLED_BACK}),
    _S.UNDOING: frozenset({_S.ROLLED_BACK}),
    _S.DONE: frozenset(),
    _S.ROLLED_BACK: frozenset(),
}

_D = DestinationState
DESTINATION_TRANSITIONS: Mapping[DestinationState | None, frozenset[DestinationState]] = {
    None: frozenset({_D.RESERVED}),
    _D.RESERVED: frozenset({_D.RESTORING, _D.ABORTED}),
    _D.RESTORING: frozenset({_D.PREPARED, _D.ABORTED}),
    _D.PREPARED: frozenset({_D.OWNED, _D.ABORTED}),
    # OWNED to REFUSING only while no RESUME had an effect: see handover.py.
    # The two ways of a kept source exclude each other, for ever: CONFIRMED and REVOKING.
    _D.OWNED: frozenset({_D.OWNED_DEAD, _D.REFUSING, _D.CONFIRMED, _D.REVOKING}),
    _D.CONFIRMED: frozenset({_D.OWNED_DEAD}),
    _D.REVOKING: frozenset({_D.REVOKED}),
    _D.REVOKED: frozenset(),
    _D.REFUSING: frozenset({_D.REFUSED}),
    _D.REFUSED: frozenset(),
    _D.ABORTED: frozenset(),
    _D.OWNED_DEAD: frozenset(),
}

UNGRANTED = frozenset({_D.RESERVED, _D.RESTORING, _D.PREPARED})
MAY_RUN = frozenset({_D.OWNED, _D.CONFIRMED})
NEVER_RAN = frozenset({_D.REFUSED, _D.ABORTED})
# From these no state leads on.
SOURCE_FINAL = frozenset(s for s, after in SOURCE_TRANSITIONS.items() if s and not after)
DESTINATION_FINAL = frozenset(s for s, after in DESTINATION_TRANSITIONS.items() if s and not after)

S = TypeVar("S", SourceState, DestinationState)


def advance(table: Mapping[S | None, frozenset[S]], current: S | None, new: S) -> S:
    """The one place where a state moves. Raises IllegalTransition."""
    if new not in table[current]:
        raise IllegalTransition(f"no transition from {current} to {new}")
    return new


_OWNER: Mapping[SourceState, Owner] = {
    _S.GRANTED: Owner.UNKNOWN,
    _S.RELEASING: Owner.DESTINATION,
    _S.DONE: Owner.DESTINATION,
}


def owner_of(state: SourceState) -> Owner:
    """Who owns the process as far as the source's journal can tell."""
    return _OWNER.get(state, Owner.SOURCE)
