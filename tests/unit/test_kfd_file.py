"""Opening, mapping and finding KFD files: on character devices and sockets at hand."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrate.errors import KfdUnavailable, NoSuchProcess
from migrate.kfd import uapi
from migrate.kfd.file import (
    RealFile,
    adopt,
    find_kfd_fds,
    is_kfd,
    map_file,
    open_device,
    steal_fd,
)
from migrate.kfd.sim.client import SimFile
from migrate.model import HostPaths

NULL = HostPaths(kfd="/dev/null")  # a character device stands in for /dev/kfd


@pytest.fixture
def memory() -> Iterator[int]:
    fd = os.memfd_create("memory")
    os.truncate(fd, 8192)
    yield fd
    os.close(fd)


@pytest.fixture
def simulated(tmp_path: Path) -> Iterator[tuple[HostPaths, socket.socket]]:
    """A socket that is connected to one at the place of a simulated /dev/kfd."""
    paths = HostPaths.under(tmp_path)
    kind = socket.SOCK_SEQPACKET
    with socket.socket(socket.AF_UNIX, kind) as server, socket.socket(socket.AF_UNIX, kind) as end:
        server.bind(paths.kfd)
        server.listen()
        end.connect(paths.kfd)
        yield paths, end


# ---------------------------------------------------------------- mapping


def test_a_mapping_is_shared_and_writable(memory: int) -> None:
    mapping = map_file(memory, 4096, 4096)
    view = mapping.view()
    view[:5] = b"hello"
    assert os.pread(memory, 5, 4096) == b"hello"
    with pytest.raises(BufferError, match="in use"):
        mapping.close()
    assert bytes(view[:5]) == b"hello"  # a refused close leaves it mapped
    view.release()
    mapping.close()
    mapping.close()
    with pytest.raises(ValueError, match="closed"):
        mapping.view()


def test_a_fixed_mapping_never_replaces_another(memory: int) -> None:
    first = map_file(memory, 0, 4096)
    with pytest.raises(OSError, match="File exists") as caught:
        map_file(memory, 0, 4096, first.address)
    assert caught.value.errno == errno.EEXIST
    address = first.address
    first.close()
    second = map_file(memory, 4096, 4096, address)
    assert second.address == address
    second.close()


@pytest.mark.parametrize(
    ("offset", "length"),
    [(uapi.KFD_MMAP_TYPE_DOORBELL | uapi.KFD_MMAP_GPU_ID(7), 4096), (1, 4096), (0, 0)],
)
def test_what_the_kernel_refuses_is_an_os_error(memory: int, offset: int, length: int) -> None:
    with pytest.raises(OSError, match="Invalid argument|too large"):
        map_file(memory, offset, length)


# ---------------------------------------------------------------- a character device


def test_a_character_device_is_a_real_file() -> None:
    file = open_device("/dev/null")
    assert isinstance(file, RealFile)
    assert not os.get_inheritable(file.fileno())
    with pytest.raises(OSError, match="ioctl") as caught:
        file.ioctl(uapi.AMDKFD_IOC_GET_VERSION, uapi.kfd_ioctl_get_version_args())
    assert caught.value.errno == errno.ENOTTY
    node = file.open_node("/dev/zero")
    assert not os.get_inheritable(node)
    os.close(node)
    file.close()
    file.close()
    with pytest.raises(OSError, match="Bad file") as caught:
        file.fileno()
    assert caught.value.errno == errno.EBADF


def test_adopting_makes_it_close_on_exec() -> None:
    fd = os.open("/dev/null", os.O_RDWR)
    os.set_inheritable(fd, True)
    file = adopt(fd)
    assert isinstance(file, RealFile)
    assert not os.get_inheritable(fd)
    file.close()


def test_adopting_a_socket_gives_a_simulated_file() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        file = adopt(ours.detach())
        assert isinstance(file, SimFile)
        file.close()


def test_what_is_neither_is_refused_and_stays_open(memory: int) -> None:
    with pytest.raises(KfdUnavailable):
        adopt(memory)
    os.fstat(memory)


@pytest.mark.parametrize("name", ["missing", "file", "dead"])
def test_nothing_usable_there(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.bind(str(tmp_path / "dead"))
    with pytest.raises(KfdUnavailable, match=name):
        open_device(str(tmp_path / name))


# ---------------------------------------------------------------- finding


def test_a_device_is_told_by_its_number() -> None:
    null, zero = os.open("/dev/null", os.O_RDONLY), os.open("/dev/zero", os.O_RDONLY)
    assert is_kfd(null, NULL)
    assert is_kfd(os.fstat(null), NULL)
    assert not is_kfd(zero, NULL)
    assert not is_kfd(null, HostPaths(kfd="/nowhere"))
    found = find_kfd_fds(os.getpid(), NULL)
    assert null in found
    assert zero not in found
    os.close(null)
    os.close(zero)


def test_a_simulated_device_is_told_by_its_peer(
    simulated: tuple[HostPaths, socket.socket], tmp_path: Path
) -> None:
    paths, end = simulated
    pair = socket.socketpair(socket.AF_UNIX)
    assert is_kfd(end.fileno(), paths)
    assert not is_kfd(pair[0].fileno(), paths)
    assert not is_kfd(end.fileno(), NULL)
    assert find_kfd_fds(os.getpid(), paths) == [end.fileno()]
    for one in pair:
        one.close()


def test_a_child_is_looked_into(simulated: tuple[HostPaths, socket.socket]) -> None:
    paths, end = simulated
    child = subprocess.Popen(
        [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[end.fileno()]
    )
    try:
        assert find_kfd_fds(child.pid, paths) == [end.fileno()]
        stolen = steal_fd(child.pid, end.fileno())
        assert not os.get_inheritable(stolen)
        assert is_kfd(stolen, paths)
        os.close(stolen)
    finally:
        child.communicate(b"\n")
    with pytest.raises(NoSuchProcess):
        find_kfd_fds(child.pid, paths)


def test_stealing_what_is_not_there() -> None:
    with pytest.raises(OSError, match="Bad file") as caught:
        steal_fd(os.getpid(), 10**6)
    assert caught.value.errno == errno.EBADF
