"""What can be known before anything is touched: needs of the process, room at the destination."""

from __future__ import annotations

from collections.abc import Sequence

from migrate.engine.seam import Survey
from migrate.errors import (
    EngineUnsupported,
    InsufficientMemory,
    LayoutMismatch,
    VisibleGpus,
)
from migrate.kfd.process import KfdCheckpoint
from migrate.kfd.sysfs import busy_gpus, read_processes
from migrate.model import GpuMap
from migrate.orchestrator.host import Host, available_memory
from migrate.orchestrator.objects import private_data, refuse_svm
from migrate.orchestrator.plan import KfdNeeds, Needs, Options
from migrate.orchestrator.sharing import refuse_shared
from migrate.topology.gpumap import parse_gpu_map
from migrate.topology.match import PREFERENCES, error_of, match
from migrate.topology.model import Topology

# A process may allocate between the reservation and the freeze; more than that is refused.
QUOTA_SLACK = 256 * 1024 * 1024


def needs(survey: Survey, checkpoints: Sequence[KfdCheckpoint], options: Options) -> Needs:
    """What the process needs over there, from a snapshot of its KFD state.

    Raises SvmUnsupported, SharedBuffer.
    """
    refuse_shared(checkpoints)
    contents = sum(b.size for c in checkpoints for b in c.bos if b.has_contents)
    staging = contents + survey.cpu_bytes
    del options  # without pre-copy the last round still waits in staging
    return Needs(
        processes=tuple(_kfd_needs(c) for c in checkpoints),
        memory=staging + survey.cpu_bytes,
        quota=2 * staging + QUOTA_SLACK,
    )


def _kfd_needs(checkpoint: KfdCheckpoint) -> KfdNeeds:
    private = private_data(checkpoint)
    refuse_svm(private)
    actual = {d.user_gpu_id: d.actual_gpu_id for d in checkpoint.devices}
    vram = dict.fromkeys(actual.values(), 0)
    for bo in checkpoint.bos:
        if bo.is_vram:
            vram[actual[bo.gpu_id]] += bo.size
    return KfdNeeds(
        identities=tuple(actual.items()),
        gpus=tuple(actual.values()),
        vram=vram,
        priv_bo_size=private.bo_record_size,
    )


def check_room(host: Host, engine: str, wanted: Needs, options: Options) -> None:
    """What does not hang on the GPU map. Raises EngineUnsupported, InsufficientMemory ..."""
    if engine != host.engine.name:
        raise EngineUnsupported(
            f"the source's process engine is {engine}, the destination's is {host.engine.name}",
            advice="Configure the same engine on both agents.",
        )
    free = available_memory()
    if free < wanted.memory:
        raise InsufficientMemory(
            f"{wanted.memory} bytes of host memory are needed for staging and CPU memory,"
            f" {free} are available on {host.name}"
        )
    sizes = {k.priv_bo_size for k in wanted.processes}
    here = host.bo_record_size
    if sizes - {here}:
        raise LayoutMismatch(
            f"the source's kernel uses BO records of {sorted(sizes)} bytes,"
            f" {host.name}'s uses {here}"
        )
    del options


def choose_map(host: Host, source: Topology, wanted: Needs, options: Options) -> GpuMap:
    """The GPU map, by the one matching function. Raises NoGpuMap, VisibleGpus, ..."""
    visible = sorted({gpu for k in wanted.processes for gpu in k.gpus})
    vram: dict[int, int] = dict.fromkeys(visible, 0)
    for kfd in wanted.processes:
        for gpu, size in kfd.vram.items():
            vram[gpu] += size
    destination = host.topology()
    if len(visible) < len(destination.gpus) and not host.engine.can_hide_gpus:
        raise VisibleGpus(
            f"the process sees {len(visible)} GPUs, {host.name} shows {len(destination.gpus)},"
            " and KFD wants the same number at RESTORE",
            advice="Choose a destination with as many GPUs, or one that can hide GPUs by a"
            " device cgroup (criu engine, cgroup v2, root).",
        )
    identities = [pair for kfd in wanted.processes for pair in kfd.identities]
    override = (
        parse_gpu_map(options.gpu_map, source, destination, identities=identities)
        if options.gpu_map
        else None
    )
    result = match(
        source,
        destination,
        visible=visible,
        needs=vram,
        free=host.free_vram(),
        busy=busy_gpus(read_processes(host.paths)),
        override=override,
        relax=PREFERENCES | frozenset(options.relax),
    )
    if result.map is None:
        raise error_of(result)
    return result.map
