"""The surprises of the real driver: a stand-in that lacks them would hide our own mistakes."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from migrate.kfd import privdata, uapi
from migrate.kfd.file import open_device
from migrate.kfd.sim.faults import Fault
from migrate.kfd.sim.opcodes import FillKernargs, Opcode
from tests.conformance import image as raw
from tests.conformance.hosts import Child, Host, Link, any_host
from tests.conformance.image import INVALID, Buffers, Image
from tests.conformance.kit import (
    DOORBELL,
    MMIO,
    PAGE,
    USERPTR,
    VRAM,
    WRITABLE,
    Process,
    gpu_nodes,
)
from tests.conformance.target import (
    ADDED,
    open_nodes,
    restored,
    stays,
    target,
    wait_until,
    without_vm,
)
from tests.conformance.test_restore import attempt, dumped, frozen, run_resume
from tests.conformance.tracer import held, seize, stolen, stop

VRAM_AVAILABILITY_ALIGN = 2 << 20  # bytes; amdgpu_amdkfd_gpuvm.c
CLONE_NEWPID = 0x20000000
CLONE_NEWUSER = 0x10000000  # lets those without root make the other


def decoded(image: Image) -> privdata.PrivateData:
    return privdata.decode(image.priv_data, len(image.devices), len(image.bos), image.num_objects)


# ---------------------------------------------------------------- 1, 2: oopses


@pytest.mark.simulated
def test_resume_of_a_process_without_vm_oopses(broken_host: Host) -> None:
    child = broken_host.spawn(without_vm)
    child.hear()
    assert run_resume(broken_host, child.pid) == errno.EIO
    assert "oops: amdgpu_amdkfd_criu_resume" in broken_host.kernel_log
    kfd = open_device(broken_host.paths.kfd)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):  # broken for good
        kfd.ioctl(uapi.AMDKFD_IOC_GET_VERSION, uapi.kfd_ioctl_get_version_args())
    kfd.close()


@pytest.mark.simulated
def test_process_info_and_unpause_with_a_gpu_without_vm_oopses(broken_host: Host) -> None:
    child = broken_host.spawn(without_vm)
    child.hear()
    with held(child.pid, broken_host.paths) as file:
        raw.process_info(file)
        assert "oops" not in broken_host.kernel_log
        assert raw.errno_of(file, uapi.KFD_CRIU_OP_UNPAUSE) == errno.EIO
    assert "oops: restore_process_queues_cpsch" in broken_host.kernel_log


# ---------------------------------------------------------------- 3, 4: pauses


def test_process_info_twice_and_unpause_once_leaves_queues_evicted(host: Host) -> None:
    child = host.spawn(target)
    child.hear()
    child.ask(("start_counter",))
    assert child.ask(("counter_moves",))
    with held(child.pid, host.paths) as file:
        raw.process_info(file)
        raw.process_info(file)
        raw.unpause(file)
        assert raw.errno_of(file, uapi.KFD_CRIU_OP_UNPAUSE) == errno.EINVAL
    assert child.ask(("counter_stays",))


def _pause_and_die(link: Link, pid: int) -> None:
    seize(pid)
    stop(pid)
    with stolen(pid, link.paths) as file:
        raw.process_info(file)
        os._exit(0)


def test_a_dead_tracers_pause_stays_and_a_new_tracer_can_undo_it(host: Host) -> None:
    child = host.spawn(target)
    child.hear()
    child.ask(("start_counter",))
    assert child.ask(("counter_moves",))
    host.spawn(_pause_and_die, child.pid).join()
    assert child.ask(("counter_stays",))
    with held(child.pid, host.paths) as file:
        raw.unpause(file)
    assert child.ask(("counter_moves",))


def test_nothing_writes_vram_while_paused(host: Host) -> None:
    child = host.spawn(target)
    child.hear()
    child.ask(("start_counter",))
    child.ask(("submit_adds", 40))
    with held(child.pid, host.paths) as file:
        counts = raw.process_info(file)
        assert stays(lambda: raw.checkpoint(file, counts).contents)
        raw.unpause(file)
    assert child.ask(("counter_moves",))
    assert child.ask(("wait_adds",)) == 40 * ADDED


def _fill_again_and_again(link: Link, size: int) -> None:
    process = Process(link.paths)
    process.prepare_queues()
    queue = process.create_queue(process.gpu_ids[0], 0)
    buffer = process.alloc(process.gpu_ids[0], size)
    link.say(buffer.address)
    for value in range(1, 1 << 20):
        queue.submit(Opcode.FILL, FillKernargs(buffer.address, size, value))
        if not wait_until(lambda: queue.write_index - queue.read_index < 8):
            break
    os._exit(0)


def test_process_info_answers_only_when_the_gpu_has_stopped(host: Host) -> None:
    """Nothing of the buffer changes while it is paused, and all goes on afterwards.

    It may be half filled: a kernel is stopped in its middle (CWSR) and goes on later.
    """
    size = 64 << 20
    child = host.spawn(_fill_again_and_again, size)
    address = child.hear()
    for _ in range(5):
        with held(child.pid, host.paths) as file:
            buffers = Buffers(raw.process_info(file))
            raw.criu(file, uapi.KFD_CRIU_OP_CHECKPOINT, **buffers.fields)
            fd = next(bucket.dmabuf_fd for bucket in buffers.bos if bucket.addr == address)
            memory = mmap.mmap(fd, size)
            found = memory[:]
            assert stays(partial(_contents, memory), 0.02)
            assert memory[:] == found
            buffers.close()
            raw.unpause(file)
        with memory:  # it goes on
            assert wait_until(partial(_differs, memory, found))


def _contents(memory: mmap.mmap) -> bytes:
    return memory[:]


def _differs(memory: mmap.mmap, found: bytes) -> bool:
    return memory[:] != found


# ---------------------------------------------------------------- 5: RESTORE by the tracer


def _open_kfd_alone(link: Link) -> None:
    process = Process(link.paths, acquire=False)
    link.say(process.kfd.fileno())
    link.hear()


def _restore_as_tracer(link: Link, pid: int, image: Image, counter: int) -> None:
    """RESTORE through the stolen fd; after RESUME says whether the counter at rest stays."""
    nodes = [
        open_device(f"{link.paths.dri}/renderD{minor}") for minor in gpu_nodes(link.paths).values()
    ]
    with held(pid, link.paths) as file:
        done = raw.restore(file, image, [node.fileno() for node in nodes])
    link.say()
    link.hear()
    at = next(n for n in range(len(image.bos)) if image.bo(n).addr == counter)
    with mmap.mmap(done.dmabufs[at], PAGE) as memory:
        assert int.from_bytes(memory[:8], "little") > 0
        link.say(stays(lambda: memory[:8], 0.3))
    done.close()
    link.hear()


def _restored_by_a_tracer(host: Host) -> tuple[Child, Child]:
    """(tracer, copy): RESTORE is done, RESUME is not.

    The tracer is a process that never opened /dev/kfd: see the oops below.
    """
    image, layout = dumped(host, ("start_counter",), ("counter_moves",))
    copy = host.spawn(_open_kfd_alone)
    copy.hear()
    address = layout.buffers["counter"].address
    tracer = host.spawn(_restore_as_tracer, copy.pid, image, address)
    tracer.hear()
    return tracer, copy


def test_restore_made_by_the_tracer_says_ok_but_the_queues_never_start(host: Host) -> None:
    tracer, copy = _restored_by_a_tracer(host)
    assert run_resume(host, copy.pid) == 0
    assert tracer.ask()


def _restore_as_tracer_with_kfd(link: Link, pid: int, image: Image, counter: int) -> None:
    kfd = open_device(link.paths.kfd)
    _restore_as_tracer(link, pid, image, counter)
    kfd.close()


@pytest.mark.simulated
def test_resume_after_a_restore_by_a_tracer_with_kfd_state_oopses(broken_host: Host) -> None:
    """The worker starts the tracer's queues, and the tracer has no VM."""
    image, layout = dumped(broken_host)
    copy = broken_host.spawn(_open_kfd_alone)
    copy.hear()
    address = layout.buffers["pointers"].address
    broken_host.spawn(_restore_as_tracer_with_kfd, copy.pid, image, address).hear()
    assert run_resume(broken_host, copy.pid) == 0
    assert wait_until(lambda: "oops: restore_process_queues_cpsch" in broken_host.kernel_log)


