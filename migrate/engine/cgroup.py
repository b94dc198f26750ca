"""cgroup v2: the freezer that holds a process tree, whoever else dies.

Trees are held in groups of ours below ``migrate/`` at the hierarchy's root. A frozen
task runs no instruction of its own, can be traced, and can be killed
(Documentation/admin-guide/cgroup-v2.rst; cgroup.kill since Linux 5.14).
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from migrate.errors import CgroupUnusable, FreezeTimeout
from migrate.topology.devices import DeviceFilter

OURS = "migrate"  # folder below the root
_POLL = 0.002  # seconds
_FREEZE_TIMEOUT = 30.0
_KILL_TIMEOUT = 60.0  # a process with much memory takes time to end


def mount_point() -> Path:
    """Where cgroup v2 is mounted. Raises CgroupUnusable."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, where, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(where)
    raise CgroupUnusable("no cgroup v2 hierarchy is mounted")


def group_of(pid: int) -> Cgroup | None:
    """The group that a process is in, None if the process or cgroup v2 is not there."""
    with contextlib.suppress(OSError, CgroupUnusable):
        for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
            if line.startswith("0::"):
                return Cgroup(mount_point() / line[3:].removesuffix(" (deleted)").lstrip("/"))
    return None


def ours(name: str) -> Cgroup:
    """Our group of that name, which may not exist yet. Raises CgroupUnusable."""
    return Cgroup(mount_point() / OURS / name)


class Cgroup:
    """One group. Methods raise CgroupUnusable where the kernel or the rights are wanting."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def create(self) -> None:
        """Idempotent."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CgroupUnusable(f"{self.path} can't be made: {error.strerror}") from error
        for name in ("cgroup.freeze", "cgroup.kill"):
            if not (self.path / name).exists():
                raise CgroupUnusable(f"{self.path / name} is missing: the kernel is too old")

    def hide(self, devices: Sequence[tuple[int, int]]) -> None:
        """No member, here or below, opens these character devices (major, minor) from now on.

        It holds until the group is removed, whoever else ends. Raises CgroupUnusable,
        VisibleGpus, MissingCapability.
        """
        with DeviceFilter(devices) as loaded:
            try:
                loaded.attach(self.path)
            except OSError as error:
                raise CgroupUnusable(
                    f"{self.path} takes no device filter: {error.strerror}"
                ) from error

    @property
    def exists(self) -> bool:
        """Whether it is there."""
        return self.path.is_dir()

    def add(self, pids: Iterable[int]) -> None:
        """Move processes, with all their threads, here. One that has ended is no error."""
        for pid in pids:
            try:
                (self.path / "cgroup.procs").write_text(str(pid))
            except ProcessLookupError:
                continue
            except OSError as error:
                raise CgroupUnusable(
                    f"process {pid} can't be moved to {self.path}: {error.strerror}"
                ) from error

    def processes(self) -> list[int]:
        """Pids in it and in groups below it; of zombies, too, until they are reaped."""
        found: list[int] = []
        for folder, _, _ in os.walk(self.path):
            with contextlib.suppress(OSError):
                found += map(int, (Path(folder) / "cgroup.procs").read_text().split())
        return found

    def freeze(self) -> None:
        """Stop everything in it; returns when all is stopped. Idempotent. Raises FreezeTimeout."""
        self._write("cgroup.freeze", "1")
        deadline = time.monotonic() + _FREEZE_TIMEOUT
        while not self._event("frozen"):
            if not self.processes():
                return  # an empty group counts as not frozen
            if time.monotonic() > deadline:
                self._write("cgroup.freeze", "0")
                raise FreezeTimeout(f"{self.path} did not freeze in {_FREEZE_TIMEOUT:g} s")
            time.sleep(_POLL)

    def thaw(self) -> None:
        """Let everything in it run. Idempotent."""
        self._write("cgroup.freeze", "0")

    @property
    def is_frozen(self) -> bool:
        """Whether it was told to freeze and everything in it is stopped."""
        try:
            told = (self.path / "cgroup.freeze").read_text().strip() == "1"
        except OSError:
            return False
        return told and self._event("frozen")

    def kill(self) -> None:
        """End everything in it, frozen or not, and wait. Idempotent. Raises FreezeTimeout."""
        if not self.exists:
            return
        deadline = time.monotonic() + _KILL_TIMEOUT
        while self._event("populated"):
            self._write("cgroup.kill", "1")
            if time.monotonic() > deadline:
                raise FreezeTimeout(f"what is in {self.path} was killed and has not ended yet")
            time.sleep(_POLL)

    def remove(self) -> None:
        """Remove it and empty groups below it; one that is in use stays. Idempotent."""
        for folder, _, _ in os.walk(self.path, topdown=False):
            with contextlib.suppress(OSError):
                os.rmdir(folder)

    def _event(self, name: str) -> bool:
        try:
            for line in (self.path / "cgroup.events").read_text().splitlines():
                if line == f"{name} 1":
                    return True
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENODEV):
                raise
        return False

    def _write(self, name: str, text: str) -> None:
        try:
            (self.path / name).write_text(text)
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno == errno.ENODEV:
                return  # removed meanwhile
            raise CgroupUnusable(f"{self.path / name}: {error.strerror}") from error
