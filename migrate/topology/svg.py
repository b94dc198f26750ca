"""Both machines as one SVG picture: GPUs on a ring, hives by colour, links as lines."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping
from itertools import combinations
from xml.sax.saxutils import escape

from migrate.topology.drawing import hive_letters
from migrate.topology.match import MatchResult
from migrate.topology.model import Node, Topology
from migrate.topology.relations import Joints, LinkKind

_SIDE = 460  # px, a machine's square
_RING = 165
_LINE = 130  # characters
_COLOURS = ("#0b6e99", "#b35900", "#3a7d34", "#7b3fa0", "#a02c2c", "#5b5b1a", "#1f4f8b", "#8a4a6b")
_NO_HIVE = "#555555"
_STYLE = (
    "text{font-family:sans-serif;font-size:12px;fill:#222}.t{font-size:15px;font-weight:bold}"
    ".g{fill:#fff;text-anchor:middle;font-weight:bold}.n{text-anchor:middle;font-size:11px}"
)


def svg(
    source: Topology, destination: Topology, result: MatchResult, names: tuple[str, str]
) -> str:
    """The picture. GPUs show their gpu_id, and where they go or come from."""
    pairs = dict(result.map.pairs) if result.map else {}
    back = {new: old for old, new in pairs.items()}
    verdict = list(_verdict(result))
    height = _SIDE + 44 + 18 * len(verdict)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * _SIDE} {height}"'
        f' width="{2 * _SIDE}" height="{height}">',
        f'<style>{_STYLE}</style><rect width="100%" height="100%" fill="#fff"/>',
        *_machine(source, 0, names[0], {old: f"to {new}" for old, new in pairs.items()}),
        *_machine(destination, _SIDE, names[1], {new: f"from {old}" for new, old in back.items()}),
        f'<text x="16" y="{_SIDE + 24}">Circles: GPUs by gpu_id, colour and letter: hive,'
        " n: NUMA node. Thick lines: XGMI, thin dashed lines: PCIe.</text>",
    ]
    for index, line in enumerate(verdict):
        parts.append(f'<text x="16" y="{_SIDE + 46 + 18 * index}">{escape(line)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _verdict(result: MatchResult) -> Iterator[str]:
    if result.map is None:
        for refusal in result.refusals[:3]:
            yield from textwrap.wrap(refusal.message, _LINE, subsequent_indent="    ")
        if result.advice:
            yield "Smallest relaxation that allows a map: " + ", ".join(result.advice)


def _machine(
    topology: Topology, left: int, title: str, partner: Mapping[int, str]
) -> Iterator[str]:
    joints = Joints(topology)
    letters = hive_letters(topology)
    order = sorted(topology.gpus, key=lambda g: (letters.get(g.hive_id, "~"), g.number))
    place = _ring(order, left)
    yield f'<text class="t" x="{left + 16}" y="26">{escape(title)}</text>'
    for wanted in (LinkKind.PCIE, LinkKind.XGMI):  # XGMI above PCIe
        for a, b in combinations(order, 2):
            joint = joints.between(a, b)
            if max(joint.kinds) is wanted:
                yield _line(place[a.gpu_id], place[b.gpu_id], wanted, max(joint.bandwidth))
    for gpu in order:
        yield from _circle(gpu, place[gpu.gpu_id], letters, joints, partner.get(gpu.gpu_id, ""))


def _ring(order: list[Node], left: int) -> dict[int, tuple[float, float]]:
    centre = left + _SIDE / 2, _SIDE / 2 + 12
    found = {}
    for index, gpu in enumerate(order):
        angle = 2 * math.pi * (index + 0.5) / len(order) - math.pi / 2
        found[gpu.gpu_id] = (
            centre[0] + _RING * math.cos(angle),
            centre[1] + _RING * math.sin(angle),
        )
    return found


def _line(a: tuple[float, float], b: tuple[float, float], kind: LinkKind, bandwidth: int) -> str:
    ends = f'x1="{a[0]:.1f}" y1="{a[1]:.1f}" x2="{b[0]:.1f}" y2="{b[1]:.1f}"'
    if kind is LinkKind.XGMI:
        width = 2.5 + min(bandwidth, 200_000) / 50_000
        return f'<line {ends} stroke="#444" stroke-width="{width:.1f}"/>'
    return f'<line {ends} stroke="#aaa" stroke-width="1" stroke-dasharray="4 3"/>'


def _circle(
    gpu: Node, at: tuple[float, float], letters: Mapping[int, str], joints: Joints, partner: str
) -> Iterator[str]:
    letter = letters.get(gpu.hive_id, "")
    colour = _NO_HIVE
    if letter:
        colour = _COLOURS[list(letters.values()).index(letter) % len(_COLOURS)]
    numa = joints.numa.get(gpu.number)
    note = " ".join(filter(None, (letter, "" if numa is None else f"n{numa}")))
    x, y = at
    yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="25" fill="{colour}"/>'
    yield f'<text class="g" x="{x:.1f}" y="{y + 1:.1f}">{gpu.gpu_id}</text>'
    yield f'<text class="g n" x="{x:.1f}" y="{y + 14:.1f}">{escape(note)}</text>'
    if partner:
        yield f'<text class="n" x="{x:.1f}" y="{y + 39:.1f}">{escape(partner)}</text>'
