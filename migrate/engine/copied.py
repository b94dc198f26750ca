"""Files that are sent with a process (``--copy-file``), put into place at the destination.

They must be there before the copy is built, and a migration may come to nothing after that:
until the copy is released what they replaced is kept beside them, and put back by ``undo``. A
file in the engine's folder says so first, so that an agent that comes later can do it, too.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import msgspec

from migrate.dataplane.access import MemoryAccess
from migrate.decode import from_json
from migrate.errors import FrameRejected, RestoreFailed
from migrate.model import Value

_STEP = 2 << 20  # bytes
_KERNEL = ("/proc/", "/sys/", "/dev/")
MAX_PATH = 4096 - 64  # bytes, with the ending of a name that stands beside it


class CopiedFile(Value):
    """A regular file of the source as it was in the freeze; ``blob`` has its contents.

    ``modified``: nanoseconds since 1970. ``mode``: permission bits.
    """

    blob: str
    path: str
    size: int
    mode: int
    uid: int
    gid: int
    modified: int


class _Placed(Value):
    path: str
    existed: bool


def describe(path: str, blob: str) -> CopiedFile | None:
    """A regular file of this host; None if it is none. Raises OSError."""
    found = os.lstat(path)
    if not stat.S_ISREG(found.st_mode):
        return None
    return CopiedFile(
        blob=blob,
        path=path,
        size=found.st_size,
        mode=stat.S_IMODE(found.st_mode),
        uid=found.st_uid,
        gid=found.st_gid,
        modified=found.st_mtime_ns,
    )


def is_plain(path: str) -> bool:
    """Whether a peer's word for a file is its whole path, and nothing else."""
    plain = path.startswith("/") and os.path.normpath(path) == path and "\0" not in path
    return plain and len(os.fsencode(path)) <= MAX_PATH


def check(file: CopiedFile) -> None:
    """A peer's word, before anything is written. Raises FrameRejected."""
    path = file.path
    numbers = (file.size, file.uid, file.gid, file.modified)
    if (
        not is_plain(path)
        or path.startswith(_KERNEL)
        or not all(0 <= number < 1 << 63 for number in numbers)
        or not 0 <= file.mode <= 0o7777
    ):
        raise FrameRejected(f"{path[:70]!r} is no file that could be copied")


class Places:
    """The copied files of one migration at the destination; *record* is where it says so."""

    def __init__(self, migration: str, record: Path) -> None:
        self._migration = migration
        self._record = record

    def put(self, file: CopiedFile, contents: MemoryAccess) -> bool:
        """Put it where it belongs, whole or not at all; False: the same is there already.

        Raises RestoreFailed.
        """
        try:
            if _same(file, contents):
                return False
            new, old = self._beside(file.path, "new"), self._beside(file.path, "old")
            _write(new, file, contents)
            existed = os.path.lexists(file.path)
            self._note(_Placed(path=file.path, existed=existed))
            if existed:
                os.link(file.path, old, follow_symlinks=False)
            os.replace(new, file.path)
        except OSError as error:
            raise RestoreFailed(f"{file.path} can't be put into place: {error}") from error
        return True

    def undo(self) -> None:
        """Everything is as it was. Idempotent."""
        for placed in reversed(self._placed()):
            old = self._beside(placed.path, "old")
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._beside(placed.path, "new"))
            with contextlib.suppress(FileNotFoundError):
                if placed.existed:
                    os.replace(old, placed.path)
                else:
                    os.unlink(placed.path)
        self._record.unlink(missing_ok=True)

    def keep(self) -> None:
        """The files are the process's from now on. Idempotent."""
        for placed in self._placed():
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._beside(placed.path, "old"))
        self._record.unlink(missing_ok=True)

    def _beside(self, path: str, what: str) -> str:
        folder, name = os.path.split(path)
        return os.path.join(folder, f".{name[:160]}.{self._migration[:40]}.{what}")

    def _placed(self) -> list[_Placed]:
        try:
            return from_json(self._record.read_bytes(), list[_Placed])
        except OSError:
            return []

    def _note(self, placed: _Placed) -> None:
        self._record.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        new = self._record.with_suffix(".new")
        new.write_bytes(msgspec.json.encode([*self._placed(), placed]))
        os.replace(new, self._record)


def _parts(file: CopiedFile, contents: MemoryAccess) -> Iterator[memoryview]:
    """The contents in order; each part is gone with the next one."""
    data = memoryview(bytearray(_STEP))
    for at in range(0, file.size, _STEP):
        part = data[: min(_STEP, file.size - at)]
        contents.read(at, part)
        yield part


def _same(file: CopiedFile, contents: MemoryAccess) -> bool:
    """Whether the file is there with these contents: the same one on a shared file system, too."""
    try:
        fd = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    with open(fd, "rb", buffering=0) as there:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_size != file.size:
            return False
        return all(there.read(len(part)) == part for part in _parts(file, contents))


def _write(path: str, file: CopiedFile, contents: MemoryAccess) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    with open(os.open(path, flags, 0o600), "wb") as target:
        for part in _parts(file, contents):
            target.write(part)
        target.flush()
        os.fchown(target.fileno(), file.uid, file.gid)
        os.fchmod(target.fileno(), file.mode)
        os.utime(target.fileno(), ns=(file.modified, file.modified))
        os.fsync(target.fileno())
