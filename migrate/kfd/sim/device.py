"""The simulated host as a whole: its GPUs, open files, processes, and the lock."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from migrate.kfd.sim.callers import start_time_of
from migrate.kfd.sim.faults import Faults
from migrate.kfd.sim.memory import AddressSpace, Backing, Bo, FreeVram, align_up
from migrate.kfd.sim.process import DeviceData, SimProcess

if TYPE_CHECKING:
    from migrate.kfd.sim.engine import Engine
    from migrate.topology.profiles import TreeGpu

DRM_FILE_PAGE_OFFSET_START = 0x100000000  # where DRM begins to hand out mmap offsets

# amdgpu_amdkfd_gpuvm.c of Linux 6.1; bytes
VRAM_AVAILABILITY_ALIGN = 1 << 21
AMDGPU_VM_RESERVED_VRAM = 8 << 20


@dataclass(eq=False)
class OpenFile:
    """An open /dev/kfd (``gpu`` None) or render node; gone when nobody holds it."""

    connection: socket.socket
    gpu: Gpu | None
    inode: int = 0  # of the other end of the connection: tells which file a passed fd is
    process: SimProcess | None = None  # of a kfd file
    has_vm: bool = False  # of a render node


@dataclass(eq=False)
class Gpu:
    """One GPU of the host."""

    spec: TreeGpu
    free: FreeVram
    engine: Engine | None = None
    vram_used: int = 0
    vram_used_aligned: int = 0  # each BO as whole 2 MiB
    mmap_offsets: dict[int, Bo] = field(default_factory=dict)
    next_offset: int = DRM_FILE_PAGE_OFFSET_START
    hws_hang: bool = False
    mmio: Backing | None = None
    orphans: list[Backing] = field(default_factory=list)  # freed VRAM that somebody holds

    @property
    def gpu_id(self) -> int:
        """The actual gpu_id."""
        return self.spec.gpu_id

    def use_vram(self, size: int) -> None:
        """Account for a BO of *size* bytes; negative when it is freed."""
        self.vram_used += size
        whole = align_up(abs(size), VRAM_AVAILABILITY_ALIGN)
        self.vram_used_aligned += whole if size > 0 else -whole


class Host:
    """State of the node. Everything in it is touched under ``lock`` only."""

    def __init__(self, root: Path, gpus: tuple[TreeGpu, ...], *, allow_unprivileged: bool,
                 interface_minor: int, bo_record_size: int, svm: bool,
                 populated: int) -> None:  # fmt: skip
        self.root = root
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)  # events, ends of processes
        self.engines = threading.Condition(self.lock)  # an engine stopped working
        self.gpus = tuple(Gpu(spec, FreeVram(populated)) for spec in gpus)
        self.allow_unprivileged = allow_unprivileged
        self.interface_minor = interface_minor
        self.bo_record_size = bo_record_size
        self.svm = svm
        self.files: dict[int, OpenFile] = {}  # by inode of the process's end
        self.processes: dict[int, SimProcess] = {}  # alive, by pid
        self.pinned: set[SimProcess] = set()  # dead, but a file is still open
        self.faults = Faults(root)
        self.broken = False
        self._next_pasid = 0x8000

    # ------------------------------------------------------------ files and processes

    def open_kfd(self, file: OpenFile, pid: int) -> None:
        """kfd_open(): the process of *pid* has the device open. Raises OSError."""
        process = self.processes.get(pid)
        start = start_time_of(pid)
        if process is None or process.start_time != start:
            process = SimProcess(pid, start, self._next_pasid)
            self._next_pasid += 1
            for gpu in self._visible(pid):
                space = AddressSpace(process)
                process.devices.append(DeviceData(gpu, process, gpu.gpu_id, space))
            self.processes[pid] = process
            self.write_process(process)
        process.files.add(file)
        file.process = process

    def _visible(self, pid: int) -> list[Gpu]:
        """The GPUs a device cgroup lets *pid* see: ``run/devices/PID`` of it or a parent."""
        folder = self.root / "run" / "devices"
        while pid > 1 and folder.is_dir():
            try:
                minors = {int(word) for word in (folder / str(pid)).read_text().split()}
                return [gpu for gpu in self.gpus if gpu.spec.render_minor in minors]
            except FileNotFoundError:
                pid = _parent(pid)
        return list(self.gpus)

    def find_file(self, fd: int) -> OpenFile | None:
        """The render node that *fd*, passed by a caller, stands for."""
        try:
            file = self.files.get(os.fstat(fd).st_ino)
        except (OSError, OverflowError):
            return None
        return file

    def init_vm(self, device: DeviceData, file: OpenFile, caller: int) -> None:
        """kfd_process_device_init_vm() in process *caller*. Raises OSError(EBUSY, EINVAL).

        Whose render node it is, is not looked at; that it is one, is, and that it has no
        compute VM yet. The first VM notes who made it (init_kfd_vm() in
        amdgpu_amdkfd_gpuvm.c): that one's queues are what RESUME will start.
        """
        if device.drm_file is not None:
            raise OSError(errno.EBUSY, "has a VM")
        if file.gpu is None or file.has_vm:
            raise OSError(errno.EINVAL, "not a fresh render node")
        process = device.process
        if not process.has_vm:
            process.vm_maker = (caller, start_time_of(caller))
        file.has_vm = True
        device.drm_file = file

    def close_file(self, file: OpenFile) -> None:
        """The last fd of an open file is closed."""
        self.files.pop(file.inode, None)
        process = file.process
        if process is not None:
            process.files.discard(file)
            if process.dead and not process.files:
                self._release(process)

    def end_process(self, process: SimProcess) -> None:
        """The process has exited (its mm is gone)."""
        if self.processes.get(process.pid) is process:
            del self.processes[process.pid]
        process.dead = True
        self.changed.notify_all()
        if process.files:
            self.pinned.add(process)
        else:
            self._release(process)

    def _release(self, process: SimProcess) -> None:
        """kfd_process_wq_release(): queues, BOs and events go."""
        self.pinned.discard(process)
        for device in process.devices:
            device.queues.clear()
        process.queues.clear()
        self.wait_engines(process)
        for device in process.devices:
            for bo in device.handles.values():
                self.drop_bo(bo)
            device.handles.clear()
            if device.doorbells is not None:
                device.doorbells.close()
                device.doorbells = None
        process.events.close()
        os.close(process.pidfd)
        if process.pid not in self.processes:  # the number may have been given anew
            shutil.rmtree(self.process_folder(process), ignore_errors=True)
        self.changed.notify_all()

    def wait_engines(self, process: SimProcess) -> None:
        """Wait until no engine is in the middle of a packet of *process*."""
        self.engines.wait_for(
            lambda: (
                not any(
                    gpu.engine is not None and gpu.engine.works_for(process) for gpu in self.gpus
                )
            )
        )

    # ------------------------------------------------------------ VRAM

    def allocate_vram(self, gpu: Gpu, size: int) -> Backing:
        """VRAM for a BO, zero. Raises OSError(ENOMEM) if the GPU has no *size* bytes left."""
        self.reap_orphans(gpu)
        if gpu.vram_used + size > gpu.spec.vram_bytes - self._page_table_reserve():
            raise OSError(errno.ENOMEM, "VRAM is full")
        backing = gpu.free.take(size, gpu.vram_used + size) or Backing("kfd-vram", size, gpu)
        self._use_vram(gpu, size)
        return backing

    def reap_orphans(self, gpu: Gpu) -> None:
        """Take back freed memory that nobody holds any more."""
        for backing in list(gpu.orphans):
            if not backing.is_held():
                gpu.orphans.remove(backing)
                self._use_vram(gpu, -backing.size)
                gpu.free.put(backing, gpu.vram_used)

    def _same(self, bo: Bo) -> Iterator[Bo]:
        """All handles of its buffer on its GPU, in any process."""
        for process in self.processes.values():
            for device in process.devices:
                for other in device.handles.values() if device.gpu is bo.owner.gpu else ():
                    if other.mmap_offset == bo.mmap_offset:
                        yield other

    def may_map(self, bo: Bo, file: OpenFile) -> bool:
        """drm_vma_node_is_allowed(): by the render node that it was made or imported with."""
        return any(other.owner.drm_file is file for other in (bo, *self._same(bo)))

    def _hand_over(self, gpu: Gpu, gone: Bo) -> bool:
        """A buffer that was imported stays mappable by whoever has it. Whether anybody has."""
        for other in self._same(gone):
            if other is not gone:
                gpu.mmap_offsets[gone.mmap_offset] = other
                return True
        return False

    def drop_bo(self, bo: Bo) -> None:
        """Free a BO; its memory stays accounted while somebody holds it."""
        gpu = bo.owner.gpu
        if not self._hand_over(gpu, bo):
            gpu.mmap_offsets.pop(bo.mmap_offset, None)
        for device in bo.mapped:
            device.memory.remove(bo)
        bo.mapped.clear()
        backing = bo.backing
        if backing is None:
            return
        backing.users -= 1
        backing.forget_window()
        if backing.users:
            return
        if backing.vram_of is None:
            if backing is not gpu.mmio and backing is not bo.owner.doorbells:
                backing.close()
        else:
            backing.vram_of.orphans.append(backing)
            self.reap_orphans(backing.vram_of)

    def available_vram(self, gpu: Gpu) -> int:
        """amdgpu_amdkfd_get_available_memory(): careful, in steps of 2 MiB."""
        self.reap_orphans(gpu)
        free = gpu.spec.vram_bytes - gpu.vram_used_aligned - self._page_table_reserve()
        return max(free, 0) & ~(VRAM_AVAILABILITY_ALIGN - 1)

    def _page_table_reserve(self) -> int:
        """ESTIMATE_PT_SIZE(), of the GPUs' memory: the host's own has no number here."""
        return max(sum(gpu.spec.vram_bytes for gpu in self.gpus) >> 14, AMDGPU_VM_RESERVED_VRAM)

    def _use_vram(self, gpu: Gpu, size: int) -> None:
        gpu.use_vram(size)
        self.write_vram(gpu)

    # ------------------------------------------------------------ sysfs

    def write_vram(self, gpu: Gpu) -> None:
        """DIR/drm/renderD*/device/mem_info_vram_{total,used}."""
        folder = self.root / "drm" / f"renderD{gpu.spec.render_minor}" / "device"
        folder.mkdir(parents=True, exist_ok=True)
        write_attribute(folder / "mem_info_vram_total", gpu.spec.vram_bytes)
        write_attribute(folder / "mem_info_vram_used", gpu.vram_used)

    def process_folder(self, process: SimProcess) -> Path:
        """DIR/sys/proc/PID."""
        return self.root / "sys" / "proc" / str(process.pid)

    def write_process(self, process: SimProcess) -> None:
        """DIR/sys/proc/PID: pasid, vram_<actual gpu_id>, queues/N/{gpuid,size,type}."""
        folder = self.process_folder(process)
        (folder / "queues").mkdir(parents=True, exist_ok=True)
        write_attribute(folder / "pasid", process.pasid)
        for device in process.devices:
            write_attribute(folder / f"vram_{device.gpu.gpu_id}", device.vram_usage)
        for stale in {p.name for p in (folder / "queues").iterdir()} - {
            str(number) for number in process.queues
        }:
            shutil.rmtree(folder / "queues" / stale)
        for number, queue in process.queues.items():
            place = folder / "queues" / str(number)
            if not place.is_dir():
                place.mkdir()
                write_attribute(place / "gpuid", queue.owner.gpu.gpu_id)
                write_attribute(place / "size", queue.ring_size)
                write_attribute(place / "type", queue.kind)

    # ------------------------------------------------------------ the kernel's log

    def log(self, line: str) -> None:
        """Append to DIR/run/kernel.log."""
        with (self.root / "run" / "kernel.log").open("a") as stream:
            stream.write(line + "\n")

    def oops(self, what: str) -> OSError:
        """The kernel would have crashed here; the device is broken for good."""
        self.log(f"oops: {what}")
        self.broken = True
        return OSError(errno.EIO, "the simulated kernel oopsed")


def write_attribute(path: Path, value: object) -> None:
    """Write a sysfs-like file so that a reader never sees it half written."""
    fresh = path.with_name(f".{path.name}")
    fresh.write_text(f"{value}\n")
    fresh.rename(path)


def _parent(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/stat") as stream:
            return int(stream.read().rpartition(")")[2].split()[1])
    except OSError:
        return 0
