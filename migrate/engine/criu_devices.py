"""Which files of a tree are GPU devices, as a hook of CRIU is asked about them."""

from __future__ import annotations

import os
import stat

from migrate.engine import criu_tree
from migrate.engine.criu_document import DRM_MAJOR, KFD, minor_to_gpu
from migrate.engine.hook import HookCall
from migrate.kfd.file import find_kfd_fds
from migrate.kfd.sysfs import read_processes, read_render_minors
from migrate.model import HostPaths, ProcessRef


class DeviceFiles:
    """Of one tree. ``kfd``: its KFD processes. ``render_nodes``: minors by gpu_id."""

    def __init__(self, process: ProcessRef, paths: HostPaths) -> None:
        self.kfd = kfd_processes(process.pid, paths)
        self._kfd_rdev = os.stat(paths.kfd).st_rdev if self.kfd else -1
        self.render_nodes = read_render_minors(paths.topology) if self.kfd else {}

    def gpu_of(self, call: HookCall) -> int | None:
        """The GPU of the file that a hook is about, or KFD; None if it is no device of ours."""
        rdev = call.event.rdev
        if not stat.S_ISCHR(call.event.mode):
            return None
        if rdev == self._kfd_rdev:
            return KFD
        if os.major(rdev) != DRM_MAJOR:
            return None
        return minor_to_gpu(self.render_nodes).get(os.minor(rdev))


def kfd_processes(root: int, paths: HostPaths) -> list[int]:
    """Pids of the tree below *root* that are KFD processes, the root's first.

    A child that only inherited the file is none: the driver knows processes by their memory.
    """
    known = {usage.pid for usage in read_processes(paths)}
    return [pid for pid in criu_tree.tree(root) if pid in known and find_kfd_fds(pid, paths)]
