"""One HTML page, complete in itself: each drill's verdict and a picture of its time."""

from __future__ import annotations

from html import escape

from scenarios.drills.outcome import Outcome, Results

WIDTH, LEFT, LANE, BAR = 900, 170, 26, 18  # pixels of the picture
LANES = (
    "source",
    "process at the source",
    "owner",
    "copy at the destination",
    "destination",
)
COLOURS = {
    "SETUP": "#cfe0f5", "ACTIVE": "#a9c8ee", "DEVICE": "#f6d58a", "GRANTED": "#f0a35e",
    "RELEASING": "#a8d8b0", "DONE": "#6dbb7b", "UNDOING": "#d9c2ee", "RECLAIMED": "#c9a8ee",
    "ROLLED_BACK": "#b79adb",
    "RESERVED": "#cfe0f5", "RESTORING": "#f6d58a", "PREPARED": "#f0a35e", "OWNED": "#6dbb7b",
    "CONFIRMED": "#5aa868", "REVOKING": "#e3b0a0", "REVOKED": "#d99580",
    "REFUSING": "#e3a0a0", "REFUSED": "#d98080", "ABORTED": "#c9c9c9",
    "OWNED_DEAD": "#c05050",
    "runs": "#4f9d5d", "stands": "#b9c3cc", "source": "#5b8fd0", "destination": "#4f9d5d",
    "unknown": "#e0b040",
}  # fmt: skip
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1100px; color: #222 }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 2em } h3 { font-size: 1em; margin: 0 }
section { border: 1px solid #ddd; border-radius: 6px; padding: .8em 1em; margin: .8em 0 }
section.failed { border-color: #c33; background: #fff6f6 }
.why { color: #555; margin: .2em 0 } .facts { font-size: .87em; color: #333; margin: .3em 0 }
.problem { color: #a00; font-weight: 600 } code { font-size: .95em }
svg { width: 100%; height: auto; font: 11px system-ui, sans-serif }
table { border-collapse: collapse; font-size: .9em }
td, th { padding: .15em .8em; text-align: left }
pre { font-size: .75em; overflow: auto; max-height: 20em; background: #f4f4f4; padding: .5em }
"""


def render(results: Results) -> str:
    """The page."""
    families = list(dict.fromkeys(o.drill.family for o in results.outcomes))
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>Drills</title>",
        f"<style>{STYLE}</style>"
        f"<h1>Drills: {results.passed} of {len(results.outcomes)} passed</h1>",
        f"<p>{results.seconds:.0f} seconds by the wall. Real agents, real processes, simulated GPU"
        " nodes. After each drill exactly one copy of the process is there (or it ended, where"
        " that is right), it comes to the digest of a twin that nobody hurt, and nothing is left"
        " behind. Times are seconds since the command.</p>",
        "<table><tr><th>family<th>passed<th>failed</tr>",
    ]
    for family in families:
        mine = [o for o in results.outcomes if o.drill.family == family]
        passed = sum(o.passed for o in mine)
        parts.append(
            f'<tr><td><a href="#{escape(family)}">{escape(family)}</a><td>{passed}'
            f"<td>{len(mine) - passed}</tr>"
        )
    parts.append("</table>")
    for family in families:
        parts.append(f'<h2 id="{escape(family)}">{escape(family)}</h2>')
        parts += [_section(o) for o in results.outcomes if o.drill.family == family]
    return "\n".join(parts) + "\n"


def _section(outcome: Outcome) -> str:
    drill, expect = outcome.drill, outcome.drill.expect
    word = "passed" if outcome.passed else "failed"
    at = f" at <code>{escape(drill.point)}</code>" if drill.point else ""
    exit_code = "killed" if outcome.exit is None else str(outcome.exit)
    facts = (
        f"{escape(drill.fault)}: {escape(drill.actor)}{at} · owner <b>{escape(outcome.owner)}</b>"
        f" · runs: {escape(outcome.runs)} · command: {exit_code} {escape(outcome.reason)}"
        f" · journals: {outcome.source or 'none'}, {outcome.destination or 'none'}"
        f" · {outcome.seconds:.1f} s · expected owner: {expect.owner}"
    )
    problems = "".join(f'<div class="problem">{escape(p)}</div>' for p in outcome.problems)
    log = f"<pre>{escape(outcome.log)}</pre>" if outcome.log else ""
    return (
        f'<section class="{word}" id="{escape(drill.name)}"><h3>{escape(drill.name)}: {word}</h3>'
        f'<div class="why">{escape(drill.why)}</div><div class="facts">{facts}</div>'
        f"{problems}{picture(outcome)}{log}</section>"
    )


def picture(outcome: Outcome) -> str:
    """The timeline as SVG: a lane for each side, each copy and the owner; faults as lines."""
    length = max([span.end for span in outcome.spans] + [mark.at for mark in outcome.marks] + [1.0])
    scale = (WIDTH - LEFT - 10) / length
    marks_top = len(LANES) * LANE + 24
    height = marks_top + 14 * len(outcome.marks) + 6
    parts = [f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="timeline">']
    for row, lane in enumerate(LANES):
        top = row * LANE + 4
        parts.append(f'<text x="4" y="{top + 13}" fill="#333">{lane}</text>')
        for span in outcome.spans:
            if span.lane == lane:
                parts.append(
                    _bar(LEFT + span.start * scale, (span.end - span.start) * scale, top, span.text)
                )
    axis = len(LANES) * LANE + 6
    step = next(s for s in (0.5, 1, 2, 5, 10, 20, 50, 100, 1000) if length / s <= 12)
    for tick in range(int(length / step) + 1):
        x = LEFT + tick * step * scale
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{axis}" y2="{axis + 4}" stroke="#888"/>')
        parts.append(f'<text x="{x + 2:.1f}" y="{axis + 12}" fill="#888">{tick * step:g}</text>')
    for row, mark in enumerate(outcome.marks):
        x, y = LEFT + mark.at * scale, marks_top + 14 * row + 8
        colour = "#444" if mark.text.startswith(("migrate", "mended", "the command")) else "#c00"
        anchor = "end" if x > WIDTH * 0.7 else "start"
        parts.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{y}" stroke="{colour}"'
            ' stroke-dasharray="3 2"/>'
            f'<text x="{x + (3 if anchor == "start" else -3):.1f}" y="{y + 3}" fill="{colour}"'
            f' text-anchor="{anchor}">{escape(mark.text)} ({mark.at:.2f})</text>'
        )
    parts.append("</svg>")
    return "".join(parts)


def _bar(x: float, width: float, top: int, text: str) -> str:
    width = max(width, 1.0)
    colour = COLOURS.get(text, "#dddddd")
    label = ""
    if width > 7 * len(text):
        label = f'<text x="{x + 3:.1f}" y="{top + 13}" fill="#111">{escape(text)}</text>'
    return (
        f'<rect x="{x:.1f}" y="{top}" width="{width:.1f}" height="{BAR}" fill="{colour}">'
        f"<title>{escape(text)}</title></rect>{label}"
    )
