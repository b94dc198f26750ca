"""The source's half of one migration: look, pre-copy, freeze, copy, hand over.

The phases run one after another in one thread. What can go wrong before GRANTED is
undone by the handover machine (``Failed``): queues unpaused, tree thawed, destination
told. After GRANTED nothing here decides any more: see handover.py.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Protocol

from migrate import faults
from migrate.dataplane.access import MemoryAccess
from migrate.dataplane.messages import ObjectInfo
from migrate.dataplane.source import Coming, Manifest, Progress
from migrate.dataplane.stats import RoundStats
from migrate.engine import procfs
from migrate.engine.seam import CpuImage, Survey
from migrate.errors import (
    Cancelled,
    ConnectedSockets,
    DowntimeExceeded,
    MigrateError,
    MigrationFailed,
    NoSuchProcess,
    ProcessExited,
    TakenBack,
)
from migrate.kfd.process import Checkpointed, KfdProcess
from migrate.model import GpuMap
from migrate.orchestrator import convergence
from migrate.orchestrator.checking import Examination, Preflight, Stopped
from migrate.orchestrator.coming import Came, CpuBefore, CpuSide
from migrate.orchestrator.convergence import Decision, Policy
from migrate.orchestrator.estimate import Known
from migrate.orchestrator.figures import SourceFigures, unanswered_error
from migrate.orchestrator.handover import (
    Answer,
    Prepared,
    Resolved,
    Restarted,
    SourceHandover,
)
from migrate.orchestrator.holding import Holding, shortage
from migrate.orchestrator.host import Host
from migrate.orchestrator.life import INTERVAL, SUSPECT, WINDOW, Look, between, take_look
from migrate.orchestrator.narrator import Narrator
from migrate.orchestrator.objects import ObjectTable, OpenBos, buffers, lent
from migrate.orchestrator.peer import Peer, Reservation
from migrate.orchestrator.plan import Activity, Move, ObjectOrder, Options, RestoreOrder, Share
from migrate.orchestrator.rings import pending_packets
from migrate.orchestrator.sharing import Place, let_go, shares
from migrate.orchestrator.source_handover import (
    SourceSide,
    given_back,
    note_pausing,
    note_unpaused,
    refusal,
)
from migrate.report import Report
from migrate.status import Owner, SourceState, Status

HELD_BACK = 0.1  # seconds that a slowed workload stands, as long as it then runs
CHECK_PATIENCE = 1.0  # seconds that the link may be broken while only a sample is sent
ENDING = 5.0  # seconds that a killed process may take to be gone


class RoundSender(Protocol):
    """What a migration needs of a ``Sender``; also what writes an image."""

    def send_round(
        self,
        objects: Sequence[tuple[ObjectInfo, MemoryAccess]],
        progress: Progress | None = None,
        cancel: threading.Event | None = None,
        coming: Coming | None = None,
        *,
        still: bool = False,
    ) -> RoundStats:
        """See Sender."""

    def give_up(self, object_id: int) -> None:
        """See Sender."""

    def drop_object(self, object_id: int) -> None:
        """See Sender."""

    def manifest(self) -> Manifest:
        """See Sender."""

    def close(self) -> None:
        """See Sender."""


SenderFactory = Callable[[str, Reservation, Options], RoundSender]


class SourceMigration:
    """Drives one migration. ``run`` returns its report and raises nothing."""

    def __init__(
        self,
        migration: str,
        survey: Survey,
        host: Host,
        peer: Peer,
        options: Options,
        connect: SenderFactory,
        machine: SourceHandover,
    ) -> None:
        self.id = migration
        self.survey = survey
        self.process = survey.process
        self.host = host
        self.peer = peer
        self.options = options
        self.connect = connect
        self.narrator = Narrator(migration)
        self.cancel = host.clock.event()  # an operator asked for an abort: see abort()
        self.stop = host.clock.event()  # the agent ends
        self.let_go = False  # by the watchdog: it may have run, and ended, since the freeze
        self.figures = SourceFigures(
            migration,
            survey,
            engine=host.engine.name,
            source=host.name,
            destination=peer.name,
            narrator=self.narrator,
        )
        self.side = SourceSide(
            migration,
            self.process,
            machine,
            host=host,
            peer=peer,
            narrator=self.narrator,
            patience=options.patience,
            stop=self.stop,
            cancel=self.cancel,
        )
        self.known: Sequence[Report] = ()  # of earlier migrations to the same host
        self._objects = ObjectTable()
        self._bos = OpenBos(host.vram_access, self.figures.vram)
        self._sent_before: set[int] = set()
        self._before: list[Came] = []  # CPU memory that was sent and still counts
        self._digests: Manifest = {}  # of that
        self._policy = Policy(
            max_downtime=options.max_downtime,
            max_rounds=options.max_rounds,
            throttle=options.throttle,
            or_stay=options.or_stay,
        )
        self._throttled = False  # the workload is slowed down during the round under way
        self._vram_short = ""  # why live rounds must not go on
        self._reservation: Reservation | None = None
        self._first_look: Look | None = None
        self._ran = Activity()
        self._sender: RoundSender | None = None
        self._report: Report | None = None

    # ------------------------------------------------------------ the whole

    def run(self) -> Report:
        """Migrate. Every outcome is in the report, which is journaled."""
        error: MigrateError | None = None
        try:
            self._setup()
            if self.options.precopy:
                self._precopy()
            self._switchover()
        except MigrateError as raised:
            error = self._explained(raised)
        except Exception as raised:
            error = MigrateError(f"{type(raised).__name__}: {raised}")
        if error is not None:
            self._fail(error)
        return self._finish(error)

    def resume(self) -> Report:
        """Go on from the journal after a restart of the agent: finish, undo, or keep asking."""
        error: MigrateError | None = MigrationFailed(
            "the source's agent was restarted during the migration"
        )
        # One that was let go is no lost copy, also if it has come to its end since.
        present = self.let_go or self.host.engine.is_alive(self.process)
        self.narrator.enter("recovery", Status.HANDOVER)
        self.side.pursue(Restarted(copy_present=present))
        return self._finish(error)

    def abort(self) -> bool:
        """An operator's wish to end it. False: too late, the grant is given."""
        return self.side.abort()

    def hurry(self) -> None:
        """Whatever waits to be tried again is tried now."""
        self.side.wake.set()

    def has_process(self) -> bool:
        """Whether the process is here, frozen or not."""
        return self.host.engine.is_alive(self.process)

    def doing(self) -> str:
        """What is being done, for a person who asks whether anything is."""
        state = self.side.machine.state
        if state is not SourceState.GRANTED:
            return "it is under way"
        heard = self.side.heard
        answered = f"its last answer was {heard.answer}" if heard else "it has not answered"
        return f"{self.peer.name} is asked for its answer to the grant; {answered}"

    def resolve(self, resolution: Resolved) -> None:
        """An operator decides, who fenced the other host. Counts while the grant is unanswered."""
        self.side.resolve(resolution)

    def may_take_back(self) -> bool:
        """Whether a kept source may have asked for a copy that the destination knows of."""
        heard = self.side.heard
        known = heard is None or heard.answer is not Answer.NO_RECORD
        return self.options.hold_source and known

    def conclude(self) -> Report:
        """The report of a migration that ended, when its agent died before it was journaled."""
        if self.side.machine.state is SourceState.ROLLED_BACK:
            return self._finish(MigrationFailed("the source's agent died while it undid"))
        return self._finish(None)

    def stream_resumes(self) -> int:
        """Connections that broke and were made anew: every one has an epoch in the journal."""
        return max(0, self.host.journal.count(self.id, "epoch") - self.options.streams)

    def report_now(self) -> Report:
        """The report as things stand; the last one, if the journal did not take it."""
        if self._report is not None:
            return self._report
        granted = self.side.machine.state is SourceState.GRANTED
        self.figures.stream_resumes = self.stream_resumes()
        unanswered = granted and self.narrator.owner is Owner.UNKNOWN
        return self.figures.report(
            self.side.machine.state,
            self.side.answer,
            unanswered_error(self.side.heard) if unanswered else None,
            self.host.engine.is_alive(self.process),
            self.host.peak_memory(),
            ended=False,
        )

    def _fail(self, error: MigrateError) -> None:
        """Undo, or go on if the grant is given: until that is done, or the agent ends."""
        cancelled = isinstance(error, Cancelled)
        self.narrator.enter("undo", Status.CANCELLING if cancelled else self.narrator.status)
        self.side.settle(str(error))

    def _finish(self, error: MigrateError | None) -> Report:
        if self._sender is not None:
            self._sender.close()
            self._sender = None  # its buffers are large, and this is remembered for long
        self._bos.close_all()
        state = self.side.machine.state
        if state in (SourceState.GRANTED, SourceState.RELEASING, SourceState.DONE):
            error = None  # what failed on the way did not decide
        if state in (SourceState.RECLAIMED, SourceState.ROLLED_BACK):
            error = self._given_back() or error
        left = self.figures.left_running
        if error is None and state is SourceState.ROLLED_BACK and not left:
            error = refusal(self.side.answer)
        alive = self.host.engine.is_alive(self.process)
        self.narrator.close_phase()
        self.figures.stream_resumes = self.stream_resumes()
        report = self.figures.report(state, self.side.answer, error, alive, self.host.peak_memory())
        self.narrator.owner = report.owner
        if state in (SourceState.DONE, SourceState.ROLLED_BACK, None) or error is not None:
            self._report = report
            self._journal_report(report)
            self.narrator.end(report.status, report.owner, report.status)
        return report

    def _given_back(self) -> MigrateError | None:
        """What to say of a source that runs though a grant was given and not refused."""
        found = given_back(self.host.journal, self.id)
        self.figures.replayed = found is not None
        if isinstance(found, TakenBack):
            self.figures.life = SUSPECT
        return found

    def _journal_report(self, report: Report) -> None:
        try:
            self.host.journal.append(self.id, "report", report)
        except MigrateError as error:
            self.narrator.say(f"the report could not be journaled: {error}")

    def _explained(self, error: MigrateError) -> MigrateError:
        """What really happened, where the first error is only a symptom."""
        if self.cancel.is_set() and not isinstance(error, Cancelled):
            return Cancelled("the migration was aborted")
        gone = not self.host.engine.is_alive(self.process)
        if not gone and (isinstance(error, NoSuchProcess) or procfs.is_ending(self.process)):
            gone = self._wait_gone()
        granted = self.side.machine.state in (SourceState.GRANTED, SourceState.RELEASING)
        if gone and not granted and not isinstance(error, ProcessExited):
            return ProcessExited(f"process {self.process.pid} ended during the migration")
        return error

    def _wait_gone(self) -> bool:
        """Whether a process that is ending has ended: its files are closed a moment before."""
        deadline, wait = self.host.clock.monotonic() + ENDING, self.host.clock.event()
        while self.host.engine.is_alive(self.process):
            if self.host.clock.monotonic() > deadline:
                return False
            wait.wait(INTERVAL)
        return True

    def _checkpoint_cancel(self) -> None:
        if self.cancel.is_set():
            raise Cancelled("the migration was aborted")

    # ------------------------------------------------------------ phases

    def _setup(self) -> None:
        """Preflight on both hosts, GPU map, reservation, streams."""
        self.side.record(SourceState.SETUP)
        faults.point("source.setup")
        self.narrator.enter("setup", Status.SETUP)
        examination = Examination(self.host, self.peer, self.survey, self.options, self.known)
        found = examination.run(self._snapshot, self._look, self.options.patience)
        self.figures.checked(
            found.prediction, found.blockers(), found.warnings(), found.user_gpu_ids
        )
        self._checkpoint_cancel()
        found.refuse()
        engine = self.host.engine
        move = Move(
            engine=engine.name, needs=found.needs, topology=found.topology, options=self.options
        )
        reservation = self.peer.reserve(self.id, move, engine.ahead(self.process))
        faults.point("source.reserved")
        self._reservation = reservation
        self.figures.gpu_map = reservation.gpu_map
        self._sender = self.connect(self.id, reservation, self.options)

    def _refuse_connections(self) -> None:
        """A kept source may be run again from its freeze. Raises ConnectedSockets."""
        found = self.host.connected_sockets(self.process) if self.options.hold_source else ()
        if found:
            raise ConnectedSockets(f"--hold-source, and there are connections: {'; '.join(found)}")

    def _look(self, stopped: Stopped) -> None:
        self._first_look = take_look(self.process, stopped.checkpoints, self.host.clock)

    def _precopy(self) -> None:
        """Rounds over live memory until stopping is cheap, or no longer gets cheaper."""
        self.side.record(SourceState.ACTIVE)
        self.narrator.enter("pre-copy", Status.ACTIVE)
        if self.known:
            self.figures.learned = Known(self.known, precopy=True).costs
        while True:
            self._checkpoint_cancel()
            with self._snapshot() as stopped:
                orders, imports = self._bo_orders(stopped.checkpoints)
                let_go(stopped.checkpoints, imports)
                faults.point("source.round")
                self._send_round(orders, stopped.checkpoints, frozen=False)
            faults.point("source.round-sent")
            if len(self.figures.rounds) == 1:
                self._precopy_cpu()
            verdict = convergence.decide(
                self.figures.rounds,
                self.figures.costs(),
                self._policy,
                throttled=self._throttled,
            )
            self.figures.predicted = verdict.predicted_downtime
            self.narrator.say(verdict.why, predicted=verdict.predicted_downtime)
            self._throttled = verdict.decision is Decision.THROTTLE
            if verdict.decision is Decision.STAY:
                raise DowntimeExceeded(
                    f"the process would stand for {verdict.predicted_downtime:.2f} s, and"
                    f" {self.options.max_downtime:.2f} s are the limit: {verdict.why}"
                )
            if verdict.decision is Decision.STOP_AND_COPY or self._vram_short:
                return

    def _precopy_cpu(self) -> None:
        """CPU memory, once. What can't be sent now is sent in the freeze."""
        assert self._sender is not None
        self._bos.close_all()  # nobody lists them meanwhile
        before = CpuBefore(iter(()), self._objects)
        stats = RoundStats()
        try:
            pieces = self.host.engine.precopy(self.process)
            if pieces is None:
                return
            before = CpuBefore(pieces, self._objects)
        except MigrateError as error:
            before.failed = error
        else:
            stats = self._sender.send_round((), self._progress(), self.cancel, before)
        why_not = before.failed.message if before.failed is not None else ""
        self.figures.sent_before(stats, sum(piece.size for _, piece in before.came), why_not)
        if why_not:
            self.narrator.say(f"CPU memory is sent in the freeze: {why_not}")
            self._outdated({info.id for info, _ in before.came})
        else:
            self._before = before.came
            self._digests = self._sender.manifest()

    def _outdated(self, objects: set[int]) -> None:
        """CPU memory that was sent for nothing is let go over there."""
        assert self._sender is not None
        for number in sorted(objects):
            self._sender.drop_object(number)
            self._digests.pop(number, None)
        self._before = [came for came in self._before if came[0].id not in objects]

    def _checkpoint_frozen(self, kfd: Sequence[KfdProcess]) -> list[Checkpointed]:
        """Leaves all paused. What the GPUs may have written of CPU memory is sent again."""
        found = _checkpoint(kfd)
        try:
            if self._before:
                written = [cpu for one in found for cpu in lent(one.checkpoint)]
                gone = set(self.host.engine.outdated(self.process, written))
                self._outdated({info.id for info, piece in self._before if piece in gone})
            faults.point("source.checkpointing")
        except BaseException:
            for one in found:
                one.close()
            raise
        return found

    def _switchover(self) -> None:
        """Freeze, copy the rest, restore held over there, hand over."""
        faults.point("source.before-device")
        self._checkpoint_cancel()
        self.narrator.enter("stop", Status.PRE_SWITCHOVER)
        self.side.record(SourceState.DEVICE)
        faults.point("source.device")
        downtime = self.figures.downtime
        downtime.begin()
        image = self.host.engine.freeze(self.process)
        downtime.lap("stop")
        faults.point("source.frozen")
        self._refuse_connections()  # made since

        self.narrator.enter("checkpoint", Status.DEVICE)
        note_pausing(self.host.journal, self.id)
        chosen = self.options.ways_out, self.options.copy_files
        found = self.host.engine.dump(self.process, self._checkpoint_frozen, *chosen)
        with _Stopped(found) as stopped:
            self.figures.pending_packets = pending_packets(stopped.checkpoints)
            if self._first_look is not None:
                last = take_look(self.process, stopped.checkpoints, self.host.clock)
                self._ran = between(self._first_look, last)
            downtime.lap("checkpoint")
            faults.point("source.checkpointed")
            self.narrator.enter("final round", Status.DEVICE)
            order = self._final_round(image, stopped.checkpoints)
            downtime.lap("delta")
        faults.point("source.final-round")
        self._checkpoint_cancel()
        self.narrator.enter("restore", Status.DEVICE)
        assert self._sender is not None
        sent = self._digests | self._sender.manifest()
        manifest = {number: digests for number, (_, digests) in sent.items()}
        prepared = self.peer.restore(self.id, order, manifest)
        self.figures.restored(prepared.figures)
        downtime.lap("restore")
        faults.point("source.prepared")

        self._checkpoint_cancel()
        if self.options.leave_running:
            self.figures.left_running = True
            self.side.settle("the process was to be left running")
            return
        self.narrator.enter("handover", Status.HANDOVER)
        self.side.feed(Prepared(token=prepared.token, store_id=prepared.store_id))
        if self.side.answer is not None and self.side.answer.answer is Answer.OWNED:
            self.figures.released(self.side.answer.figures, at=self.side.answered_at)
            self._bos.close_all()
            self._ask_life()

    def _ask_life(self) -> None:
        """What the destination sees of the released copy. Decides nothing."""
        if not self._ran.seconds:
            return
        clock = self.host.clock
        deadline = clock.monotonic() + WINDOW + 1
        while clock.monotonic() < deadline and not self.stop.is_set():
            try:
                self.figures.life = self.peer.query(self.id).life
            except MigrateError:
                return
            if self.figures.life:
                self.narrator.say(f"the released process is {self.figures.life}")
                return
            self.stop.wait(INTERVAL)

    # ------------------------------------------------------------ pieces

    def _snapshot(self) -> _Stopped:
        """Checkpoint the running process; its queues stand for milliseconds."""
        note_pausing(self.host.journal, self.id)
        began = self.host.clock.monotonic()
        try:
            return _Stopped(self.host.engine.snapshot(self.process, _checkpoint_and_unpause))
        except NoSuchProcess as error:
            raise ProcessExited(str(error)) from error
        finally:
            self.figures.snapshot = self.host.clock.monotonic() - began
            note_unpaused(self.host.journal, self.id)

    def _bo_orders(
        self, checkpoints: Sequence[Checkpointed]
    ) -> tuple[tuple[ObjectOrder, ...], tuple[Share, ...]]:
        """What there is to send, and what is imported: a buffer may be at any time."""
        imports = shares(checkpoints)
        orders = tuple(
            order
            for number, one in enumerate(checkpoints)
            for order in self._objects.bos(number, one.checkpoint, imports)
        )
        return orders, imports

    def _final_round(self, image: CpuImage, stopped: Sequence[Checkpointed]) -> RestoreOrder:
        """The last delta of the BOs, and the CPU side while the engine writes it."""
        orders, imports = self._bo_orders(stopped)
        engine = self.host.engine
        cpu = CpuSide(engine, self.process, image, self._objects, self._before)
        try:
            self._send_round(orders, stopped, frozen=True, cpu=cpu)
        finally:
            cpu.close()
        self.figures.cpu_frozen(cpu.bytes)
        return RestoreOrder(
            gpu_map=self._map(),
            image=cpu.image,
            checkpoints=tuple(one.checkpoint for one in stopped),
            shares=imports,
            objects=(*orders, *cpu.orders),
            ran=self._ran,
            hold_source=self.options.hold_source,
        )

    def _send_round(
        self,
        orders: Sequence[ObjectOrder],
        checkpoints: Sequence[Checkpointed],
        *,
        frozen: bool,
        cpu: CpuSide | None = None,
    ) -> None:
        assert self._sender is not None
        tell = self._progress()
        holding: Holding | None = None

        def progress(done: int, total: int) -> None:
            if holding is not None:
                holding.tick()
            if self._throttled and not frozen:
                self._hold_back()
            tell(done, total)

        objects = self._bos.open(orders, checkpoints)
        self._drop_gone({info.id for info, _ in objects})
        if not frozen:
            holding = self._holding()
        stats = self._sender.send_round(objects, progress, self.cancel, cpu, still=frozen)
        if holding is not None and holding.dropped:
            self._vram_short = holding.dropped
            self.narrator.say(f"no more live rounds: {holding.dropped}")
        self.figures.sent(stats, (*orders, *(cpu.orders if cpu else ())), frozen=frozen)

    def _progress(self) -> Progress:
        """Tells how a round goes on that begins now."""
        number = len(self.figures.rounds) + 1
        started = time.monotonic()

        def tell(done: int, total: int) -> None:
            self.narrator.say(
                "",
                number=number,
                rate=done / max(time.monotonic() - started, 1e-6),
                left=total - done,
                total=total,
                predicted=self.figures.predicted,
            )

        return tell

    def _holding(self) -> Holding:
        assert self._sender is not None
        gpus = tuple(self._map().as_dict())

        def relist() -> dict[int, Place]:
            with self._snapshot() as now:
                orders, _ = self._bo_orders(now.checkpoints)
                return buffers(orders, now.checkpoints)

        return Holding(
            self._bos.buffers(),
            clock=self.host.clock,
            relist=relist,
            short=lambda: shortage(self.host.vram(), gpus),
            give_up=self._sender.give_up,
            close=self._bos.close,
        )

    def _hold_back(self) -> None:
        """Let the workload stand for a moment: half of the time, as this is called."""

        def stand(kfd: Sequence[KfdProcess]) -> None:
            try:
                for process in kfd:
                    process.process_info()
                self.cancel.wait(HELD_BACK)
            finally:
                for process in kfd:
                    process.unpause_if_paused()

        note_pausing(self.host.journal, self.id)
        try:
            self.host.engine.snapshot(self.process, stand)
        except NoSuchProcess as error:
            raise ProcessExited(str(error)) from error
        finally:
            note_unpaused(self.host.journal, self.id)

    def _drop_gone(self, present: set[int]) -> None:
        """Objects that the process freed since the last round are freed over there too."""
        assert self._sender is not None
        for gone in self._sent_before - present:
            self._sender.drop_object(gone)
        self._sent_before = present

    def _map(self) -> GpuMap:
        if self._reservation is None:
            raise MigrationFailed("no reservation")
        return self._reservation.gpu_map


