"""The five CRIU operations: values, guards, errors, and no fd left anywhere."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from migrate.errors import (
    BrokenPrivateData,
    CheckpointFailed,
    GpuWithoutVm,
    KfdUnavailable,
    MigrateError,
    MissingCapability,
    NotKfdProcess,
    ObjectsChanged,
    ProcessExited,
    RestoreFailed,
    SchedulerHang,
)
from migrate.kfd import uapi
from migrate.kfd.checkpoint import check_checkpoint
from migrate.kfd.guards import gpus_without_vm, identify, refuse_gpus_without_vm, render_minor
from migrate.kfd.privdata import QueueRecord, encode
from migrate.kfd.process import (
    BoBucket,
    DeviceBucket,
    KfdCheckpoint,
    KfdProcess,
    RestoreProof,
    resume,
)
from migrate.model import HostPaths
from tests.unit.kfd_double import GPU, PAGE, KfdDouble, private

INFO, CHECKPOINT, UNPAUSE = (
    uapi.KFD_CRIU_OP_PROCESS_INFO,
    uapi.KFD_CRIU_OP_CHECKPOINT,
    uapi.KFD_CRIU_OP_UNPAUSE,
)
RESTORE, RESUME = uapi.KFD_CRIU_OP_RESTORE, uapi.KFD_CRIU_OP_RESUME
OLD, NEW = GPU + 1, GPU + 2  # actual ids at the source and at the destination
MINORS = {NEW: 128}


@pytest.fixture
def node() -> Iterator[KfdDouble]:
    double = KfdDouble()
    yield double
    for fd in double.handed_out:
        assert not is_open(fd), "a dmabuf was left open"


@pytest.fixture
def process(node: KfdDouble) -> KfdProcess:
    return KfdProcess(node, os.getpid())


@pytest.fixture
def render_node(tmp_path: Path) -> Iterator[int]:
    with connected(tmp_path / "renderD128") as file:
        yield file.fileno()


class connected:
    """A client connected to a listening socket at *path*, as a simulated node has them."""

    def __init__(self, path: Path) -> None:
        self.server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.server.bind(str(path))
        self.server.listen()
        self.client = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.client.connect(str(path))

    def __enter__(self) -> socket.socket:
        return self.client

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self.server.close()


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def a_checkpoint() -> KfdCheckpoint:
    process = KfdProcess(KfdDouble(), os.getpid())
    process.process_info()
    with process.checkpoint() as got:
        return got.checkpoint


# ---------------------------------------------------------------- dump


def test_dump(node: KfdDouble, process: KfdProcess) -> None:
    counts = process.process_info()
    assert (counts.num_devices, counts.num_bos, counts.num_objects, counts.pid) == (1, 2, 1, 77)
    with process.checkpoint() as got:
        vram, userptr = got.checkpoint.bos
        assert vram.is_vram
        assert vram.has_contents
        assert userptr.is_userptr
        assert not userptr.has_contents
        assert got.checkpoint.devices == (DeviceBucket(user_gpu_id=GPU, actual_gpu_id=OLD),)
        assert got.checkpoint.private() == private()
        assert got.dmabufs == [node.handed_out[0], None]
        assert not os.get_inheritable(node.handed_out[0])
    process.unpause()
    assert node.calls == [INFO, CHECKPOINT, UNPAUSE]
    assert not process.is_paused


def test_a_checkpoint_survives_the_wire() -> None:
    checkpoint = a_checkpoint()
    wire = msgspec.msgpack.encode(checkpoint)
    assert msgspec.msgpack.decode(wire, type=KfdCheckpoint) == checkpoint


def test_a_process_without_bos(node: KfdDouble, process: KfdProcess) -> None:
    node.private = private(num_bos=0)
    process.process_info()
    with process.checkpoint() as got:
        assert got.dmabufs == []
    process.unpause()


def test_a_pause_is_never_nested(node: KfdDouble, process: KfdProcess) -> None:
    process.process_info()
    with pytest.raises(CheckpointFailed, match="paused already"):
        process.process_info()
    assert node.calls == [INFO]


def test_a_journaled_pause_counts_as_one(node: KfdDouble) -> None:
    process = KfdProcess(node, os.getpid(), paused=True)
    with pytest.raises(CheckpointFailed, match="paused already"):
        process.process_info()
    assert node.calls == []


def test_recovery_unpauses_only_what_is_paused(node: KfdDouble) -> None:
    node.paused = True
    assert KfdProcess(node, os.getpid(), paused=True).unpause_if_paused()
    assert not KfdProcess(node, os.getpid(), paused=True).unpause_if_paused()


def test_checkpoint_needs_a_pause_of_ours(node: KfdDouble, process: KfdProcess) -> None:
    with pytest.raises(CheckpointFailed, match="without PROCESS_INFO"):
        process.checkpoint()
    process.process_info()
    process.unpause()
    with pytest.raises(CheckpointFailed, match="without PROCESS_INFO"):
        process.checkpoint()


def test_objects_that_come_or_go_in_between(node: KfdDouble, process: KfdProcess) -> None:
    process.process_info()
    node.private = private(num_bos=1)
    with pytest.raises(ObjectsChanged, match="EINVAL"):
        process.checkpoint()
    process.unpause()


def test_a_failed_unpause_still_counts_as_paused(node: KfdDouble, process: KfdProcess) -> None:
    process.process_info()
    node.fail[UNPAUSE] = errno.EIO
    with pytest.raises(CheckpointFailed, match="UNPAUSE.*EIO"):
        process.unpause()
    assert process.is_paused


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.EACCES, MissingCapability),
        (errno.ENODEV, NotKfdProcess),
        (errno.ETIME, SchedulerHang),
        (errno.ENOTTY, KfdUnavailable),
        (errno.EBADF, CheckpointFailed),
        (errno.EIO, CheckpointFailed),
    ],
)
def test_errors_of_process_info(
    node: KfdDouble, process: KfdProcess, number: int, kind: type[MigrateError]
) -> None:
    node.fail[INFO] = number
    with pytest.raises(kind, match=f"PROCESS_INFO.*{errno.errorcode[number]}") as caught:
        process.process_info()
    assert type(caught.value) is kind
    assert not process.is_paused


def test_ebadf_of_a_process_that_is_gone(node: KfdDouble) -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    node.fail[INFO] = errno.EBADF
    with pytest.raises(ProcessExited):
        KfdProcess(node, child.pid).process_info()


def test_ebadf_of_a_zombie(node: KfdDouble) -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    node.fail[INFO] = errno.EBADF
    with pytest.raises(ProcessExited):
        KfdProcess(node, child.pid).process_info()
    child.wait()


def test_an_executor_that_is_gone(process: KfdProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    def ioctl(request: int, arg: object) -> None:
        raise ConnectionResetError("the executor is gone")

    monkeypatch.setattr(process.file, "ioctl", ioctl)
    with pytest.raises(CheckpointFailed, match="PROCESS_INFO.*executor is gone"):
        process.process_info()


@pytest.mark.parametrize("field", ["num_devices", "num_bos", "num_objects", "priv_data_size"])
def test_absurd_counts_are_not_allocated(node: KfdDouble, process: KfdProcess, field: str) -> None:
    counts = msgspec.structs.replace(process.process_info(), **{field: 2**32 - 1})
    process._counts = counts
    with pytest.raises(CheckpointFailed, match=field):
        process.checkpoint()
    assert node.calls == [INFO]
    process.unpause()


# ---------------------------------------------------------------- a GPU without a VM


def kfd_proc(tmp_path: Path, vram: dict[int, int], queues: tuple[int, ...] = ()) -> HostPaths:
    paths = HostPaths.under(tmp_path)
    folder = Path(paths.kfd_sysfs) / "proc" / str(os.getpid())
    (folder / "queues").mkdir(parents=True)
    (folder / "pasid").write_text("32770\n")
    for gpu_id, used in vram.items():
        (folder / f"vram_{gpu_id}").write_text(f"{used}\n")
    for number, gpu_id in enumerate(queues):
        (folder / "queues" / str(number)).mkdir()
        for name, value in (("gpuid", gpu_id), ("size", 4096), ("type", 0)):
            (folder / "queues" / str(number) / name).write_text(f"{value}\n")
    return paths


def test_signs_of_a_vm(tmp_path: Path, render_node: int) -> None:
    paths = kfd_proc(tmp_path, {1: 4096, 2: 0, 3: 0, 4: 0}, queues=(2,))
    assert gpus_without_vm(os.getpid(), paths, {3: 128, 4: 129}) == (4,)


def test_a_gpu_without_a_vm_is_refused_before_the_kernel_is_asked(
    node: KfdDouble, tmp_path: Path
) -> None:
    paths = kfd_proc(tmp_path, {GPU: 0})
    process = KfdProcess(
        node,
        os.getpid(),
        before_pause=lambda pid: refuse_gpus_without_vm(pid, paths, {GPU: 128}),
    )
    with pytest.raises(GpuWithoutVm, match=str(GPU)):
        process.process_info()
    assert node.calls == []


# ---------------------------------------------------------------- restore


def test_restore_and_resume(node: KfdDouble, process: KfdProcess, render_node: int) -> None:
    with process.restore(a_checkpoint(), {OLD: NEW}, {NEW: render_node}, MINORS) as restored:
        assert node.devices == [(GPU, NEW, render_node)]
        assert restored.restored_offsets == (5 * PAGE, 0)
        assert restored.dmabufs == [node.handed_out[0], None]
        assert not os.get_inheritable(node.handed_out[0])
        assert restored.proof.process == identify(os.getpid())
        assert resume(node, os.getpid(), restored.proof)
    assert node.calls == [RESTORE, RESUME]


def an_aql_ring() -> KfdCheckpoint:
    """The checkpoint with its first BO mapped twice, as memory of an AQL queue is."""
    checkpoint = a_checkpoint()
    ring, *others = checkpoint.bos
    flags = ring.alloc_flags | uapi.KFD_IOC_ALLOC_MEM_FLAGS_AQL_QUEUE_MEM
    ring = msgspec.structs.replace(ring, alloc_flags=flags)
    return msgspec.structs.replace(checkpoint, bos=(ring, *others))


def test_the_memory_of_an_aql_queue_is_not_halved(process: KfdProcess, render_node: int) -> None:
    with process.restore(an_aql_ring(), {OLD: NEW}, {NEW: render_node}, MINORS) as restored:
        assert restored.dmabufs[0] is not None
        assert os.fstat(restored.dmabufs[0]).st_size == PAGE


def test_a_bo_of_another_size_is_noticed(
    node: KfdDouble, process: KfdProcess, render_node: int
) -> None:
    node.halves_aql = False
    with pytest.raises(RestoreFailed, match=f"has {2 * PAGE} bytes, not {PAGE}"):
        process.restore(an_aql_ring(), {OLD: NEW}, {NEW: render_node}, MINORS)


def test_a_second_restore_never_reaches_the_kernel(
    node: KfdDouble, process: KfdProcess, render_node: int
) -> None:
    node.fail[RESTORE] = errno.EINVAL
    node.leave_fds_on_failure = True
    for complaint in ("EINVAL", "second time"):
        with pytest.raises(RestoreFailed, match=complaint):
            process.restore(a_checkpoint(), {OLD: NEW}, {NEW: render_node}, MINORS)
    assert node.calls == [RESTORE]


def test_a_restore_where_more_gpus_are_visible_says_so(
    node: KfdDouble, process: KfdProcess, render_node: int
) -> None:
    node.fail[RESTORE] = errno.EINVAL
    node.visible = 8
    with pytest.raises(RestoreFailed, match="8 GPUs are visible to it, 1 were"):
        process.restore(a_checkpoint(), {OLD: NEW}, {NEW: render_node}, MINORS)


def test_crossed_render_nodes_are_refused(
    node: KfdDouble, process: KfdProcess, render_node: int
) -> None:
    with pytest.raises(RestoreFailed, match="is renderD128, not renderD129"):
        process.restore(a_checkpoint(), {OLD: NEW}, {NEW: render_node}, {NEW: 129})
    assert node.calls == []


@pytest.mark.parametrize(
    ("gpu_map", "drm_fds", "complaint"),
    [
        ({}, {NEW: 0}, "not in the GPU map"),
        ({OLD: NEW}, {}, "no render node was opened"),
        ({OLD: NEW}, {NEW: 10**6}, "No such file"),
    ],
)
def test_gaps_in_maps_are_refused(
    node: KfdDouble,
    process: KfdProcess,
    gpu_map: dict[int, int],
    drm_fds: dict[int, int],
    complaint: str,
) -> None:
    with pytest.raises(RestoreFailed, match=complaint):
        process.restore(a_checkpoint(), gpu_map, drm_fds, MINORS)
    assert node.calls == []


def test_what_is_no_render_node_is_seen(render_node: int) -> None:
    read, write = os.pipe()
    with socket.socket(socket.AF_UNIX) as alone:
        fds = [read, alone.fileno(), render_node]
        assert [render_minor(os.getpid(), fd) for fd in fds] == [None, None, 128]
    os.close(read)
    os.close(write)


def replaced(bo: BoBucket, **changes: int) -> KfdCheckpoint:
    checkpoint = a_checkpoint()
    changed = msgspec.structs.replace(bo, **changes)
    return msgspec.structs.replace(checkpoint, bos=(changed, checkpoint.bos[1]))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"gpu_id": 5}, "GPU 5"),
        ({"size": 0}, "0 bytes"),
        ({"size": 4095}, "4095 bytes"),
        ({"size": 1 << 60}, "bytes"),
        ({"addr": 1 << 60}, "address space"),
        ({"addr": 1}, "address space"),
        ({"addr": -4096}, "address space"),
        ({"alloc_flags": 1 << 31}, "not one type of memory"),
        ({"alloc_flags": 3}, "not one type of memory"),
        ({"alloc_flags": 1 | 1 << 10}, "some are unknown"),
        ({"offset": 1 << 64}, "the offset"),
        ({"alloc_flags": 1 << 32 | 1}, "flags"),
    ],
)
def test_hostile_bos_never_reach_the_kernel(
    node: KfdDouble,
    process: KfdProcess,
    render_node: int,
    changes: dict[str, int],
    complaint: str,
) -> None:
    checkpoint = replaced(a_checkpoint().bos[0], **changes)
    with pytest.raises(BrokenPrivateData, match=complaint):
        process.restore(checkpoint, {OLD: NEW}, {NEW: render_node}, MINORS)
    assert node.calls == []


def with_private(**changes: object) -> KfdCheckpoint:
    good = a_checkpoint()
    changed = msgspec.structs.replace(private(), **changes)
    return msgspec.structs.replace(
        good, priv_data=encode(changed), num_objects=len(changed.objects)
    )


def a_queue(gpu_id: int) -> QueueRecord:
    numbers = dict.fromkeys(set(QueueRecord.__struct_fields__) - {"mqd", "ctl_stack"}, 0)
    plain = {"object_type": "queue", **numbers, "mqd": bytes(2048), "gpu_id": gpu_id}
    return msgspec.convert(plain, QueueRecord)


BO, EVENT = private().bos[0], private().events[0]


@pytest.mark.parametrize(
    ("devices", "complaint"),
    [
        ((), "no GPU"),
        ((0, OLD), "user_gpu_id 0"),
        ((GPU, 0), "actual_gpu_id 0"),
        ((2**32, OLD), "user_gpu_id 4294967296"),
        ((GPU, OLD, GPU, OLD + 1), "user_gpu_id 48879"),
        ((GPU, OLD, GPU + 1, OLD), "actual_gpu_id 48880"),
        ((1, 2) * 65, "65 devices"),
    ],
)
def test_hostile_gpu_ids_are_refused(devices: tuple[int, ...], complaint: str) -> None:
    buckets = tuple(
        DeviceBucket(user_gpu_id=user, actual_gpu_id=actual)
        for user, actual in zip(devices[::2], devices[1::2], strict=True)
    )
    with pytest.raises(BrokenPrivateData, match=complaint):
        check_checkpoint(msgspec.structs.replace(a_checkpoint(), devices=buckets))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"bos": (BO, BO)}, "BO 1 of GPU 48879 is given twice"),
        (
            {"bos": (msgspec.structs.replace(BO, mapped_gpuids=(7,)), private().bos[1])},
            "mapped to GPUs",
        ),
        ({"objects": (EVENT, EVENT)}, "event 1 is given twice"),
        ({"objects": (a_queue(GPU), a_queue(GPU))}, "queue 0 is given twice"),
        ({"objects": (a_queue(GPU + 9),)}, "queue 0 is of GPU"),
        ({"objects": (msgspec.structs.replace(EVENT, user_handle=GPU << 32 | 99),)}, "event page"),
    ],
)
def test_hostile_private_data_is_refused(changes: dict[str, object], complaint: str) -> None:
    with pytest.raises(BrokenPrivateData, match=complaint):
        check_checkpoint(with_private(**changes))


@pytest.mark.parametrize("num_objects", [-1, 2, 1 << 21])
def test_a_wrong_number_of_objects_is_refused(num_objects: int) -> None:
    with pytest.raises(BrokenPrivateData):
        check_checkpoint(msgspec.structs.replace(a_checkpoint(), num_objects=num_objects))


def test_what_is_whole_passes() -> None:
    assert check_checkpoint(a_checkpoint()) == private()
    page = msgspec.structs.replace(EVENT, user_handle=uapi.MAKE_HANDLE(GPU, 1))
    whole = with_private(objects=(a_queue(GPU), page))
    large = msgspec.structs.replace(whole.bos[0], size=uapi.KFD_SIGNAL_EVENT_LIMIT * 8)
    check_checkpoint(msgspec.structs.replace(whole, bos=(large, *whole.bos[1:])))
    # The kernel clears 32 KiB of it without asking how large it is.
    with pytest.raises(BrokenPrivateData, match="the event page has 4096 bytes"):
        check_checkpoint(whole)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"q_id": 1024}, "id"),
        ({"doorbell_id": 1024}, "doorbell"),
        ({"format": 2}, "format"),
        ({"gws": 2}, "global wave sync"),
        ({"priority": 16}, "priority"),
        ({"q_percent": 101}, "percentage"),
        ({"q_size": 1000}, "ring size"),
        ({"q_size": 1 << 32}, "ring size"),
        ({"q_address": 1 << 57, "q_size": 4096}, "ring"),
        ({"q_address": (1 << 64) - 4096, "q_size": 4096}, "ring"),
        ({"read_ptr_addr": 1 << 60}, "read pointer"),
        ({"write_ptr_addr": 3}, "write pointer"),
        ({"eop_ring_buffer_address": 1 << 57, "eop_ring_buffer_size": 1}, "EOP"),
        ({"ctx_save_restore_area_address": 1 << 63}, "save area"),
        ({"mqd": bytes(2044)}, "MQD"),
        ({"mqd": bytes(2050)}, "MQD"),
        ({"mqd": bytes((1 << 20) + 4)}, "MQD"),
        ({"type": 1, "mqd": bytes(508)}, "MQD"),
    ],
)
def test_a_queue_that_create_queue_would_refuse(changes: dict[str, object], complaint: str) -> None:
    queue = msgspec.structs.replace(a_queue(GPU), **changes)
    with pytest.raises(BrokenPrivateData, match=f"wrong {complaint}"):
        check_checkpoint(with_private(objects=(queue,)))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"type": uapi.KFD_IOC_EVENT_NODECHANGE}, "has the type"),
        ({"type": 1 << 31}, "has the type"),
        ({"type": uapi.KFD_IOC_EVENT_SIGNAL, "event_id": 4096}, "no slot"),
        ({"type": uapi.KFD_IOC_EVENT_DEBUG_EVENT, "event_id": 1 << 30}, "no slot"),
    ],
)
def test_an_event_that_create_event_would_refuse(
    changes: dict[str, object], complaint: str
) -> None:
    event = msgspec.structs.replace(EVENT, **changes)
    with pytest.raises(BrokenPrivateData, match=complaint):
        check_checkpoint(with_private(objects=(event,)))


# ---------------------------------------------------------------- resume


def test_resume_never_goes_to_another_process(node: KfdDouble) -> None:
    ours = identify(os.getpid())
    other = msgspec.structs.replace(ours, pid=ours.pid + 1)
    with pytest.raises(RestoreFailed, match="RESTORE was seen of"):
        resume(node, os.getpid(), RestoreProof(process=other))
    later = msgspec.structs.replace(ours, start_time=ours.start_time + 1)
    with pytest.raises(ProcessExited, match="another process"):
        resume(node, os.getpid(), RestoreProof(process=later))
    assert node.calls == []


def test_resume_of_a_process_that_is_gone(node: KfdDouble) -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    proof = RestoreProof(process=identify(child.pid))
    child.wait()
    with pytest.raises(ProcessExited, match="gone"):
        resume(node, child.pid, proof)
    assert node.calls == []


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.ESRCH, ProcessExited), (errno.ENOMEM, RestoreFailed)]
)
def test_errors_of_resume(node: KfdDouble, number: int, kind: type[MigrateError]) -> None:
    node.fail[RESUME] = number
    with pytest.raises(kind, match="RESUME"):
        resume(node, os.getpid(), RestoreProof(process=identify(os.getpid())))


def test_a_second_resume_says_so(node: KfdDouble) -> None:
    node.fail[RESUME] = errno.EINVAL
    assert not resume(node, os.getpid(), RestoreProof(process=identify(os.getpid())))
