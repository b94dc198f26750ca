"""Proof of life: whether a copy that was released does what it did before the freeze.

"RESUME said OK and the process hangs" is looked for here. The source takes two looks, at
its first snapshot and in the freeze: CPU time used, and packets its queues read. After the
release the destination compares for WINDOW seconds. Nothing is decided by the answer; it
is told in the report:

    alive     its queues read packets again, or it uses CPU time if that is all it did
    idle      it did too little before for anything to be missed
    suspect   it did something before and does nothing now
    ended     the copy came to its end within the window
    ""        nobody looked (the destination's agent was restarted), or it was not asked in time
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from migrate.dataplane.access import MemoryAccess
from migrate.engine import procfs
from migrate.engine.seam import CpuRange, ProcessEngine
from migrate.errors import MigrateError
from migrate.kfd.process import Checkpointed
from migrate.model import ProcessRef, Value
from migrate.orchestrator.clock import Clock
from migrate.orchestrator.plan import Activity
from migrate.orchestrator.rings import POINTER, read_pointers

WINDOW = 3.0  # seconds after the release
INTERVAL = 0.05  # seconds between looks
FEW_PACKETS = 3  # that were to be expected in the window; fewer may be late by themselves
LITTLE_CPU = 0.1  # seconds of CPU time, likewise
WOKEN = 0.02  # seconds of CPU time that waking up alone may take
ALIVE, IDLE, SUSPECT, ENDED = "alive", "idle", "suspect", "ended"


class Look(Value):
    """One look at a stopped process. ``pointers``: value of read pointers by address."""

    at: float  # monotonic seconds
    cpu: float  # seconds of CPU time
    pointers: tuple[tuple[int, int], ...]


def expected(ran: Activity, amount: float) -> float:
    """How much of *amount* falls into the window."""
    return amount / ran.seconds * WINDOW if ran.seconds > 0 else 0.0


def take_look(process: ProcessRef, checkpoints: Sequence[Checkpointed], clock: Clock) -> Look:
    """A look at the source, while its threads and queues stand.

    Of a tree's queues only those of *process* count: others have theirs at the same addresses.
    """
    own = [one for one in checkpoints if one.checkpoint.pid == process.pid] or checkpoints[:1]
    pointers = read_pointers(own)
    return Look(
        at=clock.monotonic(),
        cpu=procfs.cpu_seconds(process.pid),
        pointers=tuple(sorted(pointers.items())),
    )


def between(first: Look, last: Look) -> Activity:
    """What happened from one look to the other. Queues that came or went are left out."""
    before = dict(first.pointers)
    return Activity(
        seconds=last.at - first.at,
        cpu=max(0.0, last.cpu - first.cpu),
        packets=advanced(before, dict(last.pointers)),
        pointers=last.pointers,
    )


def advanced(before: Mapping[int, int], now: Mapping[int, int]) -> int:
    """Packets read since, over all queues."""
    return sum(max(0, now[address] - value) for address, value in before.items() if address in now)


def judge(ran: Activity, *, cpu: float, packets: int) -> str:
    """ALIVE, or what it is if nothing more happens: IDLE or SUSPECT."""
    if expected(ran, ran.packets) >= FEW_PACKETS:
        return ALIVE if packets else SUSPECT
    if expected(ran, ran.cpu) >= LITTLE_CPU:
        return ALIVE if packets or cpu > WOKEN else SUSPECT
    return ALIVE if packets or cpu > WOKEN else IDLE


def judge_by(ran: Activity, pointers: Mapping[int, int], *, cpu: float) -> str:
    """``judge`` by the read pointers that could be read; by CPU time alone if none could.

    They are where the queue says, as ROCr maps a buffer. A process may have it elsewhere.
    """
    if ran.pointers and not pointers:
        ran = msgspec.structs.replace(ran, packets=0)
    return judge(ran, cpu=cpu, packets=advanced(dict(ran.pointers), pointers))


def watch(ran: Activity, process: ProcessRef, engine: ProcessEngine, clock: Clock) -> str:
    """Watch a copy that was just released, for WINDOW seconds at most."""
    deadline = clock.monotonic() + WINDOW
    started = procfs.cpu_seconds(process.pid)
    wait = clock.event()
    while True:
        if not engine.is_alive(process):
            return ENDED
        cpu = procfs.cpu_seconds(process.pid) - started
        found = judge_by(ran, _pointers(ran, process, engine), cpu=cpu)
        if found == ALIVE or clock.monotonic() >= deadline:
            return found
        wait.wait(INTERVAL)


def _pointers(ran: Activity, process: ProcessRef, engine: ProcessEngine) -> dict[int, int]:
    """Read pointers now, through the copy's own mappings; those that can't be read are left out."""
    found = {}
    for address, _ in ran.pointers:
        data = bytearray(POINTER)
        try:
            wanted = CpuRange(pid=process.pid, address=address, length=POINTER)
            access: MemoryAccess = engine.memory(process, wanted)
            try:
                access.read(0, memoryview(data))
            finally:
                access.close()
        except (MigrateError, OSError):
            continue
        found[address] = int.from_bytes(data, "little")
    return found
