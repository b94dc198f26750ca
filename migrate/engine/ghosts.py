"""Deleted files of a process: CRIU gives them a name at the destination, for a moment.

It writes such a file as ``PATH.cr.ID.ghost`` and unlinks it once the tasks have it open
(ghost_path in criu/files-reg.c). A CRIU that is killed before that leaves it there, and the
next restore of the process would fail on it: "File exists". So the names are noted on the disk
before CRIU is started.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from migrate.decode import from_json
from migrate.model import HostPaths
from migrate.preflight.descriptors import descriptors
from migrate.preflight.local import deleted
from migrate.preflight.mappings import mappings

_DELETED = " (deleted)"
_NO_FILE = ("/memfd:", "/dev/zero", "/SYSV", "/anon_hugepage", "/[aio]")
_ENDING = re.compile(r"\.cr\.[0-9a-f]{1,8}\.ghost")


def deleted_files(pids: Sequence[int], paths: HostPaths) -> tuple[str, ...]:
    """Names that open and mapped files of these processes had. Raises NoSuchProcess."""
    found = {one.link for one in descriptors(pids, paths) if deleted(one)}
    found |= {one.path for one in mappings(pids, paths) if one.deleted}
    names = {path.removesuffix(_DELETED) for path in found}
    return tuple(sorted(n for n in names if n.startswith("/") and not n.startswith(_NO_FILE)))


class Ghosts:
    """Those of one restore; *record* is where it says which they may be."""

    def __init__(self, record: Path) -> None:
        self._record = record

    def expect(self, names: Iterable[str]) -> None:
        """CRIU may make ghosts of these from now on. Raises OSError."""
        wanted = list(names)
        if wanted:
            self._record.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._record.write_bytes(msgspec.json.encode(wanted))

    def remove(self) -> None:
        """What a CRIU that is gone has left. Idempotent."""
        with contextlib.suppress(OSError, msgspec.DecodeError):
            for name in from_json(self._record.read_bytes(), list[str]):
                _remove(name)
        self.forget()

    def forget(self) -> None:
        """The copy stands: CRIU has unlinked them. Idempotent."""
        self._record.unlink(missing_ok=True)


def _remove(name: str) -> None:
    folder, base = os.path.split(name)
    with contextlib.suppress(OSError):
        for found in os.listdir(folder):
            if found.startswith(base) and _ENDING.fullmatch(found[len(base) :]):
                os.unlink(os.path.join(folder, found))
