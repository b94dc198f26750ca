"""The destination's half of one migration: room, staging, the copy, and its handover.

Calls come from the source, one at a time under one lock; a cancel interrupts a build
that is under way. What the handover machine answers is performed here, in order.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence

from migrate import faults
from migrate.dataplane.access import MemoryAccess
from migrate.dataplane.memory import PartAccess
from migrate.dataplane.staging import WORTH_SHARING, Staging, in_parallel
from migrate.dataplane.vram import VramTally
from migrate.engine.seam import HeldProcess, MovedBo, MovedGpu
from migrate.errors import (
    Cancelled,
    MigrateError,
    MigrationFailed,
    RestoreFailed,
    UsageError,
    VerificationFailed,
)
from migrate.kfd.process import KfdProcess, Restored, RestoreProof
from migrate.model import ProcessRef, Value
from migrate.orchestrator.clock import Laps
from migrate.orchestrator.handover import (
    Answer,
    Built,
    CancelCame,
    CopyDied,
    DestinationEffect,
    DestinationEvent,
    DestinationHandover,
    Done,
    Failed,
    FirstResumeFailed,
    GrantCame,
    Kill,
    Reply,
    Resolved,
    Restarted,
    RevokeCame,
    SeenAlive,
    SeenSuspect,
    Start,
    Write,
)
from migrate.orchestrator.host import Host
from migrate.orchestrator.life import ALIVE, ENDED, IDLE, SUSPECT
from migrate.orchestrator.peer import GrantReply, PreparedReply
from migrate.orchestrator.plan import Activity, BoKey, ObjectOrder, RestoreOrder
from migrate.orchestrator.targets import Targets, dmabuf
from migrate.report import DestinationFigures
from migrate.status import NEVER_RAN, DestinationState

_log = logging.getLogger(__name__)

LOOKS = 3  # that must all find a copy suspect before it may be asked back

_BEFORE_WRITE = {
    DestinationState.PREPARED: "destination.prepared.before-write",
    DestinationState.OWNED: "destination.owned.before-write",
}
_AFTER_WRITE = {
    DestinationState.RESERVED: "destination.reserved",
    DestinationState.RESTORING: "destination.restoring",
    DestinationState.PREPARED: "destination.prepared.after-write",
    DestinationState.OWNED: "destination.owned.after-write",
    DestinationState.ABORTED: "destination.aborted",
    DestinationState.CONFIRMED: "destination.confirmed",
    DestinationState.REVOKING: "destination.revoking",
    DestinationState.REVOKED: "destination.revoked",
}
_BUILDS = frozenset({DestinationState.RESERVED, DestinationState.RESTORING})
_OWNS = frozenset(
    {
        DestinationState.OWNED,
        DestinationState.CONFIRMED,
        DestinationState.REVOKING,
        DestinationState.OWNED_DEAD,
    }
)


_SEEN: Mapping[str, DestinationEvent] = {
    ALIVE: SeenAlive(),
    IDLE: SeenAlive(),  # never suspect: it did too little before for anything to be missed
    SUSPECT: SeenSuspect(),
    ENDED: CopyDied(),
}


# What came from the source, before anything is built of it. Raises MigrateError.
Check = Callable[[RestoreOrder, Mapping[int, bytes]], None]


class DestinationRecord(Value):
    """The journal's ``destination`` record: a state and its token."""

    state: DestinationState
    token: bytes = b""


class CopyRecord(Value):
    """The journal's ``copy`` record: the process that was built, before anything of it runs.

    ``restored``: processes of it whose RESTORE succeeded; only these may be RESUMEd.
    """

    process: ProcessRef
    restored: tuple[RestoreProof, ...] = ()


class KeptRecord(Value):
    """The journal's ``kept`` record: the source keeps its copy; what ours is compared with."""

    ran: Activity


class SourceRecord(Value):
    """The journal's ``peer`` record: who sends, by which certificate, and how to ask it."""

    name: str
    address: str
    store_id: str
    serial: str = ""  # of the certificate that reserved, hexadecimal


