"""Our own side of the five operations against whatever answers: KfdProcess and executors."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from migrate.engine.remote import Connection, RemoteFile
from migrate.engine.trampoline import OPEN_KFD, Trampoline
from migrate.engine.wire import Kind
from migrate.errors import RestoreFailed
from migrate.kfd.privdata import QueueRecord, encode
from migrate.kfd.process import KfdCheckpoint, KfdProcess
from tests.conformance import image as raw
from tests.conformance.hosts import DEADLINE, Child, Host, Link
from tests.conformance.image import Image
from tests.conformance.kit import AQL, gpu_nodes
from tests.conformance.target import Layout, adopt_restored, open_nodes, serve, target
from tests.conformance.test_restore import run_resume
from tests.conformance.tracer import held


def checkpointed(host: Host, child: Child) -> tuple[KfdCheckpoint, Image]:
    """A child, still paused when it ends here, as our code sees it and as the driver tells."""
    with held(child.pid, host.paths) as file:
        process = KfdProcess(file, child.pid)
        process.process_info()
        with process.checkpoint() as found:
            contents = [
                None if fd is None else raw.read_dmabuf(fd, bo.size)
                for fd, bo in zip(found.dmabufs, found.checkpoint.bos, strict=True)
            ]
        image = raw.checkpoint(file, raw.process_info(file))
    child.kill()
    return found.checkpoint, replace(image, contents=contents)


def a_target(host: Host, *steps: tuple[object, ...]) -> tuple[Child, Layout]:
    """A target that did *steps*, and where its things are afterwards."""
    child = host.spawn(target)
    child.hear()
    for step in steps:
        child.ask(step)
    return child, child.ask(("where",))


def with_a_broken_queue(checkpoint: KfdCheckpoint) -> KfdCheckpoint:
    """RESTORE fails at its objects, after the BOs: a queue's MQD is a word too long."""
    private = checkpoint.private()
    objects = tuple(
        msgspec.structs.replace(item, mqd=item.mqd + bytes(4))
        if isinstance(item, QueueRecord)
        else item
        for item in private.objects
    )
    data = encode(msgspec.structs.replace(private, objects=objects))
    return msgspec.structs.replace(checkpoint, priv_data=data)


# ---------------------------------------------------------------- AQL rings


def _restore_with_our_code(
    link: Link, checkpoint: KfdCheckpoint, image: Image, layout: Layout
) -> None:
    process, fds = open_nodes(link, image)
    here = {actual: actual for _, actual in image.devices}
    nodes = dict(zip(here, fds, strict=True))
    restored = KfdProcess(process.kfd, os.getpid()).restore(
        checkpoint, here, nodes, gpu_nodes(link.paths)
    )
    with restored:
        for fd, data in zip(restored.dmabufs, image.contents, strict=True):
            if fd is not None and data is not None:
                raw.write_dmabuf(fd, data)
    done = raw.Restored(list(restored.restored_offsets), [], image.devices)
    found = adopt_restored(process, image, layout, done)
    link.say()
    serve(link, found)


def test_memory_of_an_aql_queue_is_as_large_as_before(host: Host) -> None:
    """Twice moved, it would be a quarter if RESTORE were asked for what CHECKPOINT told."""
    child, layout = a_target(host, ("alloc_aql",))
    assert child.ask(("fill_aql", 0x01010101)) == (0x01010102).to_bytes(4, "little")
    for value in (0x03030303, 0x05050505):
        checkpoint, image = checkpointed(host, child)
        (ring,) = (bo for bo in checkpoint.bos if bo.alloc_flags & AQL)
        assert ring.size == layout.buffers["aql"].size
        child = host.spawn(_restore_with_our_code, checkpoint, image, layout)
        child.hear()
        assert run_resume(host, child.pid) == 0
        assert child.ask(("fill_aql", value)) == (value + 1).to_bytes(4, "little")


def _restore_aql_as_it_stands(link: Link, image: Image) -> list[int]:
    process, fds = open_nodes(link, image)
    done = raw.restore(process.kfd, replace(image, contents=[]), fds)
    sizes = [
        os.lseek(fd, 0, os.SEEK_END)
        for n, fd in enumerate(done.dmabufs)
        if image.bo(n).alloc_flags & AQL
    ]
    done.close()
    return sizes


def test_restore_halves_the_memory_of_an_aql_queue_again(host: Host) -> None:
    child, layout = a_target(host, ("alloc_aql",))
    _, image = checkpointed(host, child)
    assert host.run(_restore_aql_as_it_stands, image) == [layout.buffers["aql"].size // 2]


# ---------------------------------------------------------------- no fd left behind


def _fail_to_restore(link: Link, checkpoint: KfdCheckpoint, image: Image) -> int:
    """How many fds a RESTORE that fails after its BOs leaves in this process."""
    process, fds = open_nodes(link, image)
    here = {actual: actual for _, actual in image.devices}
    nodes = dict(zip(here, fds, strict=True))
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(RestoreFailed, match=errno.errorcode[errno.EINVAL]):
        KfdProcess(process.kfd, os.getpid()).restore(checkpoint, here, nodes, gpu_nodes(link.paths))
    return len(os.listdir("/proc/self/fd")) - before


def test_a_restore_that_fails_late_leaves_no_fd(host: Host) -> None:
    child, _ = a_target(host)
    checkpoint, image = checkpointed(host, child)
    assert host.run(_fail_to_restore, with_a_broken_queue(checkpoint), image) == 0


def _be_an_executor(link: Link, path: str) -> None:
    with socket.socket(socket.AF_UNIX) as channel:
        channel.connect(path)
        with pytest.raises(SystemExit):  # the agent broke off
            Trampoline().run(channel, lambda *_: None)


@contextmanager
def an_executor(host: Host, folder: Path) -> Iterator[tuple[Child, RemoteFile]]:
    """A copy in the making: a process that runs our ioctls, with an open /dev/kfd."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "agent"))
        listener.listen()
        listener.settimeout(DEADLINE)
        child = host.spawn(_be_an_executor, str(folder / "agent"))
        channel, _ = listener.accept()
    connection = Connection(channel)
    try:
        opened = connection.ask(Kind.OPEN, os.fsencode(host.paths.kfd), file=OPEN_KFD)
        yield child, RemoteFile(connection, opened.file)
    finally:
        connection.close()
        child.join()


def test_a_restore_that_fails_late_in_another_process_leaves_no_fd(
    host: Host, tmp_path: Path
) -> None:
    """Neither there, where the driver put them, nor here."""
    child, _ = a_target(host)
    checkpoint, image = checkpointed(host, child)
    minors = gpu_nodes(host.paths)
    here = {actual: actual for _, actual in image.devices}
    with an_executor(host, tmp_path) as (copy, file):
        nodes = {
            actual: file.open_node(f"{host.paths.dri}/renderD{minors[actual]}") for actual in here
        }
        folders = ("/proc/self/fd", f"/proc/{copy.pid}/fd")
        before = [set(os.listdir(folder)) for folder in folders]
        with pytest.raises(RestoreFailed, match=errno.errorcode[errno.EINVAL]):
            KfdProcess(file, copy.pid).restore(with_a_broken_queue(checkpoint), here, nodes, minors)
        after = [set(os.listdir(folder)) for folder in folders]
        assert all(now <= then for now, then in zip(after, before, strict=True))
