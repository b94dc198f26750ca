"""The one reader of KFD's sysfs: real, simulated, or a saved copy in a folder.

Formats are those of ``kfd_topology.c`` and ``kfd_process.c``: one value a file, or lines
of ``name value``. Fields that this reader does not know are skipped, fields that a
kernel does not print keep the model's defaults; what is damaged raises BrokenTopology
naming the file.
"""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import msgspec

from migrate.errors import BrokenTopology
from migrate.model import HostPaths, Value
from migrate.topology.model import Cache, Link, MemoryBank, Node, Topology

# A hotplug or partition change between two files shows as a new generation_id.
_READ_ATTEMPTS = 5
# From a folder that somebody saved, or one of sysfs, to the tree.
_AROUND = (
    "",
    "topology",
    "kfd/topology",
    "kfd/kfd/topology",
    "class/kfd/kfd/topology",
    "sys/class/kfd/kfd/topology",
    "sys/devices/virtual/kfd/kfd/topology",
    "devices/virtual/kfd/kfd/topology",
    "sys/topology",
)
_LARGEST = (1 << 64) - 1
_SKIPPED = frozenset({"number", "gpu_id", "name", "mem_banks", "caches", "links"})
_NODE_FIELDS = frozenset(f.name for f in msgspec.structs.fields(Node)) - _SKIPPED
_COUNTS = frozenset({"mem_banks_count", "io_links_count", "p2p_links_count"})
_OF_BANKS = frozenset({"heap_type", "size_in_bytes", "width", "mem_clk_max"})
_OF_CACHES = frozenset({"level", "size", "type"})
_OF_LINKS = frozenset(
    {"type", "node_from", "node_to", "weight", "min_bandwidth", "max_bandwidth", "flags"}
)
_READ = _NODE_FIELDS | _COUNTS | _OF_BANKS | _OF_CACHES | _OF_LINKS


T = TypeVar("T")


class _Hidden(Exception):
    """Not an error: the device cgroup keeps this node from us."""


def read_topology(root: str | Path) -> Topology:
    """Read the tree of *root*: the folder that has ``nodes``, or its parent.

    Raises BrokenTopology.
    """
    return _read_whole(topology_root(root), _read_once)


def read_render_minors(root: str | Path) -> dict[int, int]:
    """Number of the render node of each GPU, by gpu_id. Raises BrokenTopology.

    Caches and links are hundreds of small files, which a process that stands need not wait for.
    """
    return _read_whole(topology_root(root), _read_minors)


def _read_whole(base: Path, read: Callable[[Path, int], T]) -> T:
    """What *read* makes of one generation of a tree."""
    for _ in range(_READ_ATTEMPTS):
        before = _generation(base)
        found = read(base, before)
        if _generation(base) == before:
            return found
    raise BrokenTopology(f"{base}: the topology changes all the time, it could not be read whole")


def topology_root(root: str | Path) -> Path:
    """The folder with ``nodes`` in it, given it, ``nodes`` itself or a folder around them.

    Raises BrokenTopology.
    """
    base = Path(root)
    for around in _AROUND:
        if (base / around / "nodes").is_dir():
            return base / around
    if base.resolve().name == "nodes" and base.is_dir():
        return base.resolve().parent
    if not base.exists():
        raise BrokenTopology(f"{base}: no such folder")
    raise BrokenTopology(f"{base}: no folder `nodes` there, so it is no KFD topology tree")


def _generation(base: Path) -> int:
    path = base / "generation_id"
    return _integer(path, _text(path)) if path.exists() else 0


def _read_once(base: Path, generation: int) -> Topology:
    nodes: list[Node] = []
    hidden: list[int] = []
    for number, folder in _numbered(base / "nodes"):
        try:
            nodes.append(_read_node(number, folder))
        except _Hidden:
            hidden.append(number)
    if not nodes:
        raise BrokenTopology(f"{base / 'nodes'}: no node can be read there")
    _check_unique(base, (node.gpu_id for node in nodes if node.is_gpu))
    _check_links_are_whole(base, nodes)
    return Topology(nodes=tuple(nodes), generation_id=generation, hidden=tuple(hidden))


def _read_minors(base: Path, _generation: int) -> dict[int, int]:
    found: list[tuple[int, int]] = []
    for _, folder in _numbered(base / "nodes"):
        try:
            gpu_id = _integer(folder / "gpu_id", _text(folder / "gpu_id"))
            if gpu_id:
                properties = _properties(folder / "properties")
                found.append((gpu_id, properties.get("drm_render_minor", 0)))
        except _Hidden:
            continue
    _check_unique(base, [gpu_id for gpu_id, _ in found])
    return dict(found)


