"""Kernel, KFD, cards, firmware, BAR, and how fast VRAM can be reached."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from ctypes import byref, c_uint32
from pathlib import Path

import msgspec

from agents.doctor.finding import UNSEEN_ERRORS, Finding, Patient, Status, unseen
from migrate.dataplane.memory import BytesAccess
from migrate.dataplane.sdma import libdrm
from migrate.dataplane.sdma.access import SdmaAccess
from migrate.dataplane.sdma.card import Card
from migrate.dataplane.vram import SAMPLE, measure
from migrate.decode import from_json
from migrate.kfd import uapi
from migrate.kfd.file import open_device
from migrate.kfd.probe import bo_record_size
from migrate.kfd.sysfs import read_topology, read_vram
from migrate.topology.model import Node

VISIBLE = "mem_info_vis_vram_total"  # amdgpu: bytes of VRAM behind the BAR
GEM_DOMAIN_VRAM = 0x4  # AMDGPU_GEM_DOMAIN_VRAM
SLOW = 1e9  # bytes a second; below it the BAR is no way to move gigabytes
TIMEOUT = 60.0  # seconds of the child that measures


def kernel(patient: Patient) -> Iterable[Finding]:
    """Kernel release and the version of KFD's ioctl interface."""
    name = os.uname()
    yield Finding(
        name="kernel",
        status=Status.OK,
        found=f"{name.sysname} {name.release} {name.machine}",
        data={"release": name.release},
    )
    try:
        kfd = open_device(patient.paths.kfd)
    except UNSEEN_ERRORS as error:
        yield Finding(
            name="kfd",
            status=Status.FAIL,
            found=str(error),
            limits="Without KFD there are no GPU processes here to move, and none can come.",
            mend="Load amdgpu, and give the agent's user access to /dev/kfd (group render).",
        )
        return
    try:
        args = uapi.kfd_ioctl_get_version_args()
        kfd.ioctl(uapi.AMDKFD_IOC_GET_VERSION, args)
    finally:
        kfd.close()
    version = (args.major_version, args.minor_version)
    enough = version >= (1, 8)  # KFD_IOCTL_MINOR_VERSION that brought CRIU (linux 5.18)
    yield Finding(
        name="kfd",
        status=Status.OK if enough else Status.FAIL,
        found=f"KFD ioctl interface {version[0]}.{version[1]}",
        limits="" if enough else "This KFD has no CRIU operations: nothing can be moved.",
        mend="" if enough else "Use Linux 5.18 or newer.",
        data={"major": version[0], "minor": version[1]},
    )


def layout(patient: Patient) -> Iterable[Finding]:
    """The layout of private data, which must be the same on both hosts."""
    size = bo_record_size(patient.paths)
    yield Finding(
        name="private_data",
        status=Status.OK,
        found=f"BO records of {size} bytes",
        limits="Only hosts with the same size can exchange processes.",
        data={"bo_record_size": size},
    )


def cards(patient: Patient) -> Iterable[Finding]:
    """Each GPU: firmware, VRAM, BAR, rates."""
    topology = read_topology(patient.paths.topology)
    if not topology.gpus:
        yield Finding(
            name="gpus",
            status=Status.FAIL,
            found="KFD shows no GPU",
            limits="No process can come here.",
            mend="Look at `dmesg | grep -i amdgpu`.",
        )
    usage = {item.gpu_id: item for item in read_vram(patient.paths, topology)}
    for gpu in topology.gpus:
        used = usage.get(gpu.gpu_id)
        total, free = (used.total, used.free) if used else (0, 0)
        yield Finding(
            name=f"gpu {gpu.gpu_id:#x}",
            status=Status.OK,
            found=f"gfx {gpu.gfx_target_version}, firmware {gpu.fw_version} (SDMA"
            f" {gpu.sdma_fw_version}), {free >> 20} of {total >> 20} MiB of VRAM free",
            limits="A process needs a destination with the same gfx target and no older firmware.",
            data={
                "gfx_target_version": gpu.gfx_target_version,
                "fw_version": gpu.fw_version,
                "sdma_fw_version": gpu.sdma_fw_version,
                "vram": total,
                "free": free,
            },
        )
        yield _bar(patient, gpu, total)
        yield from _rates(patient, gpu)


