"""Two owners of one buffer: what an import shares, and how a checkpoint shows it."""

from __future__ import annotations

import os

import pytest

from migrate.kfd import uapi
from migrate.kfd.checkpoint import KfdCheckpoint
from migrate.kfd.file import steal_fd
from migrate.kfd.ioctl import import_dmabuf, map_memory
from migrate.kfd.process import KfdProcess
from tests.conformance import image as raw
from tests.conformance.hosts import Host, Link
from tests.conformance.image import INVALID, Buffers, Image
from tests.conformance.kit import PAGE, VRAM, WRITABLE, Buffer, Process, gpu_nodes
from tests.conformance.target import (
    ADDED,
    Layout,
    Target,
    adopt_restored,
    open_nodes,
    serve,
)
from tests.conformance.test_product import checkpointed
from tests.conformance.test_restore import run_resume
from tests.conformance.tracer import held

ADDRESS = 0x700000000


def _owner(link: Link) -> None:
    process = Process(link.paths)
    buffer = process.alloc(process.gpu_ids[0], PAGE)
    buffer.write(0, b"shared")
    link.say(buffer.mmap_offset)
    link.hear()


def _importer(link: Link, pid: int, fd: int) -> None:
    process = Process(link.paths)
    gpu = process.gpu_ids[0]
    stolen = steal_fd(pid, fd)
    import_dmabuf(process.kfd, gpu, ADDRESS, stolen)
    os.close(stolen)
    link.say()
    link.hear()


def _buffers(host: Host, pid: int) -> Buffers:
    with held(pid, host.paths) as file:
        counts = raw.process_info(file)
        try:
            found = Buffers(counts)
            raw.criu(file, uapi.KFD_CRIU_OP_CHECKPOINT, **found.fields)
        finally:
            raw.unpause(file)
    return found


def test_an_imported_buffer_has_the_offset_of_its_source(host: Host) -> None:
    owner = host.spawn(_owner)
    owner.hear()
    source = _buffers(host, owner.pid)
    (bucket,) = [b for b in source.bos if b.dmabuf_fd != INVALID]
    importer = host.spawn(_importer, os.getpid(), bucket.dmabuf_fd)
    importer.hear()
    copy = _buffers(host, importer.pid)
    (other,) = [b for b in copy.bos if b.dmabuf_fd != INVALID]
    assert other.addr == ADDRESS
    assert other.offset == bucket.offset
    assert raw.read_dmabuf(other.dmabuf_fd, 6) == b"shared"
    raw.write_dmabuf(other.dmabuf_fd, b"SHARED" + bytes(PAGE - 6))
    assert raw.read_dmabuf(bucket.dmabuf_fd, 6) == b"SHARED"
    source.close()
    copy.close()


def test_an_import_on_another_gpu_is_einval(host: Host) -> None:
    host.need_gpus(2)
    owner = host.spawn(_owner)
    owner.hear()
    source = _buffers(host, owner.pid)
    (bucket,) = [b for b in source.bos if b.dmabuf_fd != INVALID]
    assert host.run(_import_elsewhere, os.getpid(), bucket.dmabuf_fd) == "Invalid argument"
    source.close()


def _import_elsewhere(link: Link, pid: int, fd: int) -> str | None:
    process = Process(link.paths)
    stolen = steal_fd(pid, fd)
    with pytest.raises(OSError, match="Invalid") as caught:
        import_dmabuf(process.kfd, process.gpu_ids[1], ADDRESS, stolen)
    return caught.value.strerror


def _map_before_and_after(link: Link, pid: int, fd: int, offset: int) -> tuple[bool, bytes]:
    """Whether the buffer may be mapped by a process that has it not; what it maps when it has."""
    process = Process(link.paths)
    gpu = process.gpu_ids[0]
    allowed = True
    try:
        process.render[gpu].mmap(offset, PAGE)
    except PermissionError:
        allowed = False
    stolen = steal_fd(pid, fd)
    import_dmabuf(process.kfd, gpu, ADDRESS, stolen)
    os.close(stolen)
    with process.render[gpu].mmap(offset, PAGE).view() as view:
        return allowed, bytes(view[:6])


def test_an_importer_may_map_the_buffer_by_its_own_render_node(host: Host) -> None:
    owner = host.spawn(_owner)
    offset = owner.hear()
    source = _buffers(host, owner.pid)
    (bucket,) = [b for b in source.bos if b.dmabuf_fd != INVALID]
    found = host.run(_map_before_and_after, os.getpid(), bucket.dmabuf_fd, offset)
    assert found == (False, b"shared")
    source.close()


def _import_into_holes(link: Link, pid: int, fd: int) -> tuple[list[int], list[int]]:
    process = Process(link.paths)
    gpu = process.gpu_ids[0]
    made = [process.alloc(gpu, PAGE, mapped=False) for _ in range(4)]
    handles = [buffer.handle for buffer in made]
    for buffer in (made[2], made[0]):
        process.unmap(buffer, process.gpu_ids)
        process.free(buffer)
    stolen = steal_fd(pid, fd)
    imports = [import_dmabuf(process.kfd, gpu, ADDRESS + n * PAGE, stolen) for n in range(3)]
    os.close(stolen)
    return handles, imports


def test_an_import_gets_the_lowest_handle_that_is_free(host: Host) -> None:
    owner = host.spawn(_owner)
    owner.hear()
    source = _buffers(host, owner.pid)
    (bucket,) = [b for b in source.bos if b.dmabuf_fd != INVALID]
    made, imports = host.run(_import_into_holes, os.getpid(), bucket.dmabuf_fd)
    assert imports == [made[0], made[2], made[3] + 1]
    source.close()


