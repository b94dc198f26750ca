"""Where memory is after a move, and whose marker is whose."""

from __future__ import annotations

import os
import signal

import pytest

from migrate.engine import procfs
from migrate.engine.document import KFD, FileMapping, moved
from migrate.engine.marker import Marker
from migrate.engine.seam import MovedBo, MovedGpu
from migrate.errors import EngineUnsupported
from migrate.kfd import uapi

PAGE = 4096
GPUS = (
    MovedGpu(user_gpu_id=10, source_gpu_id=11, gpu_id=21, drm_fd=5),
    MovedGpu(user_gpu_id=20, source_gpu_id=12, gpu_id=22, drm_fd=6),
)
BOS = (
    MovedBo(gpu_id=10, offset=0x10000, size=4 * PAGE, restored_offset=0x90000),
    MovedBo(gpu_id=20, offset=0x10000, size=4 * PAGE, restored_offset=0x70000),
)


def mapping(gpu_id: int, offset: int) -> FileMapping:
    return FileMapping(gpu_id=gpu_id, offset=offset, address=0x1000_0000, length=PAGE)


@pytest.mark.parametrize(
    ("gpu_id", "offset", "now"),
    [
        (10, 0x10000, 0x90000),
        (20, 0x10000, 0x70000),  # the same offset is another BO on another node
        (20, 0x10000 + PAGE, 0x70000 + PAGE),  # part of a BO
        (10, 0x10000 + 4 * PAGE, 0x10000 + 4 * PAGE),  # beside it
    ],
)
def test_a_mapping_follows_its_bo(gpu_id: int, offset: int, now: int) -> None:
    assert moved(mapping(gpu_id, offset), GPUS, BOS) == mapping(gpu_id, now)


def doorbell(gpu_id: int) -> int:
    return uapi.KFD_MMAP_TYPE_DOORBELL | uapi.KFD_MMAP_GPU_ID(gpu_id)


def test_doorbells_name_the_gpu_they_are_of_now() -> None:
    as_bo = MovedBo(gpu_id=10, offset=doorbell(11), size=2 * PAGE, restored_offset=doorbell(21))
    assert moved(mapping(KFD, doorbell(11)), GPUS, (as_bo,)) == mapping(KFD, doorbell(21))
    # Without a BO that stands for them.
    assert moved(mapping(KFD, doorbell(12)), GPUS, BOS) == mapping(KFD, doorbell(22))
    assert moved(mapping(KFD, doorbell(99)), GPUS, BOS) == mapping(KFD, doorbell(99))


def test_the_event_page_stays() -> None:
    page = mapping(KFD, uapi.KFD_MMAP_TYPE_EVENTS)
    assert moved(page, GPUS, BOS) == page


def test_a_marker_is_found_by_its_process() -> None:
    me = procfs.reference(os.getpid())
    with pytest.raises(EngineUnsupported, match="does not use"):
        Marker.of(me)
    with Marker.create(signal.SIGRTMIN + 3) as mine, Marker.of(me) as seen:
        assert seen.signal == signal.SIGRTMIN + 3
        assert (seen.handed, seen.entered) == (0, False)
        seen.request(77)
        assert mine.requested == 77
        mine.enter()
        mine.hand(77, b"document")
        assert (seen.handed, seen.entered, seen.document()) == (77, True, b"document")
        mine.leave()
        assert (seen.handed, seen.entered, seen.document()) == (0, False, b"")


def test_a_marker_that_was_inherited_is_not_the_heirs() -> None:
    with Marker.create(signal.SIGRTMIN + 3):
        read, write = os.pipe()
        child = os.fork()
        if not child:
            os.read(read, 1)
            os._exit(0)
        try:
            with pytest.raises(EngineUnsupported, match="inherited"):
                Marker.of(procfs.reference(child))
        finally:
            os.write(write, b"x")
            os.waitpid(child, 0)
            os.close(read)
            os.close(write)