@pytest.mark.simulated
def test_resume_that_says_ok_and_starts_nothing(host: Host) -> None:
    """RESUME answers 0 when a worker is scheduled; look at read pointers."""
    image, layout = dumped(host, ("start_counter",), ("counter_moves",))
    child = host.spawn(restored, image, layout)
    child.hear()
    host.arm(Fault.RESUME_DEAD)
    assert run_resume(host, child.pid) == 0
    assert child.ask(("counter_stays",))


# ---------------------------------------------------------------- 6: pid namespaces


def _in_pid_namespace(link: Link) -> None:
    libc = ctypes.CDLL(None)
    if libc.unshare(CLONE_NEWPID) and libc.unshare(CLONE_NEWUSER | CLONE_NEWPID):
        link.say(None)
        return
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(write)
        process = Process(link.paths)
        link.say(os.getpid())
        os.read(read, 1)  # until the parent ends
        process.kfd.close()
        os._exit(0)
    link.say(pid)
    link.hear()


def test_pids_are_those_of_each_ones_namespace(host: Host) -> None:
    child = host.spawn(_in_pid_namespace)
    numbers = [child.hear()]
    if numbers[0] is None:
        pytest.skip("may not make a pid namespace")
    numbers.append(child.hear())
    inside, outside = min(numbers), max(numbers)
    assert inside == 1
    with held(outside, host.paths) as file:
        assert raw.process_info(file).pid == inside
        raw.unpause(file)
    assert run_resume(host, outside) == errno.EINVAL  # found, and never restored


