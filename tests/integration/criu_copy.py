"""The destination's half of tests/integration/test_criu_engine.py, in a pid namespace of its own.

``python -m tests.integration.criu_copy FOLDER CRIU WHAT`` prints a line of what it sees at
each step and waits for a line on stdin before it ends the copy. WHAT is ``release``,
``kill-criu`` (in the middle of the restore), ``hide`` (a device is hidden from the copy),
``elsewhere`` (the folder ``data`` is empty here), ``replaced`` (it has another file) or
``given-up`` (so it has, and the copy is ended before it is released), ``booted-later``.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import msgspec

from migrate.engine import cgroup
from migrate.engine.criu import HOOK, CriuEngine
from migrate.engine.criu_document import CriuDocument
from migrate.engine.criu_restore import Restoration
from migrate.engine.seam import CpuImage
from migrate.errors import MigrateError
from migrate.model import GpuMap, HostPaths

APART = ("elsewhere", "replaced", "given-up")  # where the destination has a folder of its own


def receive(engine: CriuEngine, image: CpuImage, folder: Path) -> None:
    for blob in image.blobs:
        target = engine.receive(name_of(folder), blob)
        target.write(0, memoryview(bytearray((folder / "blobs" / blob.name).read_bytes())))
        target.close()


def name_of(folder: Path) -> str:
    """Of the migration, and so of a cgroup: others may run these tests at the same time."""
    return f"copy-{zlib.crc32(bytes(folder)):08x}"


def restore(engine: CriuEngine, image: CpuImage, folder: Path) -> Restoration:
    return engine.restore(image, name_of(folder), GpuMap(pairs=()))


def hiding(paths: HostPaths, image: CpuImage, criu: str, name: str) -> Restoration:
    """As the engine does it where a GPU of this host has to stay hidden: here it is /dev/full."""
    found = os.stat("/dev/full").st_rdev
    held = Restoration(
        criu,
        Path(paths.run) / HOOK,
        paths,
        CriuDocument.decode(image.state),
        name,
        Path(paths.run) / "criu" / name,
        {},
        GpuMap(pairs=()),
        [(os.major(found), os.minor(found))],
    )
    home = cgroup.group_of(held.criu_pid)
    assert home is not None
    # A task that is being restored opens its files in the group that its parent, CRIU, is in.
    opened = subprocess.run(
        ["sh", "-c", f"echo $$ > {home.path}/cgroup.procs && : < /dev/full"],
        stderr=subprocess.DEVNULL,
        check=False,
    )
    print("forked where it is", "seen" if opened.returncode == 0 else "hidden", flush=True)
    try:
        held.await_tasks()
    except BaseException:
        held.abandon()
        raise
    return held


def strike(pid: int) -> None:
    """Kill CRIU once its hook has called."""
    os.kill(pid, 9)


def main(folder: Path, criu: str, what: str) -> None:
    paths = HostPaths(
        kfd=str(folder / "no-kfd"), kfd_sysfs=str(folder / "no-sysfs"), run=str(folder / "b")
    )
    engine = CriuEngine(paths, criu=criu)
    data = folder / "data"
    if what in APART:
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", data], check=True)
    if what in APART[1:]:
        (data / "kept").write_bytes(b"theirs")
    image = msgspec.msgpack.decode((folder / "image").read_bytes(), type=CpuImage)
    receive(engine, image, folder)
    try:
        if what == "hide":
            held = hiding(paths, image, criu, name_of(folder))
        else:
            held = restore(engine, image, folder)
        if what == "kill-criu":
            strike(held.criu_pid)
        held.restored([], [])
        held.finish([], [])
    except MigrateError as error:
        engine.discard(name_of(folder))
        print("failed", error.reason, error, flush=True)
        print("left", *sorted(os.listdir("/proc/self/task")), threading.active_count(), flush=True)
        return
    print("held", engine.is_frozen(held.process), held.process.pid, flush=True)
    sys.stdin.readline()
    if what == "given-up":
        print("here", *sorted(os.listdir(data)), (data / "kept").stat().st_size, flush=True)
        engine.kill(held.process)
        engine.discard(name_of(folder))
        print("here", *sorted(os.listdir(data)), (data / "kept").read_text(), flush=True)
        return
    engine.thaw(held.process)
    print("released", flush=True)
    if what in APART[:2]:
        kept = data / "kept"
        found = kept.stat()
        shown = *sorted(os.listdir(data)), oct(found.st_mode), found.st_uid, found.st_size
        print("here", *shown, kept.read_bytes()[8:12].decode(), flush=True)
    sys.stdin.readline()
    time.sleep(0.01)
    engine.kill(held.process)
    engine.discard(name_of(folder))
    print("ended", engine.is_alive(held.process), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
