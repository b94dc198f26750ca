"""A process tree held in a cgroup of ours, found again by the root's ProcessRef alone.

A small file in the run directory says which group a tree is in and where its processes
came from. It is written before anything is moved, so an agent or a watchdog that comes
later can finish or undo what the one before it began.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import msgspec

from migrate.decode import from_json
from migrate.engine import cgroup, procfs
from migrate.engine.cgroup import Cgroup
from migrate.errors import CgroupUnusable, NoSuchProcess
from migrate.model import HostPaths, ProcessRef, Value


class TreeRecord(Value):
    """``group``: name of the cgroup below ours. ``homes``: where each pid was before."""

    group: str
    homes: dict[int, str] = msgspec.field(default_factory=dict)


class Trees:
    """The trees of one host that are held, or were restored, by this engine."""

    def __init__(self, paths: HostPaths) -> None:
        self._folder = Path(paths.run) / "criu"

    def gather(self, root: ProcessRef) -> Cgroup:
        """Freeze the tree below *root* in a group of its own. Idempotent.

        A child that is born meanwhile is born in the group of its parent, so looking again
        until nobody is outside finds them all. Raises CgroupUnusable, FreezeTimeout.
        """
        record = self.record(root) or TreeRecord(group=_name(root))
        group = cgroup.ours(record.group)
        group.create()
        while outside := self._outside(root, group):
            record = TreeRecord(group=record.group, homes={**outside, **record.homes})
            self.write(root, record)
            group.add(outside)
            group.freeze()
        group.freeze()
        return group

    def _outside(self, root: ProcessRef, group: Cgroup) -> dict[int, str]:
        found = {}
        for pid in tree(root.pid):
            now = cgroup.group_of(pid)
            if now is not None and now.path != group.path:
                found[pid] = str(now.path)
        return found

    def group(self, root: ProcessRef) -> Cgroup | None:
        """The group that a tree is held in, None if it is not."""
        record = self.record(root)
        return cgroup.ours(record.group) if record is not None else None

    def release(self, root: ProcessRef) -> None:
        """Let the tree run, in the groups it came from. Idempotent."""
        record = self.record(root)
        if record is None:
            return
        group = cgroup.ours(record.group)
        group.thaw()
        if not record.homes:
            return  # a restored tree lives here
        root_group = str(cgroup.mount_point())
        for pid in group.processes():
            home = record.homes.get(pid) or record.homes.get(root.pid, root_group)
            with contextlib.suppress(CgroupUnusable):  # removed meanwhile: it runs on in ours
                Cgroup(Path(home)).add([pid])
        self.forget(root)

    def restored_by(self, root: ProcessRef) -> str | None:
        """The migration that brought the tree here; None if none did."""
        record = self.record(root)
        if record is None or "/" not in record.group:
            return None
        return record.group.partition("/")[0]

    def end(self, root: ProcessRef) -> None:
        """Kill the tree and wait until it is gone. Idempotent."""
        record = self.record(root)
        if record is None:
            return
        cgroup.ours(record.group).kill()
        self.forget(root)

    def forget(self, root: ProcessRef) -> None:
        """Remove record and group. Idempotent."""
        record = self.record(root)
        if record is not None:
            # The group of a restored tree has one for criu beside it.
            cgroup.ours(record.group.partition("/")[0]).remove()
            self._path(root).unlink(missing_ok=True)

    def record(self, root: ProcessRef) -> TreeRecord | None:
        """What is known of the tree of *root*."""
        try:
            return from_json(self._path(root).read_bytes(), TreeRecord)
        except (OSError, msgspec.DecodeError):
            return None

    def write(self, root: ProcessRef, record: TreeRecord) -> None:
        """Note it, before it becomes true."""
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        temporary = self._path(root).with_suffix(".new")
        temporary.write_bytes(msgspec.json.encode(record))
        os.replace(temporary, self._path(root))

    def _path(self, root: ProcessRef) -> Path:
        return self._folder / f"{_name(root)}.json"


def _name(root: ProcessRef) -> str:
    return f"tree-{root.pid}-{root.start_time}"


def tree(root: int) -> list[int]:
    """Pids of *root* and everything below it, in order, without those that have ended."""
    return [pid for pid in (root, *sorted(procfs.descendants(root))) if _lives(pid)]


def _lives(pid: int) -> bool:
    try:
        return procfs.is_alive(procfs.reference(pid))
    except NoSuchProcess:
        return False
