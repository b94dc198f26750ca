"""What a KFD process does all day: memory, mappings, queues, events. And how it fails."""

from __future__ import annotations

import ctypes
import errno
import os
import threading

import pytest

from migrate.kfd import uapi
from migrate.kfd.sim.opcodes import AddKernargs, CopyKernargs, FillKernargs, Opcode
from migrate.kfd.sysfs import read_process
from tests.conformance.hosts import Host, Link
from tests.conformance.kit import (
    DOORBELL,
    DOORBELL_SLICE,
    GTT,
    PAGE,
    USERPTR,
    VRAM,
    WRITABLE,
    Process,
)
from tests.conformance.target import target, wait_until

COMPLETE = uapi.KFD_IOC_WAIT_RESULT_COMPLETE
TIMEOUT = uapi.KFD_IOC_WAIT_RESULT_TIMEOUT


def errno_of(action: object, *arguments: object, **options: object) -> int:
    assert callable(action)
    try:
        action(*arguments, **options)
    except OSError as error:
        return error.errno or -1
    return 0


# ---------------------------------------------------------------- memory


def _allocations(link: Link) -> dict[str, int]:
    p = Process(link.paths)
    gpu = p.gpu_ids[0]
    free = p.available(gpu)
    small = p.alloc(gpu, PAGE)
    answers = {
        "size zero": errno_of(p.alloc, gpu, 0),
        "no type": errno_of(p.alloc, gpu, PAGE, WRITABLE),
        "unknown gpu": errno_of(p.alloc, 0xFFFF, PAGE, gpus=[]),
        "more than there is": errno_of(p.alloc, gpu, free + (1 << 30), gpus=[], mapped=False),
        "userptr without address": errno_of(p.alloc, gpu, PAGE, USERPTR | WRITABLE),
        "doorbell of a wrong size": errno_of(p.alloc, gpu, PAGE, DOORBELL | WRITABLE),
        "free while mapped": errno_of(p.free, small),
        "map an unknown handle": errno_of(
            p.map, type(small)(small.handle + 1000, 0, 0, 0, 0), [gpu]
        ),
        "map on an unknown gpu": errno_of(p.map, small, [0xFFFF]),
        "map on no gpu": errno_of(p.map, small, []),
    }
    p.unmap(small, p.gpu_ids)
    answers["unmap what is not mapped"] = errno_of(p.unmap, small, p.gpu_ids)
    answers["free"] = errno_of(p.free, small)
    return answers


def test_errnos_of_memory(host: Host) -> None:
    assert host.run(_allocations) == {
        "size zero": errno.EINVAL,
        "no type": errno.EINVAL,
        "unknown gpu": errno.EINVAL,
        "more than there is": errno.ENOMEM,
        "userptr without address": errno.EINVAL,
        "doorbell of a wrong size": errno.EINVAL,
        "free while mapped": errno.EBUSY,
        "map an unknown handle": errno.ENOMEM,
        "map on an unknown gpu": errno.EINVAL,
        "map on no gpu": errno.EINVAL,
        "unmap what is not mapped": errno.EINVAL,
        "free": 0,
    }


def _without_vm(link: Link) -> tuple[int, int]:
    p = Process(link.paths, acquire=False)
    gpu = p.gpu_ids[0]
    args = uapi.kfd_ioctl_create_queue_args(gpu_id=gpu, ring_size=PAGE, queue_type=2)
    return (
        errno_of(p.alloc, gpu, PAGE, gpus=[]),
        errno_of(p.kfd.ioctl, uapi.AMDKFD_IOC_CREATE_QUEUE, args),
    )


def test_memory_and_queues_need_a_vm(host: Host) -> None:
    assert host.run(_without_vm) == (errno.ENODEV, errno.ESRCH)


def _acquire_again(link: Link) -> tuple[int, int]:
    p = Process(link.paths)
    gpu = p.gpu_ids[0]
    args = uapi.kfd_ioctl_acquire_vm_args(drm_fd=p.render[gpu].fileno(), gpu_id=gpu)
    same = errno_of(p.kfd.ioctl, uapi.AMDKFD_IOC_ACQUIRE_VM, args)
    return same, errno_of(p.acquire, gpu)


def test_acquire_vm_twice_is_ebusy_unless_it_is_the_same_file(host: Host) -> None:
    assert host.run(_acquire_again) == (0, errno.EBUSY)


