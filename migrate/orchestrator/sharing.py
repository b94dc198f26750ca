"""Buffers that more than one handle or process has: found, sent once, shared again.

IMPORT_DMABUF gives a second handle of one buffer, in the same process or another. A checkpoint
shows both as buffers of their own, and RESTORE would make two buffers out of one. So one of
them is the owner, whose RESTORE makes the buffer and whose bytes are sent; the others are left
out of their processes' RESTORE and imported from it (``KfdProcess.share``).

What tells that two are one:

* the offset by which a buffer is mapped from its render node. The kernel gives it to the
  buffer itself (``drm_vma_node``), so that equal offsets of one GPU are one buffer;
* the inode of the dmabuf that the checkpoint has made. Linux 6.1 makes one for each
  checkpoint, so that it tells nothing there; since 6.8 (read, not run) a buffer has one
  dmabuf, which an import keeps (amdgpu_amdkfd_gpuvm_export_dmabuf), also on another GPU than
  the buffer's, where its offset is another. Linux 6.1 refuses imports there.

The kernel does not say which handle is an import. An import has exactly the flags that
amdgpu_amdkfd_gpuvm_import_dmabuf gives it; if no handle has others (its owner has freed its
own, or has asked for just these), any of them may make the buffer.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from migrate.errors import SharedBuffer
from migrate.kfd import uapi
from migrate.kfd.checkpoint import KfdCheckpoint
from migrate.kfd.file import driver_pids
from migrate.kfd.privdata import PrivateData
from migrate.kfd.process import Checkpointed
from migrate.model import HostPaths, Value
from migrate.orchestrator.plan import BoKey, Share
from migrate.topology.model import Topology

# A line of /proc/PID/maps (proc(5)): addresses, rights, offset, device, inode, path.
_MAPPED = re.compile(r"([0-9a-f]+)-([0-9a-f]+) \S+ ([0-9a-f]+) (\S+) (\d+) +(\S+)")

# Handles below an import's that nobody has, in one process and GPU: each is taken for a moment.
MAX_FREE_HANDLES = 1 << 14

_IMPORTED = uapi.KFD_IOC_ALLOC_MEM_FLAGS_WRITABLE | uapi.KFD_IOC_ALLOC_MEM_FLAGS_EXECUTABLE
_MEMORY = uapi.KFD_IOC_ALLOC_MEM_FLAGS_VRAM | uapi.KFD_IOC_ALLOC_MEM_FLAGS_GTT


class Place(Value):
    """Where a buffer is in its render node's file: GPU and bytes."""

    gpu_id: int
    offset: int
    size: int


def places(checkpoint: KfdCheckpoint) -> Iterator[tuple[int, Place]]:
    """Bucket index and place of each BO with contents. gpu_ids are actual ones."""
    actual = {device.user_gpu_id: device.actual_gpu_id for device in checkpoint.devices}
    for index, bo in enumerate(checkpoint.bos):
        if bo.has_contents:
            yield index, Place(gpu_id=actual[bo.gpu_id], offset=bo.offset, size=bo.size)


# ---------------------------------------------------------------- within the tree


def shared(found: Sequence[Checkpointed]) -> list[list[BoKey]]:
    """The buffers with more than one handle, as their handles in order."""
    first: dict[object, BoKey] = {}  # handle by a name that it has: its place, its dmabuf
    leader: dict[BoKey, BoKey] = {}  # a handle of the same buffer that came before

    def lead(key: BoKey) -> BoKey:
        while leader[key] != key:
            leader[key] = key = leader[leader[key]]
        return key

    for number, checkpointed in enumerate(found):
        for index, place in places(checkpointed.checkpoint):
            key = BoKey(process=number, index=index)
            leader[key] = key
            for name in _names(place, checkpointed.dmabufs[index]):
                one, other = lead(key), lead(first.setdefault(name, key))
                leader[max(one, other, key=_order)] = min(one, other, key=_order)
    groups: dict[BoKey, list[BoKey]] = defaultdict(list)
    for key in leader:
        groups[lead(key)].append(key)
    return [handles for handles in groups.values() if len(handles) > 1]


