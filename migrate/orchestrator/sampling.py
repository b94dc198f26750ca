"""A sample of a process's memory, sent for real: what its bytes compress to, and the link.

Nothing else measures both: hashing, codecs, encryption and the network work together, and
which of them is the limit only the whole shows. The sample is sent twice; what changed in
between is how fast the process writes.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence

from migrate.dataplane.access import MemoryAccess
from migrate.dataplane.channel import Channel, connect_tcp
from migrate.dataplane.messages import ObjectInfo, ObjectKind
from migrate.dataplane.sender import Sender
from migrate.dataplane.stats import RoundStats
from migrate.errors import DataPortUnreachable
from migrate.model import Value
from migrate.orchestrator.peer import Session
from migrate.orchestrator.plan import CHUNK

MAX_SAMPLE = 16 << 20  # bytes
FIRST_STEP = 512 << 10  # bytes; each step sends twice as much as the one before
BUDGET = 0.3  # seconds after which no further step begins
INTERVAL = 0.2  # seconds at least between the two looks at the same bytes
CONNECT = 1.5  # seconds to reach the data port in
PATIENCE = 15.0  # seconds that a sample's connection may be broken at most


class Sample(Value):
    """What was seen. Bytes and seconds; ``rate`` and ``look_rate`` bytes a second.

    ``rate``: of memory through the streams when all of it is new; ``look_rate``: when hardly
    anything is. ``dirty``: the share that changed within ``interval``.
    """

    size: int
    wire: int
    zero: int
    rate: float
    look_rate: float
    dirty: float
    interval: float

    @property
    def ratio(self) -> float:
        """Bytes on the wire for one of memory."""
        return self.wire / self.size


class Windows:
    """``MemoryAccess``: chunks from all over some objects, as if they were one object."""

    def __init__(self, parts: Sequence[tuple[MemoryAccess, int]]) -> None:
        """*parts*: an object, and where in it CHUNK bytes begin."""
        self._parts = parts
        self.size = len(parts) * CHUNK

    def read(self, offset: int, into: memoryview) -> None:
        """Fill *into* from *offset*. Raises OSError."""
        done = 0
        while done < len(into):
            number, inside = divmod(offset + done, CHUNK)
            access, start = self._parts[number]
            length = min(CHUNK - inside, len(into) - done)
            access.read(start + inside, into[done : done + length])
            done += length

    def write(self, offset: int, data: memoryview) -> None:
        """A sample is only read."""
        raise NotImplementedError

    def close(self) -> None:
        """The objects are their owner's."""


def choose(objects: Sequence[MemoryAccess], most: int = MAX_SAMPLE) -> list[Windows]:
    """Steps of a sample, evenly spread over all bytes, each over another part of them."""
    places = [
        (access, start) for access in objects for start in range(0, access.size - CHUNK + 1, CHUNK)
    ]
    count = min(len(places), most // CHUNK)
    chosen = [places[len(places) * n // count] for n in range(count)]
    steps, size = [], FIRST_STEP // CHUNK
    # Every step sees the whole range: the first takes each n-th of the chosen, and so on.
    pending = chosen
    while pending:
        stride = max(1, len(pending) // size)
        taken = set(range(0, len(pending), stride)[:size])
        steps.append(Windows([p for n, p in enumerate(pending) if n in taken]))
        pending = [p for n, p in enumerate(pending) if n not in taken]
        size *= 2
    return steps


def take(
    session: Session, objects: Sequence[MemoryAccess], streams: int, patience: float
) -> Sample | None:
    """Send a sample to *session*; None if the objects have less than one chunk.

    *patience*: seconds that a connection may be broken, up to PATIENCE: the destination ends
    the session of a sample that takes too long, and waits for none. Raises StreamBroken, and
    MigrationFailed for memory that can't be read.
    """
    steps = choose(objects)
    if not steps:
        return None
    epochs = itertools.count(1)  # of a secret that nobody had before

    def connect(_stream: int) -> Channel:
        return connect_tcp(session.data_address, session.data_port)

    sender = Sender(
        connect,
        session.session_secret,
        session.session_id,
        lambda: next(epochs),
        streams=streams,
        reconnect_timeout=min(patience, PATIENCE),
    )
    try:
        return _measured(sender, steps)
    finally:
        sender.close()


def reach(session: Session) -> None:
    """See whether the data port answers. Raises DataPortUnreachable."""
    where = f"{session.data_address} port {session.data_port}"
    try:
        connect_tcp(session.data_address, session.data_port, timeout=CONNECT).close()
    except OSError as error:
        raise DataPortUnreachable(
            f"the data port, {where}, can't be reached: {error.strerror or error}"
        ) from error


def _measured(sender: Sender, steps: Sequence[Windows]) -> Sample:
    began = time.monotonic()
    sent: list[tuple[ObjectInfo, MemoryAccess]] = []
    stats: list[RoundStats] = []
    first_began = 0.0
    for number, step in enumerate(steps, 1):
        info = ObjectInfo(id=number, kind=ObjectKind.BLOB, size=step.size, chunk=CHUNK)
        sent.append((info, step))
        first_began = time.monotonic()
        stats.append(sender.send_round([sent[-1]]))
        if time.monotonic() - began > BUDGET:
            break
    last = stats[-1]
    time.sleep(max(0.0, first_began + INTERVAL - time.monotonic()))
    interval = time.monotonic() - first_began
    again = sender.send_round([sent[-1]])
    return Sample(
        size=sum(s.scanned for s in stats),
        wire=sum(s.wire for s in stats),
        zero=sum(s.zero for s in stats),
        rate=last.scanned / max(last.seconds, 1e-6),
        look_rate=again.scanned / max(again.seconds, 1e-6),
        dirty=again.changed / again.scanned,
        interval=interval,
    )
