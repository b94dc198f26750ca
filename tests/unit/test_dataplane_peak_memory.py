from __future__ import annotations

import mmap
import os
import subprocess

from migrate.dataplane.messages import ObjectInfo, ObjectKind
from migrate.dataplane.peak_memory import Memory, PeakMemory, descendants, measure, sample
from migrate.dataplane.staging import StagedObject

MIB = 1 << 20
SMAPS = """\
00400000-00500000 r-xp 00000000 08:01 12 /usr/bin/python3
Size:               1024 kB
Pss:                 100 kB
Pss_Dirty:            50 kB
10000000-10200000 rw-p 00000000 00:00 0
Pss:                 200 kB
20000000-20200000 rw-s 00000000 00:01 7 /memfd:vram-1 (deleted)
Pss:                 400 kB
30000000-30200000 rw-s 00000000 00:01 7 /dmabuf:x
Pss:                 800 kB
"""


def test_bo_mappings_are_left_out_and_staging_is_told_apart() -> None:
    assert measure(SMAPS.splitlines()) == Memory(agent=300 * 1024, staging=0)
    halves = ((0x10100000, 0x10200000), (0x10000000, 0x10100000))
    assert measure(SMAPS.splitlines(), halves) == Memory(agent=100 * 1024, staging=200 * 1024)


def test_staging_is_seen_as_such_in_this_process() -> None:
    # A neighbour that is no staging, as the kernel likes to join them.
    other = mmap.mmap(-1, 32 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    other.madvise(mmap.MADV_HUGEPAGE)
    other.write(b"x" * (32 * MIB))
    # Made before the first sample: the allocator may keep what it held for the agent's.
    content = b"x" * (16 * MIB)
    staged = StagedObject(ObjectInfo(id=1, kind=ObjectKind.VRAM, size=32 * MIB))
    before = sample((staged.address_range,), exclude=lambda pid: True)
    staged.begin(0, 16 * MIB)[:] = content
    after = sample((staged.address_range,), exclude=lambda pid: True)
    assert after.staging - before.staging >= 16 * MIB
    assert after.agent - before.agent < 8 * MIB
    assert before.staging < 8 * MIB
    staged.close()
    other.close()


def test_the_peak_outlives_the_memory() -> None:
    # Without children: those that other tests have left may end in the middle.
    peak = PeakMemory(exclude=lambda pid: True, interval=3600.0)
    peak.start()
    start = sample(exclude=lambda pid: True).agent
    with mmap.mmap(-1, 32 * MIB) as block:
        block.write(b"x" * (32 * MIB))
        peak._sample()
    assert peak.stop().agent >= start + 24 * MIB


def test_children_count_unless_left_out() -> None:
    child = subprocess.Popen(["sleep", "60"])
    try:
        assert child.pid in descendants(os.getpid())
        asked: set[int] = set()

        def exclude(pid: int) -> bool:
            asked.add(pid)
            return True

        sample(exclude=exclude)
        assert child.pid in asked
    finally:
        child.kill()
        child.wait()