def test_the_drivers_view_of_a_process_is_in_sysfs(host: Host) -> None:
    child = host.spawn(target)
    layout = child.hear()
    usage = read_process(host.paths, child.pid)
    assert usage is not None
    assert {queue.gpu_id for queue in usage.queues} == set(host.gpu_ids)
    vram = sum(b.size for b in layout.buffers.values() if b.flags & VRAM)
    assert sum(used for _, used in usage.vram) == vram
    pid = child.pid
    child.kill()
    assert wait_until(lambda: read_process(host.paths, pid) is None)


# ---------------------------------------------------------------- queues


def _kernels(link: Link) -> list[bytes]:
    p = Process(link.paths)
    p.prepare_queues()
    gpus = [p.gpu_ids[0], p.gpu_ids[-1]]
    queues = [p.create_queue(gpu, n) for n, gpu in enumerate(gpus)]
    near, far = p.alloc(gpus[0], 16 * PAGE), p.alloc(gpus[1], 16 * PAGE)
    p.run(queues[0], Opcode.FILL, FillKernargs(near.address, near.size, 0x01020304))
    p.run(queues[1], Opcode.COPY, CopyKernargs(far.address, near.address, near.size))
    p.run(queues[0], Opcode.ADD, AddKernargs(near.address, far.address, near.size // 8, 1))
    return [near.read(near.size - 8, 8), far.read(far.size - 8, 8)]


def test_kernels_reach_the_memory_of_peers(host: Host) -> None:
    word = 0x0102030401020304
    assert host.run(_kernels) == [(word + 1).to_bytes(8, "little"), word.to_bytes(8, "little")]


def _userptr(link: Link) -> bytes:
    p = Process(link.paths)
    p.prepare_queues()
    gpu = p.gpu_ids[0]
    queue = p.create_queue(gpu, 0)
    memory = ctypes.create_string_buffer(3 * PAGE)
    start = (ctypes.addressof(memory) + PAGE - 1) // PAGE * PAGE
    user = p.alloc(gpu, PAGE, USERPTR | WRITABLE, user=start)
    p.run(queue, Opcode.FILL, FillKernargs(user.address, PAGE, 0x05060708))
    return ctypes.string_at(start + PAGE - 4, 4)


def test_a_userptr_is_the_processs_own_memory(host: Host) -> None:
    assert host.run(_userptr) == bytes([8, 7, 6, 5])


def _fault(link: Link) -> tuple[int, int, int, int]:
    p = Process(link.paths)
    p.prepare_queues()
    gpu = p.gpu_ids[0]
    queue = p.create_queue(gpu, 0)
    event = p.create_event(uapi.KFD_IOC_EVENT_MEMORY)
    lost = p.alloc(gpu, PAGE, gpus=[])
    queue.submit(Opcode.FILL, FillKernargs(lost.address, PAGE, 1))
    result = p.wait([event])
    data = p.event_data[0].memory_exception_data
    queue.submit(Opcode.NOP, None)
    return result, data.va - lost.address, data.gpu_id - gpu, queue.read_index


def test_an_access_outside_the_mappings_stops_the_queue_and_raises_an_event(host: Host) -> None:
    assert host.run(_fault) == (COMPLETE, 0, 0, 0)


def _doorbell_and_destroy(link: Link) -> dict[str, int]:
    p = Process(link.paths)
    p.prepare_queues()
    gpu = p.gpu_ids[0]
    queue = p.create_queue(gpu, 0)
    base = queue.args.doorbell_offset & ~(DOORBELL_SLICE - 1)
    destroy = uapi.kfd_ioctl_destroy_queue_args(queue_id=0)
    odd = p.queue_args(gpu, queue.ring, 1)
    odd.ring_size = PAGE + 1
    return {
        "doorbell of a wrong length": errno_of(p.kfd.mmap, base, PAGE),
        "doorbell of an unknown gpu": errno_of(
            p.kfd.mmap, uapi.KFD_MMAP_TYPE_DOORBELL | uapi.KFD_MMAP_GPU_ID(0xFFFF), DOORBELL_SLICE
        ),
        "odd ring": errno_of(p.kfd.ioctl, uapi.AMDKFD_IOC_CREATE_QUEUE, odd),
        "destroy": errno_of(p.kfd.ioctl, uapi.AMDKFD_IOC_DESTROY_QUEUE, destroy),
        "destroy again": errno_of(p.kfd.ioctl, uapi.AMDKFD_IOC_DESTROY_QUEUE, destroy),
    }


def test_errnos_of_queues(host: Host) -> None:
    assert host.run(_doorbell_and_destroy) == {
        "doorbell of a wrong length": errno.EINVAL,
        "doorbell of an unknown gpu": errno.ENODEV,
        "odd ring": errno.EINVAL,
        "destroy": 0,
        "destroy again": errno.EINVAL,
    }


# ---------------------------------------------------------------- events


def _events(link: Link) -> dict[str, object]:
    p = Process(link.paths)
    p.prepare_queues()
    first, second = p.create_event(), p.create_event(auto_reset=False)
    answers: dict[str, object] = {"nothing": p.wait([first], 0)}
    p.set_event(first)
    answers["one of two"] = p.wait([first, second], 0, wait_for_all=False)
    answers["auto reset took it"] = p.wait([first], 0)
    p.set_event(second)
    answers["manual stays"] = [p.wait([second], 0), p.wait([second], 0)]
    answers["not all"] = p.wait([first, second], 20)
    p.set_event(first)
    answers["all"] = p.wait([first, second], 0)
    answers["no such event"] = errno_of(p.wait, [4000], 0)
    return answers


def test_events(host: Host) -> None:
    assert host.run(_events) == {
        "nothing": TIMEOUT,
        "one of two": COMPLETE,
        "auto reset took it": TIMEOUT,
        "manual stays": [COMPLETE, COMPLETE],
        "not all": TIMEOUT,
        "all": COMPLETE,
        "no such event": errno.EINVAL,
    }


def _wait_elsewhere(link: Link, end: str) -> int:
    p = Process(link.paths)
    p.prepare_queues()
    event = p.create_event()
    other = Process.__new__(Process)
    other.kfd = p.kfd
    answers: list[int] = []

    def wait() -> None:
        try:
            answers.append(other.wait([event], 20_000))
        except OSError as error:
            answers.append(-(error.errno or 1))

    thread = threading.Thread(target=wait)
    thread.start()
    thread.join(0.05)
    if end == "set":
        p.set_event(event)
    else:
        p.kfd.ioctl(
            uapi.AMDKFD_IOC_DESTROY_EVENT, uapi.kfd_ioctl_destroy_event_args(event_id=event)
        )
    thread.join()
    return answers[0]


@pytest.mark.parametrize(("end", "answer"), [("set", COMPLETE), ("destroy", -errno.EIO)])
def test_a_waiter_is_woken(host: Host, end: str, answer: int) -> None:
    """A waiter that came too late finds a destroyed event missing: EINVAL, as it would."""
    got = host.run(_wait_elsewhere, end)
    assert got == answer or (end == "destroy" and got == -errno.EINVAL)


# ---------------------------------------------------------------- the file itself


def _unknown_ioctls(link: Link) -> list[int]:
    p = Process(link.paths, acquire=False)
    arg = uapi.kfd_ioctl_get_version_args()
    beyond = uapi._IOC_NR(uapi.AMDKFD_IOC_AVAILABLE_MEMORY) + 9
    return [
        errno_of(p.kfd.ioctl, request, arg)
        for request in (
            0x80084B00,  # number 0
            0x80084B00 | beyond,
            uapi.AMDKFD_IOC_GET_VERSION,
        )
    ]


def test_unknown_ioctls_are_enotty(host: Host) -> None:
    assert host.run(_unknown_ioctls) == [errno.ENOTTY, errno.ENOTTY, 0]


def _render_of_another_file(link: Link) -> int:
    p = Process(link.paths)
    gpu = p.gpu_ids[0]
    buffer = p.alloc(gpu, PAGE, GTT | WRITABLE)
    return errno_of(p.open_render(gpu).mmap, buffer.mmap_offset, PAGE)


def test_a_bo_is_mapped_through_the_very_file_it_was_made_with(host: Host) -> None:
    assert host.run(_render_of_another_file) == errno.EACCES


def _fds(link: Link) -> int:
    before = len(os.listdir("/proc/self/fd"))
    p = Process(link.paths)
    for file in (*p.render.values(), p.kfd):
        file.close()
    return len(os.listdir("/proc/self/fd")) - before


def test_opening_and_closing_leaves_no_fd(host: Host) -> None:
    assert host.run(_fds) == 0
