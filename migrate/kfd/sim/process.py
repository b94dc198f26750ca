"""struct kfd_process and kfd_process_device of the simulated node."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from migrate import process_vm
from migrate.kfd import uapi
from migrate.kfd.sim.events import Events
from migrate.kfd.sim.memory import AddressSpace, Backing, Bo
from migrate.kfd.sim.queues import DOORBELL_SIZE, Queue

if TYPE_CHECKING:
    from migrate.kfd import privdata
    from migrate.kfd.sim.device import Gpu, OpenFile
    from migrate.kfd.sim.svm import SvmRange

DOORBELL_SLICE = 8192  # bytes: kfd_doorbell_process_slice() with 8-byte doorbells
MAX_QUEUES = 1024
SVM_USER_BASE = 0x4000  # gpuvm_base: BOs at or below it are the driver's own
NON_CP_DOORBELLS = range(0x1E0, 0x200)  # of SDMA, IH and VCN, mirrored 512 higher


def error(number: int) -> OSError:
    """OSError of an errno."""
    return OSError(number, os.strerror(number))


@dataclass(eq=False)
class DeviceData:
    """struct kfd_process_device: one visible GPU in one process."""

    gpu: Gpu
    process: SimProcess
    user_gpu_id: int
    memory: AddressSpace
    drm_file: OpenFile | None = None  # has a VM
    handles: dict[int, Bo] = field(default_factory=dict)
    queues: list[Queue] = field(default_factory=list)  # newest first, as list_add() leaves them
    evicted: int = 0
    vram_usage: int = 0
    doorbells: Backing | None = None
    doorbell_ids: set[int] = field(default_factory=set)

    def bound(self, missing: int = errno.ENODEV) -> DeviceData:
        """kfd_bind_process_to_device(). Raises OSError(*missing*) without a VM."""
        if self.drm_file is None:
            raise OSError(missing, "no VM on that GPU")
        return self

    def find_handle(self, handle: int, missing: int = errno.EINVAL) -> Bo:
        """The BO of an IDR handle. Raises OSError(*missing*)."""
        bo = self.handles.get(handle)
        if bo is None:
            raise OSError(missing, f"no BO {handle}")
        return bo

    def free_handle(self) -> int:
        """The lowest free number, as idr_alloc() gives it."""
        number = 0
        while number in self.handles:
            number += 1
        return number

    def doorbell_backing(self) -> Backing:
        """This process's doorbell pages on the GPU; made when first needed."""
        if self.doorbells is None:
            self.doorbells = Backing("kfd-doorbells", DOORBELL_SLICE)
        return self.doorbells

    def allocate_doorbell(self, restore_id: int | None = None) -> int:
        """allocate_doorbell() of a CP queue. Raises OSError."""
        self.doorbell_backing()
        if restore_id is not None:
            if restore_id >= MAX_QUEUES or restore_id in self.doorbell_ids:
                raise OSError(errno.EINVAL, "doorbell id")
            number = restore_id
        else:
            number = 0
            while number in self.doorbell_ids or number % 512 in NON_CP_DOORBELLS:
                number += 1
            if number >= MAX_QUEUES:
                raise OSError(errno.EBUSY, "no doorbell is free")
        self.doorbell_ids.add(number)
        return number

    def read_doorbell(self, queue: Queue) -> int:
        """The u64 last stored into the queue's doorbell."""
        window = self.doorbell_backing().window()
        at = queue.doorbell_id * DOORBELL_SIZE
        return int.from_bytes(window[at : at + DOORBELL_SIZE], "little")


class SimProcess:
    """struct kfd_process: lives until the process is dead and its files are closed."""

    def __init__(self, pid: int, start_time: int, pasid: int) -> None:
        self.pid = pid
        self.start_time = start_time
        self.pasid = pasid
        self.pidfd = os.pidfd_open(pid)
        self.files: set[OpenFile] = set()
        self.devices: list[DeviceData] = []
        self.queues: dict[int, Queue] = {}
        self.events = Events()
        self.dead = False
        self.queues_paused = False
        self.xnack = False
        self.svm_ranges: list[SvmRange] = []
        self.svm_restored: list[privdata.SvmRangeRecord] = []  # by RESTORE, for RESUME
        self.block_mmu_notifications = False  # set by RESTORE, cleared by RESUME
        self.vm_maker: tuple[int, int] | None = None  # pid, start time: this one, or a tracer

    def device(self, user_gpu_id: int, missing: int = errno.EINVAL) -> DeviceData:
        """kfd_process_device_data_by_id(). Raises OSError(*missing*)."""
        for device in self.devices:
            if device.user_gpu_id == user_gpu_id:
                return device
        raise OSError(missing, f"gpu_id {user_gpu_id:#x}")

    def device_on(self, gpu: Gpu) -> DeviceData | None:
        """kfd_get_process_device_data()."""
        return next((device for device in self.devices if device.gpu is gpu), None)

    @property
    def has_vm(self) -> bool:
        """Whether kgd_process_info exists."""
        return any(device.drm_file is not None for device in self.devices)

    def free_queue_id(self, wanted: int | None = None) -> int:
        """A queue slot. Raises OSError."""
        if wanted is not None:
            if wanted >= MAX_QUEUES or wanted in self.queues:
                raise OSError(errno.EEXIST if wanted in self.queues else errno.EINVAL, "queue id")
            return wanted
        number = 0
        while number in self.queues:
            number += 1
        if number >= MAX_QUEUES:
            raise OSError(errno.ENOMEM, "queue slots")
        return number

    # ------------------------------------------------------------ the process's own memory

    def read_memory(self, address: int, length: int) -> bytes | None:
        """Bytes of a userptr; None if the process has nothing there."""
        buffer = ctypes.create_string_buffer(length)
        try:
            process_vm.read(self.pid, ctypes.addressof(buffer), address, length)
        except OSError:
            return None
        return buffer.raw

    def write_memory(self, address: int, data: bytes) -> bool:
        """Write into a userptr; False if the process has nothing there."""
        buffer = ctypes.create_string_buffer(data, len(data))
        try:
            process_vm.write(self.pid, ctypes.addressof(buffer), address, len(data))
        except OSError:
            return False
        return True

    def send_sigsegv(self) -> None:
        """What the driver does when nobody waits for memory exceptions."""
        try:
            signal.pidfd_send_signal(self.pidfd, signal.SIGSEGV)
        except OSError:
            return  # gone, or not ours to signal


def bo_by_handle(process: SimProcess, handle: int, missing: int = errno.EINVAL) -> Bo:
    """The BO of a handle as user space has it (gpu_id and IDR number)."""
    device = process.device(uapi.GET_GPU_ID(handle))
    return device.find_handle(uapi.GET_IDR_HANDLE(handle), missing)
