"""One ioctl on the node: kfd_ioctl()'s checks, then its handler, then the answer."""

from __future__ import annotations

import ctypes
import errno
import select
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any

from migrate.errors import FrameRejected
from migrate.kfd import marshal, uapi
from migrate.kfd.sim import callers, criu, svm, transport
from migrate.kfd.sim.callers import Caller
from migrate.kfd.sim.device import Host, OpenFile
from migrate.kfd.sim.events import Waiter
from migrate.kfd.sim.ioctls import HANDLERS
from migrate.kfd.sim.process import SimProcess, error

COMMAND_END = {11: 0x24, 12: 0x25}  # by interface minor: EXPORT_DMABUF came with 12
_CRIU = uapi._IOC_NR(uapi.AMDKFD_IOC_CRIU_OP)
_WAIT = uapi._IOC_NR(uapi.AMDKFD_IOC_WAIT_EVENTS)
_SVM = uapi._IOC_NR(uapi.AMDKFD_IOC_SVM)
MAY_BLOCK = {_CRIU, _WAIT}
_INFINITE = 0xFFFFFFFF
_HANGUP_CHECK = 0.5  # seconds between looks whether a waiting caller is still there


def answer(channel: socket.socket, payload: bytes, fds: list[int] | tuple[int, ...] = ()) -> bool:
    """Answer; False if nobody is there any more."""
    try:
        transport.send_message(channel, payload, fds)
    except OSError:
        return False
    return True


class Runner:
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
            reply = marshal.execute(call, self, keep_leftovers=True)
        except FrameRejected:
            return
        delivered = answer(channel, reply.encode(), reply.fds)
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
            elif number == _SVM:
                kind = uapi.kfd_ioctl_svm_args
            else:
                kind = HANDLERS[number][0]
            # The kernel takes any size: a short argument is filled up with zeros.
            # What is longer than the struct are the attributes of SVM.
            size = ctypes.sizeof(arg)
            args: Any = kind.from_buffer(bytearray(max(ctypes.sizeof(kind), size)))
            ctypes.memmove(ctypes.addressof(args), ctypes.addressof(arg), size)
            try:
                self._call(number, process, args, size)
            except OSError:
                raise
            except Exception:  # the node must not end by what one caller sent
                self._host.log("BUG: " + traceback.format_exc())
                raise error(errno.EIO) from None
            finally:
                ctypes.memmove(ctypes.addressof(arg), ctypes.addressof(args), size)

    def _call(self, number: int, process: SimProcess, args: Any, size: int) -> None:
        if number == _CRIU:
            criu.criu_op(self._host, process, self._caller, args)
        elif number == _WAIT:
            self._wait_events(process, args)
        elif number == _SVM:
            svm.svm_ioctl(self._host, process, args, size)
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
        if number not in HANDLERS and number not in {_CRIU, _WAIT, _SVM}:
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

    def give_fd(self, fd: int) -> int:
        """Not for the node itself."""
        raise error(errno.ENOTTY)

    def close_given(self, number: int) -> None:
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