# ---------------------------------------------------------------- 7, 8: what holds VRAM


def test_a_dmabuf_is_live_has_no_cloexec_and_keeps_freed_vram(host: Host) -> None:
    child = host.spawn(target)
    child.hear()
    child.ask(("alloc",))
    free = child.ask(("available",))
    assert free % VRAM_AVAILABILITY_ALIGN == 0
    with held(child.pid, host.paths) as file:
        counts = raw.process_info(file)
        buffers = Buffers(counts)
        raw.criu(file, uapi.KFD_CRIU_OP_CHECKPOINT, **buffers.fields)
        raw.unpause(file)
    fds = [bucket.dmabuf_fd for bucket in buffers.bos if bucket.dmabuf_fd != INVALID]
    assert not any(fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC for fd in fds)
    child.ask(("add",))
    work = next(b for b in buffers.bos if b.size == 16 * PAGE and b.alloc_flags & VRAM)
    assert raw.read_dmabuf(work.dmabuf_fd, 8) == ADDED.to_bytes(8, "little")
    child.ask(("free",))
    assert child.ask(("available",)) == free
    buffers.close()
    # Every BO counts as whole 2 MiB there, however small.
    assert wait_until(lambda: bool(child.ask(("available",)) == free + VRAM_AVAILABILITY_ALIGN))


def test_a_dmabuf_outlives_its_process(host: Host) -> None:
    child = host.spawn(target)
    child.hear()
    child.ask(("add",))
    with held(child.pid, host.paths) as file:
        buffers = Buffers(raw.process_info(file))
        raw.criu(file, uapi.KFD_CRIU_OP_CHECKPOINT, **buffers.fields)
    child.kill()
    work = next(b for b in buffers.bos if b.size == 16 * PAGE and b.alloc_flags & VRAM)
    assert raw.read_dmabuf(work.dmabuf_fd, 8) == ADDED.to_bytes(8, "little")
    buffers.close()


def test_a_stolen_fd_left_open_pins_the_vram_of_a_dead_process(host: Host) -> None:
    watcher = host.spawn(target)
    watcher.hear()
    free = watcher.ask(("available",))
    child = host.spawn(target)
    child.hear()
    child.ask(("alloc_vram", 64 << 20))
    used = watcher.ask(("available",))
    assert used <= free - (64 << 20)
    with stolen(child.pid, host.paths):
        child.kill()
        assert watcher.ask(("available",)) == used
    assert wait_until(lambda: bool(watcher.ask(("available",)) == free))


# ---------------------------------------------------------------- 9, 10: private data


def test_private_data_is_not_stable_byte_for_byte(host: Host) -> None:
    child = host.spawn(target)
    child.hear()
    with held(child.pid, host.paths) as file:
        first, second = raw.dump(file), raw.dump(file)
    assert first.priv_data != second.priv_data
    assert _stable(first) == _stable(second)


