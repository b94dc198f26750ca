"""Drills: what a simulated host does wrong when it is told to.

A fault is armed by a file ``run/faults/NAME`` below the host's folder and spent when it
strikes. The file may hold a number: how often (RESUME_DEAD, RESTORE_ENOMEM), the gpu_id
(SCHEDULER_HANG), or seconds (PROCESS_INFO_STALL).
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path


class Fault(StrEnum):
    """Names of the files."""

    SCHEDULER_HANG = "scheduler_hang"  # that GPU's scheduler answers no more: ETIME, then EIO
    RESTORE_ENOMEM = "restore_enomem"  # RESTORE fails as with VRAM full, process unusable
    RESUME_DEAD = "resume_dead"  # RESUME says 0, the queues never start
    PROCESS_INFO_STALL = "process_info_stall"  # PROCESS_INFO answers only that much later


def arm(root: str | Path, fault: Fault, value: float = 1) -> None:
    """Arm *fault* at the host whose folder is *root*."""
    folder = Path(root) / "run" / "faults"
    folder.mkdir(parents=True, exist_ok=True)
    fresh = folder / f".{fault}"
    fresh.write_text(f"{value:g}")
    fresh.rename(folder / fault)


class Faults:
    """The node's side."""

    def __init__(self, root: Path) -> None:
        self._folder = root / "run" / "faults"
        self._folder.mkdir(parents=True, exist_ok=True)

    def peek(self, fault: Fault) -> float | None:
        """The fault's number if it is armed, without spending it."""
        try:
            return float((self._folder / fault).read_text() or 1)
        except (FileNotFoundError, ValueError):
            return None

    def spend(self, fault: Fault) -> float | None:
        """The fault's number if it is armed; it no longer is."""
        value = self.peek(fault)
        if value is not None:
            (self._folder / fault).unlink(missing_ok=True)
        return value

    def strike(self, fault: Fault) -> bool:
        """One of as many times as the number says."""
        value = self.spend(fault)
        if value is not None and value > 1:
            arm(self._folder.parent.parent, fault, value - 1)
        return value is not None
