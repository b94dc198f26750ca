"""What a migration needs of the machine besides its cards."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path

from agents.doctor.finding import Finding, Patient, Status, unseen
from agents.hook import HEADER, NAME
from migrate.engine import cgroup
from migrate.engine.criu import HOOK
from migrate.errors import CgroupUnusable
from migrate.inventory import split_address
from migrate.orchestrator.host import available_memory

CRIU_WANTED = (4, 1)
DISK_WANTED = 1 << 30  # bytes: journal, logs, what CRIU writes and we punch behind it
LEAST_STAGING = 1 << 30  # bytes of memory; less and hardly a job fits
# `criu check --feature` names, and what their lack limits.
CRIU_FEATURES = {
    "clone3_set_tid": "Another process may take a pid that is being restored.",
    "pidfd_store": "CRIU may take a process that has reused a pid for the one it has seen.",
    "cgroupns": "A process in a cgroup namespace can't be dumped.",
    "mem_dirty_track": "The kernel can't tell which pages changed: CPU memory is sent whole while"
    " the process stands.",
}
TIMEOUT = 20.0  # seconds of a program or a connection


def _without_criu(patient: Patient) -> Status:
    """How bad it is that the engine criu does not work: simulated hosts have another."""
    return Status.WARN if patient.simulated else Status.FAIL


def criu(patient: Patient) -> Iterable[Finding]:
    """CRIU's version, and what it says of this kernel."""
    path = shutil.which("criu")
    if path is None:
        yield Finding(
            name="criu",
            status=_without_criu(patient),
            found="criu is not installed",
            limits="Only programs that use migrate's own runtime can be moved (engine reexec).",
            mend="Install CRIU 4.1 or newer.",
        )
        return
    said = _run(path, "--version").stdout
    version = tuple(int(n) for n in re.findall(r"\d+", said.partition("\n")[0])[:2])
    good = version >= CRIU_WANTED
    yield Finding(
        name="criu",
        status=Status.OK if good else _without_criu(patient),
        found=f"{path} {'.'.join(map(str, version))}",
        limits="" if good else "Older releases do not run on new kernels, and lack hooks we need.",
        mend="" if good else "Install CRIU 4.1 or newer.",
        data={"version": ".".join(map(str, version))},
    )
    if os.geteuid():
        yield unseen("criu_check", "`criu check` needs root", "Run `migrate doctor` as root.")
        return
    check = _run(path, "check")
    last = ((check.stdout + check.stderr).strip().splitlines() or ["no output"])[-1]
    yield Finding(
        name="criu_check",
        status=_without_criu(patient) if check.returncode else Status.OK,
        found=last,
        limits="CRIU can't dump or restore on this kernel." if check.returncode else "",
        mend="`criu check -v4` names what the kernel lacks." if check.returncode else "",
    )
    yield _features(path)


def _features(criu: str) -> Finding:
    has = {name: _run(criu, "check", "--feature", name).returncode == 0 for name in CRIU_FEATURES}
    missing = [name for name, there in has.items() if not there]
    return Finding(
        name="criu_features",
        status=Status.WARN if missing else Status.OK,
        found=", ".join(f"{name}: {'yes' if there else 'no'}" for name, there in has.items()),
        limits=" ".join(CRIU_FEATURES[name] for name in missing),
        mend="Use a newer kernel, or one that is built with it." if missing else "",
        data={**has},
    )


def hook(patient: Patient) -> Iterable[Finding]:
    """The plugin that connects CRIU to the agent; an agent compiles it when it starts."""
    built = Path(patient.paths.run) / HOOK / NAME
    if built.exists():
        yield Finding(name="hook", status=Status.OK, found=str(built))
        return
    headers = (Path("/usr/include") / HEADER).exists()
    compiler = shutil.which("cc") is not None
    ready = headers and compiler
    yield Finding(
        name="hook",
        status=Status.WARN,
        found="the hook for CRIU is not built"
        + ("; it can be built here" if ready else "; CRIU's headers or a compiler are missing"),
        limits="CRIU leaves GPU state alone without it: the engine criu does not work.",
        mend="Run `migrate agent build-hook`, or let the agent do it when it starts."
        if ready
        else "Install libcriu-dev, gcc and libc6-dev, then build it.",
        data={"headers": headers, "compiler": compiler},
    )


