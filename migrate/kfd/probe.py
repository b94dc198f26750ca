"""The layout of this kernel's private data, learned by asking it about ourselves.

The BO record grew from 80 to 272 bytes with the same version number, so the version tells
nothing. A short-lived child opens KFD, acquires every GPU's VM (a visible GPU without one
oopses 6.1 in UNPAUSE), makes one small buffer, and counts the bytes of PROCESS_INFO.

``python -m migrate.kfd.probe KFD DRI MINOR=GPU_ID...`` prints the record's size.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys

from migrate.errors import KfdUnavailable
from migrate.kfd import uapi
from migrate.kfd.file import open_device
from migrate.kfd.privdata import BO_RECORDS, kfd_criu_device_priv_data, kfd_criu_process_priv_data
from migrate.kfd.sysfs import read_topology
from migrate.model import HostPaths

TIMEOUT = 120.0  # seconds for the child; an emulated host takes its time
PAGE = 4096
VA = 0x4000_0000_0000  # an address no library maps; the buffer is never mapped by a CPU


def bo_record_size(paths: HostPaths) -> int:
    """Bytes of a BO record in private data on this host. Raises KfdUnavailable."""
    gpus = read_topology(paths.topology).gpus
    if not gpus:
        raise KfdUnavailable(f"{paths.topology} shows no GPU")
    command = [sys.executable, "-m", "migrate.kfd.probe", paths.kfd, paths.dri]
    command += [f"{gpu.drm_render_minor}={gpu.gpu_id}" for gpu in gpus]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except subprocess.TimeoutExpired as error:
        raise KfdUnavailable(f"probing {paths.kfd}: no answer in {TIMEOUT:g} s") from error
    if done.returncode != 0 or not done.stdout.strip().isdecimal():
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise KfdUnavailable(f"probing {paths.kfd}: {last}")
    size = int(done.stdout)
    if size not in BO_RECORDS:
        raise KfdUnavailable(
            f"this kernel's BO records have {size} bytes, which is not known to this release",
            advice="Report the kernel's version; a migration with it would not be safe.",
        )
    return size


def _probe(kfd_path: str, dri: str, gpus: dict[int, int]) -> int:
    kfd = open_device(kfd_path)
    for minor, gpu_id in gpus.items():
        drm_fd = kfd.open_node(f"{dri}/renderD{minor}")
        kfd.ioctl(
            uapi.AMDKFD_IOC_ACQUIRE_VM,
            uapi.kfd_ioctl_acquire_vm_args(drm_fd=drm_fd, gpu_id=gpu_id),
        )
    first = next(iter(gpus.values()))
    kfd.ioctl(
        uapi.AMDKFD_IOC_ALLOC_MEMORY_OF_GPU,
        uapi.kfd_ioctl_alloc_memory_of_gpu_args(
            va_addr=VA,
            size=PAGE,
            gpu_id=first,
            flags=uapi.KFD_IOC_ALLOC_MEM_FLAGS_GTT | uapi.KFD_IOC_ALLOC_MEM_FLAGS_WRITABLE,
        ),
    )
    args = uapi.kfd_ioctl_criu_args(op=uapi.KFD_CRIU_OP_PROCESS_INFO)
    kfd.ioctl(uapi.AMDKFD_IOC_CRIU_OP, args)
    kfd.ioctl(uapi.AMDKFD_IOC_CRIU_OP, uapi.kfd_ioctl_criu_args(op=uapi.KFD_CRIU_OP_UNPAUSE))
    if args.num_bos != 1 or args.num_objects != 0:
        raise KfdUnavailable(f"one BO was made, KFD counts {args.num_bos}, {args.num_objects}")
    rest: int = ctypes.sizeof(kfd_criu_process_priv_data)
    rest += args.num_devices * ctypes.sizeof(kfd_criu_device_priv_data)
    size: int = args.priv_data_size
    return size - rest


if __name__ == "__main__":
    pairs = (word.split("=") for word in sys.argv[3:])
    print(_probe(sys.argv[1], sys.argv[2], {int(minor): int(gpu) for minor, gpu in pairs}))
