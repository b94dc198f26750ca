"""Which host takes which process: a pure function of topologies and free VRAM.

Every placement is one that ``migrate.topology.match`` allows with the VRAM that the
placements before it have left. Processes are tried largest first, hosts by the VRAM that
they keep; where that leads nowhere the search goes back, so that a full placement is found
where one exists, as long as the search stays below ``BUDGET``. Past it, the best one found
counts: most processes, then most bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from migrate.model import GpuMap, Value
from migrate.topology.match import PREFERENCES, match
from migrate.topology.model import Topology

BUDGET = 5000  # steps of the search; a step is one look at one process and one host


class Job(Value):
    """One process: the actual gpu_ids that it sees, and bytes of VRAM on each."""

    pid: int
    vram: dict[int, int]

    @property
    def bytes(self) -> int:
        """VRAM in all."""
        return sum(self.vram.values())


class Target(Value):
    """One host that may take processes.

    ``free``: bytes by gpu_id. ``busy``: GPUs that others hold. ``hides_gpus``: it can take a
    process that sees fewer GPUs than it has. ``slots``: processes it may still take.
    """

    name: str
    topology: Topology
    free: dict[int, int]
    busy: frozenset[int] = frozenset()
    hides_gpus: bool = False
    slots: int | None = None


class Placement(Value):
    """Process *pid* goes to *host*."""

    pid: int
    host: str
    gpu_map: GpuMap


class Unplaced(Value):
    """No host for *pid*; ``reasons`` says why of each."""

    pid: int
    reasons: dict[str, str]


class Plan(Value):
    """Every process is in exactly one of the two, by pid."""

    placements: tuple[Placement, ...]
    unplaced: tuple[Unplaced, ...]


def plan(
    source: Topology,
    jobs: Iterable[Job],
    targets: Sequence[Target],
    *,
    excluded: Mapping[int, frozenset[str]] | None = None,
    relax: Iterable[str] = (),
) -> Plan:
    """Place *jobs* of the machine *source*. The order of jobs and targets does not matter.

    *excluded*: hosts that may not take a pid. *relax*: as for match(), besides preferences.
    """
    search = _Search(
        source,
        sorted(jobs, key=lambda job: (-job.bytes, job.pid)),
        sorted(targets, key=lambda target: target.name),
        excluded or {},
        PREFERENCES | frozenset(relax),
    )
    return search.run()


class _Search:
    def __init__(
        self,
        source: Topology,
        jobs: Sequence[Job],
        targets: Sequence[Target],
        excluded: Mapping[int, frozenset[str]],
        relax: frozenset[str],
    ) -> None:
        self._source = source
        self._jobs = jobs
        self._targets = {target.name: target for target in targets}
        self._excluded = excluded
        self._relax = relax
        self._steps = 0
        self._seen: set[object] = set()
        self._best: tuple[Placement, ...] = ()
        self._value = (-1, -1)
        self._bytes = {job.pid: job.bytes for job in jobs}

    def run(self) -> Plan:
        free = {name: dict(target.free) for name, target in self._targets.items()}
        self._descend(0, free, ())
        placed = {placement.pid for placement in self._best}
        for placement in self._best:
            self._take(free, placement)
        unplaced = tuple(
            Unplaced(pid=job.pid, reasons=self._reasons(job, free))
            for job in sorted(self._jobs, key=lambda job: job.pid)
            if job.pid not in placed
        )
        return Plan(
            placements=tuple(sorted(self._best, key=lambda placement: placement.pid)),
            unplaced=unplaced,
        )

    def _descend(
        self, index: int, free: dict[str, dict[int, int]], placed: tuple[Placement, ...]
    ) -> bool:
        """Place the jobs from *index* on. True: all are placed, or the budget is used up."""
        value = (len(placed), sum(self._bytes[p.pid] for p in placed))
        if value > self._value:
            self._best, self._value = placed, value
        if len(placed) == len(self._jobs):
            return True
        # What is left cannot make it better than what is known.
        if index == len(self._jobs) or len(placed) + len(self._jobs) - index < self._value[0]:
            return False
        counts = [sum(p.host == name for p in placed) for name in self._targets]
        state = (index, len(placed), str(free), tuple(counts))
        if state in self._seen:
            return False
        self._seen.add(state)
        job = self._jobs[index]
        options = self._options(job, free, placed)
        if self._steps > BUDGET:
            return True
        for placement in options:
            if self._descend(index + 1, self._taken(free, placement), (*placed, placement)):
                return True
        return self._descend(index + 1, free, placed)

    def _options(
        self, job: Job, free: dict[str, dict[int, int]], placed: tuple[Placement, ...]
    ) -> list[Placement]:
        """Hosts that take the job now, those first that keep the most free VRAM."""
        found = []
        for name, target in self._targets.items():
            self._steps += 1
            if name in self._excluded.get(job.pid, ()):
                continue
            if target.slots is not None and sum(p.host == name for p in placed) >= target.slots:
                continue
            gpu_map, _ = self._fits(job, target, free[name])
            if gpu_map is not None:
                found.append(Placement(pid=job.pid, host=name, gpu_map=gpu_map))
        return sorted(found, key=lambda p: (-sum(free[p.host].values()), p.host))

    def _fits(self, job: Job, target: Target, free: Mapping[int, int]) -> tuple[GpuMap | None, str]:
        if len(job.vram) < len(target.topology.gpus) and not target.hides_gpus:
            return None, (
                f"the process sees {len(job.vram)} GPUs, {target.name} shows"
                f" {len(target.topology.gpus)} and can't hide any (VISIBLE_GPUS)"
            )
        result = match(
            self._source,
            target.topology,
            visible=sorted(job.vram),
            needs=job.vram,
            free=free,
            busy=target.busy,
            relax=self._relax,
        )
        if result.map is None:
            return None, "; ".join(dict.fromkeys(r.message for r in result.refusals[:3]))
        return result.map, ""

    def _taken(
        self, free: dict[str, dict[int, int]], placement: Placement
    ) -> dict[str, dict[int, int]]:
        after = {**free, placement.host: dict(free[placement.host])}
        self._take(after, placement)
        return after

    def _take(self, free: dict[str, dict[int, int]], placement: Placement) -> None:
        job = next(job for job in self._jobs if job.pid == placement.pid)
        mine = free[placement.host]
        for gpu_id, size in job.vram.items():
            there = placement.gpu_map[gpu_id]
            if there in mine:
                mine[there] -= size

    def _reasons(self, job: Job, free: dict[str, dict[int, int]]) -> dict[str, str]:
        """Why each host does not take the job besides those that were placed."""
        reasons = {}
        for name, target in self._targets.items():
            if name in self._excluded.get(job.pid, ()):
                reasons[name] = "it refused the process before"
            elif target.slots is not None and (
                sum(p.host == name for p in self._best) >= target.slots
            ):
                reasons[name] = "it takes no more processes at a time"
            else:
                _, why = self._fits(job, target, free[name])
                reasons[name] = why or "the search was given up (too many possibilities)"
        return reasons
