"""The executor protocol: what comes out is what went in, and nonsense is refused."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import resource
import socket
import struct
import threading
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.engine import wire
from migrate.engine.executor import LetGo, Paused, serve
from migrate.engine.remote import Connection, RemoteFile
from migrate.engine.wire import Kind, Message
from migrate.errors import FrameRejected, NotKfdProcess
from migrate.kfd import uapi


@contextlib.contextmanager
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        yield ours, theirs


U32 = st.integers(0, 2**32 - 1)


@given(
    st.sampled_from(Kind),
    U32,
    st.integers(0, 2**31 - 1),
    st.integers(0, 2**64 - 1),
    st.binary(max_size=4096),
)
def test_a_message_arrives_as_it_was_sent(
    kind: Kind, sequence: int, status: int, file: int, payload: bytes
) -> None:
    with pair() as (ours, theirs):
        sent = Message(kind, sequence, status, file, payload)
        wire.send(ours, sent)
        wire.send(ours, Message(Kind.DONE))
        assert wire.receive(theirs) == sent
        assert wire.receive(theirs) == Message(Kind.DONE)


def test_more_fds_than_the_kernel_passes_at_once_keep_their_order() -> None:
    memory = os.memfd_create("test")
    count = wire.FDS_PER_GROUP + 7
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 3 * count
    fds = []
    try:
        for number in range(count):
            fds.append(os.memfd_create("one"))
            os.write(fds[-1], struct.pack("<I", number))
        with pair() as (ours, theirs):
            sender = threading.Thread(
                target=wire.send, args=(ours, Message(Kind.REPLY, fds=(*fds,)))
            )
            sender.start()
            got = wire.receive(theirs)
            sender.join()
        assert got is not None
        try:
            numbers = [struct.unpack("<I", os.pread(fd, 4, 0))[0] for fd in got.fds]
            assert numbers == list(range(count))
            assert not any(os.get_inheritable(fd) for fd in got.fds)
        finally:
            wire.close_all(got.fds)
    finally:
        wire.close_all([memory, *fds])


HEAD = {
    "magic": wire.MAGIC,
    "version": 1,
    "kind": 1,
    "sequence": 0,
    "status": 0,
    "file": 0,
    "length": 0,
    "fds": 0,
}


@pytest.mark.parametrize(
    "wrong",
    [
        {"magic": 1},
        {"version": 2},
        {"kind": 99},
        {"length": wire.MAX_PAYLOAD + 1},
        {"fds": wire.MAX_FDS + 1},
    ],
)
def test_what_is_no_message_is_refused(wrong: dict[str, int]) -> None:
    with pair() as (ours, theirs):
        ours.sendall(wire.HEADER.pack(*(HEAD | wrong).values()))
        with pytest.raises(FrameRejected):
            wire.receive(theirs)


def test_fds_that_were_announced_and_do_not_come_are_missed() -> None:
    with pair() as (ours, theirs):
        ours.sendall(wire.HEADER.pack(*(HEAD | {"fds": 1}).values()) + b"+")
        with pytest.raises(FrameRejected):
            wire.receive(theirs)


@pytest.mark.parametrize("cut", [1, 31, 32, 35])
def test_a_message_that_is_cut_short_is_no_end(cut: int) -> None:
    with pair() as (ours, theirs):
        whole = wire.HEADER.pack(*(HEAD | {"length": 4}).values()) + b"text"
        ours.sendall(whole[:cut])
        ours.close()
        with pytest.raises(ConnectionResetError):
            wire.receive(theirs)


def test_the_end_is_told_apart() -> None:
    with pair() as (ours, theirs):
        ours.close()
        assert wire.receive(theirs) is None


# ---------------------------------------------------------------- executor


class RecordingFile:
    """A KfdFile that remembers the CRIU operations it ran."""

    def __init__(self) -> None:
        self.operations: list[int] = []

    def ioctl(self, request: int, arg: ctypes.Structure) -> None:
        raw = bytes(arg)
        if request == uapi.AMDKFD_IOC_CRIU_OP:
            self.operations.append(uapi.kfd_ioctl_criu_args.from_buffer_copy(raw).op)
        elif request == uapi.AMDKFD_IOC_GET_VERSION:
            ctypes.memmove(ctypes.addressof(arg), struct.pack("<II", 1, 11), 8)
        else:
            raise OSError(errno.ENOTTY, "no such ioctl")

    def open_node(self, path: str) -> int:
        raise OSError(errno.ENOENT, path)

    def give_fd(self, fd: int) -> int:
        raise OSError(errno.ENODEV, "no fds")

    def close_given(self, number: int) -> None:
        raise OSError(errno.ENODEV, "no fds")

    def mmap(self, offset: int, length: int, address: int | None = None) -> object:
        raise OSError(errno.ENODEV, "no mmap")

    def fileno(self) -> int:
        return 7

    def close(self) -> None:
        self.operations.append(-1)


@contextlib.contextmanager
def executor(
    more: dict[Kind, Callable[[Message], Message]] | None = None, *, stolen: bool = False
) -> Iterator[tuple[Connection, RecordingFile, Paused]]:
    file, paused = RecordingFile(), Paused(stolen=stolen)
    paused.files[7] = file  # type: ignore[assignment]
    with pair() as (ours, theirs):
        handlers = {Kind.IOCTL: paused.ioctl, **(more or {})}
        thread = threading.Thread(target=serve, args=(theirs, handlers))
        thread.start()
        try:
            yield Connection(ours), file, paused
        finally:
            ours.close()
            thread.join()


def test_an_ioctl_runs_over_there() -> None:
    with executor() as (connection, _, _):
        arg = uapi.kfd_ioctl_get_version_args()
        RemoteFile(connection, 7).ioctl(uapi.AMDKFD_IOC_GET_VERSION, arg)
        assert (arg.major_version, arg.minor_version) == (1, 11)


def test_errors_over_there_are_errors_here() -> None:
    with executor() as (connection, _, _):
        arg = uapi.kfd_ioctl_get_version_args()
        with pytest.raises(OSError, match="Inappropriate ioctl") as raised:
            RemoteFile(connection, 7).ioctl(uapi.AMDKFD_IOC_DESTROY_QUEUE, arg)
        assert raised.value.errno == errno.ENOTTY
        with pytest.raises(OSError, match="no file 8") as raised:
            RemoteFile(connection, 8).ioctl(uapi.AMDKFD_IOC_GET_VERSION, arg)
        assert raised.value.errno == errno.EBADF
        with pytest.raises(OSError, match="does not know OPEN") as raised:
            RemoteFile(connection, 7).open_node("/dev/dri/renderD128")
        assert raised.value.errno == errno.ENOSYS


def test_a_named_error_keeps_its_class() -> None:
    def refuse(request: Message) -> Message:
        raise NotKfdProcess("it has none")

    with (
        executor({Kind.ATTACH: refuse}) as (connection, _, _),
        pytest.raises(NotKfdProcess, match="^it has none$"),
    ):
        connection.ask(Kind.ATTACH)


def test_an_executor_that_is_gone_is_told() -> None:
    def leave(request: Message) -> Message:
        raise LetGo(Message(Kind.REPLY))

    with executor({Kind.DONE: leave}) as (connection, _, _):
        connection.ask(Kind.DONE)
        with pair() as (ours, theirs):
            theirs.close()
            with pytest.raises(ConnectionResetError):
                Connection(ours).ask(Kind.HOLD)


def test_restore_never_goes_through_a_stolen_file() -> None:
    def restore(remote: RemoteFile) -> None:
        args = uapi.kfd_ioctl_criu_args(op=uapi.KFD_CRIU_OP_RESTORE)
        remote.ioctl(uapi.AMDKFD_IOC_CRIU_OP, args)

    with executor(stolen=True) as (connection, file, _):
        with pytest.raises(OSError, match="by the restored process itself") as raised:
            restore(RemoteFile(connection, 7))
        assert raised.value.errno == errno.EPERM
        assert file.operations == []
    with executor() as (connection, file, _):
        restore(RemoteFile(connection, 7))
        assert file.operations == [uapi.KFD_CRIU_OP_RESTORE]


def test_what_was_left_paused_is_known_and_undone_once() -> None:
    with executor() as (connection, file, paused):
        remote = RemoteFile(connection, 7)

        def run(op: int) -> None:
            remote.ioctl(uapi.AMDKFD_IOC_CRIU_OP, uapi.kfd_ioctl_criu_args(op=op))

        run(uapi.KFD_CRIU_OP_PROCESS_INFO)
        run(uapi.KFD_CRIU_OP_UNPAUSE)
        paused.unpause()
        assert file.operations == [uapi.KFD_CRIU_OP_PROCESS_INFO, uapi.KFD_CRIU_OP_UNPAUSE]
        run(uapi.KFD_CRIU_OP_PROCESS_INFO)
        paused.unpause()
        paused.unpause()
        assert file.operations[2:] == [uapi.KFD_CRIU_OP_PROCESS_INFO, uapi.KFD_CRIU_OP_UNPAUSE]
