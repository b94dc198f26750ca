"""The durable log of every transition: what an agent knows after kill -9.

SQLite in WAL mode with ``synchronous=FULL``: a record is on the disk when
:meth:`Journal.append` returns (SQLite, "PRAGMA synchronous"), so an effect that
comes after it in the program comes after it in every crash.

Records are never changed or removed. A journal has a random ``store_id``: a peer
that answers with another one is another journal (an empty disk, a restored
backup), and what it does not know proves nothing.

A record that the file system had no room for is not there. But after an I/O error, of an
fsync above all, nobody can tell: the next start may find the record, or not, and another
fsync proves nothing (the kernel drops pages it could not write). Whoever went on with the
state before it could do what the record forbids. So the journal then takes no more
records and calls ``fail_stop``, which ends the agent: the next one reads what there is.
"""

from __future__ import annotations

import os
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote

import msgspec

from migrate.decode import from_json
from migrate.errors import JournalUnusable
from migrate.model import Value

T = TypeVar("T")

SCHEMA_VERSION = 1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS records (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    migration TEXT NOT NULL,
    kind TEXT NOT NULL,
    data BLOB NOT NULL,
    wall REAL NOT NULL
) STRICT;
CREATE INDEX IF NOT EXISTS records_by_migration ON records (migration, kind, seq);
"""


class Record(Value):
    """One line of the journal.

    ``wall`` is seconds since the epoch by this host's clock, for people only: no
    decision reads it.
    """

    seq: int
    migration: str
    kind: str
    data: bytes
    wall: float

    def decode(self, type_: type[T]) -> T:
        """The payload. Raises JournalUnusable if it can't be read as *type_*."""
        try:
            return from_json(self.data, type_)
        except msgspec.DecodeError as error:
            raise JournalUnusable(
                f"journal record {self.seq} ({self.kind}) can't be read: {error}"
            ) from error


def read_records(path: Path) -> list[Record]:
    """All records of a journal, oldest first, without writing to it.

    For those who look from outside while an agent may have it open. Raises JournalUnusable.
    """
    try:
        database = sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True)
    except sqlite3.Error as error:
        raise JournalUnusable(f"journal {path}: {error}") from error
    try:
        database.execute("PRAGMA busy_timeout=5000")
        (version,) = database.execute("SELECT value FROM meta WHERE name = 'schema'").fetchone()
        if version != str(SCHEMA_VERSION):
            raise JournalUnusable(
                f"{path} has schema {version}, this release reads {SCHEMA_VERSION}"
            )
        rows = database.execute(
            "SELECT seq, migration, kind, data, wall FROM records ORDER BY seq"
        ).fetchall()
    except (sqlite3.Error, TypeError) as error:
        raise JournalUnusable(f"journal {path}: {error}") from error
    finally:
        database.close()
    return [
        Record(seq=seq, migration=migration, kind=kind, data=data, wall=wall)
        for seq, migration, kind, data, wall in rows
    ]


class Journal:
    """The log of one agent. Safe to use from several threads."""

    def __init__(self, path: Path, *, fail_stop: Callable[[str], None] = lambda _why: None) -> None:
        """Open or create it. Raises JournalUnusable."""
        self.path = path
        self._fail_stop = fail_stop
        self._broken = ""
        self._lock = threading.RLock()
        with self._errors():
            path.parent.mkdir(parents=True, exist_ok=True)
            # Created 0600 before SQLite opens it: it holds session details.
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.execute("PRAGMA busy_timeout=5000")
            self._db.executescript(_SCHEMA)
            self.store_id = self._meta("store_id", lambda: secrets.token_hex(16))
            version = self._meta("schema", lambda: str(SCHEMA_VERSION))
        if version != str(SCHEMA_VERSION):
            raise JournalUnusable(
                f"{path} has schema {version}, this release reads {SCHEMA_VERSION}",
                advice="Install the release that wrote it, or move the file away.",
            )

    def append(self, migration: str, kind: str, data: object = None) -> int:
        """Write one record; it is durable when this returns. Gives its number.

        *data* is anything msgspec can encode as JSON. Raises JournalUnusable, and then
        the record is not there.
        """
        payload = msgspec.json.encode(data)
        with self._lock, self._errors():
            if self._broken:
                raise JournalUnusable(self._broken)
            try:
                cursor = self._db.execute(
                    "INSERT INTO records (migration, kind, data, wall) VALUES (?, ?, ?, ?)",
                    (migration, kind, payload, time.time()),
                )
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_IOERR:
                    self._broken = f"journal {self.path}: {error}; what it holds is not known"
                    self._fail_stop(self._broken)
                raise
            assert cursor.lastrowid is not None
            return cursor.lastrowid

    def history(self, migration: str) -> list[Record]:
        """All records of a migration, oldest first; empty if there is none."""
        return self._select("WHERE migration = ? ORDER BY seq", (migration,))

    def last(self, migration: str, kind: str) -> Record | None:
        """The newest record of a kind."""
        found = self._select(
            "WHERE migration = ? AND kind = ? ORDER BY seq DESC LIMIT 1", (migration, kind)
        )
        return found[0] if found else None

    def migrations(self) -> list[str]:
        """Every migration id, newest first."""
        with self._lock, self._errors():
            rows = self._db.execute(
                "SELECT migration FROM records GROUP BY migration ORDER BY min(seq) DESC"
            ).fetchall()
        return [row[0] for row in rows]

    def find(self, kind: str, data: object) -> str | None:
        """The migration that has a record of *kind* with exactly *data*."""
        found = self._select(
            "WHERE kind = ? AND data = ? ORDER BY seq DESC LIMIT 1",
            (kind, msgspec.json.encode(data)),
        )
        return found[0].migration if found else None

    def count(self, migration: str, kind: str) -> int:
        """How many records of a kind a migration has."""
        with self._lock, self._errors():
            (count,) = self._db.execute(
                "SELECT count(*) FROM records WHERE migration = ? AND kind = ?", (migration, kind)
            ).fetchone()
            return int(count)

    def next_number(self, migration: str, kind: str) -> int:
        """A number that was never given before for this migration and kind, from 1 on.

        Journaled before it is returned, so that a restart can't repeat one: stream
        epochs, and with them keys and nonces, hang on that.
        """
        with self._lock:
            number = self.count(migration, kind) + 1
            self.append(migration, kind, number)
            return number

    def close(self) -> None:
        """Close the file. The journal can't be used after."""
        with self._lock:
            self._db.close()

    def _select(self, clause: str, arguments: tuple[object, ...]) -> list[Record]:
        with self._lock, self._errors():
            rows = self._db.execute(
                f"SELECT seq, migration, kind, data, wall FROM records {clause}",  # noqa: S608
                arguments,
            ).fetchall()
        return [
            Record(seq=seq, migration=migration, kind=kind, data=data, wall=wall)
            for seq, migration, kind, data, wall in rows
        ]

    def _meta(self, name: str, default: object) -> str:
        assert callable(default)
        self._db.execute("INSERT OR IGNORE INTO meta VALUES (?, ?)", (name, default()))
        row = self._db.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        return str(row[0])

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise JournalUnusable(f"journal {self.path}: {error}") from error
