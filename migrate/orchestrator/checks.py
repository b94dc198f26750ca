"""What a peer sends, checked before anything is built, reserved or told to the kernel.

An allowed source decides what runs here, so this is no fence against it; it is what keeps a
broken or confused peer from harming a host, and what is said of it a clear error. Pure: no
I/O. ``migrate.kfd.checkpoint`` checks buckets and private records; this module all around them.

Raises PeerNonsense for documents, BrokenPrivateData for KFD state, UsageError for options.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence

import msgspec

from migrate.dataplane.chunks import DIGEST_SIZE, MIN_CHUNK, chunk_count
from migrate.dataplane.keys import MAX_STREAMS
from migrate.dataplane.messages import MAX_OBJECT_SIZE, ObjectKind
from migrate.decode import from_msgpack
from migrate.engine.seam import Blob, CpuRange
from migrate.errors import PeerNonsense, UsageError
from migrate.inventory import HOST_NAME, split_address
from migrate.kfd.checkpoint import MAX_BOS, MAX_DEVICES, BoBucket, KfdCheckpoint, check_checkpoint
from migrate.kfd.privdata import BO_RECORDS
from migrate.model import GpuMap
from migrate.orchestrator.plan import (
    Activity,
    KfdNeeds,
    Move,
    Needs,
    ObjectOrder,
    Options,
    RestoreOrder,
)
from migrate.orchestrator.sharing import unshareable
from migrate.preflight.facts import Facts
from migrate.topology.model import Topology

MAX_PROCESSES = 4096  # with KFD, in one tree
MAX_OBJECTS = MAX_BOS
MAX_NODES = 1024
MAX_STATE = 64 << 20  # bytes of an engine's document
MAX_BYTES = 1 << 50  # any sum of sizes
MAX_TEXT = 4096  # characters
MAX_FACTS = 1 << 17
MAX_POINTERS = 1 << 16
MAX_PID = 1 << 22  # PID_MAX_LIMIT of Linux
USER_END = (1 << 57) - 4096  # of user space with five-level page tables
PAGE = 4096
WORD = re.compile(r"[0-9A-Za-z_-]{1,64}")  # an id: it becomes part of a file's name
FILE = re.compile(r"[0-9A-Za-z][0-9A-Za-z._-]{0,127}")  # of an engine's
U32 = (1 << 32) - 1


def _want(holds: bool, what: str) -> None:
    if not holds:
        raise PeerNonsense(f"the peer sent {what}")


def _unique(values: Sequence[int], what: str, most: int = U32) -> None:
    _want(all(0 < value <= most for value in values), f"{what} that is zero or too large")
    _want(len(set(values)) == len(values), f"{what} twice")


def _finite(value: float, most: float) -> bool:
    return math.isfinite(value) and 0 <= value <= most


# ---------------------------------------------------------------- Reserve


def check_names(migration: str, source: str, address: str, store_id: str) -> None:
    """Ids and addresses of a reservation. Raises PeerNonsense."""
    _want(bool(WORD.fullmatch(migration)), f"the migration id {migration[:70]!r}")
    _want(bool(WORD.fullmatch(store_id)), f"the store id {store_id[:70]!r}")
    _want(bool(HOST_NAME.fullmatch(source)), f"the host name {source[:70]!r}")
    try:
        _, port = split_address(address)
    except UsageError as error:
        raise PeerNonsense(f"the peer sent the address {address[:70]!r}") from error
    _want(port != 0, "an address with port 0")


def check_options(options: Options) -> None:
    """What a user may choose, within what makes sense. Raises UsageError."""
    for holds, what in (
        (0 <= options.max_rounds <= 10_000, f"max_rounds {options.max_rounds}"),
        (_finite(options.max_downtime, 1e9), f"max_downtime {options.max_downtime}"),
        (_finite(options.patience, 1e9), f"patience {options.patience}"),
        (options.bandwidth is None or 0 < options.bandwidth <= MAX_BYTES, "bandwidth"),
        (1 <= options.streams <= MAX_STREAMS, f"streams {options.streams}"),
        (len(options.gpu_map) <= MAX_TEXT, "gpu_map, too long"),
        (len(options.relax) <= MAX_DEVICES, "relax, too many"),
        (all(len(rule) <= MAX_DEVICES for rule in options.relax), "relax, no rule"),
        (len(options.copy_files) <= MAX_DEVICES, "copy_files, too many"),
        (all(glob[:1] in "/*" and len(glob) <= MAX_TEXT for glob in options.copy_files), "a glob"),
    ):
        if not holds:
            raise UsageError(f"an option is out of range: {what}")


def check_needs(needs: Needs) -> None:
    """What a process needs here. Raises PeerNonsense."""
    _want(len(needs.processes) <= MAX_PROCESSES, f"{len(needs.processes)} KFD processes")
    for what in ("memory", "quota", "image_bytes"):
        value = getattr(needs, what)
        _want(0 <= value <= MAX_BYTES, f"a {what} of {value} bytes")
    for kfd in needs.processes:
        _check_kfd_needs(kfd)


def check_facts(facts: Facts) -> None:
    """What preflight is to look for here. Raises PeerNonsense."""
    names = [fact.path for fact in (*facts.files, *facts.alike)]
    names += [*facts.labels, *facts.cgroups]
    _want(len(names) <= MAX_FACTS, f"{len(names)} facts")
    _want(_finite(facts.monotonic, 1e12), "a clock that is none")
    _want(len(facts.ids) <= MAX_PID, f"{len(facts.ids)} ids")
    _want(all(0 < number <= MAX_PID for number in facts.ids), "a pid that is none")
    _want(all(len(name) <= MAX_TEXT and "\0" not in name for name in names), "a name that is none")
    _want(all(0 <= a.number <= U32 for a in (*facts.users, *facts.groups)), "a user that can't be")


def _check_kfd_needs(kfd: KfdNeeds) -> None:
    _want(len(kfd.identities) <= MAX_DEVICES, f"{len(kfd.identities)} GPUs")
    _unique([user for user, _ in kfd.identities], "a user_gpu_id")
    _unique([actual for _, actual in kfd.identities], "an actual gpu_id")
    _want(set(kfd.gpus) == {actual for _, actual in kfd.identities}, "GPUs of no identity")
    _want(len(kfd.gpus) == len(kfd.identities), "a GPU twice")
    _want(set(kfd.vram) <= set(kfd.gpus), "VRAM on a GPU that the process does not see")
    _want(all(0 <= size <= MAX_OBJECT_SIZE for size in kfd.vram.values()), "a wrong VRAM size")
    _want(kfd.priv_bo_size in (0, *BO_RECORDS), f"BO records of {kfd.priv_bo_size} bytes")


def check_topology(topology: Topology) -> None:
    """The source's machine. Raises PeerNonsense."""
    _want(len(topology.nodes) <= MAX_NODES, f"{len(topology.nodes)} topology nodes")
    _want(len(topology.hidden) <= MAX_NODES, "too many hidden nodes")
    numbers = [node.number for node in topology.nodes]
    _want(len(set(numbers)) == len(numbers), "a topology node twice")
    _unique([node.gpu_id for node in topology.nodes if node.is_gpu], "a gpu_id")
    _want(len(topology.gpus) <= MAX_DEVICES, f"{len(topology.gpus)} GPUs")
    for node in topology.nodes:
        parts = (node, *node.mem_banks, *node.caches, *node.links)
        _want(len(parts) <= MAX_TEXT, "a topology node with too many parts")
        _want(len(node.name) <= MAX_TEXT, "a name that is too long")
        for part in parts:
            for field in part.__struct_fields__:
                value = getattr(part, field)
                _want(not isinstance(value, int) or 0 <= value < 1 << 64, f"{field} {value}")


