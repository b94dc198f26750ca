"""Log lines for machines: one JSON object a line, with the migration that it is about.

Which one it is, is found where it already stands: in the name of the migration's own thread,
or among the arguments of the message.
"""

from __future__ import annotations

import logging
import re
from datetime import UTC, datetime

import msgspec

ID = re.compile(r"[0-9a-f]{16}")
THREAD = re.compile(r"(?:migrate|life)-([0-9a-f]{16})")


class JsonLines(logging.Formatter):
    """``time`` (UTC), ``level``, ``logger``, ``thread``, ``host``, ``migration``, ``message``."""

    def __init__(self, host: str) -> None:
        super().__init__()
        self._host = host

    def format(self, record: logging.LogRecord) -> str:
        """One line; a traceback is a field of it."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "host": self._host,
            "logger": record.name,
            "thread": record.threadName,
            "message": record.getMessage(),
        }
        if (migration := migration_of(record)) is not None:
            line["migration"] = migration
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line).decode()


def migration_of(record: logging.LogRecord) -> str | None:
    """The id of the migration that a record is about."""
    found = THREAD.fullmatch(record.threadName or "")
    if found is not None:
        return found[1]
    arguments = record.args if isinstance(record.args, tuple) else ()
    return next((a for a in arguments if isinstance(a, str) and ID.fullmatch(a)), None)


def use_json_lines(host: str) -> None:
    """Write the log of this process as JSON lines from now on."""
    for handler in logging.getLogger().handlers:
        handler.setFormatter(JsonLines(host))
