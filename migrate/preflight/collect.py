"""All facts of a process tree, for an engine that moves processes whole."""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
from collections.abc import Iterable, Sequence

import msgspec

from migrate.engine import procfs
from migrate.errors import NoSuchProcess
from migrate.model import HostPaths
from migrate.preflight import files, local
from migrate.preflight.cpu import read_cpu
from migrate.preflight.descriptors import descriptors
from migrate.preflight.facts import Account, Facts
from migrate.preflight.findings import Findings
from migrate.preflight.mappings import mappings
from migrate.preflight.sockets import sockets


def whole_tree(
    pids: Sequence[int],
    paths: HostPaths,
    *,
    ghost_limit: int = local.GHOST_LIMIT,
    moved: Iterable[str] = (),
) -> Facts:
    """Facts of the processes *pids*, every one that is moved together.

    *ghost_limit*: bytes that a deleted file may have. *moved*: beginnings of paths whose
    files the engine sends itself. Looks only: nothing is stopped or traced. Raises
    NoSuchProcess, ForeignProcess, PtraceDenied.
    """
    found, mapped = descriptors(pids, paths), mappings(pids, paths)
    own = (
        *local.tracers(pids),
        *local.namespaces(pids),
        *local.files(found, mapped, ghost_limit),
        *sockets(found),
    )
    apart = tuple(moved)
    return Facts(
        own=Findings(blockers=own),
        files=tuple(
            f
            for f in files.of_tree(pids, found, mapped)
            if not apart or not f.path.startswith(apart)
        ),
        ids=tuple(sorted({thread for pid in pids for thread in procfs.threads(pid)} | set(pids))),
        users=tuple(user(number) for number in sorted(_numbers(pids, "Uid"))),
        groups=tuple(
            group(number) for number in sorted(_numbers(pids, "Gid") | _numbers(pids, "Groups"))
        ),
        labels=tuple(sorted({label for label in map(local.label, pids) if label})),
        cgroups=tuple(sorted({path for path in map(_cgroup, pids) if path})),
        cpu=read_cpu(),
        monotonic=max(map(local.monotonic, pids), default=0.0),
    )


def restarted(pids: Sequence[int], paths: HostPaths) -> Facts:
    """Facts of processes whose commands are started again at the destination.

    Their programs, their folders and those of their output must be there; what they have
    mapped should be the same. The copies run as the agent's user. Raises NoSuchProcess,
    ForeignProcess.
    """
    mapped = mappings(pids, paths)
    places, opened = set[str](), set[str]()
    for pid in pids:
        with contextlib.suppress(OSError):
            opened.add(os.readlink(f"/proc/{pid}/exe"))
            places.add(os.readlink(f"/proc/{pid}/cwd"))
        for number in (1, 2):
            with contextlib.suppress(OSError):
                path = os.readlink(f"/proc/{pid}/fd/{number}")
                if os.path.isfile(path):
                    places.add(os.path.dirname(path))
    needed = files.named(opened | places)
    return Facts(
        own=Findings(blockers=tuple(local.tracers(pids))),
        files=tuple(msgspec.structs.replace(fact, contents=False) for fact in needed),
        alike=files.named(m.path for m in mapped if not m.deleted and not m.device_file),
        runs_as=procfs.uid(pids[0]),
    )


def _numbers(pids: Sequence[int], key: str) -> set[int]:
    return {int(word) for pid in pids for word in procfs.status(pid, key).split()}


def user(number: int) -> Account:
    """A user of this host."""
    name = ""
    with contextlib.suppress(KeyError):
        name = pwd.getpwuid(number).pw_name
    return Account(number=number, name=name)


def group(number: int) -> Account:
    """A group of this host."""
    name = ""
    with contextlib.suppress(KeyError):
        name = grp.getgrgid(number).gr_name
    return Account(number=number, name=name)


def _cgroup(pid: int) -> str:
    """Its path in cgroup v2, empty at the root (cgroups(7))."""
    try:
        with open(f"/proc/{pid}/cgroup", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("0::/"):
                    return os.path.normpath(line[3:].strip()).removesuffix("/")
    except OSError as error:
        raise NoSuchProcess(f"no process {pid}") from error
    return ""
