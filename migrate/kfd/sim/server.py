"""The node's front: sockets, who may call what, and carrying calls to their handlers."""

from __future__ import annotations

import errno
import os
import selectors
import socket
import threading
from pathlib import Path

from migrate.errors import FrameRejected
from migrate.kfd import marshal, uapi
from migrate.kfd.sim import transport
from migrate.kfd.sim.callers import Caller
from migrate.kfd.sim.device import Gpu, Host, OpenFile
from migrate.kfd.sim.dispatch import MAY_BLOCK, Runner, answer
from migrate.kfd.sim.memory import PAGE, Backing
from migrate.kfd.sim.process import DOORBELL_SLICE, SimProcess, error
from migrate.kfd.sim.transport import Operation


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
        answer(channel, transport.OPEN_REPLY.pack(number))

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
            answer(channel, transport.MMAP_REPLY.pack(failure.errno or errno.EIO, 0))
            return
        try:
            answer(channel, transport.MMAP_REPLY.pack(0, start), [fd])
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
                if not self.host.may_map(bo, file):
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
        runner = Runner(self.host, file, caller)
        if uapi._IOC_NR(call.request) not in MAY_BLOCK:
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
