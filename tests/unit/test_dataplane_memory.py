"""The sides of the MemoryAccess seam, and that no vanished page ends the agent."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from migrate.dataplane import sigbus
from migrate.dataplane.access import MemoryAccess, MemoryGone
from migrate.dataplane.chunks import address_of, digests_of
from migrate.dataplane.memory import LARGE, BytesAccess, MmapAccess, ProcessMemoryAccess

PIECE = 4 << 20
SIZE = 2 * PIECE + 12345
F_ADD_SEALS, F_SEAL_FUTURE_WRITE = 1033, 0x10  # linux/fcntl.h; the module lacks the second


def memfd() -> int:
    fd = os.memfd_create("object", os.MFD_CLOEXEC)
    os.ftruncate(fd, SIZE)
    return fd


class OnlyMmap(MmapAccess):
    """As a dmabuf: no read method."""

    def _readable(self) -> bool:
        return False


KEPT: list[object] = []


def own_memory() -> ProcessMemoryAccess:
    block = mmap.mmap(-1, SIZE)
    KEPT.append(block)
    address = ctypes.addressof(ctypes.c_char.from_buffer(block))
    return ProcessMemoryAccess(os.getpid(), address, SIZE)


MAKERS: dict[str, Callable[[], MemoryAccess]] = {
    "file": lambda: MmapAccess(memfd(), SIZE),
    "mmap": lambda: OnlyMmap(memfd(), SIZE),
    "process": own_memory,
    "bytes": lambda: BytesAccess(bytearray(SIZE)),
}


@pytest.fixture(params=sorted(MAKERS))
def access(request: pytest.FixtureRequest) -> MemoryAccess:
    return MAKERS[request.param]()


def read(access: MemoryAccess, offset: int, length: int) -> bytes:
    data = bytearray(length)
    access.read(offset, memoryview(data))
    return bytes(data)


@pytest.mark.parametrize(
    ("offset", "length"),
    [
        (0, SIZE),
        (0, 0),
        (1, 1),
        (PIECE - 3, 7),
        (PIECE - 1, PIECE + 2),
        (SIZE - 5, 5),
        (SIZE, 0),
    ],
)
@pytest.mark.parametrize("writable", [True, False])
def test_what_is_written_is_read(
    access: MemoryAccess, offset: int, length: int, writable: bool
) -> None:
    data = os.urandom(length)
    access.write(offset, memoryview(bytearray(data)) if writable else memoryview(data))
    assert read(access, offset, length) == data
    assert read(access, 0, offset) == bytes(offset)
    access.close()


@pytest.mark.parametrize(("offset", "length"), [(SIZE, 1), (-1, 1), (SIZE - 4, 5), (0, SIZE + 1)])
def test_nothing_outside_is_reached(access: MemoryAccess, offset: int, length: int) -> None:
    with pytest.raises(OSError, match="object of") as caught:
        access.read(offset, memoryview(bytearray(length)))
    assert caught.value.errno == errno.EINVAL
    with pytest.raises(OSError, match="object of"):
        access.write(offset, memoryview(bytearray(length)))
    access.close()


@pytest.mark.parametrize("kind", [MmapAccess, OnlyMmap])
def test_pages_that_are_gone_are_an_error_and_no_signal(kind: type[MmapAccess]) -> None:
    fd = memfd()
    access = kind(fd, SIZE)
    assert read(access, 0, 10) == bytes(10)
    os.ftruncate(fd, 4096)
    with pytest.raises(OSError, match=r"EFAULT|Bad address|ends before") as caught:
        read(access, PIECE // 2, 1 << 20)
    assert caught.value.errno == errno.EFAULT
    access.close()


def test_writing_to_pages_that_are_gone_is_an_error_too() -> None:
    fd = memfd()
    access = OnlyMmap(fd, SIZE)
    assert read(access, 0, 10) == bytes(10)
    os.ftruncate(fd, 4096)
    with pytest.raises(OSError, match="Bad address"):
        access.write(PIECE // 2, memoryview(bytearray(100)))
    access.close()


def lent(access: MmapAccess, offset: int, length: int) -> bytes | None:
    with access.lend(offset, length) as data:
        return None if data is None else bytes(data)


@pytest.mark.parametrize(("offset", "length"), [(0, SIZE), (4096, PIECE + 1), (SIZE - 5, 5)])
def test_what_is_lent_is_what_is_read(offset: int, length: int) -> None:
    access = MmapAccess(memfd(), SIZE)
    access.write(0, memoryview(os.urandom(SIZE)))
    assert lent(access, offset, length) == read(access, offset, length)
    access.write(offset, memoryview(bytes([read(access, offset, 1)[0] ^ 1])))
    assert lent(access, offset, length) == read(access, offset, length)
    with pytest.raises(OSError, match="object of"):
        lent(access, SIZE, 1)
    access.close()
    with pytest.raises(MemoryGone, match="Bad file descriptor"):
        lent(access, offset, length)


def test_what_is_dear_to_read_or_not_there_is_not_lent() -> None:
    fd = memfd()
    sparse, slow = MmapAccess(fd, SIZE), OnlyMmap(fd, SIZE, own=False)
    host = OnlyMmap(fd, SIZE, own=False, cached=True)  # as a dmabuf in GTT
    sparse.write(0, memoryview(b"x"))
    assert lent(sparse, 0, 4096) == lent(host, 0, 4096) == b"x" + bytes(4095)
    assert lent(sparse, 0, PIECE) is None
    assert os.fstat(fd).st_blocks * 512 == 4096, "holes stay holes"
    assert lent(slow, 0, 4096) is None
    for access in (slow, host, sparse):
        access.close()


def look_while_it_vanishes(access: MmapAccess, fd: int) -> None:
    with access.lend(0, PIECE) as data:
        assert data is not None
        os.ftruncate(fd, 4096)
        digests_of(data, 256 << 10)


def test_pages_that_vanish_while_they_are_lent_are_an_error_then_and_for_good() -> None:
    fd = memfd()
    access = MmapAccess(fd, SIZE)
    access.write(0, memoryview(b"x" * PIECE))
    for _ in range(2):
        with pytest.raises(MemoryGone, match="Bad address"):
            look_while_it_vanishes(access, fd)
        os.ftruncate(fd, SIZE)
    access.close()


def test_pages_that_vanished_are_gone_for_good_whatever_else_went_wrong() -> None:
    fd = memfd()
    access = MmapAccess(fd, SIZE)
    access.write(0, memoryview(b"x" * PIECE))
    with pytest.raises(ConnectionResetError), access.lend(0, PIECE):  # noqa: PT012
        with pytest.raises(MemoryGone):
            look_while_it_vanishes(access, fd)
        raise ConnectionResetError
    os.ftruncate(fd, SIZE)
    with pytest.raises(MemoryGone, match="Bad address"):
        read(access, PIECE + 4096, 10)
    access.close()


def test_what_is_lent_may_vanish_after_something_else_was_copied() -> None:
    fd = memfd()
    access, other = MmapAccess(fd, SIZE), OnlyMmap(memfd(), SIZE)
    access.write(0, memoryview(b"x" * PIECE))
    with pytest.raises(MemoryGone, match="Bad address"), access.lend(0, PIECE) as data:  # noqa: PT012
        assert data is not None
        read(other, 0, 10)
        os.ftruncate(fd, 4096)
        digests_of(data, 256 << 10)
    other.close()
    access.close()


def test_an_error_that_still_has_a_view_keeps_no_one_from_closing() -> None:
    access = MmapAccess(memfd(), SIZE)
    access.write(0, memoryview(b"x" * PIECE))
    with access.lend(0, PIECE) as data:
        assert data is not None
        kept = data[:10]
    access.close()
    assert kept == b"x" * 10


@pytest.mark.parametrize("chunk", [16 << 10, 256 << 10], ids=["with-gil", "without-gil"])
def test_pages_that_vanish_under_a_digest_are_an_error_and_no_signal(chunk: int) -> None:
    fd = memfd()
    block = mmap.mmap(fd, SIZE)
    data = memoryview(block)[:PIECE]
    mapping = sigbus.Mapping(address_of(data), PIECE)
    os.ftruncate(fd, 4096)
    with pytest.raises(OSError, match="Bad address"), sigbus.reading(mapping):
        digests_of(data, chunk)
    os.close(fd)


def test_a_range_of_another_process() -> None:
    code = (
        "import ctypes,sys\n"
        "b = ctypes.create_string_buffer(b'hello from there', 4096)\n"
        "print(ctypes.addressof(b), flush=True)\n"
        "sys.stdin.read()\n"
        "print(b.value.decode(), flush=True)\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdin is not None
    assert child.stdout is not None
    access = ProcessMemoryAccess(child.pid, int(child.stdout.readline()), 4096)
    assert read(access, 0, 16) == b"hello from there"
    access.write(6, memoryview(b"FROM"))
    out, _ = child.communicate("")
    assert out.strip() == "hello FROM there"
    with pytest.raises(OSError, match="No such process"):
        read(access, 0, 16)


def test_reading_a_hole_makes_no_pages_of_it() -> None:
    fd = memfd()
    access = MmapAccess(fd, SIZE)
    os.pwrite(fd, b"x" * 4096, PIECE)
    assert read(access, 0, SIZE) == bytes(PIECE) + b"x" * 4096 + bytes(SIZE - PIECE - 4096)
    assert os.fstat(fd).st_blocks * 512 == 4096
    access.close()


def test_a_hole_is_written_without_the_mapping_and_the_rest_of_it_stays_a_hole() -> None:
    fd = memfd()
    access = MmapAccess(fd, SIZE, own=False)
    access.write(mmap.PAGESIZE, memoryview(b"x" * mmap.PAGESIZE))
    assert os.fstat(fd).st_blocks * 512 == mmap.PAGESIZE
    access.write(0, memoryview(b"y" * 3 * mmap.PAGESIZE))  # half of it is there
    assert os.pread(fd, 4 * mmap.PAGESIZE, 0) == b"y" * 3 * mmap.PAGESIZE + bytes(mmap.PAGESIZE)
    assert os.fstat(fd).st_blocks * 512 == 3 * mmap.PAGESIZE
    access.close()
    os.close(fd)


def test_pages_that_are_there_are_written_in_the_mapping() -> None:
    """Which the seal leaves alone, once it is there; pwrite(2) it forbids."""
    fd = os.memfd_create("object", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.pwrite(fd, bytes(SIZE), 0)
    access = MmapAccess(fd, SIZE, own=False)
    assert read(access, 5, 5) == bytes(5)
    fcntl.fcntl(fd, F_ADD_SEALS, F_SEAL_FUTURE_WRITE)
    access.write(5, memoryview(b"there"))
    assert os.pread(fd, 5, 5) == b"there"
    access.close()
    os.close(fd)


def test_closing_waits_for_copies_and_ends_later_ones() -> None:
    """A buffer is let go while streams read it."""
    fd = memfd()
    os.pwrite(fd, b"x" * SIZE, 0)
    access = MmapAccess(fd, SIZE)
    errors: list[OSError] = []

    def work() -> None:
        try:
            while True:
                assert read(access, PIECE, 1 << 20) == b"x" * (1 << 20)
        except OSError as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(0.05)
    access.close()
    for thread in threads:
        thread.join()
    assert [error.errno for error in errors] == [errno.EBADF] * 3


def _is_mapped(fd: int) -> bool:
    return f" {os.fstat(fd).st_ino} " in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("size", [SIZE, LARGE])
def test_a_closed_mapping_goes(size: int) -> None:
    fd = os.memfd_create("object", os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    os.pwrite(fd, b"x", 0)
    access = MmapAccess(fd, size, own=False)
    assert read(access, 0, 1) == b"x"
    assert _is_mapped(fd)
    access.close()
    deadline = time.monotonic() + 60
    while _is_mapped(fd):
        assert size >= LARGE
        assert time.monotonic() < deadline
    with pytest.raises(OSError, match="Bad file descriptor"):
        read(access, 0, 1)
    os.close(fd)


def test_zeros_in_place_of_vanished_pages_are_never_taken_for_contents() -> None:
    """The page that the handler of SIGBUS puts there stays: no later read may trust it."""
    fd = memfd()
    access = OnlyMmap(fd, SIZE)
    os.pwrite(fd, b"x" * SIZE, 0)
    assert read(access, 0, 10) == b"x" * 10
    os.ftruncate(fd, 4096)
    for offset in (PIECE, 2 * PIECE, 0):
        with pytest.raises(OSError, match="Bad address"):
            read(access, offset, 4096)
    access.close()


def test_a_sigbus_that_is_not_ours_still_ends_the_process() -> None:
    code = (
        "import mmap,os,signal\n"
        "from migrate.dataplane.memory import MmapAccess\n"
        "fd = os.memfd_create('x')\n"
        "os.ftruncate(fd, 8192)\n"
        "MmapAccess(fd, 8192).read(0, memoryview(bytearray(10)))\n"
        "other = mmap.mmap(fd, 8192)\n"
        "os.ftruncate(fd, 0)\n"
        "other[5000]\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=False, timeout=60
    )
    assert done.returncode == -signal.SIGBUS


def test_close_is_idempotent_and_closes_what_it_owns() -> None:
    fd = memfd()
    MmapAccess(fd, SIZE, own=False).close()
    access = MmapAccess(fd, SIZE)
    access.close()
    access.close()
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(fd)
