"""Two owners of one buffer: what an import shares, and how a checkpoint shows it."""

from __future__ import annotations

import os

import pytest

from migrate.kfd import uapi
from migrate.kfd.file import steal_fd
from migrate.kfd.ioctl import import_dmabuf
from tests.conformance import image as raw
from tests.conformance.hosts import Host, Link
from tests.conformance.image import INVALID, Buffers
from tests.conformance.kit import PAGE, Process
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
