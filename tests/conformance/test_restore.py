"""The restore half of the table: RESTORE and RESUME. One test a row or case."""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from migrate.kfd import privdata, uapi
from migrate.kfd.file import open_device
from migrate.kfd.sim.faults import Fault
from tests.conformance import image as raw
from tests.conformance.hosts import Child, Host, Link
from tests.conformance.image import Image
from tests.conformance.kit import GTT, VRAM, Process
from tests.conformance.target import (
    ADDED,
    Attempts,
    Layout,
    idle,
    open_nodes,
    restored,
    revive,
    target,
    try_restore,
    wait_until,
    without_kfd,
)
from tests.conformance.tracer import held

DEVICE_PRIV = 8  # bytes of private data of the process, before those of devices
BO_PRIV_SIZE = 80


def dumped(host: Host, *steps: tuple[Any, ...]) -> tuple[Image, Layout]:
    """The image of a target that did *steps* and is gone afterwards.

    A target that did nothing is dumped once for all tests: images are never changed.
    """
    if not steps and "idle" in host.images:
        known: tuple[Image, Layout] = host.images["idle"]
        return known
    child = host.spawn(target)
    layout: Layout = child.hear()
    for step in steps:
        child.ask(step)
    image = frozen(host, child)
    child.kill()
    if not steps:
        host.images["idle"] = (image, layout)
    return image, layout


def frozen(host: Host, child: Child) -> Image:
    """The image of a child that is paused and stopped, and stays paused."""
    with held(child.pid, host.paths) as file:
        return raw.checkpoint(file, raw.process_info(file))


def attempt(host: Host, image: Image, **options: Any) -> Attempts:
    """What comes of a RESTORE and of a second, good one in the same process."""
    child = host.spawn(try_restore, image, options)
    found: Attempts = child.hear()
    child.kill()
    return found


def dmabufs_of(image: Image) -> int:
    """How many of its BOs get a dmabuf fd."""
    return sum(raw.has_contents(image.bo(n)) for n in range(len(image.bos)))


def run_resume(host: Host, pid: int) -> int:
    """errno of RESUME from a process with its own kfd fd."""
    kfd = open_device(host.paths.kfd)
    try:
        return raw.errno_of(kfd, uapi.KFD_CRIU_OP_RESUME, pid=pid)
    finally:
        kfd.close()


def with_bo(image: Image, index: int, **fields: int) -> Image:
    """*image* with fields of a BO bucket changed."""
    bucket = image.bo(index)
    for name, value in fields.items():
        setattr(bucket, name, value)
    bos = list(image.bos)
    bos[index] = bytes(bucket)
    return replace(image, bos=bos)


def with_device(image: Image, index: int, user: int | None, actual: int | None) -> Image:
    """*image* with a device bucket changed."""
    devices = list(image.devices)
    old = devices[index]
    devices[index] = (old[0] if user is None else user, old[1] if actual is None else actual)
    return replace(image, devices=devices)


# ---------------------------------------------------------------- EINVAL, may try again


@pytest.mark.parametrize("null", ["devices", "bos", "priv_data"])
def test_restore_with_a_null_argument_is_einval_and_may_be_tried_again(
    host: Host, null: str
) -> None:
    image, _ = dumped(host)
    assert attempt(host, image, null=[null]) == (errno.EINVAL, 0, 0)


@pytest.mark.parametrize("zero", ["num_devices", "priv_data_size"])
def test_restore_with_a_zero_argument_is_einval_and_may_be_tried_again(
    host: Host, zero: str
) -> None:
    image, _ = dumped(host)
    assert attempt(host, image, fields={zero: 0}) == (errno.EINVAL, 0, 0)


def test_restore_of_fewer_devices_than_visible_is_einval_and_may_be_tried_again(
    host: Host,
) -> None:
    host.need_gpus(2)
    image, _ = dumped(host)
    assert attempt(host, image, fields={"num_devices": 1}) == (errno.EINVAL, 0, 0)


def _unknown_first_gpu(image: Image) -> Image:
    return with_device(image, 0, None, 0xFFFF)


def _user_gpu_id_zero(image: Image) -> Image:
    return with_device(image, 0, 0, None)


def _version_two(image: Image) -> Image:
    return replace(image, priv_data=b"\x02" + image.priv_data[1:])


@pytest.mark.parametrize("change", [_unknown_first_gpu, _user_gpu_id_zero, _version_two])
def test_restore_with_a_bad_beginning_is_einval_and_may_be_tried_again(
    host: Host, change: Callable[[Image], Image]
) -> None:
    image, _ = dumped(host)
    assert attempt(host, change(image), good=image) == (errno.EINVAL, 0, 0)


@pytest.mark.parametrize("fd", ["closed", "kfd"])
def test_restore_whose_first_drm_fd_is_no_render_node_is_einval_and_may_be_tried_again(
    host: Host, fd: str
) -> None:
    image, _ = dumped(host)
    fds = [fd, *["own"] * (len(image.devices) - 1)]
    assert attempt(host, image, fds=fds) == (errno.EINVAL, 0, 0)


