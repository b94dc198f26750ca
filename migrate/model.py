"""Frozen value types shared by every layer. No logic beyond validation, no I/O."""

from __future__ import annotations

from pathlib import Path
from typing import Self, dataclass_transform

import msgspec


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(msgspec.field,))
class _ValueMeta(msgspec.StructMeta):
    """Tells type checkers that subclasses of Value inherit frozen and kw_only."""


class Value(
    msgspec.Struct, metaclass=_ValueMeta, frozen=True, kw_only=True, forbid_unknown_fields=True
):
    """Base of the value types: immutable, compared by value, JSON by msgspec."""


class HostPaths(Value):
    """Where a host keeps what we talk to. A simulated host is just other paths."""

    kfd: str = "/dev/kfd"
    dri: str = "/dev/dri"  # folder of render nodes, renderD128 and so on
    kfd_sysfs: str = "/sys/class/kfd/kfd"  # has topology/ and proc/
    drm_sysfs: str = "/sys/class/drm"  # has renderD128/device/mem_info_vram_{total,used}
    run: str = "/run/migrate"  # journal, sockets, logs of the agent

    @classmethod
    def under(cls, root: str | Path) -> Self:
        """The paths of a simulated host whose folder is *root*."""
        base = Path(root)
        return cls(
            kfd=str(base / "kfd"),
            dri=str(base / "dri"),
            kfd_sysfs=str(base / "sys"),
            drm_sysfs=str(base / "drm"),
            run=str(base / "run"),
        )

    @property
    def topology(self) -> str:
        """The topology tree (``nodes/N/properties`` below it)."""
        return f"{self.kfd_sysfs}/topology"


class ProcessRef(Value):
    """One process, told apart from a later one with the same pid.

    ``start_time`` is field 22 of /proc/PID/stat in clock ticks since boot;
    ``boot_id`` is /proc/sys/kernel/random/boot_id.
    """

    pid: int
    start_time: int
    boot_id: str


class GpuMap(Value):
    """Source gpu_id to destination gpu_id, both as the kernels print them now.

    These are the *actual* ids; the ids a process knows (user_gpu_id) never change.
    """

    pairs: tuple[tuple[int, int], ...]

    def __getitem__(self, source_gpu_id: int) -> int:
        """The destination's gpu_id for *source_gpu_id*; KeyError if it is not mapped."""
        return dict(self.pairs)[source_gpu_id]

    def as_dict(self) -> dict[int, int]:
        """Source gpu_id to destination gpu_id."""
        return dict(self.pairs)
