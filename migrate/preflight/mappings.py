"""Which files a process has mapped (proc(5), maps)."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Sequence

from migrate.errors import ForeignProcess, NoSuchProcess
from migrate.model import HostPaths, Value

_LINE = re.compile(
    r"([0-9a-f]+)-([0-9a-f]+) (....) [0-9a-f]+ ([0-9a-f]+):([0-9a-f]+) (\d+)\s*(/.*)?$"
)
_DELETED = " (deleted)"
DMABUF = "/dmabuf:"  # and its name: of the files that drivers export buffers as
_OWN = ("/memfd:", "/dev/zero", "/SYSV", "/anon_hugepage")  # memory that has no file


class Mapping(Value):
    """One file of one process, however often it is mapped. ``size`` in bytes."""

    pid: int
    address: str  # of one mapping, as in map_files
    path: str
    inode: int
    size: int
    shared_writable: bool
    deleted: bool
    device_file: bool

    @property
    def opened(self) -> str:
        """A path by which the very file is opened, also if another has its name now."""
        return f"/proc/{self.pid}/map_files/{self.address}"


def mappings(pids: Sequence[int], paths: HostPaths) -> tuple[Mapping, ...]:
    """One for every mapped file of every process. Raises NoSuchProcess, ForeignProcess."""
    return tuple(m for pid in pids for m in _of_process(pid, paths))


def _of_process(pid: int, paths: HostPaths) -> Iterator[Mapping]:
    try:
        with open(f"/proc/{pid}/maps", encoding="utf-8", errors="surrogateescape") as maps:
            lines = maps.read().splitlines()
    except PermissionError as error:
        raise ForeignProcess(f"process {pid}: its mappings can't be read") from error
    except OSError as error:
        raise NoSuchProcess(f"no process {pid}") from error
    found: dict[str, Mapping] = {}
    for line in lines:
        mapping = of_line(pid, line, paths)
        if mapping is None:
            continue
        known = found.get(mapping.path)
        if known is None or (mapping.shared_writable and not known.shared_writable):
            found[mapping.path] = mapping
    yield from found.values()


def of_line(pid: int, line: str, paths: HostPaths) -> Mapping | None:
    """What a line of /proc/PID/maps says of a file, None if it is of none that matters."""
    match = _LINE.match(line)
    if match is None or not match[7] or match[7].startswith(_OWN):
        return None
    path = match[7].replace("\\012", "\n")
    if path == paths.kfd or path.startswith(f"{paths.dri}/renderD"):
        return None
    gone = path.endswith(_DELETED)
    try:
        seen = os.stat(path.removesuffix(_DELETED) if gone else path)
    except OSError:
        seen = None
    same = seen is not None and seen.st_ino == int(match[6])
    # The node of an overlay file system may show another inode in maps than stat gives.
    size = seen.st_size if seen is not None and (same or not gone) else _extent(match)
    return Mapping(
        pid=pid,
        address=f"{match[1]}-{match[2]}",
        path=path.removesuffix(_DELETED),
        inode=int(match[6]),
        size=size,
        shared_writable=match[3][1] == "w" and match[3][3] == "s",
        deleted=gone,
        device_file=path.startswith(DMABUF) or (seen is not None and stat.S_ISCHR(seen.st_mode)),
    )


def _extent(match: re.Match[str]) -> int:
    return int(match[2], 16) - int(match[1], 16)