# ---------------------------------------------------------------- EINVAL, unusable


@pytest.mark.parametrize("fd", ["closed", "kfd", "first"])
def test_restore_with_a_bad_second_drm_fd_is_einval_and_unusable(host: Host, fd: str) -> None:
    """'first' is the row's "an fd twice"."""
    host.need_gpus(2)
    image, _ = dumped(host)
    fds = ["own", fd, *["own"] * (len(image.devices) - 2)]
    assert attempt(host, image, fds=fds) == (errno.EINVAL, errno.EINVAL, 0)


def test_restore_of_a_gpu_twice_is_einval_and_unusable(host: Host) -> None:
    host.need_gpus(2)
    image, _ = dumped(host)
    twice = with_device(image, 1, None, image.devices[0][1])
    assert attempt(host, twice, good=image) == (errno.EINVAL, errno.EINVAL, 0)


@pytest.mark.parametrize("change", [-1, 1])
def test_restore_with_a_private_size_that_is_off_is_einval_and_unusable(
    host: Host, change: int
) -> None:
    image, _ = dumped(host)
    data = image.priv_data + b"\0"
    wrong = replace(image, priv_data=data[: len(image.priv_data) + change])
    assert attempt(host, wrong, good=image) == (errno.EINVAL, errno.EINVAL, dmabufs_of(image))


@pytest.mark.parametrize("field", ["num_bos", "num_objects"])
def test_restore_with_a_wrong_count_is_einval_and_unusable(host: Host, field: str) -> None:
    """It fails at the objects, and leaves the fds of all BOs that were restored before open."""
    image, _ = dumped(host)
    count = {"num_bos": len(image.bos), "num_objects": image.num_objects}[field]
    left = dmabufs_of(image)
    if field == "num_bos":
        left -= raw.has_contents(image.bo(count - 1))
    found = attempt(host, image, fields={field: count - 1})
    assert found == (errno.EINVAL, errno.EINVAL, left)


def test_restore_with_bad_bo_flags_is_einval_and_unusable(host: Host) -> None:
    image, _ = dumped(host)
    wrong = with_bo(image, 0, alloc_flags=0)
    assert attempt(host, wrong, good=image) == (errno.EINVAL, errno.EINVAL, 0)


def test_restore_after_acquire_vm_is_einval_and_unusable(host: Host) -> None:
    image, _ = dumped(host)
    assert attempt(host, image, acquire=True) == (errno.EINVAL, errno.EINVAL, 0)


def test_a_second_restore_is_einval(host: Host) -> None:
    image, _ = dumped(host)
    assert attempt(host, image) == (0, errno.EINVAL, 0)


# ---------------------------------------------------------------- ENODEV, ENOMEM


def test_restore_of_a_bo_on_an_unknown_gpu_is_enodev_and_unusable(host: Host) -> None:
    image, _ = dumped(host)
    wrong = with_bo(image, 0, gpu_id=0xFFFF)
    assert attempt(host, wrong, good=image) == (errno.ENODEV, errno.EINVAL, 0)


def test_restore_with_vram_full_is_enomem_and_the_vram_is_freed_at_exit(host: Host) -> None:
    image, _ = dumped(host)
    watcher = host.spawn(_watch_vram)
    free = watcher.hear()
    index = next(n for n in range(len(image.bos)) if image.bo(n).alloc_flags & VRAM)
    too_big = with_bo(image, index, size=free + (64 << 20))
    child = host.spawn(try_restore, too_big, {"good": image})
    assert child.hear() == (errno.ENOMEM, errno.EINVAL, 0)
    child.kill()
    assert wait_until(lambda: bool(watcher.ask() == free))


def _watch_vram(link: Link) -> None:
    process = Process(link.paths)
    while True:
        link.say(process.available(process.gpu_ids[0]))
        link.hear()


def test_restore_of_a_duplicate_handle_is_enomem_and_unusable(host: Host) -> None:
    image, _ = dumped(host)
    pair = _two_bos_of_one_gpu(image)
    record = privdata.kfd_criu_bo_priv_data.idr_handle
    first, second = (_bo_priv(image, n) + record.offset for n in pair)
    data = bytearray(image.priv_data)
    data[second : second + 4] = data[first : first + 4]
    wrong = replace(image, priv_data=bytes(data))
    assert attempt(host, wrong, good=image) == (errno.ENOMEM, errno.EINVAL, 0)


def _two_bos_of_one_gpu(image: Image) -> tuple[int, int]:
    seen: dict[int, int] = {}
    for n in range(len(image.bos)):
        gpu_id = image.bo(n).gpu_id
        if gpu_id in seen:
            return seen[gpu_id], n
        seen[gpu_id] = n
    raise AssertionError("no GPU has two BOs")


def _bo_priv(image: Image, index: int) -> int:
    """Offset of a BO's record in the private data, whichever size it has."""
    for size in privdata.BO_RECORDS:
        start = DEVICE_PRIV + 8 * len(image.devices)
        after = start + size * len(image.bos)
        kind = ctypes.c_uint32.from_buffer_copy(image.priv_data, after).value
        if kind in {privdata.KFD_CRIU_OBJECT_TYPE_QUEUE, privdata.KFD_CRIU_OBJECT_TYPE_EVENT}:
            return start + size * index
    raise AssertionError("no known size of BO record fits")


