"""What a migration says while it goes: phases with their times, and events for watchers."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

from migrate.report import Event, Phase
from migrate.status import Owner, Status


class Narrator:
    """Collects events of one migration. Any number of threads may follow."""

    def __init__(self, migration: str) -> None:
        self.migration = migration
        self.status = Status.SETUP
        self.owner = Owner.SOURCE
        self._phase = ""
        self._since = time.monotonic()
        self._phases: list[Phase] = []
        self._events: list[Event] = []
        self._changed = threading.Condition()
        self._ended = False

    def enter(self, phase: str, status: Status) -> None:
        """A new phase begins; the one before has its time now."""
        with self._changed:
            self._close_phase()
            self._phase, self._since, self.status = phase, time.monotonic(), status
        self.say(phase)

    def say(
        self,
        message: str,
        *,
        number: int = 0,
        rate: float = 0.0,
        left: int = 0,
        total: int = 0,
        predicted: float | None = None,
    ) -> None:
        """Tell followers something."""
        with self._changed:
            self._events.append(
                Event(
                    id=self.migration,
                    sequence=len(self._events),
                    status=self.status,
                    owner=self.owner,
                    phase=self._phase,
                    message=message,
                    round=number,
                    rate=rate,
                    left=left,
                    total=total,
                    predicted_downtime=predicted,
                    ended=self._ended,
                )
            )
            self._changed.notify_all()

    def end(self, status: Status, owner: Owner, message: str) -> None:
        """The migration has ended; followers are let go."""
        with self._changed:
            self._close_phase()
            self.status, self.owner, self._ended = status, owner, True
        self.say(message)

    def close_phase(self) -> None:
        """The phase at hand is over, and none begins."""
        with self._changed:
            self._close_phase()

    def phases(self) -> tuple[Phase, ...]:
        """The phases that are over, with seconds."""
        with self._changed:
            return tuple(self._phases)

    def last(self) -> Event | None:
        """The newest event."""
        with self._changed:
            return self._events[-1] if self._events else None

    def follow(self, first: int = 0) -> Iterator[Event | None]:
        """Events from number *first* on, until the end; None about once a second if none came.

        The None lets a server notice that its client is gone.
        """
        position = first
        while True:
            with self._changed:
                if position >= len(self._events):
                    self._changed.wait(timeout=1.0)
                batch = self._events[position:]
            position += len(batch)
            if not batch:
                yield None
            for event in batch:
                yield event
                if event.ended:
                    return

    def _close_phase(self) -> None:
        if self._phase:
            seconds = time.monotonic() - self._since
            self._phases.append(Phase(name=self._phase, seconds=seconds))
            self._phase = ""
