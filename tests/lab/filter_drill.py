"""Runs in a guest with more than two GPUs: what the device filter makes of KFD's answers.

Prints a line a fact. ``/dev/kfd`` is opened before or after the process joins its cgroup;
the second and the last GPU are the chosen ones.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from migrate.errors import BrokenTopology
from migrate.kfd import uapi
from migrate.kfd.file import KfdFile, open_device
from migrate.kfd.sysfs import read_topology
from migrate.topology.devices import DeviceFilter, hidden_nodes
from tests.conformance import image as raw
from tests.conformance.hosts import Host, Link, any_host
from tests.conformance.image import Image
from tests.conformance.target import Layout, restored, target, try_restore
from tests.conformance.tracer import held

CGROUPS = Path("/sys/fs/cgroup")


def join(folder: Path) -> None:
    """Make this process a member of a cgroup."""
    (folder / "cgroup.procs").write_text(str(os.getpid()))


def inside(link: Link, folder: Path, body: Callable[..., object], *args: Any) -> object:
    """*body*, in a process that is a member from before it opens anything."""
    join(folder)
    return body(link, *args)


def apertures(kfd: KfdFile) -> list[int]:
    """The gpu_ids of GET_PROCESS_APERTURES_NEW: the GPUs that this process has."""
    args = uapi.kfd_ioctl_get_process_apertures_new_args()
    kfd.ioctl(uapi.AMDKFD_IOC_GET_PROCESS_APERTURES_NEW, args)  # how many there are
    room = (uapi.kfd_process_device_apertures * args.num_of_nodes)()
    args.kfd_process_device_apertures_ptr = ctypes.addressof(room)
    kfd.ioctl(uapi.AMDKFD_IOC_GET_PROCESS_APERTURES_NEW, args)
    return [room[n].gpu_id for n in range(args.num_of_nodes)]


def seen(link: Link, late: Path | None = None) -> tuple[list[int], list[int]]:
    """GPUs by the ioctl and by the topology tree; *late* is joined after /dev/kfd is open."""
    kfd = open_device(link.paths.kfd)
    if late is not None:
        join(late)
    try:
        tree = [gpu.gpu_id for gpu in read_topology(link.paths.kfd_sysfs).gpus]
    except BrokenTopology as error:
        raise AssertionError(f"the reader fails under the filter: {error}") from error
    return apertures(kfd), tree


@contextmanager
def cgroup(name: str, hidden: Sequence[tuple[int, int]]) -> Iterator[Path]:
    """A cgroup whose members don't see *hidden*."""
    folder = CGROUPS / f"drill-{name}"
    folder.mkdir()
    with DeviceFilter(hidden) as loaded:
        loaded.attach(folder)
    try:
        yield folder
    finally:
        (folder / "cgroup.kill").write_text("1")
        while "populated 1" in (folder / "cgroup.events").read_text():
            pass
        folder.rmdir()


def name_of(number: int) -> str:
    """Of an errno."""
    return errno.errorcode[number] if number else "ok"


def dump(host: Host, folder: Path) -> tuple[Image, Layout]:
    """A target under the filter, checkpointed and gone."""
    child = host.spawn(inside, folder, target)
    layout: Layout = child.hear()
    with held(child.pid, host.paths) as file:
        counts = raw.process_info(file)
        image = raw.checkpoint(file, counts)
    print("PROCESS_INFO num_devices", counts.num_devices)
    print("CHECKPOINT devices", sorted(actual for _, actual in image.devices))
    child.kill()
    return image, layout


def attempts(host: Host, image: Image, folder: Path | None) -> str:
    """The errno of a RESTORE, in a cgroup or not."""
    if folder is None:
        child = host.spawn(try_restore, image, {})
    else:
        child = host.spawn(inside, folder, try_restore, image, {})
    first: int = child.hear().first
    child.kill()
    return name_of(first)


def goes_on(host: Host, image: Image, layout: Layout, folder: Path) -> None:
    """Restore under the filter, resume, and let both GPUs compute."""
    child = host.spawn(inside, folder, restored, image, layout)
    pid = child.hear()
    kfd = open_device(host.paths.kfd)
    print("RESUME", name_of(raw.errno_of(kfd, uapi.KFD_CRIU_OP_RESUME, pid=pid)))
    kfd.close()
    child.ask(("start_counter",))
    print("counter moves", child.ask(("counter_moves",)))
    print("add", child.ask(("add",)))
    child.kill()


def main() -> None:
    """Print what KFD says."""
    with any_host() as host:
        topology = read_topology(host.paths.kfd_sysfs)
        everything = [gpu.gpu_id for gpu in topology.gpus]
        chosen = [everything[1], everything[-1]]
        hidden = hidden_nodes(topology, chosen)
        print("all", everything)
        print("chosen", chosen)
        print("hidden", list(hidden))
        with cgroup("two", hidden) as two, cgroup("late", hidden) as late, cgroup("open", ()) as no:
            print("no cgroup", *host.run(seen))
            print("empty filter", *host.run(inside, no, seen))
            print("filter", *host.run(inside, two, seen))
            print("filter too late", *host.run(seen, late))
            image, layout = dump(host, two)
            print("RESTORE filter", attempts(host, image, two))
            print("RESTORE no filter", attempts(host, image, None))
            print("RESTORE empty filter", attempts(host, image, no))
            goes_on(host, image, layout, two)


if __name__ == "__main__":
    main()
