"""A machine as text: its sockets and hives, and what joins its GPUs."""

from __future__ import annotations

from collections.abc import Iterator

from migrate.topology.model import Node, Topology
from migrate.topology.relations import Joint, Joints, LinkKind

LEGEND = "X XGMI (GB/s where told), p PCIe, . none"
_WIDE = 16  # GPUs up to which bandwidths are shown


def hive_letters(topology: Topology) -> dict[int, str]:
    """A letter per hive that has GPUs here, in the order of the nodes."""
    letters: dict[int, str] = {}
    for gpu in topology.gpus:
        if gpu.hive_id and gpu.hive_id not in letters:
            letters[gpu.hive_id] = _letter(len(letters))
    return letters


def _letter(index: int) -> str:
    return chr(ord("A") + index) if index < 26 else f"Z{index}"


def draw(topology: Topology, title: str) -> list[str]:
    """Lines: GPUs by NUMA node with their hives, then the links between them."""
    joints = Joints(topology)
    return [title, *_places(topology, joints), *_matrix(topology, joints)]


def _places(topology: Topology, joints: Joints) -> Iterator[str]:
    letters = hive_letters(topology)
    sockets = sorted({joints.numa.get(gpu.number, -1) for gpu in topology.gpus})
    for socket in sockets:
        gpus = [gpu for gpu in topology.gpus if joints.numa.get(gpu.number, -1) == socket]
        name = f"NUMA node {socket}" if socket >= 0 else "NUMA node not told"
        for index, gpu in enumerate(gpus):
            branch = "└─" if index == len(gpus) - 1 else "├─"
            if index == 0:
                yield f"  {name}"
            yield f"  {branch} {_gpu(gpu, letters)}{_partition(gpu, topology)}"


def _gpu(gpu: Node, letters: dict[int, str]) -> str:
    hive = f", hive {letters[gpu.hive_id]}" if gpu.hive_id else ""
    vram = f", {gpu.vram_bytes / (1 << 30):.0f} GiB" if gpu.vram_bytes else ""
    return f"GPU {gpu.gpu_id} {gpu.gfx} renderD{gpu.drm_render_minor} {gpu.pci}{vram}{hive}"


def _partition(gpu: Node, topology: Topology) -> str:
    """Which partition of its device it is, where the device shows several (DPX to CPX)."""
    parts = [other.gpu_id for other in topology.gpus if other.physical == gpu.physical]
    if len(parts) < 2:
        return ""
    xccs = f"{gpu.num_xcc} XCC" + "s" * (gpu.num_xcc > 1)
    return f", partition {parts.index(gpu.gpu_id) + 1} of {len(parts)} ({xccs})"


def _matrix(topology: Topology, joints: Joints) -> Iterator[str]:
    gpus = topology.gpus
    if len(gpus) < 2:
        return
    wide = len(gpus) <= _WIDE
    width = 7 if wide else 2
    label = max(len(str(gpu.gpu_id)) for gpu in gpus)
    if wide:
        yield "  " + " " * label + "".join(f"{gpu.gpu_id:>{width}}" for gpu in gpus)
    for a in gpus:
        cells = ("-" if a is b else _cell(joints.between(a, b), wide) for b in gpus)
        yield f"  {a.gpu_id:>{label}}" + "".join(f"{cell:>{width}}" for cell in cells)


def _cell(joint: Joint, wide: bool) -> str:
    """Of a to b."""
    kind, bandwidth = joint.kinds[0], joint.bandwidth[0]
    if kind is LinkKind.XGMI:
        return f"X{bandwidth // 1000}" if wide and bandwidth else "X"
    return "p" if kind is LinkKind.PCIE else "."