def _check_unique(base: Path, gpu_ids: Iterable[int]) -> None:
    for gpu_id, times in Counter(gpu_ids).items():
        if times > 1:
            raise BrokenTopology(f"{base}: {times} nodes have the gpu_id {gpu_id}")


def _check_links_are_whole(base: Path, nodes: Iterable[Node]) -> None:
    """A tree without any links does not tell of them; one that lacks some is damaged."""
    folders = [base / "nodes" / str(node.number) for node in nodes]
    for kind in ("io_links", "p2p_links"):
        missing = [folder for folder in folders if not (folder / kind).is_dir()]
        if len(missing) == len(folders):
            continue
        for folder in missing:
            count = _properties(folder / "properties").get(f"{kind}_count", 0)
            if count:
                raise BrokenTopology(f"{folder / kind}: missing, but {kind}_count is {count}")


def _read_node(number: int, folder: Path) -> Node:
    gpu_id = _integer(folder / "gpu_id", _text(folder / "gpu_id"))
    properties = _properties(folder / "properties")
    name = _text(folder / "name").strip() if (folder / "name").exists() else ""
    banks = tuple(
        _bank(path, p)
        for path, p in _entries(folder, "mem_banks", properties.get("mem_banks_count"))
    )
    caches = _entries(folder, "caches", properties.get("caches_count"))
    links = [
        _link(path, number, p, False)
        for path, p in _entries(folder, "io_links", properties.get("io_links_count"))
    ]
    links += [
        _link(path, number, p, True)
        for path, p in _entries(folder, "p2p_links", properties.get("p2p_links_count"))
    ]
    known = {key: value for key, value in properties.items() if key in _NODE_FIELDS}
    return Node(
        number=number,
        gpu_id=gpu_id,
        name=name,
        mem_banks=banks,
        caches=_caches(caches),
        links=tuple(sorted(links, key=lambda link: (link.node_to, link.p2p, link.weight))),
        **known,
    )


def _entries(
    folder: Path, kind: str, expected: int | None
) -> Iterator[tuple[Path, dict[str, int]]]:
    """The numbered entries of a node's folder *kind*.

    Published trees leave whole folders out, so a missing folder is "not told". Fewer
    entries than the node counts is a copy that broke off.
    """
    if not (folder / kind).is_dir():
        return
    entries = _numbered(folder / kind)
    if expected is not None and len(entries) < expected:
        raise BrokenTopology(
            f"{folder / kind}: {len(entries)} entries, but {kind}_count is {expected}"
        )
    for _, entry in entries:
        path = entry / "properties"
        yield path, _properties(path)


def _bank(path: Path, p: dict[str, int]) -> MemoryBank:
    return MemoryBank(
        heap_type=_need(path, p, "heap_type"),
        size_in_bytes=_need(path, p, "size_in_bytes"),
        width=p.get("width", 0),
        mem_clk_max=p.get("mem_clk_max", 0),
    )


def _caches(entries: Iterator[tuple[Path, dict[str, int]]]) -> tuple[Cache, ...]:
    count: Counter[tuple[int, int, int]] = Counter()
    for path, p in entries:
        count[_need(path, p, "level"), _need(path, p, "size"), _need(path, p, "type")] += 1
    return tuple(
        Cache(level=level, size=size, type=type_, count=n)
        for (level, size, type_), n in sorted(count.items())
    )


def _link(path: Path, number: int, p: dict[str, int], p2p: bool) -> Link:
    if _need(path, p, "node_from") != number:
        raise BrokenTopology(f"{path}: node_from is {p['node_from']}, but the node is {number}")
    return Link(
        type=_need(path, p, "type"),
        node_from=number,
        node_to=_need(path, p, "node_to"),
        weight=p.get("weight", 0),
        min_bandwidth=p.get("min_bandwidth", 0),
        max_bandwidth=p.get("max_bandwidth", 0),
        flags=p.get("flags", 0),
        p2p=p2p,
    )


# ---------------------------------------------------------------- files


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    """Entries whose name is a number, in the order of the numbers."""
    try:
        names = os.listdir(folder)
    except OSError as error:
        raise BrokenTopology(f"{folder}: {error.strerror}") from error
    # As the kernel writes them: no other script's digits, and no 01 beside 1.
    plain = [name for name in names if name.isascii() and name.isdecimal()]
    return sorted((int(name), folder / name) for name in plain if name == str(int(name)))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        if error.errno == errno.EPERM:  # kfd_devcgroup_check_permission
            raise _Hidden from error
        raise BrokenTopology(f"{path}: {error.strerror}") from error


