"""The regular files and folders that a process has open or mapped, and what they hold."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterable, Iterator, Sequence

from migrate.engine import procfs
from migrate.preflight.descriptors import Descriptor
from migrate.preflight.facts import FileFact
from migrate.preflight.identity import identity
from migrate.preflight.local import deleted
from migrate.preflight.mappings import Mapping

SHARED_MEMORY = "/dev/shm/"  # noqa: S108 - POSIX shared memory and semaphores, tmpfs
# File systems whose inodes are the same on every host that has them mounted.
_NETWORK = frozenset(
    ("nfs", "nfs4", "ceph", "lustre", "gpfs", "beegfs", "gfs2", "ocfs2", "9p", "virtiofs", "fuse")
)
# File systems that every host makes up itself.
_KERNEL = ("/proc/", "/sys/", "/dev/pts/", "/dev/hugepages/")


def of_tree(
    pids: Sequence[int], found: Sequence[Descriptor], mapped: Sequence[Mapping]
) -> tuple[FileFact, ...]:
    """Everything with a name that must be there under the same path, by path."""
    written = {d.link for d in found if d.writable and stat.S_ISREG(d.mode)}
    written |= {m.path for m in mapped if m.shared_writable}
    opened: dict[str, str] = {}
    for descriptor in found:
        named = stat.S_ISREG(descriptor.mode) or stat.S_ISDIR(descriptor.mode)
        if named and descriptor.link.startswith("/") and not _apart(descriptor):
            opened.setdefault(descriptor.link, descriptor.path)
    for mapping in mapped:
        if not mapping.deleted and not mapping.device_file:
            opened.setdefault(mapping.path, mapping.opened)
    for pid in pids:
        for name in ("cwd", "root", "exe"):
            with contextlib.suppress(OSError):
                opened.setdefault(os.readlink(f"/proc/{pid}/{name}"), f"/proc/{pid}/{name}")
    facts = (
        _fact(path, through, path in written)
        for path, through in sorted(opened.items())
        if not path.startswith(_KERNEL)
    )
    return tuple(fact for fact in facts if fact is not None)


def named(paths: Iterable[str]) -> tuple[FileFact, ...]:
    """Facts of paths that exist, written ones among them not known as such."""
    facts = (_fact(path, path, False) for path in sorted(set(paths)))
    return tuple(fact for fact in facts if fact is not None)


def here(wanted: Iterable[FileFact]) -> Iterator[FileFact]:
    """What this host has under the paths of *wanted*: those that it has."""
    for fact in wanted:
        found = _fact(fact.path, fact.path, fact.written, contents=bool(fact.identity))
        if found is not None:
            yield found


def _apart(descriptor: Descriptor) -> bool:
    """Deleted, or memory that has no file."""
    return deleted(descriptor) or descriptor.link.startswith(("/memfd:", "/anon_hugepage"))


def _fact(path: str, through: str, written: bool, *, contents: bool = True) -> FileFact | None:
    try:
        kind = os.stat(through).st_mode
        if not stat.S_ISREG(kind) and not stat.S_ISDIR(kind):
            return None  # opening a device may do something
        fd = os.open(through, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except PermissionError:
        return _unread(path, through, written)
    except OSError:
        return _unread(path, path, written) if through != path else None
    try:
        seen = os.fstat(fd)
        wanted = contents and not written
        return _made(path, seen, written, _identity(fd, seen) if wanted else "")
    finally:
        os.close(fd)


def _unread(path: str, through: str, written: bool) -> FileFact | None:
    try:
        seen = os.stat(through)
    except OSError:
        return None
    return _made(path, seen, written, "")


def _made(path: str, seen: os.stat_result, written: bool, found: str) -> FileFact:
    folder = stat.S_ISDIR(seen.st_mode)
    return FileFact(
        path=path,
        size=0 if folder else seen.st_size,
        inode=seen.st_ino,
        storage=storage(seen.st_dev) if written else "",
        identity=found,
        folder=folder,
        written=written,
    )


def storage(device: int) -> str:
    """The file system of *device* (st_dev): "nfs4" and the like, or "local" of this boot.

    An inode of a network file system is the same on every host, one of a local disk means
    nothing elsewhere: two hosts made of one image have the same numbers.
    """
    wanted = f"{os.major(device)}:{os.minor(device)}"
    with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as mounts:
        for line in mounts:
            before, _, after = line.partition(" - ")
            kind = after.split(" ", 1)[0]
            if before.split()[2] == wanted and kind.split(".")[0] in _NETWORK:
                return kind
    return f"local {procfs.boot_id()}"


def _identity(fd: int, seen: os.stat_result) -> str:
    if stat.S_ISDIR(seen.st_mode):
        return ""
    try:
        return identity(fd, seen.st_size)
    except OSError:
        return ""