# ---------------------------------------------------------------- shared again after a restore

SHARED = 16 * PAGE


class _Owner:
    """What a test asks of the process that has made the buffer."""

    def __init__(self, buffer: Buffer) -> None:
        self._buffer = buffer

    def word(self, index: int, value: int | None = None) -> int:
        return self._buffer.word(index, value)


def _own(link: Link) -> None:
    process = Process(link.paths)
    buffer = process.alloc(process.gpu_ids[-1], SHARED, VRAM | WRITABLE)
    link.say((buffer.mmap_offset, buffer.handle))
    serve(link, _Owner(buffer))  # type: ignore[arg-type]


def _import_as_work(link: Link, pid: int, fd: int, offset: int) -> None:
    """A target whose work buffer is the import; there is a free handle below the import's."""
    found = Target(Process(link.paths))
    found.build()
    process = found.process
    gpu = process.gpu_ids[-1]
    below = process.alloc(gpu, PAGE, mapped=False)
    stolen = steal_fd(pid, fd)
    handle = import_dmabuf(process.kfd, gpu, ADDRESS, stolen)
    os.close(stolen)
    map_memory(process.kfd, handle, process.gpu_ids)
    memory = process.render[gpu].mmap(offset, SHARED)
    found.buffers["work"] = Buffer(handle, ADDRESS, SHARED, offset, VRAM, memory)
    process.unmap(below, process.gpu_ids)
    process.free(below)
    link.say(found.layout)
    serve(link, found)


def _own_again(link: Link, image: Image, index: int) -> None:
    process, fds = open_nodes(link, image)
    done = raw.restore(process.kfd, image, fds)
    bucket = image.bo(index)
    actual = dict(image.devices)[bucket.gpu_id]
    memory = process.render[actual].mmap(done.offsets[index], bucket.size)
    link.say((done.dmabufs[index], done.offsets[index]))
    serve(link, _Owner(Buffer(0, bucket.addr, bucket.size, 0, VRAM, memory)))  # type: ignore[arg-type]


def _import_again(
    link: Link,
    checkpoint: KfdCheckpoint,
    image: Image,
    layout: Layout,
    index: int,
    owner: tuple[int, int, int],
) -> None:
    """RESTORE without BO *index*, then ``share`` it with *owner* (pid, dmabuf fd, offset)."""
    process, fds = open_nodes(link, image)
    here = {actual: actual for _, actual in image.devices}
    nodes = dict(zip(here, fds, strict=True))
    kfd = KfdProcess(process.kfd, os.getpid())
    pid, number, offset = owner
    with kfd.restore(checkpoint, here, nodes, gpu_nodes(link.paths), {index}) as restored:
        for fd, data in zip(restored.dmabufs, image.contents, strict=True):
            if fd is not None and data is not None:
                raw.write_dmabuf(fd, data)
        before = set(os.listdir("/proc/self/fd"))
        stolen = steal_fd(pid, number)
        kfd.share(checkpoint, {index: stolen})
        os.close(stolen)
        assert set(os.listdir("/proc/self/fd")) == before
        offsets = list(restored.restored_offsets)
    offsets[index] = offset
    found = adopt_restored(process, image, layout, raw.Restored(offsets, [], image.devices))
    link.say()
    serve(link, found)


def _index(checkpoint: KfdCheckpoint, gpu: int, handle: int) -> int:
    private = checkpoint.private()
    (found,) = [
        index
        for index, (bo, record) in enumerate(zip(checkpoint.bos, private.bos, strict=True))
        if uapi.MAKE_HANDLE(bo.gpu_id, record.idr_handle) == handle
    ]
    assert checkpoint.bos[found].gpu_id == gpu
    return found


def test_a_buffer_that_two_processes_had_is_one_again_after_their_restores(host: Host) -> None:
    """What one of them writes, by its GPU, the other reads; the import has its old handle."""
    owner = host.spawn(_own)
    offset, owned = owner.hear()
    owner.ask(("word", 0, 1000))
    source = _buffers(host, owner.pid)
    (bucket,) = [b for b in source.bos if b.dmabuf_fd != INVALID]
    importer = host.spawn(_import_as_work, os.getpid(), bucket.dmabuf_fd, offset)
    layout = importer.hear()
    assert importer.ask(("add",)) == 1000 + ADDED
    assert owner.ask(("word", 0)) == 1000 + ADDED
    source.close()

    gpu = layout.gpu_ids[-1]
    importers, importers_image = checkpointed(host, importer)
    owners, owners_image = checkpointed(host, owner)
    owner = host.spawn(_own_again, owners_image, _index(owners, gpu, owned))
    given = (owner.pid, *owner.hear())
    handle = layout.buffers["work"].handle
    index = _index(importers, gpu, handle)
    importer = host.spawn(_import_again, importers, importers_image, layout, index, given)
    importer.hear()
    for child in (owner, importer):
        assert run_resume(host, child.pid) == 0

    assert owner.ask(("word", 0)) == 1000 + ADDED
    assert importer.ask(("add",)) == 1000 + 2 * ADDED
    assert owner.ask(("word", 0)) == 1000 + 2 * ADDED
    owner.ask(("word", 0, 5))
    assert importer.ask(("add",)) == 5 + ADDED
    again = _index(checkpointed(host, importer)[0], gpu, handle)
    assert again == index
