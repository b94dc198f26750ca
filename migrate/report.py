"""The report of a migration, its events and the process list: one versioned schema.

``migrate show --json``, ``migrate run --json``, the gRPC API and the journal carry
these documents. Fields are added, never renamed; a changed meaning is a new version.
All sizes are bytes, all durations seconds by a monotonic clock.
"""

from __future__ import annotations

import msgspec

from migrate.model import Value
from migrate.status import Owner, Status

REPORT_SCHEMA = "migrate.report/1"
EVENT_SCHEMA = "migrate.event/1"
CHECK_SCHEMA = "migrate.check/1"
RESTORED_SCHEMA = "migrate.restored/1"


class End(Value):
    """One end of a migration. ``pid`` is None while there is no process there."""

    host: str
    pid: int | None = None


class Phase(Value):
    """One phase of the migration, in order, with the time it took."""

    name: str
    seconds: float


class Downtime(Value):
    """From the first stopped thread to the released copy; the parts add up to it.

    ``stop``: until every thread stands. ``checkpoint``: KFD PROCESS_INFO and
    CHECKPOINT. ``delta``: hashing and sending what the destination lacks. ``build``:
    the new process and KFD RESTORE. ``placement`` and ``read_back``: writing all bytes
    into the buffers and checking them. ``engine``: the rest of the CPU side, and
    messages. ``handover``: PREPARED to the released copy.
    """

    seconds: float
    stop: float
    checkpoint: float
    delta: float
    build: float
    placement: float
    read_back: float
    engine: float
    handover: float


class Round(Value):
    """One pass over the memory. The last one ran while the process stood."""

    number: int
    frozen: bool
    objects: int
    scanned: int
    changed: int
    zero: int
    unchanged: int
    wire: int
    seconds: float


class Bytes(Value):
    """Sizes of what was moved, and what became of it over all rounds."""

    vram: int = 0
    gtt: int = 0
    cpu: int = 0
    zero: int = 0
    unchanged: int = 0
    wire: int = 0


class CpuMemory(Value):
    """CPU memory by when it was sent, in bytes; what was sent twice counts twice.

    ``in_freeze_because``: why none was sent before, though there was pre-copy.
    """

    before: int = 0
    frozen: int = 0
    seconds: float = 0.0  # that sending ``before`` took
    in_freeze_because: str = ""


class GpuRow(Value):
    """Which GPU took the place of which. ``user_gpu_id`` is what the process sees, always."""

    user_gpu_id: int
    source_gpu_id: int
    destination_gpu_id: int


class PeakMemory(Value):
    """Peak of one agent and its helpers in bytes.

    ``agent`` is PSS without the memory of BOs and staging; ``staging`` is listed apart.
    """

    agent: int = 0
    staging: int = 0


class VramBytes(Value):
    """Bytes of VRAM that one agent read and wrote, by ``vram_access``: mapped, or by SDMA.

    All rounds are counted, and what is read back to be compared.
    """

    mmap_read: int = 0
    mmap_written: int = 0
    sdma_read: int = 0
    sdma_written: int = 0


class Failure(Value):
    """Why a migration did not do what was asked, and what to do now."""

    reason: str
    message: str
    advice: str
    exit_code: int
    detail: str = ""


class Notice(Value):
    """What a person should know and what forbids nothing."""

    reason: str
    message: str
    advice: str


class Prediction(Value):
    """What preflight expects, before anything was moved. Stored beside what came true.

    ``seconds`` in all, ``downtime`` of it; ``wire`` bytes. ``rate`` is bytes of memory a
    second through the streams, ``ratio`` wire bytes by memory bytes, ``zero`` the share of
    zeros, ``dirty`` the share of memory that changed within ``interval`` seconds.
    ``sampled``: bytes of the process's memory that was measured by; 0: nothing was, and
    the figures are those of earlier migrations, or guesses.
    """

    seconds: float
    downtime: float
    wire: int
    sampled: int = 0
    rate: float = 0.0
    ratio: float = 1.0
    zero: float = 0.0
    dirty: float = 0.0
    interval: float = 0.0


class DestinationFigures(Value):
    """What only the destination can measure; part of its answers."""

    pid: int | None = None
    build: float = 0.0
    placement: float = 0.0
    read_back: float = 0.0
    engine: float = 0.0
    after_release: float = 0.0
    chunks_verified: int = 0
    peak: PeakMemory = PeakMemory()
    vram: VramBytes = VramBytes()


