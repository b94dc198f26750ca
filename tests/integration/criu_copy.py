"""The destination's half of tests/integration/test_criu_engine.py, in a pid namespace of its own.

``python -m tests.integration.criu_copy FOLDER CRIU WHAT`` prints a line of what it sees at
each step and waits for a line on stdin before it ends the copy. WHAT is ``release``,
``kill-criu`` (in the middle of the restore) or ``no-agent`` (the hook can't reach anybody
when the tasks are ready).
"""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

import msgspec

from migrate.engine.criu import CriuEngine
from migrate.engine.seam import CpuImage
from migrate.errors import MigrateError
from migrate.model import GpuMap, HostPaths


def receive(engine: CriuEngine, image: CpuImage, folder: Path) -> None:
    for blob in image.blobs:
        target = engine.receive("copy", blob)
        target.write(0, memoryview(bytearray((folder / "blobs" / blob.name).read_bytes())))
        target.close()


def strike(pid: int) -> None:
    """Kill CRIU once its hook has called."""
    os.kill(pid, 9)


def main(folder: Path, criu: str, what: str) -> None:
    paths = HostPaths(
        kfd=str(folder / "no-kfd"), kfd_sysfs=str(folder / "no-sysfs"), run=str(folder / "b")
    )
    engine = CriuEngine(paths, criu=criu)
    image = msgspec.msgpack.decode((folder / "image").read_bytes(), type=CpuImage)
    receive(engine, image, folder)
    try:
        held = engine.restore(image, "copy", GpuMap(pairs=()))
        if what == "kill-criu":
            strike(held.criu_pid)
        held.restored([], [])
        held.finish([], [])
    except MigrateError as error:
        print("failed", error.reason, error, flush=True)
        print("left", *sorted(os.listdir("/proc/self/task")), threading.active_count(), flush=True)
        return
    print("held", engine.is_frozen(held.process), held.process.pid, flush=True)
    sys.stdin.readline()
    held.release()
    print("released", flush=True)
    sys.stdin.readline()
    time.sleep(0.01)
    engine.kill(held.process)
    engine.discard("copy")
    print("ended", engine.is_alive(held.process), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
