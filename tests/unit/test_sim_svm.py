"""SVM ranges of the simulated node; and a process that has some is refused."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Iterator

import pytest

from migrate.engine.seam import Survey
from migrate.errors import SvmUnsupported
from migrate.kfd import uapi
from migrate.kfd.file import map_file
from migrate.kfd.process import KfdProcess
from migrate.model import ProcessRef
from migrate.orchestrator import preflight
from migrate.orchestrator.objects import ObjectTable, private_data, refuse_svm
from migrate.orchestrator.plan import Options
from tests.conformance import image as raw
from tests.conformance.hosts import Child, Host, Link, simulated_host
from tests.conformance.image import Image
from tests.conformance.kit import PAGE, Process
from tests.conformance.target import open_nodes
from tests.conformance.test_restore import run_resume
from tests.conformance.test_surprises import decoded
from tests.conformance.tracer import held

PREFERRED = uapi.KFD_IOCTL_SVM_ATTR_PREFERRED_LOC
ACCESS, NO_ACCESS = uapi.KFD_IOCTL_SVM_ATTR_ACCESS, uapi.KFD_IOCTL_SVM_ATTR_NO_ACCESS
FIRST = 0x7E0000000  # page number of the ranges: free in every process here
PAGES = 8
Range = tuple[int, int, dict[int, int]]  # first page, pages, attributes


class SvmArgs(ctypes.Structure):
    _fields_ = (
        ("head", uapi.kfd_ioctl_svm_args),
        ("attrs", uapi.kfd_ioctl_svm_attribute * 2),
    )


REQUEST = uapi.AMDKFD_IOC_SVM + (ctypes.sizeof(uapi.kfd_ioctl_svm_attribute * 2) << 16)


@pytest.fixture(scope="module")
def _node() -> Iterator[Host]:
    with simulated_host("--allow-unprivileged", "--svm") as host:
        yield host


@pytest.fixture
def node(_node: Host) -> Iterator[Host]:
    yield _node
    _node.end_children()


def map_pages() -> None:
    """PAGES pages of this process at page FIRST; they stay."""
    memory = os.memfd_create("svm", os.MFD_CLOEXEC)
    os.ftruncate(memory, PAGES * PAGE)
    map_file(memory, 0, PAGES * PAGE, FIRST * PAGE)
    os.close(memory)


def set_range(p: Process, first: int, pages: int, location: int) -> int:
    """errno of SET_ATTR: a preferred location, and access by the first GPU."""
    head = uapi.kfd_ioctl_svm_args(start_addr=first * PAGE, size=pages * PAGE, nattr=2)
    args = SvmArgs(head)
    args.attrs[0] = uapi.kfd_ioctl_svm_attribute(PREFERRED, location)
    args.attrs[1] = uapi.kfd_ioctl_svm_attribute(ACCESS, p.gpu_ids[0])
    try:
        p.kfd.ioctl(REQUEST, args)
    except OSError as error:
        return error.errno or -1
    return 0


def with_ranges(link: Link) -> None:
    """A process with SVM ranges; unmaps their last page when it is told to."""
    p = Process(link.paths)
    map_pages()
    gpu = p.gpu_ids[0]
    errnos = [
        set_range(p, FIRST, PAGES, 0),
        set_range(p, FIRST + 2, 2, gpu),  # splits it
        set_range(p, FIRST + 2, 1, gpu),  # changes nothing
        set_range(p, FIRST, PAGES + 1, 0),  # not all mapped
        set_range(p, FIRST, 1, 0xFFFF),  # no such GPU
    ]
    link.say(errnos)
    link.hear()
    ctypes.CDLL(None).munmap(ctypes.c_void_p((FIRST + PAGES - 1) * PAGE), mmap.PAGESIZE)
    link.say()
    link.hear()


def ranges_of(host: Host, child: Child) -> tuple[list[Range], Image]:
    with held(child.pid, host.paths) as file:
        image = raw.dump(file)
    found = decoded(image).svm_ranges
    return [(r.start_addr - FIRST, r.size, dict(r.attributes)) for r in found], image


def test_ranges_are_split_trimmed_and_told(node: Host) -> None:
    child = node.spawn(with_ranges)
    assert child.hear() == [0, 0, 0, errno.EFAULT, errno.EINVAL]
    gpu, other = node.gpu_ids
    found, _ = ranges_of(node, child)
    assert [(first, pages) for first, pages, _ in found] == [(0, 2), (2, 2), (4, 4)]
    assert [attributes[PREFERRED] for _, _, attributes in found] == [0, gpu, 0]
    assert all(a[ACCESS] == gpu and a[NO_ACCESS] == other for _, _, a in found)
    child.ask()
    found, _ = ranges_of(node, child)
    assert [(first, pages) for first, pages, _ in found] == [(0, 2), (2, 2), (4, 3)]


def _restored(link: Link, image: Image) -> None:
    process, fds = open_nodes(link, image)
    map_pages()
    raw.restore(process.kfd, image, fds).close()
    link.say()
    link.hear()


def test_ranges_come_back_with_resume(node: Host) -> None:
    child = node.spawn(with_ranges)
    child.hear()
    before, image = ranges_of(node, child)
    child.kill()
    copy = node.spawn(_restored, image)
    copy.hear()
    assert run_resume(node, copy.pid) == 0
    assert ranges_of(node, copy)[0] == before


def test_a_process_with_svm_ranges_is_refused(node: Host) -> None:
    """Before anything is touched, and in every round."""
    child = node.spawn(with_ranges)
    child.hear()
    with held(child.pid, node.paths) as file:
        process = KfdProcess(file, child.pid)
        process.process_info()
        with process.checkpoint() as found:
            checkpoint = found.checkpoint
        process.unpause()
    survey = Survey(
        process=ProcessRef(pid=child.pid, start_time=1, boot_id=""),
        command=("x",),
        uid=0,
        kfd_processes=(child.pid,),
        cpu_bytes=0,
    )
    with pytest.raises(SvmUnsupported, match=f"3 SVM ranges, the first at {FIRST * PAGE:#x}"):
        refuse_svm(private_data(checkpoint))
    assert preflight.needs(survey, [checkpoint], Options()).processes  # the rest is asked, too
    with pytest.raises(SvmUnsupported):
        ObjectTable().bos(0, checkpoint)


def _svm_errno(link: Link) -> int:
    p = Process(link.paths)
    map_pages()
    return set_range(p, FIRST, 1, 0)


def test_without_the_switch_it_is_a_kernel_without_svm() -> None:
    with simulated_host("--allow-unprivileged") as plain:
        assert plain.run(_svm_errno) == errno.EPERM