def check_move(move: Move) -> None:
    """What a source wants to send. Raises PeerNonsense, UsageError."""
    check_needs(move.needs)
    check_topology(move.topology)
    check_options(move.options)


# ---------------------------------------------------------------- Restore


def check_order(
    order: RestoreOrder,
    manifest: Mapping[int, bytes],
    *,
    reserved: GpuMap | None,
    quota: int,
    engine: str,
) -> None:
    """The whole order to restore, against what was reserved for it.

    *reserved*: the GPU map that this host chose. *quota*: bytes of all objects together.
    """
    gpus = order.gpu_map.as_dict()
    _want(len(gpus) == len(order.gpu_map.pairs) <= MAX_DEVICES, "a GPU map with a GPU twice")
    _unique(list(gpus.values()), "a destination GPU")
    _want(reserved is None or order.gpu_map == reserved, "another GPU map than was reserved")
    _want(order.image.engine == engine, f"an image of the engine {order.image.engine[:64]!r}")
    _want(len(order.image.state) <= MAX_STATE, "an engine's document that is too large")
    _want(len(order.checkpoints) <= MAX_PROCESSES, f"{len(order.checkpoints)} checkpoints")
    for checkpoint in order.checkpoints:
        _check_checkpoint(checkpoint, gpus)
    _check_shares(order)
    _check_ranges(order.image.ranges)
    _check_objects(order)
    _want(sum(item.size for item in order.objects) <= quota, "more bytes than were reserved")
    _check_manifest(order.objects, manifest)
    _check_activity(order.ran)


