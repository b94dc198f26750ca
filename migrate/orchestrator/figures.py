"""The numbers of one migration, taken where they arise, and the report made of them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

import msgspec

from migrate.dataplane.messages import ObjectKind
from migrate.dataplane.stats import RoundStats
from migrate.dataplane.vram import VramTally
from migrate.engine.seam import Survey
from migrate.errors import MigrateError, OwnedDead, OwnerUnknown
from migrate.model import GpuMap
from migrate.orchestrator.clock import Laps
from migrate.orchestrator.convergence import Costs
from migrate.orchestrator.handover import Answer
from migrate.orchestrator.image_peer import PREFIX
from migrate.orchestrator.narrator import Narrator
from migrate.orchestrator.peer import GrantReply
from migrate.orchestrator.plan import ObjectOrder
from migrate.report import (
    Bytes,
    CpuMemory,
    DestinationFigures,
    Downtime,
    End,
    Failure,
    GpuRow,
    Notice,
    PeakMemory,
    Prediction,
    Report,
    Round,
)
from migrate.status import SourceState, Status, owner_of

# What placing and reading back costs where nothing was measured yet, bytes a second.
PLACEMENT_GUESS = 1.5e9
FIXED_GUESS = 0.4  # seconds: build of the process and handover


def downtime_of(laps: Laps, figures: DestinationFigures, released_at: float) -> Downtime:
    """The freeze's parts once the copy was released at *released_at* (monotonic)."""
    measured = figures.build + figures.placement + figures.read_back
    return Downtime(
        seconds=released_at - laps.began,
        stop=laps["stop"],
        checkpoint=laps["checkpoint"],
        delta=laps["delta"],
        build=figures.build,
        placement=figures.placement,
        read_back=figures.read_back,
        engine=laps["restore"] - measured,
        handover=released_at - laps.since,
    )


