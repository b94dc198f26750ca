"""What can be known before anything is touched: needs of the process, room at the destination."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import partial

from migrate.engine.seam import Survey
from migrate.errors import (
    EngineUnsupported,
    InsufficientDisk,
    InsufficientMemory,
    KfdUnavailable,
    LayoutMismatch,
    MigrateError,
    MissingCapability,
    VisibleGpus,
)
from migrate.kfd.checkpoint import BoBucket, KfdCheckpoint
from migrate.kfd.process import Checkpointed
from migrate.kfd.sysfs import ProcessUsage, busy_gpus, read_processes
from migrate.model import GpuMap
from migrate.orchestrator.host import Host, available_memory
from migrate.orchestrator.objects import private_data, refuse_svm
from migrate.orchestrator.plan import KfdNeeds, Move, Needs, Options, Share
from migrate.orchestrator.sharing import contents, refuse_strangers
from migrate.preflight.compare import compare, look
from migrate.preflight.facts import Facts
from migrate.preflight.findings import Finding, Findings
from migrate.preflight.notes import LOW_MEMORY
from migrate.topology.gpumap import parse_gpu_map
from migrate.topology.match import PREFERENCES, error_of, match
from migrate.topology.model import Topology

# A process may allocate between the reservation and the freeze; more than that is refused.
QUOTA_SLACK = 256 * 1024 * 1024
DISK_RESERVE = 16 * 1024 * 1024  # bytes: records of a migration, and a log of its copy
MEMORY_RESERVE = 512 * 1024 * 1024  # bytes that should be left to others


def needs(
    survey: Survey,
    checkpoints: Sequence[KfdCheckpoint],
    options: Options,
    shares: Sequence[Share] = (),
) -> Needs:
    """What the process needs over there, from a snapshot of its KFD state."""
    imported = {(share.importer.process, share.importer.index) for share in shares}
    own = [
        [bo for index, bo in enumerate(checkpoint.bos) if (number, index) not in imported]
        for number, checkpoint in enumerate(checkpoints)
    ]
    staging = contents(checkpoints, shares) + survey.cpu_bytes
    del options  # without pre-copy the last round still waits in staging
    others = (survey.cpu_copies - 1) * survey.cpu_bytes
    return Needs(
        processes=tuple(_kfd_needs(c, bos) for c, bos in zip(checkpoints, own, strict=True)),
        memory=staging + others,
        quota=2 * staging + QUOTA_SLACK,
        image_bytes=survey.image_bytes,
    )


def _kfd_needs(checkpoint: KfdCheckpoint, own: Sequence[BoBucket]) -> KfdNeeds:
    private = private_data(checkpoint)
    actual = {d.user_gpu_id: d.actual_gpu_id for d in checkpoint.devices}
    vram = dict.fromkeys(actual.values(), 0)
    for bo in own:
        if bo.is_vram:
            vram[actual[bo.gpu_id]] += bo.size
    return KfdNeeds(
        identities=tuple(actual.items()),
        gpus=tuple(actual.values()),
        vram=vram,
        priv_bo_size=private.bo_record_size,
    )


def estimated_needs(survey: Survey, usages: Sequence[ProcessUsage], bo_record_size: int) -> Needs:
    """The same from sysfs, for a process that can't be stopped to be asked."""
    return Needs(
        processes=tuple(
            KfdNeeds(
                identities=tuple((gpu, gpu) for gpu, _ in usage.vram),
                gpus=tuple(gpu for gpu, _ in usage.vram),
                vram=dict(usage.vram),
                priv_bo_size=bo_record_size,
            )
            for usage in usages
        ),
        memory=sum(size for usage in usages for _, size in usage.vram)
        + survey.cpu_copies * survey.cpu_bytes,
        quota=QUOTA_SLACK,
        image_bytes=survey.image_bytes,
    )


def refused_objects(
    host: Host, topology: Topology, pid: int, found: Sequence[Checkpointed]
) -> Iterator[MigrateError]:
    """GPU objects of the tree of *pid* that no destination could take, all of them."""
    for refuse in (
        *(partial(_refuse_svm, one.checkpoint) for one in found),
        partial(refuse_strangers, host.paths, topology, pid, found),
    ):
        try:
            refuse()
        except MigrateError as error:
            yield error


def _refuse_svm(checkpoint: KfdCheckpoint) -> None:
    refuse_svm(private_data(checkpoint))


def check_room(host: Host, engine: str, wanted: Needs) -> None:
    """Raises the first of ``lacking``."""
    for error in lacking(host, engine, wanted):
        raise error


def lacking(host: Host, engine: str, wanted: Needs) -> Iterator[MigrateError]:
    """What this host lacks and does not hang on the GPU map, all of it."""
    if engine != host.engine.name:
        yield EngineUnsupported(
            f"the source's process engine is {engine}, the destination's is {host.engine.name}",
            advice="Configure the same engine on both agents.",
        )
    free = available_memory()
    if free < wanted.memory:
        yield InsufficientMemory(
            f"{wanted.memory} bytes of host memory are needed for staging and CPU memory,"
            f" {free} are available on {host.name}"
        )
    try:
        sizes = {k.priv_bo_size for k in wanted.processes} - {0}
        here = host.bo_record_size if wanted.processes else 0
        if sizes - {here}:
            yield LayoutMismatch(
                f"the source's kernel uses BO records of {sorted(sizes)} bytes,"
                f" {host.name}'s uses {here}"
            )
    except (KfdUnavailable, MissingCapability) as error:
        yield error
    yield from cramped(host, wanted.image_bytes)


def cramped(host: Host, image_bytes: int) -> Iterator[MigrateError]:
    """A run directory without room for the engine's files and the journal's records."""
    try:
        left = os.statvfs(host.paths.run)
    except OSError:
        return  # a journal in memory
    free = left.f_bavail * left.f_frsize
    wanted = DISK_RESERVE + image_bytes
    if free < wanted:
        yield InsufficientDisk(
            f"{host.name} has {free} bytes left for {host.paths.run}, {wanted} are needed"
        )


def examine(host: Host, move: Move, facts: Facts) -> tuple[Findings, GpuMap | None]:
    """Everything that speaks against this host as the destination, at once."""
    wanted, options = move.needs, move.options
    found = [Finding.of(error) for error in lacking(host, move.engine, wanted)]
    gpu_map = None
    try:
        gpu_map = choose_map(host, move.topology, wanted, options)
    except MigrateError as error:
        found.append(Finding.of(error))
    findings = Findings(blockers=tuple(found), warnings=tuple(_tight(host, wanted)))
    globs = options.copy_files
    return findings + compare(facts, look(facts, globs), host.name, globs), gpu_map


def _tight(host: Host, wanted: Needs) -> Iterator[Finding]:
    free = available_memory()
    if wanted.memory <= free < wanted.memory + MEMORY_RESERVE:
        yield LOW_MEMORY.finding(
            f"{wanted.memory} of the {free} bytes of host memory that {host.name} has left will be"
            " in use"
        )


def choose_map(host: Host, source: Topology, wanted: Needs, options: Options) -> GpuMap:
    """The GPU map, by the one matching function. Raises NoGpuMap, VisibleGpus, ..."""
    if not wanted.processes:
        return GpuMap(pairs=())  # nothing of it is on a GPU
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