def _check_checkpoint(checkpoint: KfdCheckpoint, gpus: Mapping[int, int]) -> None:
    _want(0 < checkpoint.pid < MAX_PID, f"the pid {checkpoint.pid}")
    # One of nothing at all is refused by KfdProcess.restore, where there is a kernel to harm.
    if checkpoint.devices or checkpoint.bos or checkpoint.num_objects:
        check_checkpoint(checkpoint)
    seen = {device.actual_gpu_id for device in checkpoint.devices}
    _want(seen <= set(gpus), "a checkpoint with GPUs that are not in the GPU map")


def _check_shares(order: RestoreOrder) -> None:
    """Every import is of a buffer that a RESTORE makes, and can be made."""
    importers = {share.importer for share in order.shares}
    _want(len(importers) == len(order.shares), "an import twice")
    for share in order.shares:
        for key in (share.importer, share.owner):
            known = 0 <= key.process < len(order.checkpoints)
            bos = order.checkpoints[key.process].bos if known else ()
            known = 0 <= key.index < len(bos) and bos[key.index].has_contents
            _want(known, "an import of or for a buffer that is none")
        _want(share.owner not in importers, "an import of an import")
    if order.shares:
        private = [checkpoint.private() for checkpoint in order.checkpoints]
        trouble = unshareable(order.shares, order.checkpoints, private)
        _want(not trouble, f"imports that can't be: {trouble}")


def _check_ranges(ranges: Iterable[CpuRange]) -> None:
    """Whole pages of user space, and none twice: one would overwrite another."""
    end: dict[int, int] = {}
    for item in sorted(ranges, key=lambda r: (r.pid, r.address)):
        _want(0 < item.pid < MAX_PID, f"the pid {item.pid}")
        where = f"CPU memory at {item.address:#x}, {item.length} bytes"
        _want(item.length > 0 and not (item.address | item.length) % PAGE, where)
        _want(PAGE <= item.address <= USER_END - item.length, where)
        _want(item.address >= end.get(item.pid, 0), f"{where}, twice")
        end[item.pid] = item.address + item.length


def _check_objects(order: RestoreOrder) -> None:
    _want(len(order.objects) <= MAX_OBJECTS, f"{len(order.objects)} objects")
    _unique([item.object_id for item in order.objects], "an object id")
    imported = {(share.importer.process, share.importer.index) for share in order.shares}
    wanted = {
        (process, index): bo
        for process, checkpoint in enumerate(order.checkpoints)
        for index, bo in enumerate(checkpoint.bos)
        if bo.has_contents and (process, index) not in imported
    }
    ranges = set(order.image.ranges)
    blobs = {blob.name: blob for blob in order.image.blobs}
    files: dict[str, list[ObjectOrder]] = {}
    _want(len(blobs) == len(order.image.blobs), "a file of the engine's twice")
    for item in order.objects:
        if item.bo is not None:
            bo = wanted.pop((item.bo.process, item.bo.index), None)
            _check_bo(item, bo)
        elif item.blob is not None:
            _check_blob(item, blobs)
            files.setdefault(item.blob.name, []).append(item)
        else:
            _check_cpu(item, ranges)
    # A buffer that nothing is written to would show what its VRAM held before.
    _want(not wanted, f"no contents for {len(wanted)} buffers")
    _want(not ranges, f"no contents for {len(ranges)} ranges of CPU memory")
    _check_pieces(files)
    lacking = {name for name, blob in blobs.items() if not blob.sparse} - files.keys()
    _want(not lacking, f"no contents for {len(lacking)} files of the engine's")