class SourceFigures:
    """Collects until the report is made."""

    def __init__(
        self,
        migration: str,
        survey: Survey,
        *,
        engine: str,
        source: str,
        destination: str,
        narrator: Narrator,
    ) -> None:
        self.migration = migration
        self.survey = survey
        self.source = source
        self.destination = destination
        self.narrator = narrator
        self.engine = engine
        self.started = datetime.now(UTC).isoformat(timespec="seconds")
        self._began = time.monotonic()
        self.downtime = Laps(time.monotonic)
        self.rounds: list[Round] = []
        self.stats: list[RoundStats] = []
        self.cpu = CpuMemory()
        self.vram = VramTally()
        self.predicted: float | None = None
        self.prediction: Prediction | None = None
        self.blockers: tuple[Failure, ...] = ()
        self.warnings: tuple[Notice, ...] = ()
        self.gpu_map: GpuMap | None = None
        self.pending_packets = 0
        self.life = ""
        self.learned: Costs | None = None  # from earlier migrations
        self.left_running = False  # an image was made, and the process let go on
        self.stream_resumes = 0
        self.replayed = False
        self.snapshot = 0.0  # seconds that stopping and checkpointing took the last time
        self.user_gpu_ids: dict[int, int] = {}  # actual gpu_id at the source: user_gpu_id
        self._sizes: dict[ObjectKind, int] = {}
        self._destination = DestinationFigures()
        self._parts: Downtime | None = None

    def checked(
        self,
        prediction: Prediction,
        blockers: tuple[Failure, ...],
        warnings: tuple[Notice, ...],
        user_gpu_ids: Mapping[int, int],
    ) -> None:
        """Preflight is over."""
        self.prediction, self.blockers, self.warnings = prediction, blockers, warnings
        self.user_gpu_ids = dict(user_gpu_ids)

    def sent(self, stats: RoundStats, orders: Sequence[ObjectOrder], *, frozen: bool) -> None:
        """One round is over."""
        self.stats.append(stats)
        self.rounds.append(
            Round(
                number=len(self.rounds) + 1,
                frozen=frozen,
                objects=len(orders),
                scanned=stats.scanned,
                changed=stats.changed,
                zero=stats.zero,
                unchanged=stats.unchanged,
                wire=stats.wire,
                seconds=stats.seconds,
            )
        )
        self._sizes = {
            kind: sum(order.size for order in orders if order.kind is kind) for kind in ObjectKind
        }

    def sent_before(self, stats: RoundStats, size: int, why_not: str = "") -> None:
        """*size* bytes of CPU memory went while the process ran; for nothing if *why_not*."""
        self.stats.append(stats)
        self.cpu = CpuMemory(before=size, seconds=stats.seconds, in_freeze_because=why_not)

    def cpu_frozen(self, size: int) -> None:
        """So many bytes of CPU memory went in the freeze."""
        self.cpu = msgspec.structs.replace(self.cpu, frozen=size)

    def restored(self, figures: DestinationFigures) -> None:
        """The destination holds the copy."""
        self._destination = figures

    def released(self, figures: DestinationFigures, *, at: float) -> None:
        """The answer OWNED came at *at* (monotonic); the copy ran ``after_release`` before."""
        self._parts = downtime_of(self.downtime, self._destination, at - figures.after_release)
        self._destination = figures

    def costs(self) -> Costs:
        """What the prediction takes as known."""
        if self.learned is not None:
            return self.learned
        return Costs(placement=PLACEMENT_GUESS, fixed=FIXED_GUESS + self.snapshot)

    def report(
        self,
        state: SourceState | None,
        answer: GrantReply | None,
        error: MigrateError | None,
        source_alive: bool,
        peak: PeakMemory,
        *,
        ended: bool = True,
    ) -> Report:
        """The report as things stand; *ended* says that nothing more will happen."""
        owner = owner_of(state) if state is not None else owner_of(SourceState.SETUP)
        if ended and state is SourceState.GRANTED and error is None:
            error = unanswered_error(answer)
        done = state is SourceState.DONE
        return Report(
            id=self.migration,
            status=self._status(state, error) if ended else self.narrator.status,
            owner=owner,
            running=_running(state, source_alive, stored=self.destination.startswith(PREFIX)),
            source=End(host=self.source, pid=self.survey.process.pid),
            destination=End(host=self.destination, pid=self._destination.pid if done else None),
            command=self.survey.command,
            engine=self.engine,
            started=self.started,
            seconds=time.monotonic() - self._began,
            phases=self.narrator.phases(),
            downtime=self._parts,
            predicted_downtime=self.predicted,
            rounds=tuple(self.rounds),
            bytes=self._bytes(),
            cpu=self.cpu,
            codecs=self._codecs(),
            gpu_map=self._gpu_rows(),
            pending_packets=self.pending_packets,
            life=self.life,
            replayed=self.replayed,
            prediction=self.prediction,
            blockers=self.blockers,
            warnings=self.warnings,
            chunks_verified=self._destination.chunks_verified,
            stream_resumes=self.stream_resumes,
            source_peak=peak,
            destination_peak=self._destination.peak,
            source_vram=self.vram.bytes,
            destination_vram=self._destination.vram,
            failure=None if error is None else failure(error),
        )

    def _status(self, state: SourceState | None, error: MigrateError | None) -> Status:
        if state is SourceState.DONE or (self.left_running and error is None):
            return Status.COMPLETED
        if state in (SourceState.GRANTED, SourceState.RELEASING):
            return Status.HANDOVER
        return (
            Status.CANCELLED
            if error is not None and error.reason == "CANCELLED"
            else (Status.FAILED)
        )

    def _bytes(self) -> Bytes:
        return Bytes(
            vram=self._sizes.get(ObjectKind.VRAM, 0),
            gtt=self._sizes.get(ObjectKind.GTT, 0),
            cpu=self._sizes.get(ObjectKind.CPU, 0),
            zero=sum(s.zero for s in self.stats),
            unchanged=sum(s.unchanged for s in self.stats),
            wire=sum(s.wire for s in self.stats),
        )

    def _codecs(self) -> dict[str, float]:
        raw: dict[str, int] = {}
        for stats in self.stats:
            for name, size in stats.codecs.items():
                raw[name] = raw.get(name, 0) + size
        total = sum(raw.values())
        return {name: size / total for name, size in sorted(raw.items())} if total else {}

    def _gpu_rows(self) -> tuple[GpuRow, ...]:
        return gpu_rows(self.gpu_map, self.user_gpu_ids)


def gpu_rows(gpu_map: GpuMap | None, user_gpu_ids: Mapping[int, int]) -> tuple[GpuRow, ...]:
    """The map as a report has it. *user_gpu_ids* by actual gpu_id at the source."""
    return tuple(
        GpuRow(
            user_gpu_id=user_gpu_ids.get(source, source),
            source_gpu_id=source,
            destination_gpu_id=destination,
        )
        for source, destination in (gpu_map.pairs if gpu_map is not None else ())
    )


def failure(error: MigrateError) -> Failure:
    """An error as it stands in a report."""
    return Failure(
        reason=error.reason,
        message=error.message,
        advice=error.hint,
        exit_code=error.exit_code,
    )


def _running(state: SourceState | None, source_alive: bool, *, stored: bool) -> str:
    if stored and state in (SourceState.DONE, SourceState.RELEASING, SourceState.GRANTED):
        return "nowhere"  # it is in an image
    if state in (SourceState.DONE, SourceState.RELEASING):
        return "destination"
    if state is SourceState.GRANTED:
        return "unknown"
    return "source" if source_alive else "nowhere"


def unanswered_error(answer: GrantReply | None) -> MigrateError:
    """What a granted migration without a deciding answer reports; *answer* is the last one."""
    if answer is not None and answer.answer is Answer.OWNED_DEAD:
        return OwnedDead(f"the destination owned the process and it ended there: {answer.message}")
    return OwnerUnknown("the grant was sent and the destination has not answered")
