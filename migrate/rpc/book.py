"""What an authority has issued: ``issued.jsonl`` in its folder, a JSON line a certificate.

Written before a certificate leaves the authority, so that each that is out can be revoked.
"""

from __future__ import annotations

import os
from datetime import datetime
from pathlib import Path

import msgspec

from migrate.decode import from_json
from migrate.errors import UsageError
from migrate.model import Value

NAME = "issued.jsonl"


class Issued(Value):
    """One certificate. ``serial`` in hexadecimal; ``until`` is the end of its validity."""

    serial: str
    name: str
    role: str
    until: datetime


def note(folder: Path, issued: Issued) -> None:
    """Append a line; it is on the disk when this returns. Raises OSError."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
    fd = os.open(folder / NAME, flags, 0o600)
    try:
        os.write(fd, msgspec.json.encode(issued) + b"\n")
        os.fsync(fd)
    finally:
        os.close(fd)


def read(folder: Path) -> list[Issued]:
    """Every certificate that was issued. Raises UsageError."""
    try:
        lines = (folder / NAME).read_bytes().splitlines()
    except FileNotFoundError:
        return []
    try:
        return [from_json(line, Issued) for line in lines if line.strip()]
    except msgspec.DecodeError as error:
        raise UsageError(f"{folder / NAME} can't be read: {error}") from error
