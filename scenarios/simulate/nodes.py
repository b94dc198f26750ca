"""A simulated host: its disk, its copies, and one run after another of its agent."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, cast

from agents.destination import Destinations
from agents.source import Sources
from agents.watchdog import AGAIN, GIVE_UP, Rescue, notes
from migrate.dataplane.receiver import Receiver
from migrate.dataplane.sender import Sender
from migrate.dataplane.staging import Staging
from migrate.dataplane.stats import RoundStats
from migrate.engine.seam import ProcessEngine
from migrate.errors import KfdUnavailable, StreamBroken
from migrate.kfd.file import KfdFile
from migrate.kfd.process import RestoreProof
from migrate.model import HostPaths, ProcessRef
from migrate.orchestrator.clock import Clock, Thread
from migrate.orchestrator.host import Host
from migrate.orchestrator.peer import Peer, Reservation
from migrate.orchestrator.plan import Activity, Options
from migrate.report import PeakMemory
from migrate.topology.model import Topology
from scenarios.simulate.disk import Disk, SimulatedJournal
from scenarios.simulate.network import SimulatedPeer
from scenarios.simulate.processes import Copy, Engine, no_file
from scenarios.simulate.scheduler import Life, SimulatedEvent, SimulatedLock

if TYPE_CHECKING:
    from scenarios.simulate.world import World

NO_GPUS = Topology(nodes=())
WATCHDOG = 4.0  # seconds after an agent's death until its watchdog acts


class SimulatedClock(Clock):
    """Simulated time, with this host's own idea of it."""

    def __init__(self, node: Node, life: Life) -> None:
        self._node = node
        self._life = life

    def monotonic(self) -> float:
        """See Clock."""
        return self._node.clock_offset + self._node.world.scheduler.now * self._node.clock_rate

    def event(self) -> threading.Event:
        """See Clock."""
        return SimulatedEvent(self._node.world.scheduler)

    def lock(self) -> AbstractContextManager[object]:
        """See Clock."""
        return SimulatedLock(self._node.world.scheduler)

    def start(self, name: str, target: Callable[[], object]) -> Thread:
        """See Clock."""
        return self._node.world.scheduler.start(f"{self._node.name} {name}", self._life, target)


class SimulatedHost(Host):
    """A host without GPUs: what is moved is simulated whole by the engine."""

    bo_record_size = 80

    def topology(self) -> Topology:
        """See Host."""
        return NO_GPUS

    def render_minors(self) -> dict[int, int]:
        """See Host."""
        return {}

    def free_vram(self) -> dict[int, int]:
        """See Host."""
        return {}

    def open_kfd(self) -> KfdFile:
        """See Host."""
        engine = cast(Engine, self.engine)
        engine.work(0.0005, "open kfd")
        engine.fails("open kfd", KfdUnavailable("open of /dev/kfd: EMFILE"))
        return no_file()

    def watch_life(self, ran: Activity, process: ProcessRef) -> str:
        """See Host."""
        return cast(Engine, self.engine).watch_life(process)

    def connected_sockets(self, process: ProcessRef) -> tuple[str, ...]:
        """See Host."""
        return ()

    def resume(self, kfd: KfdFile, proof: RestoreProof) -> bool:
        """See Host."""
        return cast(Engine, self.engine).resume(proof)


class SimulatedSources(Sources):
    """Sources whose memory contents are not simulated."""

    node: Node

    def _sender(self, migration: str, reservation: Reservation, options: Options) -> Sender:
        return cast(Sender, SimulatedSender(self.node))


