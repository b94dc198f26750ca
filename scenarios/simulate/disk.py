"""The disk of a simulated host, with the product's journal on it.

The journal is the real one, SQLite included, on a file system in memory. What the disk
does is decided here: it is full, an agent dies before, after or in the middle of a
write, a host crashes and keeps what was synced, the disk comes back empty.
"""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from migrate.errors import JournalUnusable
from migrate.journal import Journal

if TYPE_CHECKING:
    from scenarios.simulate.nodes import Node

FULL_SYNC = 2  # PRAGMA synchronous: FULL, an fsync of the WAL at every commit


class Disk:
    """One host's journal file. A crash makes a new generation of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._generation = 0
        self._new()

    def _new(self) -> None:
        self._generation += 1
        self.path = self.folder / f"journal-{self._generation}.db"
        self.synced = 0  # bytes of the WAL that were fsynced
        self.ends: list[int] = []  # bytes of the WAL at the end of each record
        self.before_last = 0  # bytes of the WAL before the last record

    @property
    def _wal(self) -> Path:
        return self.path.with_name(self.path.name + "-wal")

    def size(self) -> int:
        """Bytes of the WAL."""
        try:
            return os.stat(self._wal).st_size
        except FileNotFoundError:
            return 0

    def crash(self, *, keep: int | None = None) -> None:
        """What a next start finds: the file, and the first *keep* bytes of the WAL (None: all)."""
        old, wal = self.path, self._wal
        length = self.size() if keep is None else min(keep, self.size())
        self._new()
        if old.exists():
            shutil.copyfile(old, self.path)
        if length:
            shutil.copyfile(wal, self._wal)
            os.truncate(self._wal, length)
        self.synced = length
        _remove(old)

    def lose(self) -> None:
        """The disk comes back empty."""
        old = self.path
        self._new()
        _remove(old)

    def kept(self, rng: random.Random) -> int:
        """What survives a power loss: what was synced, and what the kernel wrote back itself."""
        return rng.choice([self.synced, *(end for end in self.ends if end > self.synced)])

    def torn(self) -> int:
        """Bytes of the WAL if the last record reached the disk only in part."""
        return (self.before_last + self.size()) // 2


def _remove(path: Path) -> None:
    for suffix in ("", "-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)


class SimulatedJournal(Journal):
    """The product's journal; every write is a point where something can happen."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._disk = node.disk
        super().__init__(node.disk.path)
        self._synchronous = self._db.execute("PRAGMA synchronous").fetchone()[0]
        self._disk.synced = self._disk.size()
        node.recorded = self._recorded()

    def _recorded(self) -> dict[str, str]:
        """What the newest records of both sides say, for the judge."""
        found = {}
        for migration in self.migrations():
            for kind in ("source", "destination"):
                record = self.last(migration, kind)
                if record is not None:
                    found[kind] = msgspec.json.decode(record.data)["state"]
        return found

    def append(self, migration: str, kind: str, data: object = None) -> int:
        """See Journal."""
        node = self._node
        world = node.world
        state = getattr(data, "state", "")
        what = f"journal: {kind} {state}".rstrip()
        world.point(node, what)
        world.scheduler.sleep(world.random.uniform(0.0005, 0.01))
        if world.faults.disk_full(node):
            world.tell(f"{node.name}: the disk is full, {kind} {state} is not written")
            raise JournalUnusable("the disk is full")
        crash = world.faults.crash_at_write(node) if node.agent is not None else ""
        if crash == "before":
            node.crash_agent(f"before the record {kind} {state}")
        world.scheduler.check()
        self._disk.before_last = self._disk.size()
        number = super().append(migration, kind, data)
        self._disk.ends.append(self._disk.size())
        if self._synchronous >= FULL_SYNC:
            self._disk.synced = self._disk.size()
        if kind in ("source", "destination") and crash != "torn":
            node.recorded[kind] = str(state)
            world.judge.recorded(kind, str(state))
        if crash == "torn":
            node.crash_agent(f"in the middle of the record {kind} {state}", torn=True)
        elif crash == "after":
            node.crash_agent(f"after the record {kind} {state}")
        elif kind in ("source", "destination"):
            world.tell(f"{node.name}: journals {state}")
        world.scheduler.check()
        return number
