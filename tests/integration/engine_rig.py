"""Simulated hosts, the training workload, and a migration by hand, for the engine's tests."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from migrate.engine import procfs
from migrate.engine.held import Held
from migrate.engine.reexec import ReexecEngine
from migrate.engine.seam import MovedBo, MovedGpu
from migrate.kfd.file import open_device
from migrate.kfd.process import Checkpointed, KfdProcess, Restored, resume
from migrate.kfd.sysfs import read_topology
from migrate.model import GpuMap, HostPaths, ProcessRef

REPOSITORY = Path(__file__).parents[2]
SIZE = ("--vram", "8MiB", "--delay-us", "300")
PATIENCE = 60.0  # seconds; never what a test measures


def until(reached: Callable[[], object], what: str = "") -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + PATIENCE
    while not reached():
        assert time.monotonic() < deadline, f"never happened: {what or reached}"
        time.sleep(0.002)


class Host:
    """A simulated host: its node process and its paths."""

    def __init__(self, root: Path, slot_offset: int, profile: str = "mi210x2") -> None:
        root.mkdir(parents=True, exist_ok=True)
        self.root = str(root)
        self.paths = HostPaths.under(root)
        self.engine = ReexecEngine(self.paths)
        ready, write = os.pipe()
        self._parent_fd, parent = os.pipe()[::-1]
        command = [sys.executable, "-m", "migrate.kfd.sim", "--root", str(root)]
        command += ["--profile", profile, "--allow-unprivileged"]
        command += ["--slot-offset", str(slot_offset)]
        command += ["--ready-fd", str(write), "--parent-fd", str(parent)]
        self._node = subprocess.Popen(
            command, pass_fds=[write, parent], stdout=subprocess.DEVNULL, cwd=REPOSITORY
        )
        os.close(write)
        os.close(parent)
        try:
            assert os.read(ready, 1), "the simulated node did not start"
        finally:
            os.close(ready)

    def close(self) -> None:
        os.close(self._parent_fd)
        self._node.terminate()
        self._node.wait()


@contextlib.contextmanager
def hosts(folder: Path, *names: str) -> Iterator[list[Host]]:
    """Simulated hosts whose gpu_ids differ."""
    with contextlib.ExitStack() as stack:
        found = []
        for index, name in enumerate(names):
            host = Host(folder / name, 3 * index)
            stack.callback(host.close)
            found.append(host)
        yield found


class Job:
    """A run of the training workload, which trains until it is told to ``finish``."""

    def __init__(self, host: Host, folder: Path, name: str, *options: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._host = host
        self.log = folder / f"{name}.log"
        self.result = folder / f"{name}.json"
        self.errors = folder / f"{name}.err"
        command = [sys.executable, "-m", "scenarios.workloads.train"]
        self._end = folder / f"{name}.end"
        command += ["--log", str(self.log), "--result", str(self.result)]
        command += [*SIZE, *(options or ("--until", str(self._end)))]  # the last one counts
        environment = os.environ | {
            "MIGRATE_HOST_ROOT": host.root,
            "MIGRATE_PTRACER": str(os.getpid()),
        }
        with self.errors.open("ab") as errors:
            self.popen = subprocess.Popen(
                command, env=environment, cwd=REPOSITORY, stdout=errors, stderr=errors
            )

    @property
    def steps(self) -> int:
        """Steps that are in the log."""
        return self.log.read_bytes().count(b"\n") if self.log.exists() else 0

    def running(self, steps: int = 3) -> ProcessRef:
        """The process, once it did so many steps (more)."""
        wanted = self.steps + steps
        until(lambda: self.steps >= wanted or self.popen.poll() is not None, "steps")
        assert self.popen.poll() is None, self.errors.read_text()
        return procfs.reference(self.popen.pid)

    def moved_to(self, process: ProcessRef) -> None:
        """It is another process now; see that it gets on (past what was in flight)."""
        wanted = self.steps + 10
        until(lambda: self.steps >= wanted or not procfs.is_alive(process), "steps after a move")
        assert procfs.is_alive(process), self.errors.read_text()

    def finish(self) -> dict[str, Any]:
        """Tell it to end, and its report."""
        self._end.touch()
        until(
            lambda: self.result.exists() or b"train:" in self.errors.read_bytes(),
            f"a result ({self.errors.read_text()})",
        )
        found: dict[str, Any] = json.loads(self.result.read_text())
        return found

    def compare(self, report: dict[str, Any]) -> None:
        """Assert that *report* is that of a twin that does as many steps and never moves."""
        name = f"{self.log.stem}-twin"
        with job(self._host, self.log.parent, name, "--steps", str(report["steps"])) as twin:
            assert twin.popen.wait(PATIENCE) == 0, twin.errors.read_text()
            expected = json.loads(twin.result.read_text())
        for same in ("digest", "steps", "gpu_ids", "handles", "queue_ids", "event_ids"):
            assert report[same] == expected[same], same
        assert self.log.read_bytes() == twin.log.read_bytes()
        assert report["fds_at_end"] == report["fds_at_start"]


@contextlib.contextmanager
def job(host: Host, folder: Path, name: str, *options: str) -> Iterator[Job]:
    started = Job(host, folder, name, *options)
    try:
        yield started
    finally:
        started.popen.kill()
        started.popen.wait()


@contextlib.contextmanager
def dying_agent(*arguments: str) -> Iterator[tuple[subprocess.Popen[bytes], bytes]]:
    """An agent process (see engine_agent) and what it said before it is killed."""
    command = [sys.executable, "-m", "tests.integration.engine_agent", *arguments]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=REPOSITORY
    ) as found:
        try:
            assert found.stdout is not None
            yield found, found.stdout.readline().strip()
        finally:
            found.kill()


def pause_and_checkpoint(kfd: Any) -> Checkpointed:
    """A visitor that leaves the queues paused."""
    process: KfdProcess = kfd[0]
    process.process_info()
    return process.checkpoint()


def copy_memory(source: Checkpointed, target: Restored) -> None:
    for ours, theirs, bo in zip(source.dmabufs, target.dmabufs, source.checkpoint.bos, strict=True):
        if ours is None or theirs is None:
            continue
        with mmap.mmap(ours, bo.size) as before, mmap.mmap(theirs, bo.size) as after:
            after[:] = before[:]


def build(source: Host, target: Host, process: ProcessRef) -> tuple[Held, Restored]:
    """Freeze *process* and build it at *target*, held; the source stays frozen and paused."""
    image = source.engine.freeze(process)
    with source.engine.visit_frozen(process, pause_and_checkpoint) as checkpointed:
        checkpoint = checkpointed.checkpoint
        held = target.engine.restore(image, f"m{process.pid}", GpuMap(pairs=()))
        kfd = held.kfd[0]
        minors = {
            gpu.gpu_id: gpu.drm_render_minor for gpu in read_topology(target.paths.topology).gpus
        }
        # In the order of the gpu_ids: neighbours may change places on the way.
        actual = sorted(device.actual_gpu_id for device in checkpoint.devices)
        gpu_map = dict(zip(actual, sorted(minors), strict=True))
        nodes = {
            gpu: kfd.file.open_node(f"{target.paths.dri}/renderD{minor}")
            for gpu, minor in minors.items()
        }
        for wanted in image.ranges:
            data = memoryview(bytearray(wanted.length))
            source.engine.memory(process, wanted).read(0, data)
            held.memory(wanted).write(0, data)
        with kfd.restore(checkpoint, gpu_map, nodes, minors) as restored:
            copy_memory(checkpointed, restored)
        gpus = [
            MovedGpu(
                user_gpu_id=device.user_gpu_id,
                source_gpu_id=device.actual_gpu_id,
                gpu_id=gpu_map[device.actual_gpu_id],
                drm_fd=nodes[gpu_map[device.actual_gpu_id]],
            )
            for device in checkpoint.devices
        ]
        bos = [
            MovedBo(gpu_id=bo.gpu_id, offset=bo.offset, size=bo.size, restored_offset=offset)
            for bo, offset in zip(checkpoint.bos, restored.restored_offsets, strict=True)
        ]
        held.finish(gpus, bos)
    return held, restored


def migrate(source: Host, target: Host, process: ProcessRef) -> ProcessRef:
    """Move *process*; the source's copy is killed before the new one runs."""
    held, restored = build(source, target, process)
    assert target.engine.is_frozen(held.process)
    source.engine.kill(process)
    kfd = open_device(target.paths.kfd)
    assert resume(kfd, held.process.pid, restored.proof)
    kfd.close()
    held.release()
    return held.process
