"""What a benchmark leaves: JSON, a table in Markdown, plots in SVG, the machine described."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from scenarios.evidence import commit

__all__ = ["Plot", "bars", "commit", "points", "write"]
WIDTH, HEIGHT, EDGE = 640, 320, 60
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22")
Rows = Sequence[tuple[str, Mapping[str, Any]]]
Plot = tuple[str, str]  # kind of the vertical axis, the drawing inside the frame


def points(series: Mapping[str, str], rows: Rows, unit: str, *, across: str = "") -> Plot:
    """Lines through points: of each row the value of a key, over another key or the row's name."""
    xs = [float(row[across]) if across else float(name.split()[0]) for name, row in rows]
    most_x = max(xs) * 1.05
    most_y = max(float(row[key]) for key in series.values() for _, row in rows) * 1.1 or 1.0
    drawn = [_axis(most_y), _ticks([(x / most_x, f"{x:.3g}") for x in xs])]
    for (label, key), colour in zip(series.items(), COLOURS, strict=False):
        at = [
            (_x(x / most_x), _y(float(row[key]) / most_y))
            for x, (_, row) in zip(xs, rows, strict=True)
        ]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
        drawn.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        drawn += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>' for x, y in at]
        drawn.append(_legend(list(series).index(label), label, colour))
    return unit, "\n".join(drawn)


def bars(rows: Rows, key: str, unit: str) -> Plot:
    """A bar a row."""
    most = max(float(row[key]) for _, row in rows) * 1.1 or 1.0
    step = 1 / len(rows)
    drawn = [_axis(most), _ticks([((i + 0.5) * step, name) for i, (name, _) in enumerate(rows)])]
    for index, (_, row) in enumerate(rows):
        top, base = _y(float(row[key]) / most), _y(0)
        left, width = _x((index + 0.15) * step), (WIDTH - 2 * EDGE) * step * 0.7
        drawn.append(
            f'<rect x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" height="{base - top:.1f}"'
            f' fill="{COLOURS[0]}"/>'
            f'<text x="{left + width / 2:.1f}" y="{top - 4:.1f}" text-anchor="middle">'
            f"{float(row[key]):.2f}</text>"
        )
    return unit, "\n".join(drawn)


def write(
    folder: Path, name: str, result: Mapping[str, Any], rows: Rows, plots: Mapping[str, Plot]
) -> None:
    """NAME.json, NAME.md and a NAME-N.svg for each plot into *folder*."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    page = [f"# Benchmark: {name}", "", f"Commit {result['commit']}.", ""]
    page += [f"* {key}: {value}" for key, value in result["machine"].items()]
    page += ["", *table(rows), ""]
    for number, (title, (unit, drawn)) in enumerate(plots.items(), 1):
        file = f"{name}-{number}.svg"
        (folder / file).write_text(_svg(title, unit, drawn))
        page += [f"![{title}]({file})", ""]
    (folder / f"{name}.md").write_text("\n".join(page))


def table(rows: Rows) -> list[str]:
    """Lines of a Markdown table."""
    columns = [key for key, value in rows[0][1].items() if isinstance(value, (int, float, str))]
    lines = [f"| | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    for name, row in rows:
        cells = [f"{row[c]:.4g}" if isinstance(row[c], float) else str(row[c]) for c in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _x(part: float) -> float:
    return EDGE + part * (WIDTH - 2 * EDGE)


def _y(part: float) -> float:
    return HEIGHT - EDGE - part * (HEIGHT - 2 * EDGE)


def _axis(most: float) -> str:
    lines = []
    for number in range(5):
        y = _y(number / 4)
        lines.append(
            f'<line x1="{EDGE}" x2="{WIDTH - EDGE}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>'
            f'<text x="{EDGE - 6}" y="{y + 4:.1f}" text-anchor="end">{most * number / 4:.3g}</text>'
        )
    return "\n".join(lines)


def _ticks(marks: Sequence[tuple[float, str]]) -> str:
    return "\n".join(
        f'<text x="{_x(part):.1f}" y="{HEIGHT - EDGE + 18}" text-anchor="middle">'
        f"{escape(label)}</text>"
        for part, label in marks
    )


def _legend(number: int, label: str, colour: str) -> str:
    y = 40 + 16 * number
    return f'<text x="{EDGE + 8}" y="{y}" fill="{colour}">{escape(label)}</text>'


def _svg(title: str, unit: str, drawn: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}"'
        ' font-family="sans-serif" font-size="12">\n'
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>\n'
        f'<text x="{WIDTH / 2}" y="20" text-anchor="middle" font-size="14">{escape(title)}</text>\n'
        f'<text x="8" y="20">{escape(unit)}</text>\n{drawn}\n</svg>\n'
    )