class SimulatedSender:
    """Rounds that take time and may break."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def send_round(
        self,
        objects: object,
        progress: object = None,
        cancel: object = None,
        coming: Iterable[object] = (),
        *,
        still: bool = False,
    ) -> RoundStats:
        """See Sender."""
        for _ in coming:
            pass
        world = self._node.world
        world.point(self._node, "a round of memory")
        world.scheduler.sleep(world.random.uniform(0.01, 0.5))
        if world.faults.fails(self._node, "stream"):
            raise StreamBroken("the streams broke")
        return RoundStats(scanned=4096, wire=4096, seconds=0.01)

    def manifest(self) -> dict[int, tuple[int, bytes]]:
        """See Sender."""
        return {}

    def drop_object(self, object_id: int) -> None:
        """See Sender."""

    def close(self) -> None:
        """See Sender."""


class SimulatedStaging:
    """Nothing is staged."""

    def objects(self) -> tuple[()]:
        """See Staging."""
        return ()

    def close(self) -> None:
        """See Staging."""


class SimulatedSession:
    """A session of the receiver."""

    staging = cast(Staging, SimulatedStaging())


class SimulatedReceiver:
    """Sessions without streams."""

    def open_session(self, *_: object) -> SimulatedSession:
        """See Receiver."""
        return SimulatedSession()

    def close_session(self, _session_id: bytes) -> None:
        """See Receiver."""


class Agent(Life):
    """One run of an agent, wired as ``agents.daemon`` wires it."""

    def __init__(self, node: Node) -> None:
        super().__init__(f"{node.name} agent {node.runs}")
        self.node = node
        self.serves = False
        self.journal = SimulatedJournal(node)
        self.host = SimulatedHost(
            name=node.name,
            paths=HostPaths(),
            journal=self.journal,
            engine=cast(ProcessEngine, Engine(node, self)),
            peak_memory=PeakMemory,
            clock=SimulatedClock(node, self),
        )
        self.sources = SimulatedSources(self.host, self._dial)
        self.sources.node = node
        receiver = cast(Receiver, SimulatedReceiver())
        self.destinations = Destinations(self.host, receiver, ("b", 1), self._dial)

    def start(self) -> None:
        """As the daemon: recover what was not granted here, answer, go on with the rest."""
        self.destinations.recover()
        self.serves = True
        self.destinations.start()
        self.sources.recover(notes(self.node.disk.folder))

    def _dial(self, name: str, _address: str) -> Peer:
        return SimulatedPeer(name, self)


class Node:
    """One host."""

    def __init__(self, world: World, name: str, folder: Path) -> None:
        self.world = world
        self.name = name
        folder.mkdir()
        for file in ("agent.lock", "watchdog.notes"):
            (folder / file).touch()
        self.disk = Disk(folder)
        self.boots = 1
        self.runs = 0
        self.copies: dict[int, Copy] = {}
        self.agent: Agent | None = None
        self.off_for_good = False
        self.watch: _Watchdog | None = None
        self.recorded: dict[str, str] = {}  # the newest state in the journal, by its kind
        self.clock_offset = world.random.uniform(0, 1e6)
        self.clock_rate = world.random.uniform(0.97, 1.03)

    @property
    def boot(self) -> str:
        """The boot id."""
        return f"{self.name}-{self.boots}"

    def new_copy(self, role: str, stints: int) -> Copy:
        """A process that exists and does not run (destination), or runs (source)."""
        pid = 100 + len(self.copies) + 1000 * self.boots
        copy = self.copies[pid] = Copy(self, pid, role, stints)
        return copy

    def end_copy(self, copy: Copy, death: str) -> None:
        """It is gone."""
        copy.alive, copy.tasks_run, copy.queues_run = False, False, False
        copy.death = death
        self.world.judge.gone(copy)

    # ------------------------------------------------------------ agents

    def start_agent(self) -> None:
        """A new run of the agent, unless one is alive or the host is off."""
        if self.agent is not None or self.off_for_good:
            return
        if self.watch is not None:  # it holds the agent's lock
            self.world.scheduler.later(0.1, self.start_agent)
            return
        self.runs += 1
        self.world.tell(f"{self.name}: the agent starts (run {self.runs})")
        agent = self.agent = Agent(self)
        self.world.scheduler.start(f"{self.name} start {self.runs}", agent, agent.start)

    def kill_agent(self, when: str) -> None:
        """The agent dies, if there is one."""
        if self.agent is not None:
            self.crash_agent(when)

    def crash_agent(self, when: str, *, torn: bool = False) -> None:
        """The agent dies here and now; copies and what was written stay."""
        self._end_agent(f"the agent is killed {when}", self.disk.torn() if torn else None)

    def crash_host(self) -> None:
        """Power is lost: copies are gone, the disk keeps what was synced."""
        self._end_agent("the host crashes", self.disk.kept(self.world.random))
        self.boots += 1
        for copy in list(self.copies.values()):
            if copy.alive:
                self.end_copy(copy, "host")

    def _end_agent(self, how: str, keep: int | None) -> None:
        agent = self.agent
        self.world.tell(f"{self.name}: {how}")
        self.disk.crash(agent.journal.close if agent is not None else lambda: None, keep=keep)
        if self.watch is not None:
            self.watch.end()
        self.agent = None
        if agent is None:
            return
        self.world.scheduler.kill(agent)
        for copy in self.copies.values():
            if copy.alive and not copy.built:
                # A copy under construction ends when its builder's socket closes.
                self.end_copy(copy, "builder")
        self.world.agent_died(self)

    def watchdog(self) -> None:
        """A process of its own, which finds its agent dead: the product's code."""
        if self.agent is not None or self.watch is not None or self.off_for_good:
            return
        self.watch = _Watchdog(self)
        self.world.scheduler.start(self.watch.name, self.watch, self.watch.act)

    def lose_journal(self) -> None:
        """The disk comes back empty."""
        self.crash_host()
        self.world.tell(f"{self.name}: the journal is lost")
        self.disk.lose()
        (self.disk.folder / "watchdog.notes").write_bytes(b"")
        self.recorded.clear()


class _Watchdog(Life):
    """One run of the product's watchdog; a new agent waits for it."""

    def __init__(self, node: Node) -> None:
        super().__init__(f"{node.name} watchdog")
        self.node = node

    def act(self) -> None:
        """As its main does once the agent is dead."""
        node, scheduler = self.node, self.node.world.scheduler
        node.world.tell(f"{node.name}: the watchdog looks after orphans")
        rescue = Rescue(node.disk.folder, cast(ProcessEngine, Engine(node, None)))
        until = scheduler.now + GIVE_UP
        while scheduler.now < until and not rescue.act():
            scheduler.sleep(AGAIN)
        self.end()

    def end(self) -> None:
        """Ended or killed."""
        self.node.watch = None
        self.node.world.scheduler.kill(self)
