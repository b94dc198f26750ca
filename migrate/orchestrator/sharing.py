"""Buffers that more than one handle or process has: found, and refused.

IMPORT_DMABUF gives a second handle of one buffer, and an IPC handle of HSA is such an import. A
checkpoint shows both as buffers of their own, each with a dmabuf that was made for it (so an
inode tells nothing), and RESTORE would make two buffers out of one. What tells is the offset
by which a buffer is mapped from its render node: the kernel gives it to the buffer itself
(``drm_vma_node``), so that equal offsets of one GPU are one buffer, whoever has it. Linux 6.1
imports on the GPU of the buffer alone; later kernels also make imports on other GPUs, which
have offsets of their own and are not found here.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from migrate.errors import SharedBuffer
from migrate.kfd.checkpoint import KfdCheckpoint
from migrate.model import HostPaths, Value
from migrate.topology.model import Topology

# A line of /proc/PID/maps (proc(5)): addresses, rights, offset, device, inode, path.
_MAPPED = re.compile(r"([0-9a-f]+)-([0-9a-f]+) \S+ ([0-9a-f]+) \S+ \d+ +(\S+)")


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


def shared(checkpoints: Sequence[KfdCheckpoint]) -> dict[Place, list[tuple[int, int]]]:
    """Buffers with more than one owner: (KFD process, bucket index) of each."""
    owners: dict[Place, list[tuple[int, int]]] = defaultdict(list)
    for number, checkpoint in enumerate(checkpoints):
        for index, place in places(checkpoint):
            owners[place].append((number, index))
    return {place: who for place, who in owners.items() if len(who) > 1}


def refuse_shared(checkpoints: Sequence[KfdCheckpoint]) -> None:
    """Raises SharedBuffer if processes, or two handles of one, share a buffer."""
    for who in shared(checkpoints).values():
        names = ", ".join(
            f"{checkpoints[number].bos[index].addr:#x} in KFD process {number}"
            for number, index in who
        )
        raise SharedBuffer(f"one buffer is at {names}")


def refuse_strangers(
    paths: HostPaths, topology: Topology, root: int, checkpoints: Sequence[KfdCheckpoint]
) -> None:
    """Raises SharedBuffer if a process outside the tree of *root* maps one of its buffers."""
    nodes = {gpu.gpu_id: f"{paths.dri}/renderD{gpu.drm_render_minor}" for gpu in topology.gpus}
    wanted = [place for checkpoint in checkpoints for _, place in places(checkpoint)]
    ours = _tree(root)
    for pid in _pids():
        if pid in ours:
            continue
        try:
            lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
            name = Path(f"/proc/{pid}/comm").read_text().strip()
        except OSError:  # it ended, or is not ours to look at
            continue
        place = touched(lines, nodes, wanted)
        if place is not None:
            raise SharedBuffer(
                f"process {pid} ({name}) has mapped a buffer of GPU {place.gpu_id:#x}"
                f" ({place.size} bytes) that process {root} has, and would stay behind",
                advice=f"End process {pid} first, or move it as well, as part of one tree.",
            )


def touched(maps: Iterable[str], nodes: dict[int, str], wanted: Sequence[Place]) -> Place | None:
    """The first of the *wanted* buffers that lines of /proc/PID/maps map."""
    for line in maps:
        found = _MAPPED.match(line)
        if found is None or found[4] not in nodes.values():
            continue
        first, end, offset = (int(found[n], 16) for n in (1, 2, 3))
        for place in wanted:
            if nodes.get(place.gpu_id) == found[4] and (
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
