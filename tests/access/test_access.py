"""One suite for each side of the MemoryAccess seam, against a buffer of a KFD process."""

from __future__ import annotations

import errno
import os
import random
from concurrent.futures import ThreadPoolExecutor

import pytest

from migrate.dataplane.access import MemoryAccess
from migrate.dataplane.memory import ProcessMemoryAccess
from tests.access.conftest import SIZE, SLOT, Owned

pytestmark = pytest.mark.timeout(600)

RANGES = [
    (0, 1),
    (1, 1),
    (3, 4093),
    (SLOT - 3, 7),
    (SLOT - 1, SLOT + 2),
    (SIZE - 5, 5),
    (SIZE, 0),
    (4096, 4 * SLOT),
]


def read(access: MemoryAccess, offset: int, length: int) -> bytes:
    data = bytearray(length)
    access.read(offset, memoryview(data))
    return bytes(data)


def test_what_the_process_wrote_is_read(access: MemoryAccess, owned: Owned) -> None:
    data = os.urandom(SIZE)
    owned.write(0, data)
    assert read(access, 0, SIZE) == data
    for offset, length in RANGES:
        assert read(access, offset, length) == data[offset : offset + length]


@pytest.mark.parametrize("writable", [True, False])
def test_what_is_written_the_process_reads_and_nothing_else_changes(
    access: MemoryAccess, owned: Owned, *, writable: bool
) -> None:
    expected = bytearray(os.urandom(SIZE))
    owned.write(0, bytes(expected))
    for offset, length in RANGES:
        data = os.urandom(length)
        access.write(offset, memoryview(bytearray(data) if writable else data))
        expected[offset : offset + length] = data
    assert owned.read(0, SIZE) == expected


@pytest.mark.parametrize(("offset", "length"), [(SIZE, 1), (-1, 1), (SIZE - 4, 5), (0, SIZE + 1)])
def test_nothing_outside_is_reached(access: MemoryAccess, offset: int, length: int) -> None:
    for call in (access.read, access.write):
        with pytest.raises(OSError, match="object of") as caught:
            call(offset, memoryview(bytearray(length)))
        assert caught.value.errno == errno.EINVAL


def test_threads_read_and_write_at_once(access: MemoryAccess, owned: Owned) -> None:
    data = os.urandom(SIZE)
    owned.write(0, bytes(SIZE))
    step = SIZE // 13

    def move(offset: int) -> bytes:
        access.write(offset, memoryview(data)[offset : offset + step])
        return read(access, offset, len(data[offset : offset + step]))

    with ThreadPoolExecutor(6) as pool:
        back = b"".join(pool.map(move, range(0, SIZE, step)))
    assert back == data
    assert owned.read(0, SIZE) == data


def test_it_is_closed_twice_and_opened_again(access: MemoryAccess, owned: Owned) -> None:
    owned.write(0, b"before")
    assert read(access, 0, 6) == b"before"
    access.close()
    access.close()


def test_random_ranges(access: MemoryAccess, owned: Owned) -> None:
    chosen = random.Random(8)
    mirror = bytearray(os.urandom(SIZE))
    owned.write(0, bytes(mirror))
    for _ in range(40):
        offset = chosen.randrange(SIZE)
        length = chosen.randrange(min(SIZE - offset, 70_000) + 1)
        data = chosen.randbytes(length)
        access.write(offset, memoryview(bytearray(data)))
        mirror[offset : offset + length] = data
    assert read(access, 0, SIZE) == mirror


def test_it_is_read_by_the_address_that_its_process_has_it_at(owned: Owned) -> None:
    data = os.urandom(SIZE)
    owned.write(0, data)
    mapped = ProcessMemoryAccess(owned.child.pid, owned.address, SIZE)
    for offset, length in RANGES:
        assert read(mapped, offset, length) == data[offset : offset + length]