class DestinationMigration:
    """One migration at the destination. Methods raise MigrateError."""

    def __init__(
        self,
        migration: str,
        host: Host,
        machine: DestinationHandover,
        *,
        source: SourceRecord,
        check: Check = lambda _order, _manifest: None,
        staging: Staging | None = None,
        copy: CopyRecord | None = None,
        ran: Activity | None = None,
        close_session: Callable[[], None] = lambda: None,
    ) -> None:
        self.id = migration
        self.host = host
        self.machine = machine
        self.source = source
        self.copy = copy
        self.last_heard = host.clock.monotonic()
        self.unfinished = False  # what was decided is not done yet: see go_on()
        self._untouched = False  # OWNED was written by us, and no RESUME was sent
        self._check = check
        self._staging = staging
        self._close_session = close_session
        self._cancel = host.clock.event()
        self._lock = host.clock.lock()
        self._held: HeldProcess | None = None
        self._clock = Laps(host.clock.monotonic)
        self._verified = 0
        self._vram = VramTally()
        self._released_at = 0.0
        self._reply: GrantReply | None = None
        self._why = ""
        self._ran = ran or Activity()
        self._looks = False  # somebody watches the released copy
        self.life = ""  # what was seen of the copy after its release

    # ------------------------------------------------------------ calls of the source

    def reserved(self) -> None:
        """Record the reservation. Raises JournalUnusable."""
        faults.point("destination.reserve")
        self.host.journal.append(self.id, "peer", self.source)
        self._write(self.machine.to(DestinationState.RESERVED))

    def prepare(self, ahead: bytes) -> None:
        """Let the engine begin what needs nothing of the frozen process. Raises nothing."""
        with self._lock:
            if self.machine.state is not DestinationState.RESERVED:
                return
            try:
                self.host.engine.prepare(self.id, ahead)
            except MigrateError as error:  # if it matters, restore says so
                _log.info("migration %s: nothing was begun early: %s", self.id, error)

    def restore(self, order: RestoreOrder, manifest: Mapping[int, bytes]) -> PreparedReply:
        """Build the copy, place and verify its memory, hold it. On failure nothing is left."""
        with self._lock:
            self.last_heard = self.host.clock.monotonic()
            if self.machine.state is not DestinationState.RESERVED:
                raise MigrationFailed(f"this attempt is {self.machine.state} and can't be restored")
            self._check(order, manifest)
            self._ran, self.machine.hold = order.ran, order.hold_source
            if order.hold_source:
                self.host.journal.append(self.id, "kept", KeptRecord(ran=order.ran))
            self._write(self.machine.to(DestinationState.RESTORING))
            try:
                self._build(order, manifest)
                self.feed(Built(token=secrets.token_bytes(16)))
            except BaseException as error:
                self.feed(Failed(why=str(error)))
                if isinstance(error, MigrateError):
                    raise
                raise RestoreFailed(f"{type(error).__name__}: {error}") from error
            self.last_heard = self.host.clock.monotonic()
            return PreparedReply(
                store_id=self.host.journal.store_id,
                token=self.machine.token,
                figures=self.figures(),
            )

    def grant(self, token: bytes) -> GrantReply:
        """The source gives the process away. Raises MigrationFailed for a stale token."""
        with self._lock:
            self.last_heard = self.host.clock.monotonic()
            if self.machine.state is DestinationState.PREPARED and not self.is_present():
                # Nothing of it ran: the source may have its process back at once.
                self.feed(Failed(why="the copy died while it was held"))
            return self._answered(GrantCame(token=token))

    def revoke(self, token: bytes) -> GrantReply:
        """The source kept its copy and asks a suspect one back. Raises MigrationFailed."""
        with self._lock:
            self.last_heard = self.host.clock.monotonic()
            return self._answered(RevokeCame(token=token))

    def _answered(self, event: DestinationEvent) -> GrantReply:
        self._reply = None
        self.feed(event)
        if self._reply is None:
            raise MigrationFailed(f"this is not of the copy at hand (state {self.machine.state})")
        return self._reply

    def cancel(self) -> bool:
        """The source will not grant. False if the process is owned here."""
        self._cancel.set()
        with self._lock:
            self.feed(CancelCame())
            return self.machine.state not in _OWNS

    def resolve(self, fenced: str) -> None:
        """An operator fenced the source's host: the held copy is the process now.

        Raises UsageError if no copy is held here; nothing if it runs already.
        """
        with self._lock:
            state = self.machine.state
            undecided = state is DestinationState.OWNED and self.machine.hold
            if state in (DestinationState.OWNED, DestinationState.CONFIRMED) and not undecided:
                return
            decides = undecided or state is DestinationState.PREPARED
            if not decides or not self.is_present():
                raise UsageError(f"no copy is held here that could be owned ({self.machine.state})")
            self.feed(Resolved(source_owns=False, fenced=fenced))

    def figures(self) -> DestinationFigures:
        """What was measured here."""
        after = self.host.clock.monotonic() - self._released_at if self._released_at else 0.0
        return DestinationFigures(
            pid=self.copy.process.pid if self.copy else None,
            build=self._clock["build"],
            placement=self._clock["placement"],
            read_back=self._clock["read_back"],
            engine=self._clock["engine"],
            after_release=after,
            chunks_verified=self._verified,
            peak=self.host.peak_memory(),
            vram=self._vram.bytes,
        )

    def staging_ranges(self) -> tuple[tuple[int, int], ...]:
        """Where its staging lies in this process."""
        staging = self._staging
        return staging.address_ranges() if staging is not None else ()

    # ------------------------------------------------------------ handover effects

    def feed(self, event: DestinationEvent) -> None:
        """Tell the machine and perform what it answers."""
        with self._lock:
            pending: list[DestinationEvent] = [event]
            self.unfinished = True
            while pending:
                pending.extend(self._perform(self.machine.on(pending.pop(0))))
            self.unfinished = False

    def is_present(self) -> bool:
        """Whether a copy was built and is alive."""
        return self.copy is not None and self.host.engine.is_alive(self.copy.process)

    def go_on(self) -> None:
        """After a restart, and after a decision could not be carried out: do what it needs."""
        self.feed(Restarted(copy_present=self.is_present()))

    def undo_failed_build(self) -> None:
        """Undo a build that failed and could not be undone then: a full disk, a failed kill.

        It was never PREPARED, so nobody can have granted it: the source need not be asked.
        """
        if not self._is_failed_build():
            return
        with self._lock:
            if self._is_failed_build():  # and not one that was just about to end
                self.feed(CancelCame())

    def _is_failed_build(self) -> bool:
        return self.unfinished and self.machine.state in _BUILDS

    def _perform(self, effects: Sequence[DestinationEffect]) -> list[DestinationEvent]:
        came: list[DestinationEvent] = []
        for effect in effects:
            match effect:
                case Write():
                    self._write(effect)
                case Kill():
                    self._kill()
                    if self.machine.state not in NEVER_RAN:  # else: a start that makes sure
                        faults.point("destination.killed")
                    came.append(Done())
                case Start():
                    failed = self._start()
                    if failed is not None:
                        return [failed]  # what followed is overtaken by this
                case Reply(answer=answer):
                    self._reply = self._answer(answer)
        return came

    def _write(self, write: Write) -> None:
        assert isinstance(write.state, DestinationState)
        if write.state in _BEFORE_WRITE:
            faults.point(_BEFORE_WRITE[write.state])
        record = DestinationRecord(state=write.state, token=write.token)
        self.host.journal.append(self.id, "destination", record)
        self.machine.wrote(write)
        self._untouched = write.state is DestinationState.OWNED
        if write.state in _AFTER_WRITE:
            faults.point(_AFTER_WRITE[write.state])

    def _kill(self) -> None:
        if self._held is not None:
            self._held.abandon()  # the connection to what is half built, too
            self._held = None
        if self.copy is not None:
            self.host.engine.kill(self.copy.process)
        self.host.engine.discard(self.id)
        self._drop_staging()

    def _start(self) -> DestinationEvent | None:
        """RESUME each KFD process, release the tasks, see them alive. May be repeated."""
        assert self.copy is not None
        copy = self.copy.process
        if not self.host.engine.is_alive(copy):
            return CopyDied()
        if not self._released_at:
            try:
                self._resume_all(self.copy.restored)
            except MigrateError as error:
                self._why = str(error)
                if not self._never_ran(copy, error):
                    raise  # somebody asks again
                return FirstResumeFailed()
            self._untouched = False
            faults.point("destination.resumed")
            self.host.engine.thaw(copy)
            faults.point("destination.thawed")
            self._released_at = self.host.clock.monotonic()
            if self._ran.seconds and not self.machine.hold:
                self.host.clock.start(f"life-{self.id}", lambda: self._watch(copy))
            self._drop_staging()
        self._decide_by_life(copy)
        return None if self.host.engine.is_alive(copy) else CopyDied()

    def _decide_by_life(self, copy: ProcessRef) -> None:
        """With a kept source: look, and tell the machine, once in a run of the agent."""
        undecided = self.machine.hold and self.machine.state is DestinationState.OWNED
        if not undecided or self.machine.suspect or self._looks:
            return
        self._looks = True

        def look() -> None:
            try:
                for _ in range(LOOKS):
                    self._watch(copy)
                    if self.life != SUSPECT:
                        break
                self.feed(_SEEN[self.life])
            except MigrateError as error:  # a full disk: go_on() looks again
                _log.error("migration %s: %s", self.id, error)
            finally:
                self._looks = False

        self.host.clock.start(f"life-{self.id}", look)

    def _watch(self, copy: ProcessRef) -> None:
        self.life = self.host.watch_life(self._ran, copy)
        log = _log.warning if self.life == SUSPECT else _log.info
        log("migration %s: the released process %d is %s", self.id, copy.pid, self.life)

    def _never_ran(self, copy: ProcessRef, error: MigrateError) -> bool:
        """Whether a failed first RESUME proves that nothing of the copy ever ran.

        Queues start only by RESUME and tasks only by the thaw after it. An agent that was
        restarted can't know by itself what the one before it did. But KFD takes a second
        RESUME for an error of its own (see ``resume``), so another error of the first one
        means that there was none, and the tasks can be seen to be held.
        """
        if self._untouched:
            return True
        return isinstance(error, RestoreFailed) and self.host.engine.is_frozen(copy)

    def _resume_all(self, proofs: Sequence[RestoreProof]) -> None:
        """RESUME all; raises only if the very first failed, so that nothing runs."""
        kfd = self.host.open_kfd()
        try:
            for position, proof in enumerate(proofs):
                try:
                    self.host.resume(kfd, proof)
                except MigrateError as error:
                    if position == 0:
                        raise
                    # One runs already: the copy is owned, and its others are looked after
                    # by an operator, who reads this.
                    self._why = str(error)
        finally:
            kfd.close()

    def _answer(self, answer: Answer) -> GrantReply:
        return GrantReply(
            answer=answer,
            store_id=self.host.journal.store_id,
            message=self._why,
            figures=self.figures(),
        )

    def _drop_staging(self) -> None:
        self._close_session()
        if self._staging is not None:
            self._staging.close()
            self._staging = None

    # ------------------------------------------------------------ the copy

    def _build(self, order: RestoreOrder, manifest: Mapping[int, bytes]) -> None:
        self._clock.begin()
        self._receive(order, manifest)
        held = self.host.engine.restore(order.image, self.id, order.gpu_map)
        self._held = held
        self._record_copy(held.process)
        faults.point("destination.built")
        if len(held.kfd) != len(order.checkpoints):
            raise RestoreFailed(
                f"{len(order.checkpoints)} KFD processes came, {len(held.kfd)} were built"
            )
        nodes = self.host.render_minors()
        restored: list[Restored] = []
        gpus: list[MovedGpu] = []
        processes = list(held.kfd)
        try:
            for number, checkpoint in enumerate(order.checkpoints):
                self._go_on()
                process = processes[number]
                drm_fds = _open_nodes(self.host.paths.dri, process, order, nodes)
                gpus += _moved_gpus(number, order, drm_fds)
                restored.append(
                    process.restore(
                        *(checkpoint, order.gpu_map.as_dict(), drm_fds, nodes),
                        left_out={index for index, _ in _imports(order, number)},
                    )
                )
            for number, process in enumerate(processes):
                imports = {
                    index: dmabuf(restored, owner) for index, owner in _imports(order, number)
                }
                if imports:
                    self._go_on()
                    process.share(order.checkpoints[number], imports)
            self._record_copy(held.process, tuple(r.proof for r in restored))
            bos = _moved_bos(order, restored)
            held.restored(gpus, bos)
            self._clock.lap("build")
            faults.point("destination.restored")
            self._fill(held, order, restored, manifest)
        finally:
            for result in restored:
                result.close()
        held.finish(gpus, bos)
        self._clock.lap("engine")

    def _receive(self, order: RestoreOrder, manifest: Mapping[int, bytes]) -> None:
        """The engine's files: placed and verified before the engine reads them."""
        for item in order.objects:
            if item.blob is not None:
                file = self.host.engine.receive(self.id, item.blob)
                target = PartAccess(file, item.offset, item.size)
                try:
                    self._place(item, target)
                    self._verified += self._verify(item, target, manifest)
                finally:
                    target.close()

    def _place(self, item: ObjectOrder, target: MemoryAccess) -> None:
        self._go_on()
        assert self._staging is not None
        self._staging.place(item.object_id, target)

    def _verify(
        self, item: ObjectOrder, target: MemoryAccess, manifest: Mapping[int, bytes]
    ) -> int:
        """How many chunks are right. Raises VerificationFailed if one is not."""
        self._go_on()
        if item.object_id not in manifest:
            raise VerificationFailed(f"object {item.object_id} has no digests")
        assert self._staging is not None
        return self._staging.verify(item.object_id, target, manifest[item.object_id])

    def _record_copy(self, process: ProcessRef, restored: tuple[RestoreProof, ...] = ()) -> None:
        self.copy = CopyRecord(process=process, restored=restored)
        self.host.journal.append(self.id, "copy", self.copy)

    def _fill(
        self,
        held: HeldProcess,
        order: RestoreOrder,
        restored: Sequence[Restored],
        manifest: Mapping[int, bytes],
    ) -> None:
        """Place every object, then read every object back and compare its digests."""
        staging = self._staging
        assert staging is not None
        strangers = {info.id for info in staging.objects()} - {o.object_id for o in order.objects}
        if strangers:
            raise VerificationFailed(f"objects {sorted(strangers)} came and are in no order")
        memory = [item for item in order.objects if item.blob is None]
        verified: list[int] = []
        with Targets(held, order, restored, self.host.vram_access, self._vram) as targets:

            def place(item: ObjectOrder) -> None:
                with targets.open(item, "write") as target:
                    self._place(item, target)

            def verify(item: ObjectOrder) -> None:
                with targets.open(item, "read") as target:
                    verified.append(self._verify(item, target, manifest))

            _do_all(memory, place)
            self._clock.lap("placement")
            faults.point("destination.placed")
            _do_all(memory, verify)
        self._verified += sum(verified)
        self._clock.lap("read_back")
        faults.point("destination.verified")

    def _go_on(self) -> None:
        if self._cancel.is_set():
            raise Cancelled("the source cancelled")


