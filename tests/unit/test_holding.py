"""What a live round lets go of, and when."""

from __future__ import annotations

import errno
import os
from types import SimpleNamespace
from typing import cast

import pytest

from migrate.dataplane.memory import MmapAccess
from migrate.dataplane.messages import ObjectInfo, ObjectKind
from migrate.kfd.process import Checkpointed
from migrate.kfd.sysfs import VramUsage
from migrate.orchestrator.clock import Clock
from migrate.orchestrator.holding import RELIST, Holding, listed, shortage
from migrate.orchestrator.plan import BoKey, ObjectOrder

SIZE = 4096


class Setting:
    """Three buffers, a clock, and what the kernel would list."""

    def __init__(self) -> None:
        self.now = 100.0
        self.fds = [os.memfd_create(f"bo{i}", os.MFD_CLOEXEC) for i in range(3)]
        for fd in self.fds:
            os.ftruncate(fd, SIZE)
        self.orders = [
            ObjectOrder(object_id=i, kind=ObjectKind.VRAM, size=SIZE, bo=BoKey(process=0, index=i))
            for i in range(3)
        ]
        self.held = Checkpointed(cast("object", None), [os.dup(fd) for fd in self.fds])  # type: ignore[arg-type]
        self.access = [
            MmapAccess(fd, SIZE, own=False) for fd in self.held.dmabufs if fd is not None
        ]
        self.exist = listed(self.orders, [self.held])
        self.short = ""
        self.given_up: list[int] = []
        infos = [ObjectInfo(id=o.object_id, kind=o.kind, size=o.size) for o in self.orders]
        self.holding = Holding(
            self.orders,
            list(zip(infos, self.access, strict=True)),
            [self.held],
            clock=cast(Clock, SimpleNamespace(monotonic=lambda: self.now)),
            relist=lambda: self.exist,
            short=lambda: self.short,
            give_up=self.given_up.append,
        )

    def readable(self, index: int) -> bool:
        try:
            self.access[index].read(0, memoryview(bytearray(8)))
        except OSError as error:
            if error.errno != errno.EBADF:
                raise
            return False
        return True

    def held_now(self) -> list[bool]:
        return [fd is not None for fd in self.held.dmabufs]


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
    setting.exist[2] += 1  # the inode of its dmabuf
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
