"""The dump half of the table: PROCESS_INFO, CHECKPOINT, UNPAUSE. One test a row or case."""

from __future__ import annotations

import ctypes
import errno
import os
import threading

import pytest

from migrate.kfd import uapi
from migrate.kfd.sim.faults import Fault
from tests.conformance import image as raw
from tests.conformance.hosts import Host, Link, any_host
from tests.conformance.image import Buffers
from tests.conformance.kit import Process
from tests.conformance.target import idle, target
from tests.conformance.tracer import WALL, detach, held, seize, stolen, stop

CHECKPOINT = uapi.KFD_CRIU_OP_CHECKPOINT
PROCESS_INFO = uapi.KFD_CRIU_OP_PROCESS_INFO
UNPAUSE = uapi.KFD_CRIU_OP_UNPAUSE


# ---------------------------------------------------------------- EBADF: whose fd it is


def test_stolen_fd_while_not_tracing_is_ebadf(host: Host) -> None:
    child = host.spawn(idle)
    child.hear()
    with stolen(child.pid, host.paths) as file:
        assert raw.errno_of(file, PROCESS_INFO) == errno.EBADF


def test_another_thread_of_the_tracer_is_ebadf(host: Host) -> None:
    child = host.spawn(idle)
    child.hear()
    answers: list[int] = []
    with held(child.pid, host.paths) as file:
        thread = threading.Thread(target=lambda: answers.append(raw.errno_of(file, PROCESS_INFO)))
        thread.start()
        thread.join()
        assert raw.errno_of(file, PROCESS_INFO) == 0
        raw.unpause(file)
    assert answers == [errno.EBADF]


def test_non_criu_ioctl_on_a_stolen_fd_is_ebadf(host: Host) -> None:
    child = host.spawn(idle)
    child.hear()
    with held(child.pid, host.paths) as file:
        with pytest.raises(OSError, match=os.strerror(errno.EBADF)) as failure:
            file.ioctl(uapi.AMDKFD_IOC_GET_VERSION, uapi.kfd_ioctl_get_version_args())
        assert failure.value.errno == errno.EBADF


def _use_in_fork(link: Link) -> int:
    process = Process(link.paths)
    pid = os.fork()
    if pid == 0:
        try:
            process.kfd.ioctl(uapi.AMDKFD_IOC_GET_VERSION, uapi.kfd_ioctl_get_version_args())
        except OSError as error:
            os._exit(error.errno or 255)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_forked_child_is_ebadf(host: Host) -> None:
    assert host.run(_use_in_fork) == errno.EBADF


def test_dead_target_is_ebadf(host: Host) -> None:
    child = host.spawn(idle)
    child.hear()
    seize(child.pid)
    stop(child.pid)
    with stolen(child.pid, host.paths) as file:
        os.kill(child.pid, 9)
        os.waitpid(child.pid, WALL)
        child.join()
        assert raw.errno_of(file, PROCESS_INFO) == errno.EBADF


# ---------------------------------------------------------------- EACCES: capability


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


def _process_info_without_capability(link: Link) -> int:
    process = Process(link.paths)
    header = _Header(0x20080522, 0)
    none = (ctypes.c_uint32 * 6)()
    assert ctypes.CDLL(None).capset(ctypes.byref(header), none) == 0
    return raw.errno_of(process.kfd, PROCESS_INFO)


def test_without_capability_is_eacces() -> None:
    with any_host() as strict:  # without --allow-unprivileged
        assert strict.run(_process_info_without_capability) == errno.EACCES


# ---------------------------------------------------------------- EINVAL: order and counts


def test_checkpoint_before_process_info_is_einval(host: Host) -> None:
    child = host.spawn(target)
    child.hear()
    with held(child.pid, host.paths) as file:
        counts = raw.process_info(file)
        raw.unpause(file)
        assert raw.errno_of(file, CHECKPOINT, **Buffers(counts).fields) == errno.EINVAL


def test_unpause_before_process_info_and_a_second_unpause_are_einval(host: Host) -> None:
    child = host.spawn(target)
    child.hear()
    with held(child.pid, host.paths) as file:
        assert raw.errno_of(file, UNPAUSE) == errno.EINVAL
        raw.process_info(file)
        raw.unpause(file)
        assert raw.errno_of(file, UNPAUSE) == errno.EINVAL


@pytest.mark.parametrize("pointer", ["devices", "bos", "priv_data"])
def test_checkpoint_with_a_null_pointer_is_einval(host: Host, pointer: str) -> None:
    child = host.spawn(target)
    child.hear()
    with held(child.pid, host.paths) as file:
        buffers = Buffers(raw.process_info(file))
        fields = buffers.fields | {pointer: 0}
        assert raw.errno_of(file, CHECKPOINT, **fields) == errno.EINVAL
        raw.unpause(file)


