"""What a migration needs of the host it runs on, gathered in one place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

from migrate.dataplane.vram import VramAccess, VramMode
from migrate.engine.seam import ProcessEngine
from migrate.engine.sockets import connected
from migrate.journal import Journal
from migrate.kfd.file import KfdFile, open_device
from migrate.kfd.probe import bo_record_size
from migrate.kfd.process import RestoreProof, resume
from migrate.kfd.sysfs import VramUsage, read_render_minors, read_topology, read_vram
from migrate.model import HostPaths, ProcessRef
from migrate.orchestrator import life
from migrate.orchestrator.clock import Clock
from migrate.orchestrator.plan import Activity
from migrate.report import PeakMemory
from migrate.topology.model import Topology


@dataclass(frozen=True)  # not a Value: it holds live things
class Host:
    """This host, as the orchestrator sees it.

    ``peak_memory`` gives the agent's peak so far, helpers included.
    """

    name: str
    paths: HostPaths
    journal: Journal
    engine: ProcessEngine
    peak_memory: Callable[[], PeakMemory]
    vram_mode: VramMode = VramMode.AUTO
    clock: Clock = field(default_factory=Clock)

    def topology(self) -> Topology:
        """The GPUs and links of this host now. Raises BrokenTopology."""
        return read_topology(self.paths.topology)

    def render_minors(self) -> dict[int, int]:
        """Number of each GPU's render node by gpu_id. Raises BrokenTopology."""
        return read_render_minors(self.paths.topology)

    def free_vram(self) -> dict[int, int]:
        """Free VRAM in bytes by gpu_id."""
        return {usage.gpu_id: usage.free for usage in self.vram()}

    def vram(self) -> tuple[VramUsage, ...]:
        """VRAM of every GPU that tells it."""
        return read_vram(self.paths, self.topology())

    @cached_property
    def vram_access(self) -> VramAccess:
        """Access to BOs of this host's GPUs."""
        return VramAccess(self.vram_mode, self._render_node)

    def _render_node(self, gpu_id: int) -> str:
        return f"{self.paths.dri}/renderD{self.render_minors()[gpu_id]}"

    @cached_property
    def bo_record_size(self) -> int:
        """Bytes of a BO record in this kernel's private data. Raises KfdUnavailable."""
        return bo_record_size(self.paths)

    def open_kfd(self) -> KfdFile:
        """A kfd file of our own, for RESUME. Raises KfdUnavailable."""
        return open_device(self.paths.kfd)

    def resume(self, kfd: KfdFile, proof: RestoreProof) -> bool:
        """Let the queues of a restored process run. See ``migrate.kfd.process.resume``."""
        return resume(kfd, proof.process.pid, proof)

    def watch_life(self, ran: Activity, process: ProcessRef) -> str:
        """Watch a released process for some seconds. See ``migrate.orchestrator.life``."""
        return life.watch(ran, process, self.engine, self.clock)

    def connected_sockets(self, process: ProcessRef) -> tuple[str, ...]:
        """Connections of a process and its children to others. See ``migrate.engine.sockets``."""
        return connected(process)


def available_memory() -> int:
    """MemAvailable of /proc/meminfo in bytes (proc(5))."""
    with open("/proc/meminfo", encoding="ascii") as meminfo:
        for line in meminfo:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 0
