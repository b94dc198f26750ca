"""The node's front: sockets, who may call what, and carrying calls to their handlers."""

from __future__ import annotations

import ctypes
import errno
import os
import select
import selectors
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from migrate.errors import FrameRejected
from migrate.kfd import marshal, uapi
from migrate.kfd.sim import callers, criu, transport
from migrate.kfd.sim.callers import Caller
from migrate.kfd.sim.device import Gpu, Host, OpenFile
from migrate.kfd.sim.events import Waiter
from migrate.kfd.sim.ioctls import HANDLERS, error
from migrate.kfd.sim.memory import PAGE, Backing
from migrate.kfd.sim.process import DOORBELL_SLICE, SimProcess
from migrate.kfd.sim.transport import Operation

COMMAND_END = {11: 0x24, 12: 0x25}  # by interface minor: EXPORT_DMABUF came with 12
_CRIU = uapi._IOC_NR(uapi.AMDKFD_IOC_CRIU_OP)
_WAIT = uapi._IOC_NR(uapi.AMDKFD_IOC_WAIT_EVENTS)
_INFINITE = 0xFFFFFFFF
_HANGUP_CHECK = 0.5  # seconds between looks whether a waiting caller is still there


class Server:
    """Serves one host's sockets until stopped."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self._selector = selectors.DefaultSelector()
        self._listeners: list[tuple[socket.socket, Path]] = []
        self._watched: dict[int, SimProcess] = {}  # pidfd of processes whose end is awaited
        self._stop_read, self._stop_write = os.pipe()
        self._selector.register(self._stop_read, selectors.EVENT_READ, None)
        self._listen(host.root / "kfd", None)
        (host.root / "dri").mkdir(exist_ok=True)
        for gpu in host.gpus:
            self._listen(host.root / "dri" / f"renderD{gpu.spec.render_minor}", gpu)

    def _listen(self, path: Path, gpu: Gpu | None) -> None:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        listener.bind(str(path))
        path.chmod(0o666)
        listener.listen(64)
        listener.setblocking(False)
        self._listeners.append((listener, path))
        self._selector.register(listener, selectors.EVENT_READ, lambda: self._accept(listener, gpu))

    def stop(self) -> None:
        """End ``serve``; may be called from a signal handler."""
        os.write(self._stop_write, b"x")

    def serve(self) -> None:
        """Serve until ``stop``; then the sockets are gone."""
        try:
            while True:
                for key, _ in self._selector.select():
                    if key.data is None:
                        return
                    key.data()
        finally:
            for listener, path in self._listeners:
                listener.close()
                path.unlink(missing_ok=True)
            with self.host.lock:
                for gpu in self.host.gpus:
                    if gpu.engine is not None:
                        gpu.engine.stop()

    # ------------------------------------------------------------ open files

    def _accept(self, listener: socket.socket, gpu: Gpu | None) -> None:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        file = OpenFile(connection, gpu)
        self._selector.register(connection, selectors.EVENT_READ, lambda: self._serve(file))

    def _close(self, file: OpenFile) -> None:
        self._selector.unregister(file.connection)
        file.connection.close()
        with self.host.lock:
            self.host.close_file(file)

    def _serve(self, file: OpenFile) -> None:
        """One operation on an open file."""
        try:
            received = transport.receive_operation(file.connection)
        except BlockingIOError:
            return
        except (OSError, FrameRejected):
            received = None
        if received is None:
            self._close(file)
            return
        operation, caller, channel = received
        with channel:
            try:
                payload, fds = transport.receive_message(channel, socket.MSG_DONTWAIT)
            except (OSError, FrameRejected):
                return  # whoever asked is gone, or does not speak our language
            keep = False
            try:
                if operation == Operation.OPEN:
                    self._open(file, caller, channel, fds)
                elif operation == Operation.MMAP:
                    self._mmap(file, caller, channel, payload)
                else:
                    keep = self._start_ioctl(file, caller, channel, payload, fds)
            finally:
                if not keep:
                    marshal.close_all(fds)

    def _open(self, file: OpenFile, caller: Caller, channel: socket.socket, fds: list[int]) -> None:
        number = 0
        try:
            if len(fds) != 1 or file.inode:
                raise error(errno.EINVAL)
            file.inode = os.fstat(fds[0]).st_ino
            marshal.close_all(fds)  # before anything else: it would keep the file open
            fds.clear()
            with self.host.lock:
                self.host.files[file.inode] = file
                if file.gpu is None:
                    self.host.open_kfd(file, caller.pid)
                    assert file.process is not None
                    self._watch(file.process)
        except OSError as failure:
            number = failure.errno or errno.EIO
        _answer(channel, transport.OPEN_REPLY.pack(number))

    def _watch(self, process: SimProcess) -> None:
        if process.pidfd in self._watched:
            return
        self._watched[process.pidfd] = process

        def ended() -> None:
            self._selector.unregister(process.pidfd)
            del self._watched[process.pidfd]
            with self.host.lock:
                self.host.end_process(process)

        self._selector.register(process.pidfd, selectors.EVENT_READ, ended)

    # ------------------------------------------------------------ mmap

    def _mmap(self, file: OpenFile, caller: Caller, channel: socket.socket, payload: bytes) -> None:
        try:
            if len(payload) != transport.MMAP_CALL.size:
                raise error(errno.EINVAL)
            offset, length = transport.MMAP_CALL.unpack(payload)
            with self.host.lock:
                backing, start = self._find_memory(file, caller, offset, length)
                fd = backing.reopen()
        except OSError as failure:
            _answer(channel, transport.MMAP_REPLY.pack(failure.errno or errno.EIO, 0))
            return
        try:
            _answer(channel, transport.MMAP_REPLY.pack(0, start), [fd])
        finally:
            os.close(fd)

    def _find_memory(
        self, file: OpenFile, caller: Caller, offset: int, length: int
    ) -> tuple[Backing, int]:
        if self.host.broken:
            raise error(errno.EIO)
        if offset % PAGE or length == 0:
            raise error(errno.EINVAL)
        if file.gpu is None:
            return self._find_kfd_memory(caller, offset, length), 0
        for start, bo in file.gpu.mmap_offsets.items():
            if start <= offset < start + bo.size:
                if bo.owner.drm_file is not file:  # drm_vma_node_is_allowed()
                    raise error(errno.EACCES)
                if bo.backing is None:  # a userptr
                    raise error(errno.EPERM)
                if offset + length > start + bo.size:
                    raise error(errno.EINVAL)
                return bo.backing, offset - start
        raise error(errno.EINVAL)

    def _find_kfd_memory(self, caller: Caller, offset: int, length: int) -> Backing:
        """kfd_mmap(): for the process that calls, whoever opened the file."""
        process = self.host.processes.get(caller.pid)
        if process is None:
            raise error(errno.EINVAL)
        kind = offset & uapi.KFD_MMAP_TYPE_MASK
        if kind == uapi.KFD_MMAP_TYPE_EVENTS:
            return process.events.map_page(length)
        gpu_id = uapi.KFD_MMAP_GET_GPU_ID(offset)  # the actual one
        gpu = next((g for g in self.host.gpus if g.gpu_id == gpu_id), None)
        device = None if gpu is None else process.device_on(gpu)
        if gpu is None or device is None:
            raise error(errno.ENODEV)
        if kind == uapi.KFD_MMAP_TYPE_DOORBELL and length == DOORBELL_SLICE:
            return device.doorbell_backing()
        if kind == uapi.KFD_MMAP_TYPE_MMIO and length == PAGE:
            gpu.mmio = gpu.mmio or Backing("kfd-mmio", PAGE)
            return gpu.mmio
        raise error(errno.EINVAL)

    # ------------------------------------------------------------ ioctl

    def _start_ioctl(
        self, file: OpenFile, caller: Caller, channel: socket.socket, payload: bytes, fds: list[int]
    ) -> bool:
        """Run an ioctl, in a thread if it may block; True if that thread has the fds."""
        try:
            call = marshal.Call.decode(payload, tuple(fds))
        except FrameRejected:
            return False
        runner = _Runner(self.host, file, caller)
        if uapi._IOC_NR(call.request) not in {_CRIU, _WAIT}:
            runner.run(call, channel)
            return False
        mine = channel.dup()

        def blocking() -> None:
            with mine:
                try:
                    runner.run(call, mine)
                finally:
                    marshal.close_all(fds)

        threading.Thread(target=blocking, daemon=True).start()
        return True


def _answer(channel: socket.socket, payload: bytes, fds: list[int] | tuple[int, ...] = ()) -> bool:
    """Answer; False if nobody is there any more."""
    try:
        transport.send_message(channel, payload, fds)
    except OSError:
        return False
    return True


class _Runner:
    """One ioctl: kfd_ioctl()'s checks, then the handler, then the answer."""

    def __init__(self, host: Host, file: OpenFile, caller: Caller) -> None:
        self._host = host
        self._file = file
        self._caller = caller
        self._channel: socket.socket | None = None
        self._undo: Callable[[], None] | None = None

    def run(self, call: marshal.Call, channel: socket.socket) -> None:
        """Run *call* and answer on *channel*."""
        self._channel = channel
        try:
            reply = marshal.execute(call, self)
        except FrameRejected:
            return
        delivered = _answer(channel, reply.encode(), reply.fds)
        marshal.close_all(reply.fds)
        if not delivered and self._undo is not None:
            with self._host.lock:
                self._undo()
                self._host.changed.notify_all()

    def ioctl(self, request: int, arg: ctypes.Structure) -> None:
        """What the driver does with the ioctl; *arg* holds pointers into the node."""
        with self._host.lock:
            if self._host.broken:
                raise error(errno.EIO)
            process = self._check(uapi._IOC_NR(request))
            number = uapi._IOC_NR(request)
            if number == _CRIU:
                self._check_capability()
                kind: type[ctypes.Structure] = uapi.kfd_ioctl_criu_args
            elif number == _WAIT:
                kind = uapi.kfd_ioctl_wait_events_args
            else:
                kind = HANDLERS[number][0]
            # The kernel takes any size: a short argument is filled up with zeros.
            size = min(ctypes.sizeof(kind), ctypes.sizeof(arg))
            args: Any = kind()
            ctypes.memmove(ctypes.addressof(args), ctypes.addressof(arg), size)
            try:
                self._call(number, process, args)
            finally:
                ctypes.memmove(ctypes.addressof(arg), ctypes.addressof(args), size)

    def _call(self, number: int, process: SimProcess, args: Any) -> None:
        if number == _CRIU:
            criu.criu_op(self._host, process, self._caller, args)
        elif number == _WAIT:
            self._wait_events(process, args)
        else:
            HANDLERS[number][1](self._host, process, args)

    def _check(self, number: int) -> SimProcess:
        """The checks of kfd_ioctl() up to the function pointer. Raises OSError."""
        if not 1 <= number < COMMAND_END[self._host.interface_minor]:
            raise error(errno.ENOTTY)
        process = self._file.process
        if process is None:  # a render node has no ioctl of ours
            raise error(errno.ENOTTY)
        if process.dead:
            raise error(errno.EBADF)
        if process.pid != self._caller.pid and not (number == _CRIU and self._traces(process.pid)):
            raise error(errno.EBADF)
        if number not in HANDLERS and number not in {_CRIU, _WAIT}:
            raise error(errno.EINVAL)
        return process

    def _traces(self, pid: int) -> bool:
        """ptrace_parent(lead thread) == the calling thread."""
        thread = callers.thread_of(self._caller.pid, self._caller.tid)
        return thread is not None and callers.tracer_of(pid) == thread

    def _check_capability(self) -> None:
        if not self._host.allow_unprivileged and not callers.may_checkpoint(self._caller.pid):
            raise error(errno.EACCES)

    # ------------------------------------------------------------ WAIT_EVENTS

    def _wait_events(self, process: SimProcess, args: Any) -> None:
        """kfd_wait_on_events()."""
        events = process.events
        args.wait_result = uapi.KFD_IOC_WAIT_RESULT_FAIL
        if args.num_events and not args.events_ptr:
            raise error(errno.EFAULT)
        data = (uapi.kfd_event_data * args.num_events).from_address(args.events_ptr or 1)
        ids = [data[index].event_id for index in range(args.num_events)]
        waiters = events.begin_wait(ids)
        undo = True
        try:
            result = self._sleep(process, waiters, args)
            if result == uapi.KFD_IOC_WAIT_RESULT_FAIL:
                raise error(errno.EIO)
            if result == uapi.KFD_IOC_WAIT_RESULT_COMPLETE:
                _copy_event_data(waiters, data)
            args.wait_result = result
            undo = False
        finally:
            events.end_wait(waiters, undo=undo)
        taken = [w.event for w in waiters if w.activated and w.event and w.event.auto_reset]

        def give_back() -> None:
            for event in taken:
                event.set()

        self._undo = give_back

    def _sleep(self, process: SimProcess, waiters: list[Waiter], args: Any) -> int:
        end = None if args.timeout == _INFINITE else time.monotonic() + args.timeout / 1000
        while True:
            result = process.events.test(waiters, wait_for_all=bool(args.wait_for_all))
            if result != uapi.KFD_IOC_WAIT_RESULT_TIMEOUT:
                return result
            left = _HANGUP_CHECK if end is None else min(end - time.monotonic(), _HANGUP_CHECK)
            if left <= 0:
                return result
            if process.dead or self._hung_up():
                raise error(errno.EINTR)
            self._host.changed.wait(left)

    def _hung_up(self) -> bool:
        assert self._channel is not None
        poll = select.poll()
        poll.register(self._channel, select.POLLHUP)
        return bool(poll.poll(0))

    # ------------------------------------------------------------ the rest of KfdFile

    def open_node(self, path: str) -> int:
        """Not for the node itself."""
        raise error(errno.ENOTTY)

    def mmap(self, offset: int, length: int, address: int | None = None) -> Any:
        """Not for the node itself."""
        raise error(errno.ENOTTY)

    def fileno(self) -> int:
        """The node's end of the open file."""
        return self._file.connection.fileno()

    def close(self) -> None:
        """The file is closed by those who hold it."""


def _copy_event_data(waiters: list[Waiter], data: Any) -> None:
    """copy_signaled_event_data(): only memory exceptions have data."""
    for waiter, entry in zip(waiters, data, strict=True):
        event = waiter.event
        if event is None:
            raise error(errno.EINVAL)
        if waiter.activated and event.kind == uapi.KFD_IOC_EVENT_MEMORY:
            ctypes.memmove(ctypes.addressof(entry), event.data, len(event.data))
