"""The typed ioctls: what the kernel is given, and what of its answer comes back."""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Callable

import pytest

from migrate.kfd import ioctl, uapi
from migrate.kfd.usermem import read_memory, write_memory
from tests.unit.kfd_double import GPU, KfdDouble


class Kernel(KfdDouble):
    """Answers one ioctl by a function of its struct."""

    def __init__(self, request: int, answer: Callable[[int], None]) -> None:
        super().__init__()
        self.request = request
        self.answer = answer

    def ioctl(self, request: int, arg: ctypes.Structure) -> None:
        if request != self.request:
            raise OSError(errno.ENOTTY, "not the ioctl that was expected")
        self.answer(ctypes.addressof(arg))


def test_apertures_are_counted_then_fetched() -> None:
    def answer(address: int) -> None:
        args = uapi.kfd_ioctl_get_process_apertures_new_args.from_address(address)
        if not args.num_of_nodes:
            args.num_of_nodes = 2
            return
        one = uapi.kfd_process_device_apertures(gpu_id=GPU, gpuvm_base=0x4000)
        write_memory(args.kfd_process_device_apertures_ptr, bytes(one))
        args.num_of_nodes = 1  # one of them went away

    kernel = Kernel(uapi.AMDKFD_IOC_GET_PROCESS_APERTURES_NEW, answer)
    (only,) = ioctl.get_process_apertures(kernel)
    assert (only.gpu_id, only.gpuvm_base) == (GPU, 0x4000)


@pytest.mark.parametrize(
    ("request_number", "call"),
    [
        (uapi.AMDKFD_IOC_MAP_MEMORY_TO_GPU, ioctl.map_memory),
        (uapi.AMDKFD_IOC_UNMAP_MEMORY_FROM_GPU, ioctl.unmap_memory),
    ],
)
def test_gpu_ids_are_an_array(
    request_number: int, call: Callable[[KfdDouble, int, list[int]], None]
) -> None:
    seen: list[bytes] = []

    def answer(address: int) -> None:
        args = uapi.kfd_ioctl_map_memory_to_gpu_args.from_address(address)
        assert args.handle == 9
        seen.append(read_memory(args.device_ids_array_ptr, 4 * args.n_devices))

    call(Kernel(request_number, answer), 9, [GPU, 7])
    assert seen == [bytes((ctypes.c_uint32 * 2)(GPU, 7))]


def test_a_userptr_gives_its_cpu_address_where_the_offset_comes_back() -> None:
    def answer(address: int) -> None:
        args = uapi.kfd_ioctl_alloc_memory_of_gpu_args.from_address(address)
        assert args.mmap_offset == 0x7000
        args.handle, args.mmap_offset = uapi.MAKE_HANDLE(GPU, 3), 0

    kernel = Kernel(uapi.AMDKFD_IOC_ALLOC_MEMORY_OF_GPU, answer)
    flags = uapi.KFD_IOC_ALLOC_MEM_FLAGS_USERPTR
    bo = ioctl.alloc_memory(kernel, GPU, 0x10000, 4096, flags, cpu_address=0x7000)
    assert bo == (uapi.MAKE_HANDLE(GPU, 3), 0)


@pytest.mark.parametrize(
    ("result", "signalled"),
    [(uapi.KFD_IOC_WAIT_RESULT_COMPLETE, True), (uapi.KFD_IOC_WAIT_RESULT_TIMEOUT, False)],
)
def test_waiting(result: int, signalled: bool) -> None:
    seen: list[int] = []

    def answer(address: int) -> None:
        args = uapi.kfd_ioctl_wait_events_args.from_address(address)
        array = (uapi.kfd_event_data * args.num_events).from_address(args.events_ptr)
        seen.extend(item.event_id for item in array)
        assert (args.wait_for_all, args.timeout) == (0, 20)
        args.wait_result = result

    kernel = Kernel(uapi.AMDKFD_IOC_WAIT_EVENTS, answer)
    assert ioctl.wait_events(kernel, [4, 5], wait_for_all=False, timeout=20) is signalled
    assert seen == [4, 5]


def test_svm_attributes_follow_the_struct_and_count_in_the_request() -> None:
    def answer(address: int) -> None:
        args = uapi.kfd_ioctl_svm_args.from_address(address)
        assert (args.start_addr, args.size, args.nattr) == (0x1000, 0x2000, 2)
        array = (uapi.kfd_ioctl_svm_attribute * 2).from_address(address + ctypes.sizeof(args))
        assert (array[0].type, array[0].value) == (5, 1)
        array[1].value = 8

    kernel = Kernel(0xC0284B20, answer)  # 24 bytes and two attributes of 8: size 0x28
    got = ioctl.svm(kernel, uapi.KFD_IOCTL_SVM_OP_GET_ATTR, 0x1000, 0x2000, [(5, 1), (7, 0)])
    assert got == ((5, 1), (7, 8))


def test_more_svm_attributes_than_a_request_has_room_for() -> None:
    kernel = Kernel(0, lambda _: None)
    with pytest.raises(OSError, match="2045 attributes") as caught:
        ioctl.svm(kernel, uapi.KFD_IOCTL_SVM_OP_GET_ATTR, 0x1000, 0x1000, [(0, 0)] * 2045)
    assert caught.value.errno == errno.EINVAL


def test_the_kernels_errno_passes_through() -> None:
    with pytest.raises(OSError, match="expected") as caught:
        ioctl.get_version(Kernel(0, lambda _: None))
    assert caught.value.errno == errno.ENOTTY
