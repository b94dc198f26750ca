"""Simulated processes and the engine that moves them, with all that real ones do unasked.

A copy may run if its tasks are not held or its queues are not stopped. What happens to a
copy is told to the judge at once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import msgspec

from migrate.dataplane.access import MemoryAccess
from migrate.decode import from_json
from migrate.engine.seam import (
    Blob,
    CpuImage,
    CpuRange,
    HeldProcess,
    MovedBo,
    MovedGpu,
    Piece,
    Survey,
    T,
    Visitor,
)
from migrate.errors import (
    CheckpointFailed,
    FreezeTimeout,
    NoSuchProcess,
    ProcessExited,
    RestoreFailed,
)
from migrate.kfd.file import KfdFile
from migrate.kfd.privdata import PrivateData, encode
from migrate.kfd.process import Checkpointed, KfdCheckpoint, KfdProcess, Restored, RestoreProof
from migrate.model import GpuMap, ProcessRef
from migrate.orchestrator.life import ALIVE, ENDED, IDLE, SUSPECT, WINDOW
from migrate.preflight.facts import Facts

if TYPE_CHECKING:
    from scenarios.simulate.nodes import Agent, Node

PRIVATE = encode(PrivateData(xnack_mode=0, devices=(), bos=(), objects=()))


class Copy:
    """One process on one host. ``stints``: how often its tasks were let run."""

    def __init__(self, node: Node, pid: int, role: str, stints: int) -> None:
        self.node = node
        self.role = role  # source or destination
        self.ref = ProcessRef(pid=pid, start_time=pid * 7, boot_id=node.boot)
        self.alive = True
        self.tasks_run = role == "source"
        self.queues_run = role == "source"
        self.paused = False  # by PROCESS_INFO
        self.built = role == "source"
        self.traced = False
        self.image_stints = stints  # of the source's copy when the image was taken
        self.stints = stints
        self.ran = role == "source"
        self.death = ""
        self.looked_suspect = False
        self.hangs = False  # it was released and does nothing

    @property
    def may_run(self) -> bool:
        """Whether anything of it can make a step: a task, or a queue that is not stopped."""
        return self.alive and (self.tasks_run or (self.queues_run and self.role == "destination"))


class SimulatedKfd:
    """``KfdProcess`` of a copy, as far as the drivers use it."""

    def __init__(self, engine: Engine, copy: Copy) -> None:
        self.engine = engine
        self.copy = copy
        self.pid = copy.ref.pid
        self.file = None

    def process_info(self) -> None:
        """Pause the queues."""
        self.engine.work(0.0005, "PROCESS_INFO")
        self.engine.alive(self.copy)
        if self.copy.paused:
            raise CheckpointFailed("PROCESS_INFO: paused already")
        self.engine.fails("pause", CheckpointFailed("PROCESS_INFO: ETIME"))
        self.copy.paused, self.copy.queues_run = True, False

    def checkpoint(self) -> Checkpointed:
        """Describe the paused process."""
        self.engine.work(0.001, "CHECKPOINT")
        self.engine.alive(self.copy)
        if not self.copy.paused:
            raise CheckpointFailed("CHECKPOINT: not paused")
        checkpoint = KfdCheckpoint(
            pid=self.pid, devices=(), bos=(), num_objects=0, priv_data=PRIVATE
        )
        return Checkpointed(checkpoint, [])

    def unpause_if_paused(self) -> bool:
        """UNPAUSE."""
        self.engine.work(0.0005, "UNPAUSE")
        self.engine.alive(self.copy)
        self.engine.fails("unpause", CheckpointFailed("UNPAUSE: EIO"))
        return self.copy_unpaused()

    def copy_unpaused(self) -> bool:
        """The effect alone."""
        was, self.copy.paused = self.copy.paused, False
        self.copy.queues_run = True
        self.engine.node.world.judge.saw(self.copy, "UNPAUSE")
        return was

    def restore(self, *_: object, left_out: Collection[int]) -> Restored:
        """RESTORE: all objects are there and the queues are stopped."""
        self.engine.work(0.002, "RESTORE")
        self.engine.alive(self.copy)
        self.engine.fails("build", RestoreFailed("RESTORE: ENOMEM"))
        return Restored(RestoreProof(process=self.copy.ref), (), [])


class Held:
    """``HeldProcess``: under construction, then held so that it outlives the agent."""

    def __init__(self, engine: Engine, copy: Copy) -> None:
        self.engine = engine
        self.copy = copy
        self.process = copy.ref
        self.kfd: Sequence[KfdProcess] = [cast(KfdProcess, SimulatedKfd(engine, copy))]

    def memory(self, wanted: CpuRange) -> MemoryAccess:
        """No memory is simulated."""
        raise NotImplementedError

    def restored(self, gpus: Sequence[MovedGpu], bos: Sequence[MovedBo]) -> None:
        """See HeldProcess."""

    def finish(self, gpus: Sequence[MovedGpu], bos: Sequence[MovedBo]) -> None:
        """Hold."""
        self.engine.work(0.01, "the copy is held")
        self.engine.alive(self.copy)
        self.engine.fails("build", RestoreFailed("the copy did not stop"))
        self.copy.built = True

    def release(self) -> None:
        """See HeldProcess."""
        self.engine.thaw(self.process)

    def abandon(self) -> None:
        """See HeldProcess."""
        self.engine.kill(self.process)


class Engine:
    """``ProcessEngine`` of one run of an agent. Copies belong to the host and outlive it."""

    name = "reexec"
    can_hide_gpus = False
    ways_out: frozenset[str] = frozenset()

    def __init__(self, node: Node, agent: Agent | None) -> None:
        self.node = node
        self.agent = agent  # None: the watchdog

    # ------------------------------------------------------------ of the simulation

    def work(self, seconds: float, what: str) -> None:
        """It takes time, and anything may happen meanwhile."""
        self.node.world.point(self.node, f"engine: {what}")
        self.node.world.scheduler.sleep(seconds * self.node.world.random.uniform(0.2, 3.0))

    def fails(self, kind: str, error: Exception) -> None:
        """Raise *error* if it is the turn of a planned failure of this kind."""
        if self.node.world.faults.fails(self.node, kind):
            raise error

    def alive(self, copy: Copy) -> None:
        """Raises ProcessExited."""
        if not copy.alive:
            raise ProcessExited(f"process {copy.ref.pid} ended")

    def _find(self, process: ProcessRef) -> Copy:
        copy = self.node.copies.get(process.pid)
        if copy is None or not copy.alive or copy.ref != process:
            raise NoSuchProcess(f"process {process.pid} has ended")
        return copy

    def _undone_alone(self, copy: Copy) -> None:
        """What a tracer or CRIU does when the agent that it answers to is dead."""

        def act() -> None:
            copy.traced = False
            if copy.alive and copy.paused:
                self.node.world.tell(f"{self.node.name}: the helper unpauses by itself")
                SimulatedKfd(self, copy).copy_unpaused()

        self.node.world.scheduler.later(self.node.world.random.uniform(0.0, 0.5), act)

    # ------------------------------------------------------------ source

    def survey(self, pid: int) -> Survey:
        """See ProcessEngine."""
        copy = self.node.copies[pid]
        return Survey(
            process=copy.ref, command=("job",), uid=0, kfd_processes=(pid,), cpu_bytes=4096
        )

    def facts(self, process: ProcessRef) -> Facts:
        """See ProcessEngine. A simulated host has no files."""
        del process
        return Facts()

    def snapshot(self, process: ProcessRef, visit: Visitor[T]) -> T:
        """See ProcessEngine."""
        return self._visit(process, visit, leave_paused=False)

    def dump(
        self,
        process: ProcessRef,
        visit: Visitor[T],
        ways_out: Collection[str] = (),
        copy_files: tuple[str, ...] = (),
    ) -> T:
        """See ProcessEngine."""
        return self._visit(process, visit, leave_paused=True)

    def precopy(self, process: ProcessRef) -> None:
        """See ProcessEngine: it does not."""

    def outdated(self, process: ProcessRef, written: Iterable[CpuRange]) -> Sequence[Piece]:
        """See ProcessEngine: none."""
        return ()

    def pieces(self, process: ProcessRef) -> Iterator[tuple[Piece, MemoryAccess]]:
        """See ProcessEngine: there are none."""
        return iter(())

    def finish_dump(self, process: ProcessRef, image: CpuImage) -> CpuImage:
        """See ProcessEngine."""
        return image

    def visit_frozen(self, process: ProcessRef, visit: Visitor[T]) -> T:
        """See ProcessEngine."""
        return self._visit(process, visit, leave_paused=True)

    def _visit(self, process: ProcessRef, visit: Visitor[T], *, leave_paused: bool) -> T:
        self.work(0.005, "seize")
        copy = self._find(process)
        if copy.traced:
            raise CheckpointFailed("traced already")
        copy.traced = True
        kfd = SimulatedKfd(self, copy)
        try:
            result = visit([cast(KfdProcess, kfd)])
        except Exception:
            copy.traced = False
            if copy.alive and copy.paused:
                kfd.copy_unpaused()
            raise
        except BaseException:
            self._undone_alone(copy)
            raise
        copy.traced = False
        if copy.paused and not leave_paused:
            kfd.copy_unpaused()
        return result

    def freeze(self, process: ProcessRef) -> CpuImage:
        """See ProcessEngine. CRIU lets go if its agent dies in the middle of it."""
        self.work(0.005, "freeze")
        copy = self._find(process)
        self.fails("freeze", FreezeTimeout("it did not hand over"))
        copy.tasks_run = False
        self.node.world.judge.saw(copy, "frozen")
        try:
            self.work(0.01, "dump")
        except Exception:
            raise
        except BaseException:
            if self.node.world.random.random() < 0.5:
                self.node.world.tell(f"{self.node.name}: CRIU thaws, nobody answers it")
                self._let_run(copy)
            raise
        self.alive(copy)
        state = msgspec.json.encode(copy.stints)
        return CpuImage(engine=self.name, state=state, ranges=())

    def memory(self, process: ProcessRef, wanted: CpuRange) -> MemoryAccess:
        """No memory is simulated."""
        raise NotImplementedError

    def blob(self, process: ProcessRef, wanted: Blob) -> MemoryAccess:
        """There are none."""
        raise NotImplementedError

    def thaw(self, process: ProcessRef) -> None:
        """See ProcessEngine."""
        self.work(0.002, "thaw")
        copy = self.node.copies.get(process.pid)
        if copy is None or not copy.alive or copy.tasks_run:
            return
        self.fails("thaw", FreezeTimeout("it was continued and does not go on"))
        self._let_run(copy)

    def _let_run(self, copy: Copy) -> None:
        if copy.alive and not copy.tasks_run:
            copy.tasks_run, copy.ran = True, True
            copy.stints += 1
            self.node.world.judge.saw(copy, "let run")

    # ------------------------------------------------------------ destination

    def receive(self, migration: str, coming: Blob) -> MemoryAccess:
        """There are none."""
        raise NotImplementedError

    def ahead(self, process: ProcessRef) -> bytes:
        """There is nothing."""
        return b""

    def prepare(self, migration: str, ahead: bytes) -> None:
        """There is nothing."""
        raise NotImplementedError

    def discard(self, migration: str) -> None:
        """See ProcessEngine."""

    def restore(self, image: CpuImage, migration: str, gpu_map: GpuMap) -> HeldProcess:
        """See ProcessEngine."""
        self.work(0.02, "the copy is started")
        self.fails("build", RestoreFailed("it ended at once"))
        stints = from_json(image.state, int)
        copy = self.node.new_copy("destination", stints)
        self.node.world.tell(f"{self.node.name}: the copy exists")
        return Held(self, copy)

    def resume(self, proof: RestoreProof) -> bool:
        """RESUME: 0 means that a worker was scheduled, not that queues run."""
        self.work(0.001, "RESUME")
        copy = self.node.copies.get(proof.process.pid)
        if copy is None or not copy.alive or copy.ref != proof.process:
            raise ProcessExited("RESUME: it is gone")
        if copy.queues_run:
            return False
        self.fails("resume", RestoreFailed("RESUME: ENOMEM"))
        copy.queues_run = True
        if self.node.world.faults.fails(self.node, "queues never start"):
            self.node.world.tell(f"{self.node.name}: RESUME said 0 and no queue starts")
            copy.hangs = True
        self.node.world.judge.saw(copy, "RESUME")
        return True

    def watch_life(self, process: ProcessRef) -> str:
        """What is seen of a released copy after some seconds; idle ones look like hung ones."""
        world = self.node.world
        world.scheduler.sleep(world.random.uniform(0.05, WINDOW))
        copy = self.node.copies.get(process.pid)
        world.scheduler.check()
        if copy is None or not copy.alive:
            return ENDED
        if world.idles:
            return IDLE
        slow = world.faults.fails(self.node, "alive and looks suspect")
        found = SUSPECT if copy.hangs or slow else ALIVE
        copy.looked_suspect = found == SUSPECT
        world.tell(f"{self.node.name}: the copy looks {found}")
        return found

    # ------------------------------------------------------------ both

    def kill(self, process: ProcessRef) -> None:
        """See ProcessEngine."""
        self.work(0.005, "kill")
        copy = self.node.copies.get(process.pid)
        if copy is None or not copy.alive or copy.ref != process:
            return
        self.fails("kill", FreezeTimeout("it was killed and has not ended yet"))
        self.node.end_copy(copy, "driver")

    def is_alive(self, process: ProcessRef) -> bool:
        """See ProcessEngine."""
        self.node.world.scheduler.check()
        copy = self.node.copies.get(process.pid)
        return copy is not None and copy.alive and copy.ref == process

    def is_frozen(self, process: ProcessRef) -> bool:
        """See ProcessEngine."""
        return self.is_alive(process) and not self.node.copies[process.pid].tasks_run


class NoFile:
    """The kfd file of an agent's own: nothing of it is used but its end."""

    def close(self) -> None:
        """Nothing."""


def no_file() -> KfdFile:
    """For Host.open_kfd."""
    return cast(KfdFile, NoFile())


Action = Callable[[], Any]