@pytest.mark.simulated
def test_injected_enomem_makes_the_process_unusable(host: Host) -> None:
    image, _ = dumped(host)
    host.arm(Fault.RESTORE_ENOMEM)
    assert attempt(host, image) == (errno.ENOMEM, errno.EINVAL, 0)


# ---------------------------------------------------------------- UNPAUSE, RESUME


def _unpause_after_restore(link: Link, image: Image, layout: Layout) -> int:
    found = revive(link, image, layout)
    return raw.errno_of(found.process.kfd, uapi.KFD_CRIU_OP_UNPAUSE)


def test_unpause_after_restore_is_einval(host: Host) -> None:
    image, layout = dumped(host)
    assert host.run(_unpause_after_restore, image, layout) == errno.EINVAL


def test_queues_of_a_restored_process_start_with_resume_alone(host: Host) -> None:
    image, layout = dumped(host, ("start_counter",), ("counter_moves",))
    child = host.spawn(restored, image, layout)
    child.hear()
    before = child.ask(("counter",))
    assert child.ask(("submit_adds", 3)) is None
    assert child.ask(("counter",)) == before
    assert run_resume(host, child.pid) == 0
    assert child.ask(("counter_moves",))
    assert child.ask(("wait_adds",)) == 3 * ADDED


def test_resume_a_second_time_is_einval(host: Host) -> None:
    image, layout = dumped(host)
    child = host.spawn(restored, image, layout)
    child.hear()
    assert run_resume(host, child.pid) == 0
    assert run_resume(host, child.pid) == errno.EINVAL


def test_resume_of_a_process_that_was_not_restored_is_einval(host: Host) -> None:
    child = host.spawn(idle)
    child.hear()
    assert run_resume(host, child.pid) == errno.EINVAL


def test_resume_without_such_a_process_is_esrch(host: Host) -> None:
    child = host.spawn(without_kfd)
    child.hear()
    assert run_resume(host, child.pid) == errno.ESRCH
    child.kill()
    assert run_resume(host, child.pid) == errno.ESRCH


# ---------------------------------------------------------------- what a good restore keeps


def test_a_restored_process_keeps_ids_contents_and_goes_on(host: Host) -> None:
    """Handles, queue and event ids, gpu_ids, read pointers, memory; on swapped GPUs."""
    image, layout = dumped(host, ("add",), ("add",), ("start_counter",), ("counter_moves",))
    users = [user for user, _ in image.devices]
    swapped = replace(
        image, devices=[(u, a) for u, (_, a) in zip(users, reversed(image.devices), strict=True)]
    )
    child = host.spawn(restored, swapped, layout)
    child.hear()
    assert run_resume(host, child.pid) == 0
    assert child.ask(("handles",)) == {n: b.handle for n, b in layout.buffers.items()}
    assert child.ask(("add",)) == 3 * ADDED
    assert child.ask(("counter_moves",))
    counter, iterations = child.ask(("stop_counter",))
    assert counter == iterations
    assert child.ask(("new_event",)) not in {0, layout.event_id}
    again = frozen(host, child)
    assert sorted(user for user, _ in again.devices) == sorted(users)
    assert dict(again.devices) == dict(swapped.devices)


def test_packets_in_the_ring_are_run_once_each(host: Host) -> None:
    """Packets behind a kernel that runs for ever are still in the ring of the copy."""
    child = host.spawn(target)
    layout: Layout = child.hear()
    child.ask(("start_counter", 1))
    child.ask(("submit_adds", 20))
    assert child.ask(("counter_moves", 1))
    image = frozen(host, child)
    child.kill()
    copy = host.spawn(restored, image, layout)
    copy.hear()
    assert copy.ask(("indexes",))[1] == (0, 21)
    assert run_resume(host, copy.pid) == 0
    assert copy.ask(("counter_moves", 1))
    assert copy.ask(("work",)) == 0
    counter, iterations = copy.ask(("stop_counter", 1))
    assert counter == iterations
    assert copy.ask(("wait_adds",)) == 20 * ADDED


def test_restored_offsets_and_dmabufs_are_there_for_bos_with_contents_only(host: Host) -> None:
    image, layout = dumped(host)
    assert host.run(_restored_offsets, image) == [
        raw.has_contents(image.bo(n)) for n in range(len(image.bos))
    ]
    assert any(not raw.has_contents(image.bo(n)) for n in range(len(image.bos)))
    assert layout.gpu_ids == host.gpu_ids


def _restored_offsets(link: Link, image: Image) -> list[bool]:
    process, fds = open_nodes(link, image)
    done = raw.restore(process.kfd, image, fds)
    for n, offset in enumerate(done.offsets):
        if image.bo(n).alloc_flags & (VRAM | GTT):
            assert offset
    answer = [fd != raw.INVALID for fd in done.dmabufs]
    done.close()
    return answer
