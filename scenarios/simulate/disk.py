"""The disk of a simulated host, with the product's journal on it.

The journal is the real one, SQLite included, on a file system in memory. What the disk
does is decided here: it is full, an agent dies before, after or in the middle of a
write, a host crashes and keeps what was synced, the disk comes back empty.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from migrate.errors import JournalUnusable
from migrate.journal import Journal

if TYPE_CHECKING:
    from scenarios.simulate.nodes import Node

FULL_SYNC = 2  # PRAGMA synchronous: FULL, an fsync of the WAL at every commit


class Disk:
    """One host's run directory, with the journal in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "journal.db"
        self._forget()

    def _forget(self) -> None:
        self.synced = 0  # bytes of the WAL that were fsynced
        self.ends: list[int] = []  # bytes of the WAL at the end of each record
        self.before_last = 0  # bytes of the WAL before the last record

    def _file(self, suffix: str) -> Path:
        return self.folder / f"journal.db{suffix}"

    def size(self) -> int:
        """Bytes of the WAL."""
        try:
            return os.stat(self._file("-wal")).st_size
        except FileNotFoundError:
            return 0

    def crash(self, close: Callable[[], None], *, keep: int | None = None) -> None:
        """What a next start finds: the file, and the first *keep* bytes of the WAL (None: all).

        *close* closes what the dead agent had open, for SQLite then tidies up by name.
        """
        length = self.size() if keep is None else min(keep, self.size())
        kept = {}
        for suffix in ("", "-wal"):
            if self._file(suffix).exists():
                kept[suffix] = self._file(f"{suffix}.kept")
                shutil.copyfile(self._file(suffix), kept[suffix])
        close()
        self._remove()
        for suffix, path in kept.items():
            path.rename(self._file(suffix))
        if "-wal" in kept:
            os.truncate(self._file("-wal"), length)
        self._forget()
        self.synced = length

    def lose(self) -> None:
        """The disk comes back empty. Nothing has it open."""
        self._remove()
        self._forget()

    def _remove(self) -> None:
        for suffix in ("", "-wal", "-shm"):
            self._file(suffix).unlink(missing_ok=True)

    def kept(self, rng: random.Random) -> int:
        """What survives a power loss: what was synced, and what the kernel wrote back itself."""
        return rng.choice([self.synced, *(end for end in self.ends if end > self.synced)])

    def torn(self) -> int:
        """Bytes of the WAL if the last record reached the disk only in part."""
        return (self.before_last + self.size()) // 2


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
