"""What a live round lets go of, and when."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import cast

import pytest

from migrate.dataplane.messages import ObjectKind
from migrate.dataplane.vram import VramAccess, VramMode, VramTally
from migrate.kfd.process import Checkpointed, KfdCheckpoint
from migrate.kfd.sysfs import VramUsage
from migrate.orchestrator.clock import Clock
from migrate.orchestrator.holding import RELIST, Holding, shortage
from migrate.orchestrator.objects import OpenBos
from migrate.orchestrator.plan import BoKey, ObjectOrder
from migrate.orchestrator.sharing import Place

SIZE = 4096
GPU = SimpleNamespace(user_gpu_id=7, actual_gpu_id=7)


class Setting:
    """Three buffers, a clock, and what the kernel would list."""

    def __init__(self) -> None:
        self.now = 100.0
        self.offsets = [0x1000, 0x2000, 0x3000]  # in the render node's file
        self.fds = [os.memfd_create(f"bo{i}", os.MFD_CLOEXEC) for i in range(3)]
        for fd in self.fds:
            os.ftruncate(fd, SIZE)
        self.inodes = {os.fstat(fd).st_ino for fd in self.fds}
        self.orders = [
            ObjectOrder(object_id=i, kind=ObjectKind.GTT, size=SIZE, bo=BoKey(process=0, index=i))
            for i in range(3)
        ]
        self.bos = OpenBos(VramAccess(VramMode.MMAP, str), VramTally())
        self.objects = self.bos.open(self.orders, [self.snapshot()])
        self.exist = self.bos.buffers()
        self.short = ""
        self.given_up: list[int] = []
        self.holding = Holding(
            self.bos.buffers(),
            clock=cast(Clock, SimpleNamespace(monotonic=lambda: self.now)),
            relist=lambda: self.exist,
            short=lambda: self.short,
            give_up=self.given_up.append,
            close=self.bos.close,
        )

    def snapshot(self) -> Checkpointed:
        """Dmabufs of the buffers as they are now."""
        bos = [
            SimpleNamespace(gpu_id=7, offset=offset, size=SIZE, has_contents=True, is_vram=False)
            for offset in self.offsets
        ]
        checkpoint = cast("KfdCheckpoint", SimpleNamespace(devices=(GPU,), bos=bos))
        return Checkpointed(checkpoint, [os.dup(fd) for fd in self.fds])

    def open_files(self) -> int:
        """Of its buffers: other files of this process may come and go."""
        ours = {os.fstat(fd).st_ino for fd in self.fds} | self.inodes
        return sum(inode in ours for inode in inodes())

    def readable(self, index: int) -> bool:
        try:
            self.objects[index][1].read(0, memoryview(bytearray(8)))
        except OSError as error:
            if error.errno != errno.EBADF:
                raise
            return False
        return True

    def held_now(self) -> list[bool]:
        return [number in self.bos.buffers() for number in range(3)]


@pytest.fixture
def setting() -> Setting:
    return Setting()


def test_what_was_freed_is_let_go_at_the_next_listing(setting: Setting) -> None:
    del setting.exist[1]
    setting.holding.tick()
    assert setting.held_now() == [True] * 3
    setting.now += RELIST
    setting.holding.tick()
    assert setting.held_now() == [True, False, True]
    assert [setting.readable(i) for i in range(3)] == [True, False, True]
    assert setting.given_up == [1]
    assert not setting.holding.dropped


def test_a_buffer_made_anew_at_the_same_place_is_another_one(setting: Setting) -> None:
    setting.exist[2] = Place(gpu_id=7, offset=0x9000, size=SIZE)
    setting.now += RELIST
    setting.holding.tick()
    assert setting.held_now() == [True, True, False]


def test_listings_go_on_through_a_long_round(setting: Setting) -> None:
    for gone in range(3):
        setting.exist.pop(gone)
        setting.now += RELIST
        setting.holding.tick()
        assert setting.given_up == list(range(gone + 1))


def test_all_is_let_go_where_vram_runs_short(setting: Setting) -> None:
    setting.short = "of GPU 7's VRAM only 3 MiB are free"
    setting.holding.tick()
    assert setting.held_now() == [False] * 3
    assert setting.holding.dropped == setting.short
    setting.now += RELIST
    setting.holding.tick()  # nothing is left to list


def test_only_gpus_of_the_process_count() -> None:
    usage = (
        VramUsage(gpu_id=1, total=64 << 30, used=60 << 30),
        VramUsage(gpu_id=2, total=64 << 30, used=(64 << 30) - (3 << 20)),
    )
    assert shortage(usage, [1]) == ""
    assert shortage(usage, [1, 2]) == "of GPU 2's VRAM only 3 MiB are free"


def test_a_listing_is_asked_for_at_least_every_two_seconds() -> None:
    assert RELIST <= 2.0


def test_what_is_open_stays_open_for_the_next_round(setting: Setting) -> None:
    setting.fds = [os.memfd_create("exported-anew", os.MFD_CLOEXEC) for _ in range(3)]
    before = setting.open_files()  # Linux 6.1 exports a dmabuf of its own at each checkpoint
    again = setting.snapshot()
    objects = setting.bos.open(setting.orders, [again])
    assert [access for _, access in objects] == [access for _, access in setting.objects]
    assert again.dmabufs == [None] * 3, "they are taken, and closed"
    assert setting.open_files() == before
    assert all(setting.readable(i) for i in range(3))


def test_a_buffer_made_anew_is_opened_anew_and_one_that_is_gone_is_closed(
    setting: Setting,
) -> None:
    os.close(setting.fds[1])
    setting.offsets[1] = 0x9000
    setting.fds[1] = os.memfd_create("another", os.MFD_CLOEXEC)
    os.pwrite(setting.fds[1], bytes([7]) * SIZE, 0)
    objects = {
        info.id: access
        for info, access in setting.bos.open(setting.orders[:2], [setting.snapshot()])
    }
    found = bytearray(1)
    objects[1].read(0, memoryview(found))
    assert found == b"\7"
    assert [setting.readable(i) for i in range(3)] == [True, False, False]
    assert setting.held_now() == [True, True, False]


def test_nothing_stays_open_at_the_end(setting: Setting) -> None:
    before = setting.open_files()
    setting.bos.close_all()
    setting.bos.close_all()
    assert setting.open_files() == before - 3
    assert setting.held_now() == [False] * 3


def inodes() -> Iterator[int]:
    """Of the memfds that this process has open."""
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{number}").startswith("/memfd:"):
                yield os.stat(f"/proc/self/fd/{number}").st_ino
