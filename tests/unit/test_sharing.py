"""Buffers with two owners are found by where they are mapped from."""

from __future__ import annotations

import os
from contextlib import ExitStack

import msgspec
import pytest

from migrate.errors import SharedBuffer
from migrate.kfd import uapi
from migrate.kfd.checkpoint import BoBucket, DeviceBucket, KfdCheckpoint, without_bos
from migrate.kfd.privdata import BoRecord, EventRecord, PrivateData, encode
from migrate.kfd.process import Checkpointed
from migrate.orchestrator.plan import BoKey, Share
from migrate.orchestrator.sharing import (
    MAX_FREE_HANDLES,
    Place,
    contents,
    shared,
    shares,
    touched,
)

VRAM = uapi.KFD_IOC_ALLOC_MEM_FLAGS_VRAM
USERPTR = uapi.KFD_IOC_ALLOC_MEM_FLAGS_USERPTR
IMPORT = VRAM | uapi.KFD_IOC_ALLOC_MEM_FLAGS_WRITABLE | uapi.KFD_IOC_ALLOC_MEM_FLAGS_EXECUTABLE
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


def process(
    *bos: BoBucket, handles: tuple[int, ...] = (), events: tuple[EventRecord, ...] = ()
) -> KfdCheckpoint:
    devices = (
        DeviceBucket(user_gpu_id=1, actual_gpu_id=11),
        DeviceBucket(user_gpu_id=2, actual_gpu_id=12),
    )
    records = tuple(
        BoRecord(user_addr=0, idr_handle=handle, mapped_gpuids=())
        for handle in handles or range(len(bos))
    )
    private = PrivateData(xnack_mode=0, devices=(0, 0), bos=records, objects=events)
    return KfdCheckpoint(
        pid=1, devices=devices, bos=bos, priv_data=encode(private), num_objects=len(events)
    )


def found(*checkpoints: KfdCheckpoint) -> list[Checkpointed]:
    """As CHECKPOINT returned them, with dmabufs that tell nothing."""
    return [Checkpointed(one, [None] * len(one.bos)) for one in checkpoints]


def key(process: int, index: int) -> BoKey:
    return BoKey(process=process, index=index)


def test_two_processes_and_two_handles_of_one_are_found() -> None:
    parent, child = process(bo(0x5000), bo(0x9000)), process(bo(0xB000), bo(0x5000))
    assert shared(found(parent, child)) == [[key(0, 0), key(1, 1)]]
    assert shared(found(process(bo(0x5000), bo(0x9000), bo(0x5000)))) == [[key(0, 0), key(0, 2)]]


def test_the_same_offset_of_another_gpu_or_without_contents_is_nothing() -> None:
    assert not shares(found(process(bo(0x5000)), process(bo(0x5000, gpu=2))))
    assert not shares(found(process(bo(0, flags=USERPTR), bo(0, flags=USERPTR))))


def test_one_dmabuf_is_one_buffer_wherever_it_is_mapped_from() -> None:
    """As an import on another GPU: later kernels keep the dmabuf, and give another offset."""
    first, second = os.memfd_create("a"), os.memfd_create("b")
    with ExitStack() as stack:
        checkpoints = found(process(bo(0x5000), bo(0x9000), bo(0x7000, gpu=2), bo(0x5000)))
        checkpoints[0].dmabufs = [os.dup(first), os.dup(second), os.dup(first), os.dup(second)]
        stack.callback(checkpoints[0].close)
        for fd in (first, second):
            stack.callback(os.close, fd)
        # 0 and 2 by the dmabuf, 0 and 3 by the offset, 1 and 3 by the dmabuf
        assert shared(checkpoints) == [[key(0, 0), key(0, 1), key(0, 2), key(0, 3)]]


def test_the_owner_is_who_has_other_flags_than_an_import() -> None:
    importer, owner = process(bo(0x5000, flags=IMPORT)), process(bo(0x5000))
    assert shares(found(importer, owner)) == (Share(importer=key(0, 0), owner=key(1, 0)),)
    assert shares(found(importer, importer)) == (Share(importer=key(1, 0), owner=key(0, 0)),)
    gtt = IMPORT & ~VRAM | uapi.KFD_IOC_ALLOC_MEM_FLAGS_GTT
    elsewhere, plain = process(bo(0x5000, flags=gtt)), process(bo(0x5000, flags=IMPORT))
    assert shares(found(elsewhere, plain)) == (Share(importer=key(0, 0), owner=key(1, 0)),)


def test_what_can_not_be_shared_again_is_refused() -> None:
    large = msgspec.structs.replace(bo(0x5000, flags=IMPORT), size=0x3000)
    with pytest.raises(SharedBuffer, match="different sizes"):
        shares(found(process(bo(0x5000)), process(large)))
    page = EventRecord(
        user_handle=uapi.MAKE_HANDLE(1, 0), event_id=1, auto_reset=0, type=0, signaled=0
    )
    with_page = process(bo(0x5000, flags=IMPORT), events=(page,))
    assert shares(found(process(bo(0x5000)), with_page)) == (
        Share(importer=key(0, 0), owner=key(1, 0)),
    )
    with pytest.raises(SharedBuffer, match="event page of KFD process 1"):
        shares(found(with_page, with_page))
    assert shares(found(process(bo(0x5000)), process(bo(0x5000), handles=(MAX_FREE_HANDLES,))))
    with pytest.raises(SharedBuffer, match=f"handle {MAX_FREE_HANDLES + 1}"):
        shares(found(process(bo(0x5000)), process(bo(0x5000), handles=(MAX_FREE_HANDLES + 1,))))


def test_a_shared_buffer_counts_once() -> None:
    tree = [process(bo(0x5000), bo(0x9000)), process(bo(0x5000))]
    assert contents(tree, shares(found(*tree))) == 2 * 0x2000
    assert contents(tree, ()) == 3 * 0x2000


def test_a_checkpoint_without_some_of_its_bos() -> None:
    whole = process(bo(0x5000), bo(0x9000), bo(0xB000), handles=(7, 1, 3))
    less = without_bos(whole, {1})
    assert less.bos == (whole.bos[0], whole.bos[2])
    assert [record.idr_handle for record in less.private().bos] == [7, 3]
    assert less.private().devices == whole.private().devices
    assert without_bos(whole, {0, 1, 2}).private().bos == ()
    assert without_bos(whole, ()) is whole


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


def test_a_mapping_of_a_dmabuf() -> None:
    place = Place(gpu_id=11, offset=0x5000, size=0x2000)
    line = "7f0000000000-7f0000002000 rw-s 00000000 00:0c 99   /dmabuf:drm"
    assert touched([line], NODES, [], {("00:0c", 99): place}) == place
    assert touched([line], NODES, [place], {("00:0c", 98): place}) is None
    assert touched([line], NODES, [place], {("00:0d", 99): place}) is None