def _check_bo(item: ObjectOrder, bo: BoBucket | None) -> None:
    name = f"object {item.object_id}"
    alone = item.cpu is None and item.blob is None
    _want(bo is not None and alone, f"{name}, which is of no buffer, or of two")
    assert bo is not None
    _want(item.size == bo.size <= MAX_OBJECT_SIZE, f"{name} of {item.size} bytes for {bo.size}")
    kind = ObjectKind.VRAM if bo.is_vram else ObjectKind.GTT
    _want(item.kind is kind, f"{name} of the wrong kind")


def _check_cpu(item: ObjectOrder, ranges: set[CpuRange]) -> None:
    name = f"object {item.object_id}"
    _want(item.kind is ObjectKind.CPU and item.cpu in ranges, f"{name}, which belongs nowhere")
    assert item.cpu is not None
    ranges.discard(item.cpu)
    _want(item.size == item.cpu.length, f"{name} of {item.size} bytes for {item.cpu.length}")


def _check_blob(item: ObjectOrder, blobs: dict[str, Blob]) -> None:
    name = f"object {item.object_id}"
    assert item.blob is not None
    _want(bool(FILE.fullmatch(item.blob.name)), f"the file name {item.blob.name[:70]!r}")
    known = item.cpu is None and blobs.get(item.blob.name) == item.blob
    _want(known and item.kind is ObjectKind.BLOB, f"{name}, which is of no file")
    _want(0 <= item.blob.size <= MAX_OBJECT_SIZE, f"a file of {item.blob.size} bytes")


def _check_pieces(files: Mapping[str, list[ObjectOrder]]) -> None:
    """Each file has all of its bytes, if it is not sparse, and none of them twice."""
    for name, pieces in files.items():
        blob = pieces[0].blob
        assert blob is not None
        at = 0
        for piece in sorted(pieces, key=lambda piece: piece.offset):
            fits = piece.offset == at or (blob.sparse and piece.offset > at)
            _want(fits, f"the file {name} with a gap or twice the same at {at}")
            _want(piece.size > 0 or len(pieces) == 1, f"the file {name} with an empty piece")
            at = piece.offset + piece.size
        fits = at == blob.size or (blob.sparse and at < blob.size)
        _want(fits, f"{at} bytes for the {blob.size} of the file {name}")


def _check_manifest(objects: Collection[ObjectOrder], manifest: Mapping[int, bytes]) -> None:
    _want({item.object_id for item in objects} == set(manifest), "digests of other objects")
    for item in objects:
        count, rest = divmod(len(manifest[item.object_id]), DIGEST_SIZE)
        most = chunk_count(item.size, MIN_CHUNK)
        least = min(1, item.size)  # an empty file has no chunk
        _want(not rest and least <= count <= most, f"{count} digests of object {item.object_id}")


def _check_activity(ran: Activity) -> None:
    for value in (ran.seconds, ran.cpu, float(ran.packets)):
        _want(_finite(value, 1e18), "an activity that is no number")
    _want(len(ran.pointers) <= MAX_POINTERS, "too many read pointers")
    for pair in ran.pointers:
        _want(all(0 <= value < 1 << 64 for value in pair), "a read pointer out of range")


def decoded_order(data: bytes) -> RestoreOrder:
    """The order's msgpack. Raises PeerNonsense."""
    try:
        return from_msgpack(data, RestoreOrder)
    except (msgspec.DecodeError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise PeerNonsense(f"the peer's order can't be read: {error}") from error