def _bar(patient: Patient, gpu: Node, vram: int) -> Finding:
    name = f"bar {gpu.gpu_id:#x}"
    file = Path(patient.paths.drm_sysfs) / f"renderD{gpu.drm_render_minor}/device" / VISIBLE
    try:
        size = int(file.read_text())
    except (OSError, ValueError) as error:
        return unseen(name, error)
    whole = size >= vram
    return Finding(
        name=name,
        status=Status.OK if whole else Status.WARN,
        found=f"{size >> 20} MiB of {vram >> 20} MiB of VRAM are in the CPU's reach",
        limits=""
        if whole
        else "Each touch by the CPU makes the kernel move buffers of the running job.",
        mend="" if whole else "Switch on Resizable BAR in the firmware, or keep to SDMA.",
        data={"bytes": size},
    )


def _rates(patient: Patient, gpu: Node) -> Iterable[Finding]:
    node = f"{patient.paths.dri}/renderD{gpu.drm_render_minor}"
    for side in ("mmap", "sdma"):
        try:
            rates = _measured(patient, gpu, node, side)
        except UNSEEN_ERRORS as error:
            yield unseen(f"{side} {gpu.gpu_id:#x}", error, _MEND[side])
            continue
        slow = side == "mmap" and rates["read"] < SLOW
        yield Finding(
            name=f"{side} {gpu.gpu_id:#x}",
            status=Status.WARN if slow else Status.OK,
            found=f"VRAM by {side}: reads {rates['read'] / 1e6:.0f} MB/s,"
            f" writes {rates['write'] / 1e6:.0f} MB/s",
            limits="VRAM is moved no faster than this." if slow else "",
            mend="SDMA serves where it is faster: install libdrm-amdgpu1." if slow else "",
            data={"read": rates["read"], "write": rates["write"]},
        )


_MEND = {
    "mmap": "Run as a user that may open /dev/kfd and the render node.",
    "sdma": "Install libdrm-amdgpu1; gfx12's engine and simulated nodes have no SDMA side.",
}


def _measured(patient: Patient, gpu: Node, node: str, side: str) -> dict[str, float]:
    """Bytes a second by direction, in a child: KFD state lives as long as its process."""
    command = [sys.executable, "-m", "agents.doctor.gpus", side, patient.paths.kfd, node]
    done = subprocess.run(
        [*command, str(gpu.gpu_id)], capture_output=True, text=True, timeout=TIMEOUT, check=False
    )
    if done.returncode:
        raise OSError((done.stderr.strip().splitlines() or ["no output"])[-1])
    return from_json(done.stdout, dict[str, float])


def _by_mmap(kfd_path: str, node: str, gpu_id: int) -> dict[str, float]:
    """Through the BAR, as a process of its own on the GPU."""
    kfd = open_device(kfd_path)
    render = open_device(node)
    kfd.ioctl(
        uapi.AMDKFD_IOC_ACQUIRE_VM,
        uapi.kfd_ioctl_acquire_vm_args(drm_fd=render.fileno(), gpu_id=gpu_id),
    )
    args = uapi.kfd_ioctl_alloc_memory_of_gpu_args(
        va_addr=0x4000_0000_0000,
        size=SAMPLE,
        gpu_id=gpu_id,
        flags=uapi.KFD_IOC_ALLOC_MEM_FLAGS_VRAM | uapi.KFD_IOC_ALLOC_MEM_FLAGS_WRITABLE,
    )
    kfd.ioctl(uapi.AMDKFD_IOC_ALLOC_MEMORY_OF_GPU, args)
    mapping = render.mmap(args.mmap_offset, SAMPLE)
    access = BytesAccess(mapping.view())
    return {"read": measure(access, "read"), "write": measure(access, "write")}


def _by_sdma(node: str) -> dict[str, float]:
    """By the DMA engine, on a buffer of our own."""
    card = Card(node)
    request = libdrm.BoAllocRequest(SAMPLE, 4096, GEM_DOMAIN_VRAM, 0)
    handle = card.library.make("amdgpu_bo_alloc", card.device, byref(request))
    fd = c_uint32()
    card.library.call("amdgpu_bo_export", handle, libdrm.HANDLE_DMA_BUF_FD, byref(fd))
    access = SdmaAccess(card, fd.value, SAMPLE)
    return {"read": measure(access, "read"), "write": measure(access, "write")}


def _main(side: str, kfd_path: str, node: str, gpu_id: str) -> None:
    rates = _by_sdma(node) if side == "sdma" else _by_mmap(kfd_path, node, int(gpu_id))
    sys.stdout.write(msgspec.json.encode(rates).decode())


if __name__ == "__main__":
    _main(*sys.argv[1:])
