"""What the two sides agree on: options, needs, and the order to restore."""

from __future__ import annotations

from migrate.dataplane.messages import ObjectKind
from migrate.engine.seam import Blob, CpuImage, CpuRange
from migrate.kfd.process import KfdCheckpoint
from migrate.model import GpuMap, Value
from migrate.preflight.findings import COPY_FILE
from migrate.topology.model import Topology

PROTOCOL = 5  # raised when either proto/ or a document below changes its meaning
CHUNK = 256 * 1024  # hash grain in bytes


class Options(Value):
    """What a user may choose for one migration."""

    precopy: bool = True
    max_rounds: int = 5
    max_downtime: float = 0.5  # seconds; the rounds stop when the prediction is below
    throttle: bool = False  # the workload may be slowed down where rounds do not help
    or_stay: bool = False  # rather stay than be stopped for longer than max_downtime
    leave_running: bool = False  # of an image: the process goes on, nothing is handed over
    bandwidth: int | None = None  # bytes a second, None for no limit
    streams: int = 2
    gpu_map: str = ""  # as the user typed it: OLD=NEW,...
    relax: tuple[str, ...] = ()
    hold_source: bool = False  # keep the frozen source until the copy was seen alive
    ways_out: tuple[str, ...] = ()  # of blockers: see migrate.preflight.findings
    copy_files: tuple[str, ...] = ()  # globs of files to send where the destination's differ
    patience: float = 60.0  # seconds that streams may be cut, or a grant unanswered unreported

    def ways(self) -> frozenset[str]:
        """All ways out of blockers that were chosen."""
        return frozenset(self.ways_out) | (frozenset({COPY_FILE}) if self.copy_files else set())


class KfdNeeds(Value):
    """What one KFD process needs at the destination.

    ``identities``: pairs of user_gpu_id and actual gpu_id. ``gpus``: actual gpu_ids at the
    source, visible to it. ``vram``: bytes by actual gpu_id. ``priv_bo_size``: bytes of a
    BO record in private data (80 or 272), 0 if it could not be asked.
    """

    identities: tuple[tuple[int, int], ...]
    gpus: tuple[int, ...]
    vram: dict[int, int]
    priv_bo_size: int


class Needs(Value):
    """What the process needs at the destination, as preflight saw it."""

    processes: tuple[KfdNeeds, ...]
    memory: int  # bytes of host memory: staging plus CPU memory plus GTT
    quota: int  # bytes the chunk streams may carry at most: sum of all object sizes
    image_bytes: int = 0  # of the run directory's file system, for the engine's files


class Move(Value):
    """What is to move, and how. ``topology`` is the source's."""

    engine: str
    needs: Needs
    topology: Topology
    options: Options


class BoKey(Value):
    """Which BO: the KFD process (by order in the tree) and its handle."""

    process: int
    index: int  # of the BO bucket in the final checkpoint


class Share(Value):
    """A BO that is another handle of the BO *owner*: made by importing that one's dmabuf."""

    importer: BoKey
    owner: BoKey


class ObjectOrder(Value):
    """One object of the data plane and where its bytes belong.

    ``offset``: in the file ``blob``, of which it may be a part.
    """

    object_id: int
    kind: ObjectKind
    size: int
    bo: BoKey | None = None
    cpu: CpuRange | None = None
    blob: Blob | None = None
    offset: int = 0


class Activity(Value):
    """What a process did in ``seconds`` before its freeze: CPU seconds, packets its queues read.

    ``pointers``: its queues' read pointers in the freeze, by address. See life.py.
    """

    seconds: float = 0.0
    cpu: float = 0.0
    packets: int = 0
    pointers: tuple[tuple[int, int], ...] = ()


class RestoreOrder(Value):
    """Everything but memory contents. Sent once, when the source is frozen.

    ``hold_source``: the source keeps its copy until the new one was seen alive. ``shares``:
    BOs without an object of their own, because their owner's bytes are theirs.
    """

    gpu_map: GpuMap
    image: CpuImage
    checkpoints: tuple[KfdCheckpoint, ...]
    objects: tuple[ObjectOrder, ...]
    ran: Activity = Activity()
    hold_source: bool = False
    shares: tuple[Share, ...] = ()