def _do_all(items: Sequence[ObjectOrder], do: Callable[[ObjectOrder], None]) -> None:
    """Large objects one by one, as threads share the pieces of each; threads share the others."""

    def work(taken: Iterator[ObjectOrder]) -> None:
        for item in taken:
            do(item)

    large = [item for item in items if item.size >= WORTH_SHARING]
    work(iter(large))
    others = [item for item in items if item.size < WORTH_SHARING]
    in_parallel(others, work, sum(item.size for item in others))


def _open_nodes(
    dri: str, process: KfdProcess, order: RestoreOrder, minors: Mapping[int, int]
) -> dict[int, int]:
    """A fresh render node for each mapped GPU, opened where the ioctls run."""
    return {
        gpu: process.file.open_node(f"{dri}/renderD{minors[gpu]}")
        for gpu in order.gpu_map.as_dict().values()
    }


def _moved_gpus(process: int, order: RestoreOrder, drm_fds: Mapping[int, int]) -> list[MovedGpu]:
    gpu_map = order.gpu_map.as_dict()
    return [
        MovedGpu(
            user_gpu_id=device.user_gpu_id,
            source_gpu_id=device.actual_gpu_id,
            gpu_id=gpu_map[device.actual_gpu_id],
            drm_fd=drm_fds[gpu_map[device.actual_gpu_id]],
            process=process,
        )
        for device in order.checkpoints[process].devices
    ]