class Report(Value):
    """All of a migration. ``running`` is "source", "destination", "nowhere" or "unknown".

    ``pending_packets``: packets that waited in the queues' rings when the process stood.
    ``life``: what the destination saw of the released process within 3 seconds: "alive",
    "idle" (it did too little before for anything to be missed), "suspect" (it did
    something before and does nothing now), "ended", or "" if nobody looked. ``replayed``:
    the source went on from its freeze though the copy had run, or may have: what the process
    did since may be done again. ``stream_resumes``: connections that broke and were made anew.
    ``prediction``, ``blockers`` and ``warnings`` are preflight's; ``predicted_downtime`` was
    made last before the freeze. The first of the blockers is the ``failure``.
    """

    id: str
    status: Status
    owner: Owner
    running: str
    source: End
    destination: End
    command: tuple[str, ...] = ()
    engine: str = ""
    started: str = ""
    seconds: float = 0.0
    phases: tuple[Phase, ...] = ()
    downtime: Downtime | None = None
    predicted_downtime: float | None = None
    rounds: tuple[Round, ...] = ()
    bytes: Bytes = Bytes()
    cpu: CpuMemory = CpuMemory()
    codecs: dict[str, float] = msgspec.field(default_factory=dict)
    gpu_map: tuple[GpuRow, ...] = ()
    pending_packets: int = 0
    life: str = ""
    replayed: bool = False
    prediction: Prediction | None = None
    blockers: tuple[Failure, ...] = ()
    warnings: tuple[Notice, ...] = ()
    chunks_verified: int = 0
    stream_resumes: int = 0
    source_peak: PeakMemory = PeakMemory()
    destination_peak: PeakMemory = PeakMemory()
    source_vram: VramBytes = VramBytes()
    destination_vram: VramBytes = VramBytes()
    failure: Failure | None = None
    schema: str = REPORT_SCHEMA

    @property
    def is_undecided(self) -> bool:
        """Only an operator can name the owner, unless the destination answers after all.

        In every handover the owner is unknown for a moment; a failure says for longer.
        """
        return self.owner is Owner.UNKNOWN and self.failure is not None


class Check(Value):
    """What ``migrate check`` says. ``seconds``: how long it took to find out."""

    source: End
    destination: End
    command: tuple[str, ...]
    engine: str
    blockers: tuple[Failure, ...]
    warnings: tuple[Notice, ...]
    prediction: Prediction | None
    gpu_map: tuple[GpuRow, ...]
    seconds: float
    schema: str = CHECK_SCHEMA


class Event(Value):
    """One line of ``migrate watch --json``.

    ``rate`` is bytes a second scanned in the round at hand, ``left`` bytes of it still
    to look at, ``predicted_downtime`` seconds if the process were stopped now.
    """

    id: str
    sequence: int
    status: Status
    owner: Owner
    phase: str
    message: str = ""
    round: int = 0
    rate: float = 0.0
    left: int = 0
    total: int = 0
    predicted_downtime: float | None = None
    ended: bool = False
    schema: str = EVENT_SCHEMA


class RecoveryRow(Value):
    """What an agent was doing, or began to do, about one side of a migration.

    ``side``: source or destination. ``state``: what its journal says, "" if it can't be read.
    """

    id: str
    side: str
    state: str
    message: str


class Restored(Value):
    """What ``migrate restore`` started. ``seconds``: from the call to the running process."""

    id: str
    directory: str
    source: str
    created: str
    command: tuple[str, ...]
    pid: int
    gpu_map: tuple[tuple[int, int], ...]
    chunks_verified: int
    seconds: float
    schema: str = RESTORED_SCHEMA


class ProcessRow(Value):
    """One process of ``migrate ps``. ``vram`` is bytes by actual gpu_id, of each GPU it sees.

    ``start_time`` is field 22 of /proc/PID/stat and ``boot_id`` the kernel's: with the pid
    they tell a process from every other one, for idempotency keys. ``root``: pid of the topmost
    process of the list that it descends from, with which it moves; 0 if there is none.
    """

    pid: int
    command: str
    uid: int
    vram: dict[int, int]
    queues: int
    migration: str | None = None
    start_time: int = 0
    boot_id: str = ""
    root: int = 0
