"""What a drill is: data files beside this module, each a family of drills.

A file names what all its drills have in common under ``[common]``, and each drill under
``[[drill]]``. Expectations are written down, entry by entry; none is computed from what
came out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from migrate import faults
from migrate.decode import convert
from migrate.errors import UsageError
from migrate.model import Value

FOLDER = Path(__file__).parent

ACTORS = {
    "source-agent": {"kill", "exit", "terminate", "pause"},
    "destination-agent": {"kill", "exit", "terminate", "pause"},
    "cli": {"kill", "interrupt"},
    "operator": {"abort"},
    "workload": {"kill"},
    "copy": {"kill"},
    "source-host": {"kill"},
    "destination-host": {"kill"},
    "network": {
        "cut-control", "stall-control", "cut-data", "stall-data", "cut-all", "loss",
    },
    "source-disk": {"full", "fails"},
    "destination-disk": {"full", "fails"},
    "source-clock": {"jump"},
    "destination-clock": {"jump"},
    "source-gpu": {"scheduler_hang", "process_info_stall"},
    "destination-gpu": {"restore_enomem", "resume_dead"},
}  # fmt: skip
HELD_OPEN = "sleep:3"
OWNERS = ("source", "destination", "unknown")
PLACES = ("source", "destination", "nowhere", "frozen")


class Expect(Value):
    """What must come out.

    ``owner``: who owns the process in the end, by the source's journal. ``runs``: where it
    is: source, destination, nowhere (it ended), frozen (held at the source). ``exit`` and
    ``reason``: of the ``migrate run`` that watched; no exit for one that was killed.
    ``source`` and ``destination``: last states in the journals, "" for no record.
    """

    owner: str
    runs: str
    source: str
    destination: str
    exit: int | None = None
    reason: str = ""


class Drill(Value):
    """One drill.

    At ``point`` (its ``count``-th time; "" for at once) ``fault`` strikes ``actor``. After
    ``after`` seconds what was broken is mended: an agent started again, a network healed, a
    disk freed; with ``lasts`` only when the command has ended. ``prepare`` holds further fault
    points of agents, ``options`` those of ``migrate run``. ``alone`` seconds nobody mends
    anything, and ``meanwhile`` the process must run, or stay frozen and use no CPU time.
    ``hangs``: the copy's queues never start, though RESUME says 0. ``amount``: bytes or seconds
    or a share, as the fault wants. ``limit`` in seconds.
    """

    name: str
    why: str
    actor: str
    fault: str
    expect: Expect
    family: str = ""
    point: str = ""
    count: int = 1
    after: float = 0.0
    lasts: bool = False
    prepare: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    hangs: bool = False
    alone: float = 0.0
    meanwhile: str = ""
    amount: float = 0.0
    limit: float = 240.0

    def faults_of(self, side: str) -> str:
        """MIGRATE_FAULTS of one side's agent."""
        found = [text for text in self.prepare if text.startswith(side)]
        if self.point.startswith(f"{side}."):
            found.append(f"{self.point}={self.action}@{self.count}")
        return ",".join(found)

    @property
    def action(self) -> str:
        """What the fault point itself does: strike, or hold the moment open for us."""
        if self.actor == "operator":
            return HELD_OPEN  # the agent must answer meanwhile
        own = self.point.partition(".")[0] + "-agent"
        return self.fault if self.actor == own and self.fault in {"kill", "exit"} else "stop"


def load(folder: Path = FOLDER) -> tuple[Drill, ...]:
    """All drills of the data files, checked. Raises UsageError naming file and drill."""
    found: list[Drill] = []
    for path in sorted(folder.glob("*.toml")):
        found += _read(path)
    names = [drill.name for drill in found]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"there are two drills {name!r}")
    return tuple(found)


def _read(path: Path) -> list[Drill]:
    try:
        document: dict[str, Any] = msgspec.toml.decode(path.read_bytes())
        common = document.get("common", {})
        return [_drill(path.stem, common, entry) for entry in document.get("drill", [])]
    except (OSError, msgspec.DecodeError) as error:
        raise UsageError(f"{path}: {error}") from error


def _drill(family: str, common: dict[str, Any], entry: dict[str, Any]) -> Drill:
    merged = {**common, **entry, "family": family}
    merged["expect"] = {**common.get("expect", {}), **entry.get("expect", {})}
    try:
        drill = convert(merged, Drill)
    except msgspec.ValidationError as error:
        raise UsageError(f"{family}: {entry.get('name', '?')}: {error}") from error
    _check(drill)
    return drill


def _check(drill: Drill) -> None:
    def need(condition: bool, text: str) -> None:
        if not condition:
            raise UsageError(f"{drill.family}: {drill.name}: {text}")

    need(drill.fault in ACTORS.get(drill.actor, ()), f"{drill.actor} has no fault {drill.fault}")
    need(not drill.point or drill.point in faults.POINTS, f"no fault point {drill.point}")
    need(drill.expect.owner in OWNERS, f"owner {drill.expect.owner}")
    need(drill.expect.runs in PLACES, f"runs {drill.expect.runs}")
    need(drill.meanwhile in {"", "runs", "frozen"}, f"meanwhile {drill.meanwhile}")
    for side in ("source", "destination"):
        faults.parse(drill.faults_of(side))