def check(
    host: Host, peer: Peer, process: Survey, options: Options, known: Sequence[Report]
) -> Preflight:
    """Preflight alone. Raises NoSuchProcess, ProcessExited, BrokenTopology, JournalUnusable."""
    name = f"check-{secrets.token_hex(8)}"

    def stop() -> _Stopped:
        # A record, so that whoever comes after us can start the queues again.
        host.journal.append(name, "check", process.process)
        note_pausing(host.journal, name)
        try:
            return _Stopped(host.engine.snapshot(process.process, _checkpoint_and_unpause))
        finally:
            note_unpaused(host.journal, name)

    examination = Examination(host, peer, process, options, known)
    return examination.run(stop, lambda _stopped: None, CHECK_PATIENCE)


class _Stopped:
    """Checkpoints with their dmabufs, closed at the end of the block."""

    def __init__(self, checkpoints: Sequence[Checkpointed]) -> None:
        self.checkpoints = checkpoints
        self._stack = ExitStack()
        for checkpointed in checkpoints:
            self._stack.callback(checkpointed.close)

    def __enter__(self) -> _Stopped:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()


def _checkpoint(kfd: Sequence[KfdProcess]) -> list[Checkpointed]:
    """Pause all, and read nothing until all are paused. Leaves them paused."""
    for process in kfd:
        process.process_info()
    return [process.checkpoint() for process in kfd]


def _checkpoint_and_unpause(kfd: Sequence[KfdProcess]) -> list[Checkpointed]:
    try:
        found = _checkpoint(kfd)
        faults.point("source.snapshot")
        return found
    finally:
        for process in kfd:
            process.unpause_if_paused()


def unpause(kfd: Sequence[KfdProcess]) -> None:
    """A visitor that starts the queues that are paused, of whoever paused them."""
    for process in kfd:
        process.unpause_if_paused()
