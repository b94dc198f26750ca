"""What the other host lacks: its own view of the facts, and the comparison."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from migrate.errors import (
    CpuFeatures,
    FileDiffers,
    FileMissing,
    InsufficientDisk,
    LsmLabel,
    MigrateError,
    PidInUse,
    UserMissing,
)
from migrate.model import Value
from migrate.preflight import files
from migrate.preflight.collect import group, user
from migrate.preflight.cpu import read_cpu
from migrate.preflight.facts import Account, Cpu, Facts, FileFact
from migrate.preflight.findings import COPY_FILE, Finding, Findings
from migrate.preflight.notes import CGROUP_PATH, FILE_OTHER, MONOTONIC_CLOCK

CGROUPS = Path("/sys/fs/cgroup")
_APPARMOR = Path("/sys/kernel/security/apparmor/profiles")
_SELINUX = Path("/sys/fs/selinux/enforce")
_UNCONFINED = "unconfined"


class Here(Value):
    """This host's side of another host's facts."""

    files: tuple[FileFact, ...] = ()
    alike: tuple[FileFact, ...] = ()
    runs_as: int = 0  # the agent's user
    taken: tuple[int, ...] = ()  # of the ids
    users: tuple[Account, ...] = ()
    groups: tuple[Account, ...] = ()
    labels: tuple[str, ...] = ()  # of the labels, those that can be given here
    cgroups: tuple[str, ...] = ()  # of the cgroups, those that exist
    cpu: Cpu | None = None
    monotonic: float = 0.0  # seconds
    time_namespaces: bool = True  # whether a copy can have a clock of its own
    room: dict[str, int] = {}  # noqa: RUF012 - free bytes for a file that may be copied here


def look(facts: Facts, copy_files: tuple[str, ...] = ()) -> Here:
    """What this host has of what *facts* names. Reads, changes nothing.

    *copy_files*: globs of files that may be sent here with the process.
    """
    return Here(
        files=tuple(files.here(facts.files)),
        alike=tuple(files.here(facts.alike)),
        runs_as=os.geteuid(),
        taken=tuple(number for number in facts.ids if os.path.exists(f"/proc/{number}")),
        users=tuple(user(account.number) for account in facts.users),
        groups=tuple(group(account.number) for account in facts.groups),
        labels=tuple(label for label in facts.labels if _can_label(label)),
        cgroups=tuple(path for path in facts.cgroups if (CGROUPS / path.lstrip("/")).is_dir()),
        cpu=read_cpu() if facts.cpu is not None else None,
        monotonic=time.clock_gettime(time.CLOCK_MONOTONIC),
        time_namespaces=os.path.exists("/proc/self/ns/time"),
        room=dict(_rooms(facts, copy_files)),
    )


def _rooms(facts: Facts, copy_files: tuple[str, ...]) -> Iterator[tuple[str, int]]:
    for fact in facts.files:
        if fact.copied_by(copy_files):
            with contextlib.suppress(OSError):
                left = os.statvfs(os.path.dirname(fact.path))
                yield fact.path, left.f_bavail * left.f_frsize


def _can_label(label: str) -> bool:
    if label.split(maxsplit=1)[0] == _UNCONFINED:
        return True
    if label.count(":") >= 3:  # user:role:type:level of SELinux
        return _SELINUX.exists()
    try:
        loaded = _APPARMOR.read_text()
    except OSError:
        return False
    profile = label.rpartition(" (")[0] or label
    return any(line.rpartition(" (")[0] == profile for line in loaded.splitlines())


def compare(facts: Facts, here: Here, host: str, copy_files: tuple[str, ...] = ()) -> Findings:
    """What speaks against *host*, all of it. Pure. *copy_files* as in ``look``."""
    return Findings(
        blockers=(
            *_files(facts, here, host, copy_files),
            *_ids(facts, here, host),
            *_runs_as(facts, here, host),
            *_accounts("user", facts.users, here.users, host),
            *_accounts("group", facts.groups, here.groups, host),
            *(
                Finding.of(LsmLabel(f"{host} has no security label {label!r}"))
                for label in facts.labels
                if label not in here.labels
            ),
            *_cpu(facts.cpu, here.cpu, host),
        ),
        warnings=(
            *_alike(facts, here, host),
            *_monotonic(facts, here, host),
            *(
                CGROUP_PATH.finding(f"{host} has no cgroup {path}")
                for path in facts.cgroups
                if path not in here.cgroups
            ),
        ),
    )


def _files(facts: Facts, here: Here, host: str, copy_files: tuple[str, ...]) -> Iterator[Finding]:
    found = {fact.path: fact for fact in here.files}
    for wanted in facts.files:
        there = found.get(wanted.path)
        error = _difference(wanted, there, host)
        if error is None:
            continue
        if not wanted.copied_by(copy_files) or (there is not None and there.folder):
            yield Finding.of(error)
            continue
        yield Finding.of(error, COPY_FILE)
        room = here.room.get(wanted.path)
        if room is None:
            folder = os.path.dirname(wanted.path)
            yield Finding.of(FileMissing(f"{host} has no folder {folder} for {wanted.path}"))
        elif room < wanted.size:
            yield Finding.of(
                InsufficientDisk(
                    f"{host} has {room} bytes left for {wanted.path}, {wanted.size} are needed",
                    advice="Free space on the file system that the file is copied to.",
                )
            )


def _difference(wanted: FileFact, there: FileFact | None, host: str) -> MigrateError | None:
    what = "folder" if wanted.folder else "file"
    if there is None:
        return FileMissing(f"{host} has no {what} {wanted.path}")
    if there.folder != wanted.folder:
        return FileDiffers(f"{wanted.path} is a {what} here, and none on {host}")
    if wanted.folder or not wanted.contents:
        return None
    if wanted.written:
        if (wanted.storage, wanted.inode) == (there.storage, there.inode):
            return None  # it is the very same
        return FileDiffers(
            f"{wanted.path} is being written by the process and is another file on {host}"
        )
    if wanted.size != there.size:
        return FileDiffers(f"{wanted.path} has {wanted.size} bytes, {there.size} on {host}")
    if wanted.identity and there.identity and wanted.identity != there.identity:
        return FileDiffers(
            f"{wanted.path} has other contents on {host}: {there.identity}, not {wanted.identity}"
        )
    return None


def _alike(facts: Facts, here: Here, host: str) -> Iterator[Finding]:
    there = {fact.path: fact for fact in here.alike}
    other = [f for f in facts.alike if _difference(f, there.get(f.path), host) is not None]
    if other:
        first = ", ".join(fact.path for fact in other[:3]) + (", ..." if len(other) > 3 else "")
        yield FILE_OTHER.finding(f"{len(other)} files are missing or others on {host}: {first}")


def _monotonic(facts: Facts, here: Here, host: str) -> Iterator[Finding]:
    """Where the kernel has time namespaces CRIU gives the copy the clock that it had."""
    if facts.monotonic > here.monotonic and not here.time_namespaces:
        back = facts.monotonic - here.monotonic
        yield MONOTONIC_CLOCK.finding(
            f"the clock CLOCK_MONOTONIC of the process goes back by {back:.0f} s on {host}"
        )


def _runs_as(facts: Facts, here: Here, host: str) -> Iterator[Finding]:
    if facts.runs_as is not None and facts.runs_as != here.runs_as:
        who = f"user {here.runs_as} on {host}, and the process is user {facts.runs_as}'s"
        advice = "Run the agent there as the user that owns the process."
        yield Finding.of(UserMissing(f"the copy would run as {who}", advice=advice))


def _ids(facts: Facts, here: Here, host: str) -> Iterator[Finding]:
    if here.taken:
        first = ", ".join(map(str, here.taken[:5])) + (", ..." if len(here.taken) > 5 else "")
        what = f"{len(here.taken)} of {len(facts.ids)} pids and thread ids are taken on {host}"
        yield Finding.of(PidInUse(f"{what}: {first}"))


def _accounts(
    kind: str, wanted: tuple[Account, ...], there: tuple[Account, ...], host: str
) -> Iterator[Finding]:
    names = {account.number: account.name for account in there}
    for account in wanted:
        name = names.get(account.number, "")
        if account.name and name != account.name:
            has = f"{name} there" if name else "nobody there"
            text = f"{kind} {account.number} is {account.name} here, and {has} ({host})"
            yield Finding.of(UserMissing(text))


def _cpu(wanted: Cpu | None, there: Cpu | None, host: str) -> Iterator[Finding]:
    if wanted is None:
        return
    if there is None or wanted.architecture != there.architecture:
        what = there.architecture if there is not None else "an unknown one"
        yield Finding.of(CpuFeatures(f"{wanted.architecture} here, {what} on {host}"))
        return
    missing = sorted(set(wanted.flags) - set(there.flags))
    if missing:
        yield Finding.of(CpuFeatures(f"the CPU of {host} lacks {', '.join(missing)}"))
    if wanted.xsave_size != there.xsave_size:
        sizes = f"{wanted.xsave_size} bytes here, {there.xsave_size} on {host}"
        yield Finding.of(CpuFeatures(f"a signal frame with the XSAVE area has {sizes}"))