def _order(key: BoKey) -> tuple[int, int]:
    return key.process, key.index


def _names(place: Place, dmabuf: int | None) -> Iterator[object]:
    """What two handles of one buffer have in common."""
    yield place.gpu_id, place.offset
    if dmabuf is not None:
        status = os.fstat(dmabuf)
        yield "dmabuf", status.st_dev, status.st_ino


def shares(found: Sequence[Checkpointed]) -> tuple[Share, ...]:
    """Who imports from whom over there. Raises SharedBuffer if it can't be so again."""
    groups = shared(found)
    if not groups:
        return ()
    checkpoints = [one.checkpoint for one in found]
    private = [checkpoint.private() for checkpoint in checkpoints]
    pages = _event_pages(checkpoints, private)
    result = tuple(
        Share(importer=key, owner=owner)
        for handles in groups
        for owner in [_owner(handles, checkpoints, pages)]
        for key in handles
        if key != owner
    )
    trouble = unshareable(result, checkpoints, private)
    if trouble:
        raise SharedBuffer(trouble)
    return result


def contents(checkpoints: Sequence[KfdCheckpoint], wanted: Iterable[Share]) -> int:
    """Bytes of all buffers, each counted once."""
    imported = {share.importer for share in wanted}
    return sum(
        place.size
        for number, checkpoint in enumerate(checkpoints)
        for index, place in places(checkpoint)
        if BoKey(process=number, index=index) not in imported
    )


def let_go(found: Sequence[Checkpointed], wanted: Iterable[Share]) -> None:
    """Close the dmabufs of imports: their owners' keep the memory, and show it."""
    for share in wanted:
        dmabufs = found[share.importer.process].dmabufs
        fd, dmabufs[share.importer.index] = dmabufs[share.importer.index], None
        if fd is not None:
            os.close(fd)


def _owner(
    handles: Sequence[BoKey], checkpoints: Sequence[KfdCheckpoint], pages: Collection[BoKey]
) -> BoKey:
    """The handle whose RESTORE makes the buffer."""

    def rank(key: BoKey) -> tuple[bool, bool, bool, tuple[int, int]]:
        bo = checkpoints[key.process].bos[key.index]
        imported = bo.alloc_flags & ~_MEMORY == _IMPORTED
        return key not in pages, imported, not bo.is_vram, _order(key)

    return min(handles, key=rank)


def unshareable(
    wanted: Collection[Share], checkpoints: Sequence[KfdCheckpoint], private: Sequence[PrivateData]
) -> str:
    """Why RESTORE and imports can't make what *wanted* says, or nothing.

    RESTORE needs the event page; and each import gets the lowest free handle, so those below
    it have to be taken, which is done within MAX_FREE_HANDLES.
    """
    importers = {share.importer for share in wanted}
    for share in wanted:
        here = checkpoints[share.importer.process].bos[share.importer.index]
        if here.size != checkpoints[share.owner.process].bos[share.owner.index].size:
            return f"the handles of the buffer at {here.addr:#x} have different sizes"
    for page in sorted(importers & _event_pages(checkpoints, private), key=_order):
        return f"the event page of KFD process {page.process} is an imported buffer"
    for (process, gpu_id), handles in _handles(importers, checkpoints, private).items():
        highest = max(handles)
        taken = sum(
            bo.gpu_id == gpu_id and record.idr_handle < highest
            for bo, record in zip(checkpoints[process].bos, private[process].bos, strict=True)
        )
        if highest - taken > MAX_FREE_HANDLES:
            return f"the handle {highest} of an imported buffer can't be had again"
    return ""