def _imports(order: RestoreOrder, process: int) -> list[tuple[int, BoKey]]:
    """Which BOs of one KFD process are imported, and whose they are."""
    return [
        (share.importer.index, share.owner)
        for share in order.shares
        if share.importer.process == process
    ]


def _moved_bos(order: RestoreOrder, restored: Sequence[Restored]) -> list[MovedBo]:
    """Where each BO's mapping is now. A userptr BO has none.

    An import is where its owner is, if both are on one GPU: so it was found. On another GPU
    it has a place of its own, which the kernel never tells and nobody can have mapped.
    """
    offsets = [list(result.restored_offsets) for result in restored]
    nowhere = set()
    for share in order.shares:
        here, there = share.importer, share.owner
        offsets[here.process][here.index] = offsets[there.process][there.index]
        if _actual_gpu(order, here) != _actual_gpu(order, there):
            nowhere.add(here)
    return [
        MovedBo(
            gpu_id=bucket.gpu_id,
            offset=bucket.offset,
            size=bucket.size,
            restored_offset=offsets[number][index],
        )
        for number, checkpoint in enumerate(order.checkpoints)
        for index, bucket in enumerate(checkpoint.bos)
        if not bucket.is_userptr and BoKey(process=number, index=index) not in nowhere
    ]


def _actual_gpu(order: RestoreOrder, bo: BoKey) -> int:
    checkpoint = order.checkpoints[bo.process]
    actual = {device.user_gpu_id: device.actual_gpu_id for device in checkpoint.devices}
    return actual[checkpoint.bos[bo.index].gpu_id]
