"""Who asked for what: one JSON line an action, appended to ``audit.jsonl``.

Times are UTC. A line never has what a request carried beyond the migration's id: no token, no
secret, no document. The file is for its owner alone, is only ever appended to, and is renamed
when it is full (``audit.jsonl.1`` is the newest of the older ones).
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from migrate.model import Value

logger = logging.getLogger(__name__)

NAME = "audit.jsonl"
MAX_BYTES = 16 << 20
KEEP = 8  # older files
MAX_TEXT = 300  # characters of what somebody else may have chosen


class Entry(Value):
    """One line. ``outcome``: ok, refused (it was not allowed) or failed."""

    time: str
    host: str
    name: str  # CN of the caller's certificate, empty if it shows none that is ours
    role: str
    serial: str  # of that certificate, hexadecimal
    source: str = msgspec.field(name="from")  # where it came from, as gRPC names it
    rpc: str
    migration: str = ""
    outcome: str = "ok"
    reason: str = ""
    message: str = ""


class Audit:
    """The log of one agent. Safe to use from several threads."""

    def __init__(
        self,
        folder: Path,
        *,
        max_bytes: int = MAX_BYTES,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self.path = folder / NAME
        self._max_bytes = max_bytes
        self._now = now
        self._lock = threading.Lock()

    def time(self) -> str:
        """Now, in ISO 8601 with milliseconds."""
        return self._now().isoformat(timespec="milliseconds")

    def write(self, entry: Entry) -> None:
        """Append one line.

        Where the disk is full the line goes to the agent's log instead: a grant must not
        hang on it.
        """
        short = msgspec.structs.replace(
            entry,
            migration=entry.migration[:MAX_TEXT],
            message=entry.message[:MAX_TEXT],
        )
        line = msgspec.json.encode(short) + b"\n"
        with self._lock:
            try:
                self._append(line)
            except OSError as error:
                logger.error("%s: %s; the line was: %s", self.path, error, line.decode().rstrip())

    def _append(self, line: bytes) -> None:
        # Opened for each line: an administrator may move the file away at any time.
        fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if os.fstat(fd).st_size + len(line) > self._max_bytes:
                os.close(fd)
                self._rotate()
                fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            os.write(fd, line)
        finally:
            os.close(fd)

    def _rotate(self) -> None:
        for number in range(KEEP - 1, 0, -1):
            with contextlib.suppress(FileNotFoundError):
                os.replace(f"{self.path}.{number}", f"{self.path}.{number + 1}")
        os.replace(self.path, f"{self.path}.1")
