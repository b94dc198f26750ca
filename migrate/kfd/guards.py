"""What must be checked before the kernel is asked, because it would oops or accept it.

Each guard names the surprise of the driver that it is for.
"""

from __future__ import annotations

import os
import re
import socket
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path

from migrate.errors import GpuWithoutVm, NoSuchProcess, RestoreFailed
from migrate.kfd.file import steal_fd
from migrate.kfd.sysfs import ProcessUsage, read_process
from migrate.model import HostPaths, ProcessRef

_DRM_MAJOR = 226


def identify(pid: int) -> ProcessRef:
    """The process that has *pid* now. Raises NoSuchProcess."""
    try:
        stat_line = Path(f"/proc/{pid}/stat").read_text()
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except (FileNotFoundError, ProcessLookupError) as error:
        raise NoSuchProcess(f"no process {pid}") from error
    fields = stat_line[stat_line.rindex(")") + 2 :].split()  # the command may hold spaces
    return ProcessRef(pid=pid, start_time=int(fields[22 - 3]), boot_id=boot_id)


# ---------------------------------------------------------------- PROCESS_INFO


def gpus_without_vm(
    pid: int, paths: HostPaths, render_minors: Mapping[int, int]
) -> tuple[int, ...]:
    """gpu_ids that *pid* sees and that show no sign of a VM, ascending.

    PROCESS_INFO followed by UNPAUSE oopses 6.1 kernels if a visible GPU has no VM in the
    process (restore_process_queues_cpsch follows a NULL drm_priv). The kernel says
    nowhere whether there is one: ``vram_<gpu_id>`` exists for every GPU that was visible
    when /dev/kfd was opened. These are signs that there is one: bytes of VRAM allocated,
    a queue, or an open render node of that GPU. The last alone is a guess to the safe
    side and to the unsafe one: a process may close the node after ACQUIRE_VM (refused
    here without need, if it also has no VRAM and no queue), or have it open for graphics
    only (not noticed here). Where fdinfo prints the VM's PASID (amdgpu since 5.14),
    an open node counts only with the PASID of the KFD process, and the guess is exact.

    *render_minors*: minor number of the render node by gpu_id, from the topology.
    Raises NoSuchProcess if the process has no KFD state.
    """
    usage = read_process(paths, pid)
    if usage is None:
        raise NoSuchProcess(f"process {pid} has no state in KFD")
    visible = {gpu_id for gpu_id, _ in usage.vram}
    sure = {gpu_id for gpu_id, used in usage.vram if used}
    sure |= {queue.gpu_id for queue in usage.queues}
    unsure = visible - sure
    if not unsure:
        return ()
    opened = _opened_minors(pid, usage, paths)
    return tuple(sorted(gpu for gpu in unsure if render_minors.get(gpu) not in opened))


def refuse_gpus_without_vm(pid: int, paths: HostPaths, render_minors: Mapping[int, int]) -> None:
    """Raises GpuWithoutVm; to be called before PROCESS_INFO. See ``gpus_without_vm``."""
    without = gpus_without_vm(pid, paths, render_minors)
    if without:
        names = ", ".join(str(gpu_id) for gpu_id in without)
        raise GpuWithoutVm(f"process {pid} sees GPU {names} but has no VM there")


def _opened_minors(pid: int, usage: ProcessUsage, paths: HostPaths) -> set[int]:
    """Minors of the render nodes that *pid* has open (with its KFD PASID, if shown)."""
    minors: set[int] = set()
    try:
        numbers = os.listdir(f"/proc/{pid}/fd")
    except OSError:
        return minors
    for number in numbers:
        try:
            minor = render_minor(pid, int(number))
            pasid = _pasid(pid, int(number))
        except OSError:
            continue
        if minor is not None and pasid in (None, usage.pasid):
            minors.add(minor)
    return minors


def _pasid(pid: int, fd: int) -> int | None:
    found = re.search(r"^pasid:\s*(\d+)$", Path(f"/proc/{pid}/fdinfo/{fd}").read_text(), re.M)
    return int(found[1]) if found else None


# ---------------------------------------------------------------- RESTORE


def render_minor(pid: int, fd: int) -> int | None:
    """Minor number of the render node that fd *fd* of *pid* is, None if it is none.

    A simulated render node is a socket named renderD<minor>; looking at another
    process's needs permission to trace it. Raises OSError.
    """
    seen = os.stat(f"/proc/{pid}/fd/{fd}")
    if stat.S_ISCHR(seen.st_mode):
        return os.minor(seen.st_rdev) if os.major(seen.st_rdev) == _DRM_MAJOR else None
    if not stat.S_ISSOCK(seen.st_mode):
        return None
    duplicate = os.dup(fd) if pid == os.getpid() else steal_fd(pid, fd)
    with socket.socket(fileno=duplicate) as connection:
        if connection.family != socket.AF_UNIX:
            return None
        try:
            name = os.path.basename(os.fsdecode(connection.getpeername()))
        except OSError:  # not connected
            return None
    found = re.fullmatch(r"renderD(\d+)", name)
    return int(found[1]) if found else None


def check_drm_fds(pid: int, drm_fds: Mapping[int, int], render_minors: Mapping[int, int]) -> None:
    """Refuse render nodes of the wrong GPU: RESTORE accepts crossed ones silently.

    *drm_fds*: fd number in *pid* by actual gpu_id; *render_minors* as the topology says.
    Raises RestoreFailed.
    """
    refuse_duplicates("drm_fd", drm_fds.values())
    for gpu_id, fd in drm_fds.items():
        wanted = render_minors.get(gpu_id)
        if wanted is None:
            raise RestoreFailed(f"GPU {gpu_id} has no render node in the topology")
        try:
            minor = render_minor(pid, fd)
        except OSError as error:
            raise RestoreFailed(f"drm_fd {fd} of process {pid}: {error.strerror}") from error
        if minor != wanted:
            what = "no render node" if minor is None else f"renderD{minor}"
            raise RestoreFailed(f"drm_fd {fd} for GPU {gpu_id} is {what}, not renderD{wanted}")


def refuse_duplicates(what: str, values: Iterable[int]) -> None:
    """Raises RestoreFailed if a value occurs twice."""
    seen: set[int] = set()
    for value in values:
        if value in seen:
            raise RestoreFailed(f"{what} {value} is given twice")
        seen.add(value)
