"""The two halves of tests/integration/test_criu_memory.py; each says how much memory it took.

``python -m tests.integration.criu_stream (source PID PORT | destination) FOLDER CRIU``. The
images go from one to the other by the data plane, as in a migration. A line on stdin is waited
for between steps. What is counted is anonymous and shared memory, and files that are memory.
"""

from __future__ import annotations

import itertools
import os
import stat
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from migrate.criu.rpc import tracks_memory
from migrate.dataplane.channel import TcpListener, connect_tcp
from migrate.dataplane.memory import PartAccess
from migrate.dataplane.receiver import Receiver
from migrate.dataplane.sender import Sender
from migrate.engine import cgroup, procfs
from migrate.engine.criu import CriuEngine
from migrate.engine.seam import CpuImage
from migrate.kfd.process import KfdProcess
from migrate.model import GpuMap, HostPaths, Value
from migrate.orchestrator.coming import CpuBefore, CpuSide
from migrate.orchestrator.objects import ObjectTable
from migrate.orchestrator.plan import ObjectOrder
from tests.integration.criu_copy import name_of

SESSION, SECRET = bytes(16), bytes(32)  # of a test on loopback
QUOTA = 4 << 30
LOOK = 0.02  # seconds
REWRITTEN = 2.0  # seconds that a process has to write its memory again


class Sent(Value):
    """What the control channel would carry."""

    image: CpuImage
    objects: tuple[ObjectOrder, ...]
    digests: dict[int, bytes]


class Watch:
    """The most memory that some processes, and files of ours, took beyond what they had."""

    def __init__(self, pids: Callable[[], Sequence[int]], files: Callable[[], int]) -> None:
        self._pids, self._files = pids, files
        self._before = self._now()
        self.most = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _now(self) -> int:
        return sum(map(memory, self._pids())) + self._files()

    def _run(self) -> None:
        while not self._stop.wait(LOOK):
            self.most = max(self.most, self._now() - self._before)

    def end(self) -> int:
        self._stop.set()
        self._thread.join()
        return self.most


def memory(pid: int) -> int:
    """Bytes of its memory that no file on a disk backs; 0 if it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    found = (line.split() for line in lines if line.startswith(("RssAnon", "RssShmem")))
    return sum(int(words[1]) << 10 for words in found)


def memory_files() -> int:
    """Bytes of the memfds that we have open."""
    sizes = {}
    for fd in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{fd}").startswith("/memfd:"):
                found = os.stat(f"/proc/self/fd/{fd}")
                sizes[found.st_ino] = found.st_blocks * 512
        except OSError:
            continue
    return sum(sizes.values())


def written(folder: Path) -> int:
    """Bytes of the regular files below *folder*."""
    size = 0
    for path in folder.rglob("*"):
        try:
            found = path.lstat()
        except OSError:
            continue
        size += found.st_blocks * 512 if stat.S_ISREG(found.st_mode) else 0
    return size


def source(folder: Path, criu: str, pid: int, port: int) -> None:
    run = folder / "a"
    engine = CriuEngine(HostPaths(kfd=str(folder / "no"), run=str(run)), criu=criu)
    process = procfs.reference(pid)
    epochs = itertools.count(1)
    sender = Sender(lambda _: connect_tcp("127.0.0.1", port), SECRET, SESSION, lambda: next(epochs))
    me = os.getpid()
    watch = Watch(lambda: [me, *procfs.descendants(me)], lambda: written(run))
    table, before, digests, size = ObjectTable(), [], {}, 0
    if tracks_memory(criu):
        pieces = engine.precopy(process)
        assert pieces is not None
        first = CpuBefore(pieces, table)
        size = sender.send_round([], None, None, first).scanned
        assert first.failed is None
        before, digests = first.came, sender.manifest()
        time.sleep(REWRITTEN)
    image = engine.freeze(process)

    def visit(kfd: Sequence[KfdProcess]) -> None:
        gone = set(engine.outdated(process, ()))
        for info, piece in list(before):
            if piece in gone:
                before.remove((info, piece))
                sender.drop_object(info.id)
                del digests[info.id]

    engine.dump(process, visit)
    cpu = CpuSide(engine, process, image, table, before)
    stats = sender.send_round([], None, None, cpu)
    digests |= sender.manifest()
    cpu.close()
    most = watch.end()
    found = {number: part for number, (_, part) in digests.items()}
    sent = Sent(image=cpu.image, objects=cpu.orders, digests=found)
    (folder / "sent").write_bytes(msgspec.msgpack.encode(sent))
    print("sent", most, size, stats.scanned, flush=True)
    sys.stdin.readline()
    sender.close()
    engine.thaw(process)
    print("thawed", flush=True)


def destination(folder: Path, criu: str) -> None:
    paths = HostPaths(
        kfd=str(folder / "no-kfd"), kfd_sysfs=str(folder / "no"), run=str(folder / "b")
    )
    engine, name = CriuEngine(paths, criu=criu), name_of(folder)
    listener = TcpListener("127.0.0.1")
    receiver = Receiver(listener)
    session = receiver.open_session(SESSION, SECRET, QUOTA)
    group = cgroup.ours(name)
    watch = Watch(lambda: [os.getpid(), *group.processes()], memory_files)
    receiver.start()
    print("listens", listener.port, flush=True)
    sys.stdin.readline()
    sent = msgspec.msgpack.decode((folder / "sent").read_bytes(), type=Sent)
    for item in sent.objects:
        assert item.blob is not None
        target = PartAccess(engine.receive(name, item.blob), item.offset, item.size)
        session.staging.place(item.object_id, target)
        session.staging.verify(item.object_id, target, sent.digests[item.object_id])
        target.close()
    held = engine.restore(sent.image, name, GpuMap(pairs=()))
    held.restored([], [])
    held.finish([], [])
    print("held", watch.end(), sum(map(memory, group.processes())), flush=True)
    sys.stdin.readline()
    held.release()
    print("released", flush=True)
    sys.stdin.readline()
    engine.kill(held.process)
    engine.discard(name)
    receiver.close()


if __name__ == "__main__":
    if sys.argv[1] == "source":
        source(Path(sys.argv[4]), sys.argv[5], int(sys.argv[2]), int(sys.argv[3]))
    else:
        destination(Path(sys.argv[2]), sys.argv[3])