def _stable(image: Image) -> dict[int, Any]:
    return {
        queue.q_id: (queue.q_address, queue.gpu_id, queue.doorbell_id, len(queue.mqd))
        for queue in decoded(image).queues
    }


def _two_queues(link: Link) -> None:
    process = Process(link.paths)
    process.prepare_queues()
    for number in range(2):
        process.create_queue(process.gpu_ids[0], number)
    link.say()
    link.hear()


def _restore_alone(link: Link, image: Image) -> None:
    process, fds = open_nodes(link, image)
    raw.restore(process.kfd, image, fds).close()
    link.say()
    link.hear()


def test_the_order_of_queues_flips(host: Host) -> None:
    child = host.spawn(_two_queues)
    child.hear()
    image = frozen(host, child)
    child.kill()
    copy = host.spawn(_restore_alone, image)
    copy.hear()
    assert run_resume(host, copy.pid) == 0
    again = frozen(host, copy)
    ids = [queue.q_id for queue in decoded(image).queues]
    assert [queue.q_id for queue in decoded(again).queues] == ids[::-1]
    assert _stable(image) == _stable(again)


@pytest.mark.simulated
def test_the_bo_record_of_later_kernels_has_272_bytes(host: Host) -> None:
    image, _ = dumped(host)
    with any_host("--bo-record", "272", "--allow-unprivileged") as later:
        wide, layout = dumped(later)
        assert len(wide.priv_data) == len(image.priv_data) + 192 * len(image.bos)
        assert decoded(wide).bo_record_size == 272
        copy = later.spawn(restored, wide, layout)
        copy.hear()
        assert run_resume(later, copy.pid) == 0
        assert copy.ask(("add",)) == ADDED
        found = attempt(later, image, good=wide)
        assert found.first != 0, "records of another size must not be taken"
        assert found.second == errno.EINVAL


# ---------------------------------------------------------------- 11, 12: offsets, crossed fds


def _special_bos(link: Link) -> None:
    process = Process(link.paths)
    memory = ctypes.create_string_buffer(2 * PAGE)
    start = (ctypes.addressof(memory) + PAGE - 1) // PAGE * PAGE
    gpu = process.gpu_ids[0]
    process.alloc(gpu, 8192, DOORBELL | WRITABLE)
    process.alloc(gpu, PAGE, MMIO | WRITABLE)
    process.alloc(gpu, PAGE, USERPTR | WRITABLE, user=start, gpus=[])
    link.say()
    link.hear()


def _restore_special(link: Link, image: Image) -> list[int]:
    process, fds = open_nodes(link, image)
    return raw.restore(process.kfd, image, fds).offsets


def test_offsets_of_doorbell_and_mmio_bos_encode_the_actual_gpu_id(host: Host) -> None:
    """And a userptr BO has restored_offset 0."""
    host.need_gpus(2)
    child = host.spawn(_special_bos)
    child.hear()
    image = frozen(host, child)
    child.kill()
    users = [user for user, _ in image.devices]
    there = [actual for _, actual in reversed(image.devices)]
    swapped = replace(image, devices=list(zip(users, there, strict=True)))
    offsets = host.run(_restore_special, swapped)
    for n, offset in enumerate(offsets):
        bucket = image.bo(n)
        if bucket.alloc_flags & USERPTR:
            assert offset == 0
            continue
        kind = (
            uapi.KFD_MMAP_TYPE_DOORBELL
            if bucket.alloc_flags & DOORBELL
            else uapi.KFD_MMAP_TYPE_MMIO
        )
        assert bucket.gpu_id == users[0]
        assert bucket.offset == kind | uapi.KFD_MMAP_GPU_ID(users[0])
        assert offset == kind | uapi.KFD_MMAP_GPU_ID(there[0])


def _restore_crossed(link: Link, image: Image) -> int:
    process, fds = open_nodes(link, image)
    raw.restore(process.kfd, image, fds[::-1]).close()
    return 0


def test_crossed_drm_fds_are_accepted_silently(host: Host) -> None:
    host.need_gpus(2)
    image, _ = dumped(host)
    assert host.run(_restore_crossed, image) == 0
