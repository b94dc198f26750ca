"""Buffers with two owners are found by where they are mapped from."""

from __future__ import annotations

import pytest

from migrate.errors import SharedBuffer
from migrate.kfd import uapi
from migrate.kfd.checkpoint import BoBucket, DeviceBucket, KfdCheckpoint
from migrate.orchestrator.sharing import Place, refuse_shared, shared, touched

VRAM = uapi.KFD_IOC_ALLOC_MEM_FLAGS_VRAM
USERPTR = uapi.KFD_IOC_ALLOC_MEM_FLAGS_USERPTR
NODES = {11: "/dev/dri/renderD128", 12: "/dev/dri/renderD129"}


def bo(offset: int, *, gpu: int = 1, flags: int = VRAM) -> BoBucket:
    return BoBucket(
        addr=0x10000 + offset,
        size=0x2000,
        offset=offset,
        restored_offset=0,
        gpu_id=gpu,
        alloc_flags=flags,
    )


def process(*bos: BoBucket) -> KfdCheckpoint:
    devices = (
        DeviceBucket(user_gpu_id=1, actual_gpu_id=11),
        DeviceBucket(user_gpu_id=2, actual_gpu_id=12),
    )
    return KfdCheckpoint(pid=1, devices=devices, bos=bos, priv_data=b"", num_objects=0)


def test_two_processes_and_two_handles_of_one_are_found() -> None:
    parent, child = process(bo(0x5000), bo(0x9000)), process(bo(0xB000), bo(0x5000))
    place = Place(gpu_id=11, offset=0x5000, size=0x2000)
    assert shared([parent, child]) == {place: [(0, 0), (1, 1)]}
    with pytest.raises(SharedBuffer, match="0x15000 in KFD process 0, 0x15000 in KFD process 1"):
        refuse_shared([parent, child])
    with pytest.raises(SharedBuffer):
        refuse_shared([process(bo(0x5000), bo(0x5000))])


def test_the_same_offset_of_another_gpu_or_without_contents_is_nothing() -> None:
    refuse_shared([process(bo(0x5000)), process(bo(0x5000, gpu=2))])
    refuse_shared([process(bo(0, flags=USERPTR), bo(0, flags=USERPTR))])


@pytest.mark.parametrize(
    ("line", "hit"),
    [
        ("7f0000000000-7f0000002000 rw-s 00005000 00:05 1  /dev/dri/renderD128", True),
        ("7f0000000000-7f0000001000 rw-s 00006000 00:05 1  /dev/dri/renderD128", True),
        ("7f0000000000-7f0000001000 rw-s 00007000 00:05 1  /dev/dri/renderD128", False),
        ("7f0000000000-7f0000001000 rw-s 00004000 00:05 1  /dev/dri/renderD128", False),
        ("7f0000000000-7f0000002000 rw-s 00005000 00:05 1  /dev/dri/renderD129", False),
        ("7f0000000000-7f0000002000 rw-s 00005000 00:05 1  /dev/zero", False),
        ("7f0000000000-7f0000002000 rw-p 00000000 00:00 0 ", False),
    ],
)
def test_a_mapping_of_another_process(line: str, hit: bool) -> None:
    place = Place(gpu_id=11, offset=0x5000, size=0x2000)
    assert touched([line], NODES, [place]) == (place if hit else None)
