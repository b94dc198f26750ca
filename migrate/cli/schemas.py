"""docs/schemas, made from the types: ``python -m migrate.cli.schemas``.

One JSON Schema a document and version. What programs are sent allows fields that are not in
it: later releases add some. What programs send does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from migrate.cli.history import SCHEMA as HISTORY
from migrate.cli.ps import SCHEMA as PROCESSES
from migrate.client import REQUEST_SCHEMA, Request
from migrate.drain.drain import SCHEMA as DRAIN
from migrate.drain.drain import Summary
from migrate.model import Value
from migrate.report import (
    CHECK_SCHEMA,
    EVENT_SCHEMA,
    REPORT_SCHEMA,
    RESTORED_SCHEMA,
    Check,
    Event,
    ProcessRow,
    Report,
    Restored,
)

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "schemas"
DIALECT = "https://json-schema.org/draft/2020-12/schema"


class Processes(Value):
    """What ``migrate ps --json`` prints."""

    host: str
    processes: tuple[ProcessRow, ...]
    schema: str = PROCESSES


class History(Value):
    """What ``migrate history --json`` prints; ``silent`` are hosts that did not answer."""

    migrations: tuple[Report, ...]
    silent: tuple[str, ...]
    schema: str = HISTORY


class ErrorBody(Value):
    """An error: see docs/exit-codes.md."""

    reason: str
    message: str
    advice: str
    exit_code: int


class ErrorDocument(Value):
    """What every command prints with ``--json`` when it fails before its own document."""

    error: ErrorBody


SENT: Mapping[str, type[Value]] = {REQUEST_SCHEMA: Request}
RECEIVED: Mapping[str, type[Value]] = {
    EVENT_SCHEMA: Event,
    REPORT_SCHEMA: Report,
    CHECK_SCHEMA: Check,
    PROCESSES: Processes,
    HISTORY: History,
    DRAIN: Summary,
    RESTORED_SCHEMA: Restored,
    "migrate.error/1": ErrorDocument,
}


def files() -> dict[str, bytes]:
    """Contents by file name."""
    made = {}
    for name, kind in {**SENT, **RECEIVED}.items():
        schema = msgspec.json.schema(kind)
        if name in RECEIVED:
            schema = _open(schema)
        document = {"$schema": DIALECT, "$id": f"urn:{name.replace('/', ':')}", "title": name}
        text = msgspec.json.format(msgspec.json.encode({**document, **schema}), indent=2)
        made[f"{name.replace('/', '-')}.json"] = text + b"\n"
    return made


def _open(schema: Any) -> Any:
    """The same schema, which lets pass what it does not know."""
    if isinstance(schema, list):
        return [_open(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = schema.get("additionalProperties") is False
    return {k: _open(v) for k, v in schema.items() if not (closed and k == "additionalProperties")}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, text in files().items():
        (FOLDER / name).write_bytes(text)
