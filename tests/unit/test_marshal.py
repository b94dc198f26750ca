"""Any KFD ioctl as a message: fds, pointers, bad pointers, hostile messages."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Iterator

import msgspec
import pytest

from migrate.errors import FrameRejected
from migrate.kfd import uapi
from migrate.kfd.marshal import Call, Reply, apply, close_all, execute, pack
from migrate.kfd.privdata import encode
from migrate.kfd.usermem import GuardedBuffer
from tests.unit.kfd_double import GPU, KfdDouble

CRIU = uapi.AMDKFD_IOC_CRIU_OP
BAD = 0x10  # an address in the page nobody maps


class Echo(KfdDouble):
    """Runs a function instead of an ioctl."""

    def __init__(self, function: object) -> None:
        super().__init__()
        self.function = function

    def ioctl(self, request: int, arg: ctypes.Structure) -> None:
        assert callable(self.function)
        self.function(arg)


@pytest.fixture
def node() -> KfdDouble:
    return KfdDouble()


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    close_all(list(ends))


def over_the_wire(call: Call) -> Call:
    return Call.decode(call.encode(), call.fds)


def run(node: KfdDouble, request: int, arg: ctypes.Structure) -> None:
    """A call packed, sent, executed elsewhere, and its reply sent back and applied."""
    reply = execute(over_the_wire(pack(request, arg)), node)
    apply(Reply.decode(reply.encode(), reply.fds), request, arg)


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def checkpoint_args(
    node: KfdDouble, devices: int, bos: int, priv_data: int
) -> uapi.kfd_ioctl_criu_args:
    args = uapi.kfd_ioctl_criu_args(op=uapi.KFD_CRIU_OP_PROCESS_INFO)
    run(node, CRIU, args)
    args.op, args.devices, args.bos, args.priv_data = (
        uapi.KFD_CRIU_OP_CHECKPOINT,
        devices,
        bos,
        priv_data,
    )
    return args


def test_checkpoint_through_nested_pointers_and_fds(node: KfdDouble) -> None:
    devices = (uapi.kfd_criu_device_bucket * 1)()
    bos = (uapi.kfd_criu_bo_bucket * 2)()
    priv_data = ctypes.create_string_buffer(len(encode(node.private)))
    pointers = [ctypes.addressof(x) for x in (devices, bos, priv_data)]
    args = checkpoint_args(node, *pointers)
    run(node, CRIU, args)
    assert [args.devices, args.bos, args.priv_data] == pointers
    assert devices[0].user_gpu_id == GPU
    assert priv_data.raw == encode(node.private)
    assert bos[0].dmabuf_fd == node.handed_out[0]
    assert bos[1].dmabuf_fd == uapi.KFD_INVALID_FD
    close_all(node.handed_out)


@pytest.mark.parametrize("bad", ["devices", "bos", "priv_data"])
def test_checkpoint_into_bad_memory_is_efault_and_leaks_no_fd(node: KfdDouble, bad: str) -> None:
    devices = (uapi.kfd_criu_device_bucket * 1)()
    bos = (uapi.kfd_criu_bo_bucket * 2)()
    priv_data = ctypes.create_string_buffer(len(encode(node.private)))
    args = checkpoint_args(node, *(ctypes.addressof(x) for x in (devices, bos, priv_data)))
    setattr(args, bad, BAD)
    with pytest.raises(OSError, match="Bad address") as caught:
        run(node, CRIU, args)
    assert caught.value.errno == errno.EFAULT
    assert not any(is_open(fd) for fd in node.handed_out)


def test_null_stays_null_and_a_pointer_to_nothing_does_not(node: KfdDouble) -> None:
    args = uapi.kfd_ioctl_criu_args(op=uapi.KFD_CRIU_OP_CHECKPOINT, bos=BAD, priv_data=BAD)
    call = pack(CRIU, args)
    seen: list[tuple[int, int, int]] = []

    def look(arg: ctypes.Structure) -> None:
        got = uapi.kfd_ioctl_criu_args.from_buffer_copy(arg)
        seen.append((got.devices, got.bos, got.priv_data))

    execute(over_the_wire(call), Echo(look))
    assert seen[0][0] == 0
    assert all(seen[0][1:])


def test_reading_bad_memory_is_efault() -> None:
    args = uapi.kfd_ioctl_map_memory_to_gpu_args(device_ids_array_ptr=BAD, n_devices=2)
    with pytest.raises(OSError, match="Bad address") as caught:
        pack(uapi.AMDKFD_IOC_MAP_MEMORY_TO_GPU, args)
    assert caught.value.errno == errno.EFAULT


def test_an_array_that_ends_where_memory_ends_is_read() -> None:
    with GuardedBuffer(8) as ids:
        ids.view[:] = struct.pack("<II", 3, 4)
        args = uapi.kfd_ioctl_map_memory_to_gpu_args(device_ids_array_ptr=ids.address, n_devices=2)
        call = pack(uapi.AMDKFD_IOC_MAP_MEMORY_TO_GPU, args)
        assert call.regions[0].data == struct.pack("<II", 3, 4)
        args.n_devices = 3
        with pytest.raises(OSError, match="Bad address"):
            pack(uapi.AMDKFD_IOC_MAP_MEMORY_TO_GPU, args)


def test_absurd_counts_are_refused_before_anything_is_allocated() -> None:
    args = uapi.kfd_ioctl_wait_events_args(events_ptr=BAD, num_events=2**32 - 1)
    with pytest.raises(OSError, match="too many") as caught:
        pack(uapi.AMDKFD_IOC_WAIT_EVENTS, args)
    assert caught.value.errno == errno.EINVAL


def test_an_fd_goes_in_and_the_callers_number_stays(pipe: tuple[int, int]) -> None:
    args = uapi.kfd_ioctl_acquire_vm_args(drm_fd=pipe[0], gpu_id=GPU)
    call = pack(uapi.AMDKFD_IOC_ACQUIRE_VM, args)
    assert call.fds == (pipe[0],)
    received = os.dup(pipe[0])
    seen: list[int] = []
    reply = execute(
        Call.decode(call.encode(), (received,)),
        Echo(lambda arg: seen.append(uapi.kfd_ioctl_acquire_vm_args.from_buffer_copy(arg).drm_fd)),
    )
    os.close(received)
    apply(reply, uapi.AMDKFD_IOC_ACQUIRE_VM, args)
    assert seen == [received]
    assert args.drm_fd == pipe[0]


def test_a_closed_fd_travels_as_invalid() -> None:
    ends = os.pipe()
    close_all(list(ends))
    args = uapi.kfd_ioctl_import_dmabuf_args(dmabuf_fd=ends[0])
    call = pack(uapi.AMDKFD_IOC_IMPORT_DMABUF, args)
    assert call.fds == ()
    got = uapi.kfd_ioctl_import_dmabuf_args.from_buffer_copy(call.arg)
    assert got.dmabuf_fd == uapi.KFD_INVALID_FD


def test_remote_fds_travel_as_numbers_where_they_are_allowed() -> None:
    args = uapi.kfd_ioctl_acquire_vm_args(drm_fd=12345, gpu_id=GPU)
    call = over_the_wire(pack(uapi.AMDKFD_IOC_ACQUIRE_VM, args, remote_fds=True))
    seen: list[int] = []
    node = Echo(
        lambda arg: seen.append(uapi.kfd_ioctl_acquire_vm_args.from_buffer_copy(arg).drm_fd)
    )
    with pytest.raises(FrameRejected, match="names fds"):
        execute(call, node)
    assert seen == []
    execute(call, node, remote_fds=True)
    assert seen == [12345]


def test_restore_reads_devices_and_writes_bos_back(node: KfdDouble, pipe: tuple[int, int]) -> None:
    devices = (uapi.kfd_criu_device_bucket * 1)(
        uapi.kfd_criu_device_bucket(GPU, GPU + 2, pipe[1], 0)
    )
    bos = (uapi.kfd_criu_bo_bucket * 2)()
    bos[0].alloc_flags = uapi.KFD_IOC_ALLOC_MEM_FLAGS_VRAM
    bos[0].dmabuf_fd = 0  # must never be taken for an fd
    priv_data = ctypes.create_string_buffer(encode(node.private), len(encode(node.private)))
    args = uapi.kfd_ioctl_criu_args(
        op=uapi.KFD_CRIU_OP_RESTORE,
        devices=ctypes.addressof(devices),
        bos=ctypes.addressof(bos),
        priv_data=ctypes.addressof(priv_data),
        priv_data_size=len(priv_data),
        num_devices=1,
        num_bos=2,
        num_objects=1,
    )
    run(node, CRIU, args)
    assert node.devices == [(GPU, GPU + 2, pipe[1])]
    assert bos[0].dmabuf_fd == node.handed_out[0]
    assert bos[0].restored_offset
    close_all(node.handed_out)


def test_a_failed_restore_leaves_no_fd_with_the_executor(node: KfdDouble) -> None:
    node.fail[uapi.KFD_CRIU_OP_RESTORE] = errno.EINVAL
    node.leave_fds_on_failure = True
    test = test_restore_reads_devices_and_writes_bos_back
    ends = os.pipe()
    with pytest.raises(OSError, match="Invalid argument"):
        test(node, ends)
    close_all(list(ends))
    assert node.handed_out
    assert not any(is_open(fd) for fd in node.handed_out)


def test_the_kernels_errno_and_its_out_fields_come_back() -> None:
    def fail(arg: ctypes.Structure) -> None:
        got = uapi.kfd_ioctl_map_memory_to_gpu_args.from_address(ctypes.addressof(arg))
        got.n_success = 1
        raise OSError(errno.ENOMEM, "")

    ids = (ctypes.c_uint32 * 2)(1, 2)
    args = uapi.kfd_ioctl_map_memory_to_gpu_args(
        device_ids_array_ptr=ctypes.addressof(ids), n_devices=2
    )
    with pytest.raises(OSError, match="memory") as caught:
        run(Echo(fail), uapi.AMDKFD_IOC_MAP_MEMORY_TO_GPU, args)
    assert caught.value.errno == errno.ENOMEM
    assert args.n_success == 1
    assert args.device_ids_array_ptr == ctypes.addressof(ids)


def test_svm_carries_its_attributes_by_the_size_in_the_request() -> None:
    class SvmArgs(ctypes.Structure):
        _fields_ = (
            ("head", uapi.kfd_ioctl_svm_args),
            ("attrs", uapi.kfd_ioctl_svm_attribute * 2),
        )

    args = SvmArgs(uapi.kfd_ioctl_svm_args(start_addr=1, size=2, nattr=2))
    args.attrs[1].value = 9
    request = uapi.AMDKFD_IOC_SVM + (16 << 16)

    def look(arg: ctypes.Structure) -> None:
        got = SvmArgs.from_address(ctypes.addressof(arg))
        got.attrs[0].value = got.attrs[1].value + 1

    run(Echo(look), request, args)
    assert args.attrs[0].value == 10


def test_wait_events_array_goes_both_ways() -> None:
    events = (uapi.kfd_event_data * 2)()
    events[1].event_id = 5

    def signal(arg: ctypes.Structure) -> None:
        got = uapi.kfd_ioctl_wait_events_args.from_address(ctypes.addressof(arg))
        array = (uapi.kfd_event_data * 2).from_address(got.events_ptr)
        assert array[1].event_id == 5
        array[0].memory_exception_data.va = 0x1234

    args = uapi.kfd_ioctl_wait_events_args(events_ptr=ctypes.addressof(events), num_events=2)
    run(Echo(signal), uapi.AMDKFD_IOC_WAIT_EVENTS, args)
    assert events[0].memory_exception_data.va == 0x1234


# ---------------------------------------------------------------- hostile messages


def a_call() -> bytes:
    ids = (ctypes.c_uint32 * 2)(1, 2)
    args = uapi.kfd_ioctl_map_memory_to_gpu_args(
        device_ids_array_ptr=ctypes.addressof(ids), n_devices=2
    )
    return pack(uapi.AMDKFD_IOC_MAP_MEMORY_TO_GPU, args).encode()


def test_every_truncation_and_extension_is_refused() -> None:
    wire = a_call()
    for length in range(len(wire)):
        with pytest.raises(FrameRejected):
            Call.decode(wire[:length])
    with pytest.raises(FrameRejected):
        Call.decode(wire + b"\0")


@pytest.mark.parametrize("at", [0, 4, 6, 16, 20, 24, 28 + 8, 28 + 16, 28 + 20])
def test_a_call_that_lies_about_itself_is_refused(at: int) -> None:
    wire = bytearray(a_call())
    wire[at] ^= 0x42
    with pytest.raises(FrameRejected):
        Call.decode(bytes(wire))


def test_more_or_fewer_fds_than_announced_are_refused() -> None:
    with pytest.raises(FrameRejected, match="fds"):
        Call.decode(a_call(), (0,))
    with pytest.raises(FrameRejected, match="fds"):
        Reply.decode(Reply(errno=0, arg=b"").encode(), (0,))


@pytest.mark.parametrize("index", [1, 7, 2**31])
def test_a_reply_that_names_an_fd_it_does_not_have_is_refused(index: int) -> None:
    fd = os.memfd_create("x")
    arg = bytes(uapi.kfd_ioctl_export_dmabuf_args(dmabuf_fd=index))
    args = uapi.kfd_ioctl_export_dmabuf_args()
    with pytest.raises(OSError, match="names fd"):
        apply(Reply(errno=0, arg=arg, fds=(fd,)), uapi.AMDKFD_IOC_EXPORT_DMABUF, args)
    assert not is_open(fd)


def test_a_reply_that_names_an_fd_twice_is_refused() -> None:
    bos = (uapi.kfd_criu_bo_bucket * 2)()
    args = uapi.kfd_ioctl_criu_args(
        op=uapi.KFD_CRIU_OP_CHECKPOINT, bos=ctypes.addressof(bos), num_bos=2
    )
    fd = os.memfd_create("x")
    with pytest.raises(OSError, match="names fd 0"):
        apply(Reply(errno=0, arg=bytes(args), regions=(bytes(bos),), fds=(fd,)), CRIU, args)
    assert not is_open(fd)


@pytest.mark.parametrize("remote_fds", [False, True])
def test_a_caller_can_not_have_an_fd_of_the_executor_closed(
    pipe: tuple[int, int], remote_fds: bool
) -> None:
    bos = (uapi.kfd_criu_bo_bucket * 1)(uapi.kfd_criu_bo_bucket(dmabuf_fd=pipe[0]))
    args = uapi.kfd_ioctl_criu_args(
        op=uapi.KFD_CRIU_OP_RESTORE, bos=ctypes.addressof(bos), num_bos=1
    )
    call = pack(CRIU, args)
    hostile = msgspec.structs.replace(
        call,
        remote_fds=remote_fds,
        regions=(msgspec.structs.replace(call.regions[0], data=bytes(bos)),),
    )

    def fail(arg: ctypes.Structure) -> None:
        raise OSError(errno.EINVAL, "")

    reply = execute(over_the_wire(hostile), Echo(fail), remote_fds=remote_fds)
    assert reply.errno == errno.EINVAL
    assert is_open(pipe[0])


def test_an_fd_that_no_field_names_is_closed() -> None:
    fds = tuple(os.memfd_create("x") for _ in range(2))
    arg = bytes(uapi.kfd_ioctl_export_dmabuf_args(dmabuf_fd=1))
    args = uapi.kfd_ioctl_export_dmabuf_args()
    apply(Reply(errno=0, arg=arg, fds=fds), uapi.AMDKFD_IOC_EXPORT_DMABUF, args)
    assert args.dmabuf_fd == fds[1]
    assert [is_open(fd) for fd in fds] == [False, True]
    os.close(fds[1])


def test_a_reply_of_the_wrong_shape_is_refused() -> None:
    events = (uapi.kfd_event_data * 1)()
    args = uapi.kfd_ioctl_wait_events_args(events_ptr=ctypes.addressof(events), num_events=1)
    reply = Reply(errno=0, arg=bytes(args), regions=(b"short",))
    with pytest.raises(OSError, match="does not fit") as caught:
        apply(reply, uapi.AMDKFD_IOC_WAIT_EVENTS, args)
    assert caught.value.errno == errno.EPROTO


# ---------------------------------------------------------------- memory


def test_guarded_buffer_ends_at_its_end() -> None:
    with GuardedBuffer(100) as buffer, GuardedBuffer(0) as empty:
        assert bytes(buffer.view) == bytes(100)
        assert empty.address
        arg = uapi.kfd_ioctl_wait_events_args(events_ptr=buffer.address, num_events=3)
        with pytest.raises(OSError, match="Bad address"):  # 144 bytes
            pack(uapi.AMDKFD_IOC_WAIT_EVENTS, arg)
        arg.num_events = 2
        assert pack(uapi.AMDKFD_IOC_WAIT_EVENTS, arg).regions[0].length == 96
