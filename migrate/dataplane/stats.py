"""Figures of a round, as frozen values and as the counters they are made of."""

from __future__ import annotations

import threading

from migrate.dataplane.messages import Codec
from migrate.model import Value


class RoundStats(Value):
    """What one round did. All bytes; ``codecs`` are raw bytes by codec name.

    ``dirty_rate`` is changed bytes a second of the time since the round before began
    (0 in the first round): how fast the workload writes what we must send again.
    """

    scanned: int = 0
    changed: int = 0  # differed from what the destination held, or was not there
    unchanged: int = 0
    zero: int = 0  # of the changed ones
    wire: int = 0  # frames sent, retransmissions included
    resent: int = 0  # payload of frames sent anew after a cut
    reconnects: int = 0
    seconds: float = 0.0
    dirty_rate: float = 0.0
    codecs: dict[str, int] = {}  # noqa: RUF012 - msgspec copies it
    payload: dict[str, int] = {}  # noqa: RUF012 - on the wire, by codec name


class Counters:
    """Counts of a round under way; many threads add."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = dict.fromkeys(
            ("scanned", "changed", "unchanged", "zero", "wire", "resent", "reconnects"), 0
        )
        self._codecs: dict[str, int] = {}
        self._payload: dict[str, int] = {}

    def add(self, **counts: int) -> None:
        """Add to counts by name."""
        with self._lock:
            for name, count in counts.items():
                self._counts[name] += count

    def sent(self, codec: Codec, raw: int, payload: int) -> None:
        """A run went out."""
        name = codec.name.lower()
        with self._lock:
            self._codecs[name] = self._codecs.get(name, 0) + raw
            self._payload[name] = self._payload.get(name, 0) + payload

    def stats(self, seconds: float, since_last: float = 0.0) -> RoundStats:
        """The figures now; *seconds* of the round, *since_last* since the round before began."""
        with self._lock:
            rate = self._counts["changed"] / since_last if since_last > 0 else 0.0
            return RoundStats(
                **self._counts,
                seconds=seconds,
                dirty_rate=rate,
                codecs=dict(self._codecs),
                payload=dict(self._payload),
            )