def _properties(path: Path) -> dict[str, int]:
    result: dict[str, int] = {}
    text = _text(path)
    for line in text.splitlines():
        key, *value = line.split(maxsplit=1) or ("",)
        if key in _READ:
            result[key] = _integer(path, "".join(value), f" of {key}")
    if not result:
        raise BrokenTopology(f"{path}: {'no field of KFD in it' if text.strip() else 'empty'}")
    return result


def _integer(path: Path, text: str, what: str = "") -> int:
    digits = text.strip()
    if not (digits.isascii() and digits.isdecimal()):
        raise BrokenTopology(f"{path}: the value{what} is {digits[:40]!r}, not a number")
    if len(digits) > 20 or int(digits) > _LARGEST:
        raise BrokenTopology(f"{path}: the value{what} has more than 64 bits")
    return int(digits)


def _need(path: Path, p: dict[str, int], key: str) -> int:
    try:
        return p[key]
    except KeyError:
        raise BrokenTopology(f"{path}: no field {key}") from None


# ---------------------------------------------------------------- processes


class QueueUsage(Value):
    """A queue of a process. ``size`` in bytes, ``type`` is KFD_QUEUE_TYPE_* of the driver."""

    queue_id: int
    gpu_id: int
    size: int
    type: int


class ProcessUsage(Value):
    """What a KFD process holds: bytes of VRAM per actual gpu_id, and its queues."""

    pid: int
    pasid: int
    vram: tuple[tuple[int, int], ...]
    queues: tuple[QueueUsage, ...]


def read_process(paths: HostPaths, pid: int) -> ProcessUsage | None:
    """What ``<kfd_sysfs>/proc/PID`` says, None if there is no such KFD process (any more)."""
    folder = Path(paths.kfd_sysfs) / "proc" / str(pid)
    try:
        pasid = int((folder / "pasid").read_text())
        vram = sorted(
            (int(path.name.removeprefix("vram_")), int(path.read_text()))
            for path in folder.glob("vram_*")
        )
    except (OSError, ValueError):
        return None
    queues = tuple(_queues(folder / "queues"))
    return ProcessUsage(pid=pid, pasid=pasid, vram=tuple(vram), queues=queues)


def _queues(folder: Path) -> Iterator[QueueUsage]:
    """The queues; one that is destroyed while we read is left out."""
    try:
        entries = sorted((int(n), folder / n) for n in os.listdir(folder) if n.isdecimal())
    except OSError:
        return
    for number, entry in entries:
        try:
            gpu_id, size, type_ = (int((entry / n).read_text()) for n in ("gpuid", "size", "type"))
        except (OSError, ValueError):
            continue
        yield QueueUsage(queue_id=number, gpu_id=gpu_id, size=size, type=type_)


def read_processes(paths: HostPaths) -> tuple[ProcessUsage, ...]:
    """All KFD processes of the host, by pid."""
    try:
        pids = sorted(int(n) for n in os.listdir(Path(paths.kfd_sysfs) / "proc") if n.isdecimal())
    except OSError:
        return ()
    found = (read_process(paths, pid) for pid in pids)
    return tuple(usage for usage in found if usage is not None)


def busy_gpus(processes: Iterable[ProcessUsage], apart: Collection[int] = ()) -> frozenset[int]:
    """GPUs on which a process holds VRAM or a queue, the pids in *apart* not counted."""
    found: set[int] = set()
    for usage in processes:
        if usage.pid not in apart:
            found.update(gpu_id for gpu_id, size in usage.vram if size)
            found.update(queue.gpu_id for queue in usage.queues)
    return frozenset(found)


# ---------------------------------------------------------------- VRAM in use


class VramUsage(Value):
    """VRAM of one GPU in bytes, as the base driver counts it (all processes, and itself)."""

    gpu_id: int
    total: int
    used: int

    @property
    def free(self) -> int:
        """Bytes not taken."""
        return max(0, self.total - self.used)


def read_vram(paths: HostPaths, topology: Topology) -> tuple[VramUsage, ...]:
    """VRAM of every GPU from ``mem_info_vram_{total,used}``; GPUs that do not tell are left out."""
    found = []
    for gpu in topology.gpus:
        device = Path(paths.drm_sysfs) / f"renderD{gpu.drm_render_minor}" / "device"
        try:
            total = int((device / "mem_info_vram_total").read_text())
            used = int((device / "mem_info_vram_used").read_text())
        except (OSError, ValueError):
            continue
        found.append(VramUsage(gpu_id=gpu.gpu_id, total=total, used=used))
    return tuple(found)
