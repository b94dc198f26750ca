"""Which side of the seam serves a BO, on a machine without a card."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrate.dataplane import vram
from migrate.dataplane.access import InPlace
from migrate.dataplane.memory import BytesAccess, MmapAccess
from migrate.dataplane.vram import (
    TOO_SMALL,
    VramAccess,
    VramMode,
    VramTally,
    measure,
)
from migrate.errors import MigrationFailed
from migrate.report import VramBytes

SIZE = 1 << 20


@pytest.fixture
def fd() -> Iterator[int]:
    made = os.memfd_create("bo", os.MFD_CLOEXEC)
    os.pwrite(made, os.urandom(SIZE), 0)
    yield made
    os.close(made)


@pytest.fixture
def nowhere(tmp_path: Path) -> str:
    """A render node that is no card."""
    node = tmp_path / "renderD128"
    node.write_bytes(b"")
    return str(node)


def test_without_a_card_auto_maps_and_says_why_once(
    fd: int, nowhere: str, caplog: pytest.LogCaptureFixture
) -> None:
    access = VramAccess(VramMode.AUTO, lambda _: nowhere)
    with caplog.at_level(logging.INFO, vram.__name__):
        for _ in range(3):
            opened = access.open(fd, SIZE, 7, "read")
            assert isinstance(opened, MmapAccess)
            opened.close()
    assert [record.getMessage() for record in caplog.records if "goes by mmap" in record.message]
    assert len(caplog.records) == 1
    access.close()


def test_sdma_that_is_asked_for_is_an_error_without_a_card(fd: int, nowhere: str) -> None:
    access = VramAccess(VramMode.SDMA, lambda _: nowhere)
    with pytest.raises(MigrationFailed, match="GPU 0x7 by SDMA"):
        access.open(fd, SIZE, 7, "read")
    access.close()


def test_gtt_and_mmap_never_ask_for_a_card(fd: int) -> None:
    def no_node(gpu_id: int) -> str:
        raise AssertionError(gpu_id)

    for mode, gpu_id, size in (
        (VramMode.SDMA, None, SIZE),
        (VramMode.MMAP, 7, SIZE),
        (VramMode.AUTO, 7, TOO_SMALL - 1),
    ):
        access = VramAccess(mode, no_node)
        opened = access.open(fd, size, gpu_id, "write")
        assert isinstance(opened, MmapAccess)
        opened.close()


def test_measuring_changes_nothing() -> None:
    data = os.urandom(SIZE)
    memory = bytearray(data)
    for direction in ("read", "write"):
        assert measure(BytesAccess(memory), direction) > 0
    assert memory == data


def test_bytes_of_vram_are_counted_and_those_of_host_memory_are_not(fd: int) -> None:
    access, tally = VramAccess(VramMode.MMAP, str), VramTally()
    buffer = memoryview(bytearray(4096))
    for gpu_id in (7, None):
        opened = access.open(fd, SIZE, gpu_id, "read", tally)
        opened.read(8192, buffer)
        opened.read(0, buffer[:100])
        opened.write(0, buffer)
        with pytest.raises(OSError, match="bytes 0xfffff"):
            opened.read(SIZE - 1, buffer)
        assert isinstance(opened, InPlace)
        with opened.lend(0, 4096) as data:
            assert data == buffer
        opened.close()
    assert tally.bytes == VramBytes(mmap_read=8292, mmap_written=4096)