def cgroups(patient: Patient) -> Iterable[Finding]:
    """cgroup v2 and its freezer, which holds a process in the handover."""
    try:
        root = cgroup.mount_point()
    except CgroupUnusable as error:
        yield Finding(
            name="cgroup_v2",
            status=_without_criu(patient),
            found=error.message,
            limits="The engine criu can't hold a process between two owners.",
            mend="Boot with systemd.unified_cgroup_hierarchy=1, or mount cgroup2 anywhere.",
        )
        return
    yield Finding(name="cgroup_v2", status=Status.OK, found=f"cgroup v2 is mounted at {root}")
    # The freezer is part of the core: every cgroup but the root one has the files.
    group = next((p for p in root.iterdir() if p.is_dir() and not p.is_symlink()), None)
    if group is None:
        yield unseen("freezer", "there is no cgroup below the root to look at")
        return
    lacks = [name for name in ("cgroup.freeze", "cgroup.kill") if not (group / name).exists()]
    yield Finding(
        name="freezer",
        status=_without_criu(patient) if lacks else Status.OK,
        found=f"{group} {'lacks ' + ' and '.join(lacks) if lacks else 'can be frozen and killed'}",
        limits="A source can't be held frozen: no safe handover." if lacks else "",
        mend="Use Linux 5.14 or newer." if lacks else "",
    )


def disk(patient: Patient) -> Iterable[Finding]:
    """Room where the journal is."""
    folder = Path(patient.paths.run)
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    good = free >= DISK_WANTED
    yield Finding(
        name="disk",
        status=Status.OK if good else Status.WARN,
        found=f"{free >> 20} MiB free at {folder}",
        limits="" if good else "A journal without room stops the agent (JOURNAL_UNUSABLE).",
        mend="" if good else "Free some room.",
        data={"free": free},
    )


def memory(_: Patient) -> Iterable[Finding]:
    """What pre-copied bytes wait in."""
    free = available_memory()
    good = free >= LEAST_STAGING
    yield Finding(
        name="staging",
        status=Status.OK if good else Status.WARN,
        found=f"{free >> 20} MiB of memory can hold pre-copied bytes",
        limits="A process with more VRAM and memory than this can't be pre-copied to here.",
        mend="" if good else "Add memory, or stop what uses it.",
        data={"available": free},
    )


def clock(_: Patient) -> Iterable[Finding]:
    """Certificates and reports want the right time."""
    flags = _adjtimex()
    if flags is None:
        yield unseen("clock", "adjtimex(2) is not to be had")
        return
    synchronised = not flags & 0x40  # STA_UNSYNC of sys/timex.h
    yield Finding(
        name="clock",
        status=Status.OK if synchronised else Status.WARN,
        found=f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())},"
        f" {'synchronised' if synchronised else 'not synchronised'}",
        limits="" if synchronised else "A clock that is wrong makes valid certificates look bad.",
        mend="" if synchronised else "Run chrony or systemd-timesyncd.",
        data={"synchronised": synchronised},
    )


def network(patient: Patient) -> Iterable[Finding]:
    """The way to a peer."""
    if not patient.peer:
        yield unseen("network", "no peer was named", "Name a host of the inventory.")
        return
    host, port = split_address(patient.peer)
    started = time.perf_counter()
    try:
        with socket.create_connection((host, port), timeout=TIMEOUT) as connection:
            trip = time.perf_counter() - started
            mtu = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG)
    except OSError as error:
        yield Finding(
            name="network",
            status=Status.FAIL,
            found=f"{patient.peer}: {error}",
            limits="No process can move between these two hosts.",
            mend="Start the agent there; open its port.",
        )
        return
    yield Finding(
        name="network",
        status=Status.OK,
        found=f"{patient.peer} answers in {trip * 1e3:.1f} ms, segments of {mtu} bytes",
        data={"connect_seconds": trip, "segment": mtu},
    )


def network_rate(patient: Patient) -> Iterable[Finding]:
    """What the link to the peer carries at least."""
    if patient.measure is None:
        yield unseen("network_rate", "no peer was named", "Name a host of the inventory.")
        return
    rate = patient.measure()
    yield Finding(
        name="network_rate",
        status=Status.OK,
        found=f"at least {rate / (1 << 20):.0f} MiB/s to {patient.peer}, by one encrypted call;"
        " `migrate check SRC DST PID` measures by what a migration uses",
        data={"bytes_per_second": rate},
    )


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)


def _adjtimex() -> int | None:
    import ctypes  # noqa: PLC0415

    buffer = (ctypes.c_long * 64)()  # struct timex: modes, then longs; 208 bytes
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.adjtimex(ctypes.byref(buffer)) < 0:
        return None
    return int(ctypes.c_int.from_buffer(buffer, 40).value)  # offset of status
