"""What only the simulated node has: drills, its own options, its own protocol."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrate.errors import FrameRejected
from migrate.kfd import uapi
from migrate.kfd.file import open_device
from migrate.kfd.sim import transport
from migrate.kfd.sim.aql import HEADER_BARRIER, PACKET_SIZE, PacketType, barrier_and_packet
from migrate.kfd.sim.faults import Fault
from migrate.kfd.sim.opcodes import CounterKernargs, DelayKernargs, Opcode
from migrate.kfd.sysfs import read_topology
from tests.conformance import image as raw
from tests.conformance.hosts import DEADLINE, Host, Link, simulated_host
from tests.conformance.kit import PAGE, RING, Process
from tests.conformance.target import stays, target, wait_until
from tests.conformance.test_restore import frozen
from tests.conformance.tracer import held


@pytest.fixture(scope="module")
def _node() -> Iterator[Host]:
    with simulated_host("--allow-unprivileged", "--kfd-minor", "12") as host:
        yield host


@pytest.fixture
def node(_node: Host) -> Iterator[Host]:
    yield _node
    _node.end_children()


# ---------------------------------------------------------------- packets


def _barrier(link: Link) -> list[object]:
    p = Process(link.paths)
    p.prepare_queues()
    gpu = p.gpu_ids[0]
    waiting, helper = p.create_queue(gpu, 0), p.create_queue(gpu, 1)
    signal = p.signal(1)
    packet = barrier_and_packet(header=PacketType.BARRIER_AND | HEADER_BARRIER)
    packet.dep_signal[2] = signal
    waiting.ring.write(0, bytes(packet))
    p.pointers.word(1, 1)
    waiting.ring_doorbell(1)
    blocked = stays(lambda: waiting.read_index)
    helper.submit(Opcode.NOP, None, signal)
    return [blocked, wait_until(lambda: waiting.read_index == 1)]


def test_a_barrier_waits_for_its_signals(node: Host) -> None:
    assert node.run(_barrier) == [True, True]


def _illegal(link: Link) -> list[int]:
    p = Process(link.paths)
    p.prepare_queues()
    gpu = p.gpu_ids[0]
    queue, other = p.create_queue(gpu, 0), p.create_queue(gpu, 1)
    event = p.create_event(uapi.KFD_IOC_EVENT_HW_EXCEPTION)
    queue.submit(0xBAD, None)
    result = p.wait([event])
    other.submit(Opcode.NOP, None)
    assert wait_until(lambda: other.read_index == 1)
    return [result, queue.read_index]


def test_an_illegal_instruction_stops_its_queue_only(node: Host) -> None:
    assert node.run(_illegal) == [uapi.KFD_IOC_WAIT_RESULT_COMPLETE, 0]


def _wrap(link: Link) -> int:
    p = Process(link.paths)
    p.prepare_queues()
    queue = p.create_queue(p.gpu_ids[0], 0)
    count = 3 * RING // PACKET_SIZE
    for index in range(count):
        assert wait_until(lambda: queue.write_index - queue.read_index < RING // PACKET_SIZE)
        queue.submit(Opcode.NOP, None)
        assert queue.write_index == index + 1
    return count if wait_until(lambda: queue.read_index == count) else -1


def test_a_ring_wraps(node: Host) -> None:
    assert node.run(_wrap) == 3 * RING // PACKET_SIZE


def _without_save_area(link: Link) -> list[int]:
    p = Process(link.paths)
    p.prepare_queues()
    gpu = p.gpu_ids[0]
    ring = p.alloc(gpu, RING, p.pointers.flags)
    args = p.queue_args(gpu, ring, 0)
    args.ctx_save_restore_address = args.ctl_stack_size = 0
    p.kfd.ioctl(uapi.AMDKFD_IOC_CREATE_QUEUE, args)
    from tests.conformance.kit import DOORBELL_SLICE, Queue  # noqa: PLC0415

    offset = args.doorbell_offset & ~(DOORBELL_SLICE - 1)
    p.doorbells[gpu] = p.kfd.mmap(offset, DOORBELL_SLICE)
    counter = p.start_counter(Queue(p, gpu, ring, args), gpu)
    assert wait_until(lambda: counter.word(0) > 0)
    return [raw.errno_of(p.kfd, op) for op in (0, uapi.KFD_CRIU_OP_UNPAUSE)]


def test_a_wave_that_can_not_be_saved_hangs_the_scheduler() -> None:
    with simulated_host("--allow-unprivileged") as host:
        assert host.run(_without_save_area) == [errno.ETIME, errno.EINVAL]


def _delayed(link: Link) -> None:
    p = Process(link.paths)
    p.prepare_queues()
    queue = p.create_queue(p.gpu_ids[0], 0)
    queue.submit(Opcode.DELAY, DelayKernargs(3_600_000_000))
    link.say()
    link.hear()


def test_a_delay_is_evicted_at_once_and_its_rest_travels(node: Host) -> None:
    from migrate.kfd import privdata  # noqa: PLC0415

    child = node.spawn(_delayed)
    child.hear()

    def stack() -> bytes:
        image = frozen(node, child)
        found = privdata.decode(
            image.priv_data, len(image.devices), len(image.bos), image.num_objects
        )
        with held(child.pid, node.paths) as file:
            raw.unpause(file)
        return found.queues[0].ctl_stack

    assert wait_until(lambda: b"WAVE" in stack())


# ---------------------------------------------------------------- dmabufs


def _import(link: Link, elsewhere: bool) -> list[int]:
    p = Process(link.paths)
    p.prepare_queues()
    gpu = p.gpu_ids[0]
    source = p.alloc(gpu, PAGE)
    export = uapi.kfd_ioctl_export_dmabuf_args(handle=source.handle, flags=os.O_CLOEXEC)
    p.kfd.ioctl(uapi.AMDKFD_IOC_EXPORT_DMABUF, export)
    info = uapi.kfd_ioctl_get_dmabuf_info_args(dmabuf_fd=export.dmabuf_fd)
    p.kfd.ioctl(uapi.AMDKFD_IOC_GET_DMABUF_INFO, info)
    address = 0x700000000
    importer = p.gpu_ids[int(elsewhere)]
    args = uapi.kfd_ioctl_import_dmabuf_args(
        va_addr=address, gpu_id=importer, dmabuf_fd=export.dmabuf_fd
    )
    p.kfd.ioctl(uapi.AMDKFD_IOC_IMPORT_DMABUF, args)
    imported = type(source)(args.handle, address, PAGE, 0, 0)
    p.map(imported, [importer])
    queue = p.create_queue(importer, 0)
    queue.submit(Opcode.COUNTER, CounterKernargs(address, address + 8, 0))
    moved = wait_until(lambda: source.word(0) > 0)
    source.word(1, 1)
    os.close(export.dmabuf_fd)
    again = p.render[gpu].mmap(source.mmap_offset, PAGE)
    again.close()
    return [int(info.size), int(info.gpu_id) - gpu, int(moved)]


@pytest.mark.parametrize("elsewhere", [False, True])
def test_an_imported_dmabuf_is_the_same_memory(node: Host, elsewhere: bool) -> None:
    """Also on another GPU: the node has interface 1.12."""
    assert node.run(_import, elsewhere) == [PAGE, 0, 1]


# ---------------------------------------------------------------- VRAM that stays populated


def _dmabuf(p: Process, handle: int) -> int:
    export = uapi.kfd_ioctl_export_dmabuf_args(handle=handle, flags=os.O_CLOEXEC)
    p.kfd.ioctl(uapi.AMDKFD_IOC_EXPORT_DMABUF, export)
    return int(export.dmabuf_fd)


def _vram_again(link: Link, sizes: list[int], hold: int) -> list[tuple[int, bytes, bool]]:
    """Of each BO, written full and freed before the next: bytes populated, what its last bytes
    were, and whether it is the one *hold*, whose dmabuf is kept."""
    p = Process(link.paths)
    found, kept = [], -1
    for number, size in enumerate(sizes):
        bo = p.alloc(p.gpu_ids[0], size, gpus=[])
        fd = _dmabuf(p, bo.handle)
        status = os.fstat(fd)
        same = kept >= 0 and os.fstat(kept).st_ino == status.st_ino
        populated = status.st_blocks * 512
        found.append((populated, bo.read(size - 4, 4), same))
        bo.write(0, b"used" * (size // 4))
        assert bo.memory is not None
        bo.memory.close()
        if number == hold:
            kept = fd
        else:
            os.close(fd)
        p.free(bo)
    if kept >= 0:
        assert os.pread(kept, 4, 0) == b"used"
        os.close(kept)
    return found


def test_freed_vram_stays_populated_and_is_zero_up_to_the_limit() -> None:
    mib = 1 << 20
    new, again = (0, bytes(4), False), (mib, bytes(4), False)
    with simulated_host("--kfd-minor", "12", "--populated", str(4 * mib)) as host:
        assert host.run(_vram_again, [mib, mib, 8 * mib, mib], -1) == [new, again, new, new]


def test_vram_that_somebody_holds_is_not_given_to_another_bo() -> None:
    mib = 1 << 20
    new, again = (0, bytes(4), False), (mib, bytes(4), False)
    with simulated_host("--kfd-minor", "12", "--populated", str(4 * mib)) as host:
        assert host.run(_vram_again, [mib, mib, mib], 0) == [new, new, again]


def test_vram_is_given_back_where_nothing_is_said(node: Host) -> None:
    new = (0, bytes(4), False)
    assert node.run(_vram_again, [1 << 20, 1 << 20], -1) == [new, new]


# ---------------------------------------------------------------- drills and options


def test_a_stalled_process_info_lets_others_work(node: Host) -> None:
    child, other = node.spawn(target), node.spawn(target)
    child.hear()
    other.hear()
    node.arm(Fault.PROCESS_INFO_STALL, 0.5)
    stalled = node.spawn(_pause, child.pid)
    assert other.ask(("add",)) == 7
    assert stalled.hear() >= 0.5


def _pause(link: Link, pid: int) -> float:
    with held(pid, link.paths) as file:
        start = time.monotonic()
        raw.process_info(file)
        spent = time.monotonic() - start
        raw.unpause(file)
    return spent


def test_two_hosts_have_other_gpu_ids() -> None:
    with simulated_host("--slot-offset", "1") as one, simulated_host("--slot-offset", "2") as two:
        assert not set(one.gpu_ids) & set(two.gpu_ids)


def _visible(link: Link) -> int:
    link.hear()
    process = Process(link.paths, acquire=False)
    args = uapi.kfd_ioctl_get_process_apertures_new_args()
    process.kfd.ioctl(uapi.AMDKFD_IOC_GET_PROCESS_APERTURES_NEW, args)
    return int(args.num_of_nodes)


def test_a_device_file_hides_gpus_from_a_process(node: Host) -> None:
    child = node.spawn(_visible)
    folder = Path(node.paths.run) / "devices"
    folder.mkdir(exist_ok=True)
    (folder / str(child.pid)).write_text("129\n")
    child.say()
    assert child.hear() == 1


def test_vram_use_is_in_sysfs(node: Host) -> None:
    child = node.spawn(target)
    child.hear()
    minor = read_topology(node.paths.kfd_sysfs).gpus[0].drm_render_minor
    used = Path(node.paths.drm_sysfs) / f"renderD{minor}" / "device" / "mem_info_vram_used"
    before = int(used.read_text())
    child.ask(("alloc_vram", 1 << 20))
    assert int(used.read_text()) == before + (1 << 20)
    child.kill()
    assert wait_until(lambda: int(used.read_text()) < before)


def test_a_node_ends_with_its_parent_and_clients_see_enodev(tmp_path: Path) -> None:
    read, write = os.pipe()
    command = [sys.executable, "-m", "migrate.kfd.sim", "--root", str(tmp_path)]
    node = subprocess.Popen(
        [*command, "--profile", "mi210x2", "--parent-fd", str(read)],
        pass_fds=[read],
        stdout=subprocess.PIPE,
    )
    assert node.stdout is not None
    assert node.stdout.readline() == b"READY\n"
    os.close(read)
    kfd = open_device(str(tmp_path / "kfd"))
    os.close(write)
    assert node.wait(DEADLINE) == 0
    node.stdout.close()
    with pytest.raises(OSError, match="gone") as failure:
        kfd.ioctl(uapi.AMDKFD_IOC_GET_VERSION, uapi.kfd_ioctl_get_version_args())
    assert failure.value.errno == errno.ENODEV
    kfd.close()
    assert not (tmp_path / "kfd").exists()


def test_an_unknown_profile_is_told(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "migrate.kfd.sim", "--root", tmp_path, "--profile", "no"],
        capture_output=True,
        check=False,
    )
    assert done.returncode == 2
    assert b"mi210x2" in done.stderr


# ---------------------------------------------------------------- the protocol


def test_garbage_ends_the_connection_and_nothing_else(node: Host) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as rude:
        rude.connect(node.paths.kfd)
        rude.send(b"hello")
        rude.settimeout(DEADLINE)
        assert rude.recv(1) == b""
    child = node.spawn(target)
    child.hear()
    assert child.ask(("add",)) == 7


@pytest.mark.parametrize("size", [0, 100, transport.INLINE, transport.INLINE + 1, 1 << 20])
@pytest.mark.parametrize("count", [0, 1, transport.FDS_PER_PACKET + 1])
def test_messages_arrive_whole(size: int, count: int) -> None:
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with left, right:
        payload = os.urandom(size)
        transport.send_message(left, payload, [left.fileno()] * count)
        got, fds = transport.receive_message(right)
        assert got == payload
        assert len(fds) == count
        for fd in fds:
            assert not os.get_inheritable(fd)
            os.close(fd)


def test_a_message_that_is_none_is_rejected() -> None:
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with left, right:
        left.send(b"x" * 64)
        with pytest.raises(FrameRejected):
            transport.receive_message(right)
        left.shutdown(socket.SHUT_WR)
        with pytest.raises(ConnectionResetError):
            transport.receive_message(right)


# ---------------------------------------------------------------- many objects


def _many(link: Link, count: int) -> list[int]:
    p = Process(link.paths)
    p.prepare_queues()
    gpu = p.gpu_ids[0]
    for _ in range(count):
        p.alloc(gpu, PAGE, gpus=[gpu], mapped=False)
    link.say()
    link.hear()
    return []


def test_more_bos_than_fds_fit_into_one_message(node: Host) -> None:
    """Several packets of fds, and a payload in a memfd."""
    count = 3 * transport.FDS_PER_PACKET
    child = node.spawn(_many, count)
    child.hear()
    with held(child.pid, node.paths) as file:
        image = raw.dump(file)
    assert sum(contents is not None for contents in image.contents) == count + 5
