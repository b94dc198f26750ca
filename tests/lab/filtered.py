"""Runs in a guest: starts a program that KFD shows some of the GPUs only.

    python -m tests.lab.filtered NAME 1,3 PROGRAM ARGUMENT...

The device cgroup NAME is made, with a filter that hides all GPUs but those (by index, in the
topology's order), and is in force before the program opens anything.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from migrate.kfd.sysfs import read_topology
from migrate.model import HostPaths
from migrate.topology.devices import DeviceFilter, hidden_nodes

CGROUPS = Path("/sys/fs/cgroup")


def main(name: str, indices: str, *command: str) -> None:
    """Never returns."""
    topology = read_topology(HostPaths().kfd_sysfs)
    shown = {topology.gpus[int(index)].gpu_id for index in indices.split(",")}
    folder = CGROUPS / name
    folder.mkdir()
    with DeviceFilter(hidden_nodes(topology, shown)) as loaded:
        loaded.attach(folder)
    (folder / "cgroup.procs").write_text(str(os.getpid()))
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(*sys.argv[1:])