def _handles(
    keys: Iterable[BoKey], checkpoints: Sequence[KfdCheckpoint], private: Sequence[PrivateData]
) -> dict[tuple[int, int], list[int]]:
    """Handles of BOs by process and user_gpu_id."""
    found: dict[tuple[int, int], list[int]] = defaultdict(list)
    for key in keys:
        gpu_id = checkpoints[key.process].bos[key.index].gpu_id
        found[key.process, gpu_id].append(private[key.process].bos[key.index].idr_handle)
    return found


def _event_pages(
    checkpoints: Sequence[KfdCheckpoint], private: Sequence[PrivateData]
) -> set[BoKey]:
    """The BOs that are their processes' event pages."""
    found = set()
    for number, (checkpoint, one) in enumerate(zip(checkpoints, private, strict=True)):
        pages = {event.user_handle for event in one.events if event.user_handle}
        if pages:
            found |= {
                BoKey(process=number, index=index)
                for index, (bo, record) in enumerate(zip(checkpoint.bos, one.bos, strict=True))
                if uapi.MAKE_HANDLE(bo.gpu_id, record.idr_handle) in pages
            }
    return found


# ---------------------------------------------------------------- with others


def refuse_strangers(
    paths: HostPaths, topology: Topology, root: int, found: Sequence[Checkpointed]
) -> None:
    """Raises SharedBuffer if a process outside the tree of *root* maps one of its buffers.

    By its render node, or by a dmabuf of it. Of this process's own mappings it is not said.
    """
    nodes = {gpu.gpu_id: f"{paths.dri}/renderD{gpu.drm_render_minor}" for gpu in topology.gpus}
    wanted = [place for one in found for _, place in places(one.checkpoint)]
    files = {
        _file(fd): place
        for one in found
        for index, place in places(one.checkpoint)
        for fd in [one.dmabufs[index]]
        if fd is not None
    }
    ours = _tree(root) | driver_pids(paths) | {os.getpid()}
    for pid in _pids():
        if pid in ours:
            continue
        try:
            lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
            name = Path(f"/proc/{pid}/comm").read_text().strip()
        except OSError:  # it ended, or is not ours to look at
            continue
        place = touched(lines, nodes, wanted, files)
        if place is not None:
            raise SharedBuffer(
                f"process {pid} ({name}) has mapped a buffer of GPU {place.gpu_id:#x}"
                f" ({place.size} bytes) that process {root} has, and would stay behind",
                advice=f"End process {pid} first, or move it as well, as part of one tree.",
            )


def _file(fd: int) -> tuple[str, int]:
    """Device and inode of a file as /proc/PID/maps has them."""
    status = os.fstat(fd)
    return f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}", status.st_ino


def touched(
    maps: Iterable[str],
    nodes: Mapping[int, str],
    wanted: Sequence[Place],
    files: Mapping[tuple[str, int], Place] | None = None,
) -> Place | None:
    """The first of the *wanted* buffers that lines of /proc/PID/maps map.

    *nodes*: render node by gpu_id. *files*: the buffers' dmabufs, by device and inode.
    """
    for line in maps:
        found = _MAPPED.match(line)
        if found is None:
            continue
        if files and (found[4], int(found[5])) in files:
            return files[found[4], int(found[5])]
        first, end, offset = (int(found[n], 16) for n in (1, 2, 3))
        for place in wanted:
            if nodes.get(place.gpu_id) == found[6] and (
                place.offset < offset + end - first and offset < place.offset + place.size
            ):
                return place
    return None


def _pids() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]


def _tree(root: int) -> set[int]:
    """*root* and all that descend from it."""
    children: dict[int, list[int]] = defaultdict(list)
    for pid in _pids():
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            continue
        children[int(stat.rpartition(")")[2].split()[1])].append(pid)
    found, pending = set(), [root]
    while pending:
        pid = pending.pop()
        found.add(pid)
        pending += children[pid]
    return found