@pytest.mark.parametrize("field", ["num_devices", "num_bos", "num_objects", "priv_data_size"])
@pytest.mark.parametrize("change", [-1, 1])
def test_checkpoint_with_a_count_off_by_one_is_einval(host: Host, field: str, change: int) -> None:
    child = host.spawn(target)
    child.hear()
    with held(child.pid, host.paths) as file:
        counts = raw.process_info(file)
        wrong = uapi.kfd_ioctl_criu_args.from_buffer_copy(counts)
        setattr(wrong, field, getattr(wrong, field) + change)
        assert raw.errno_of(file, CHECKPOINT, **Buffers(wrong).fields) == errno.EINVAL
        raw.checkpoint(file, counts)  # and it is still possible
        raw.unpause(file)


@pytest.mark.parametrize("change", ["alloc", "free", "new_event"])
def test_objects_made_or_freed_in_between_are_einval(host: Host, change: str) -> None:
    child = host.spawn(target)
    child.hear()
    if change == "free":
        child.ask(("alloc",))
    seize(child.pid)
    with stolen(child.pid, host.paths) as file:
        counts = raw.process_info(file)
        child.ask((change,))
        assert raw.errno_of(file, CHECKPOINT, **Buffers(counts).fields) == errno.EINVAL
        raw.unpause(file)
    stop(child.pid)
    detach(child.pid)


def test_unknown_operation_is_einval(host: Host) -> None:
    child = host.spawn(idle)
    child.hear()
    with held(child.pid, host.paths) as file:
        assert raw.errno_of(file, uapi.KFD_CRIU_OP_RESUME + 1) == errno.EINVAL


# ---------------------------------------------------------------- EFAULT, ENODEV


@pytest.mark.parametrize("pointer", ["devices", "bos", "priv_data"])
def test_checkpoint_with_a_bad_pointer_is_efault_and_leaks_no_fd(host: Host, pointer: str) -> None:
    child = host.spawn(target)
    child.hear()
    with held(child.pid, host.paths) as file:
        buffers = Buffers(raw.process_info(file))
        before = set(os.listdir("/proc/self/fd"))
        fields = buffers.fields | {pointer: 0x1000}
        assert raw.errno_of(file, CHECKPOINT, **fields) == errno.EFAULT
        assert set(os.listdir("/proc/self/fd")) <= before
        raw.unpause(file)


def _open_without_gpus(link: Link) -> tuple[int, int]:
    process = Process(link.paths, acquire=False)
    fields = {"devices": 4096, "bos": 4096, "priv_data": 4096}
    return raw.errno_of(process.kfd, PROCESS_INFO), raw.errno_of(process.kfd, CHECKPOINT, **fields)


@pytest.mark.simulated  # a real host needs a device cgroup that hides every GPU
def test_process_without_a_gpu_is_enodev() -> None:
    with any_host("--gpus", "0", "--allow-unprivileged") as bare:
        assert bare.run(_open_without_gpus) == (errno.ENODEV, errno.ENODEV)


# ---------------------------------------------------------------- ETIME: the scheduler hangs


@pytest.mark.simulated
def test_scheduler_hang_is_etime_then_unpause_einval_and_queue_creation_eio(
    broken_host: Host,
) -> None:
    child = broken_host.spawn(target)
    child.hear()
    broken_host.arm(Fault.SCHEDULER_HANG, broken_host.gpu_ids[0])
    with held(child.pid, broken_host.paths) as file:
        assert raw.errno_of(file, PROCESS_INFO) == errno.ETIME
        assert raw.errno_of(file, UNPAUSE) == errno.EINVAL
    assert child.ask(("new_queue", 2)) == errno.EIO


# ---------------------------------------------------------------- what a good dump says


def test_checkpoint_is_repeatable_and_unpause_lets_the_queues_run(host: Host) -> None:
    child = host.spawn(target)
    layout = child.hear()
    child.ask(("start_counter",))
    assert child.ask(("counter_moves",))
    with held(child.pid, host.paths) as file:
        counts = raw.process_info(file)
        first = raw.checkpoint(file, counts)
        second = raw.checkpoint(file, counts)
        raw.unpause(file)
    assert first.contents == second.contents
    assert [(user, actual) for user, actual in first.devices] == [
        (gpu_id, gpu_id) for gpu_id in host.gpu_ids
    ]
    addresses = {first.bo(n).addr for n in range(len(first.bos))}
    assert {buffer.address for buffer in layout.buffers.values()} <= addresses
    assert child.ask(("counter_moves",))


def test_only_bos_with_contents_get_a_dmabuf(host: Host) -> None:
    child = host.spawn(target)
    child.hear()
    with held(child.pid, host.paths) as file:
        found = raw.dump(file)
    for n, contents in enumerate(found.contents):
        assert (contents is not None) == raw.has_contents(found.bo(n))


def test_process_info_pid_is_the_targets(host: Host) -> None:
    child = host.spawn(idle)
    child.hear()
    with held(child.pid, host.paths) as file:
        assert raw.process_info(file).pid == child.pid
        raw.unpause(file)
