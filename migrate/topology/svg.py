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

_RING = 165  # px, of few GPUs; more of them widen it
_APART = 66  # px between neighbours on it
_MARGIN = 100  # px, for what is written beside them
_MANY = 16  # GPUs from which on links are drawn thin
_LINE = 130  # characters
_COLOURS = ("#0b6e99", "#b35900", "#3a7d34", "#7b3fa0", "#a02c2c", "#5b5b1a", "#1f4f8b", "#8a4a6b")
_NO_HIVE = "#555555"
_STYLE = (
    "text{font-family:sans-serif;font-size:12px;fill:#222}.t{font-size:15px;font-weight:bold}"
    ".g{fill:#fff;text-anchor:middle;font-weight:bold}.n{text-anchor:middle;font-size:11px}.p{font-size:11px}"
)


def svg(
    source: Topology, destination: Topology, result: MatchResult, names: tuple[str, str]
) -> str:
    """The picture. GPUs show their gpu_id, and where they go or come from."""
    pairs = dict(result.map.pairs) if result.map else {}
    back = {new: old for old, new in pairs.items()}
    verdict = list(_verdict(result))
    ring = max(_RING, max(len(m.gpus) for m in (source, destination)) * _APART / (2 * math.pi))
    side = round(2 * (ring + _MARGIN))
    height = side + 44 + 18 * len(verdict)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * side} {height}"'
        f' width="{2 * side}" height="{height}">',
        f'<style>{_STYLE}</style><rect width="100%" height="100%" fill="#fff"/>',
        *_machine(source, (0, ring), names[0], {old: f"to {new}" for old, new in pairs.items()}),
        *_machine(
            destination, (side, ring), names[1], {new: f"from {old}" for new, old in back.items()}
        ),
        f'<text x="16" y="{side + 24}">Circles: GPUs by gpu_id, colour and letter: hive,'
        " n: NUMA node. Thick lines: XGMI, thin dashed lines: PCIe.</text>",
    ]
    for index, line in enumerate(verdict):
        parts.append(f'<text x="16" y="{side + 46 + 18 * index}">{escape(line)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _verdict(result: MatchResult) -> Iterator[str]:
    if result.map is None:
        for refusal in result.refusals[:3]:
            yield from textwrap.wrap(refusal.message, _LINE, subsequent_indent="    ")
        if result.advice:
            yield "Smallest relaxation that allows a map: " + ", ".join(result.advice)


def _machine(
    topology: Topology, at: tuple[int, float], title: str, partner: Mapping[int, str]
) -> Iterator[str]:
    """*at*: the left border and the radius of the ring."""
    left = at[0]
    joints = Joints(topology)
    letters = hive_letters(topology)
    order = sorted(topology.gpus, key=lambda g: (letters.get(g.hive_id, "~"), g.number))
    centre = left + at[1] + _MARGIN, at[1] + _MARGIN + 12
    place = _ring(order, centre, at[1])
    thin = len(order) > _MANY
    yield f'<text class="t" x="{left + 16}" y="26">{escape(title)}</text>'
    for wanted in (LinkKind.PCIE, LinkKind.XGMI):  # XGMI above PCIe
        for a, b in combinations(order, 2):
            joint = joints.between(a, b)
            if max(joint.kinds) is wanted:
                ends = place[a.gpu_id], place[b.gpu_id]
                yield _line(ends, wanted, max(joint.bandwidth), thin)
    for gpu in order:
        yield from _circle(gpu, place[gpu.gpu_id], letters, joints)
        if gpu.gpu_id in partner:
            yield _beside(place[gpu.gpu_id], centre, partner[gpu.gpu_id])


def _ring(
    order: list[Node], centre: tuple[float, float], ring: float
) -> dict[int, tuple[float, float]]:
    found = {}
    for index, gpu in enumerate(order):
        angle = 2 * math.pi * (index + 0.5) / len(order) - math.pi / 2
        found[gpu.gpu_id] = (
            centre[0] + ring * math.cos(angle),
            centre[1] + ring * math.sin(angle),
        )
    return found


def _line(
    between: tuple[tuple[float, float], tuple[float, float]],
    kind: LinkKind,
    bandwidth: int,
    thin: bool,
) -> str:
    """*thin*: hundreds of links would be one black disc else."""
    a, b = between
    ends = f'x1="{a[0]:.1f}" y1="{a[1]:.1f}" x2="{b[0]:.1f}" y2="{b[1]:.1f}"'
    if kind is LinkKind.XGMI:
        width = 0.6 if thin else 2.5 + min(bandwidth, 200_000) / 50_000
        faint = ' stroke-opacity="0.3"' if thin else ""
        return f'<line {ends} stroke="#444" stroke-width="{width:.1f}"{faint}/>'
    width = 0.3 if thin else 1
    return f'<line {ends} stroke="#aaa" stroke-width="{width}" stroke-dasharray="4 3"/>'


def _circle(
    gpu: Node, at: tuple[float, float], letters: Mapping[int, str], joints: Joints
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


def _beside(at: tuple[float, float], centre: tuple[float, float], text: str) -> str:
    """Outside of the ring, where no links are."""
    away = math.dist(at, centre)
    along, down = (at[0] - centre[0]) / away, (at[1] - centre[1]) / away
    anchor = "middle" if abs(along) < 0.4 else "start" if along > 0 else "end"
    return (
        f'<text class="p" x="{at[0] + 30 * along:.1f}" y="{at[1] + 36 * down + 4:.1f}"'
        f' text-anchor="{anchor}">{escape(text)}</text>'
    )
