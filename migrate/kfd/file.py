"""The ``KfdFile`` seam: an open /dev/kfd or render node, wherever it is.

Implementations: a character device of this host (``RealFile``), the simulated
node's socket (``migrate.kfd.sim.client.SimFile``), and a file in another process
that runs the ioctl on our behalf (``migrate.engine.remote.RemoteFile``: the tracer
helper, the restored process, the CRIU hook). Everything above is the same code.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import socket
import stat
import weakref
from typing import Protocol

from migrate.errors import ForeignProcess, KfdUnavailable, NoSuchProcess, PtraceDenied
from migrate.model import HostPaths


class Mapping(Protocol):
    """Memory mapped into this process."""

    @property
    def address(self) -> int:
        """Virtual address of the first byte."""

    def view(self) -> memoryview:
        """All of it, writable, as bytes."""

    def close(self) -> None:
        """Unmap. Every view must have been released."""


class KfdFile(Protocol):
    """An open /dev/kfd or render node."""

    def ioctl(self, request: int, arg: ctypes.Structure) -> None:
        """Run one ioctl; *arg* is updated in place, as are buffers it points to.

        File descriptors that come back in *arg* (dmabuf_fd) are numbers of this process;
        those that go in (drm_fd) are numbers of the process where the ioctl runs, as
        ``open_node`` returns them. Raises OSError with the kernel's errno.
        """

    def open_node(self, path: str) -> int:
        """Open a render node in the process where this file's ioctls run.

        The number returned is valid there; that process ends it. Raises OSError.
        """

    def give_fd(self, fd: int) -> int:
        """Copy *fd* of this process into the one where this file's ioctls run.

        The number returned is valid there until ``close_given``. Raises OSError.
        """

    def close_given(self, number: int) -> None:
        """Close what ``give_fd`` made. Raises OSError."""

    def mmap(self, offset: int, length: int, address: int | None = None) -> Mapping:
        """Map *length* bytes at the file's *offset*, shared, readable and writable.

        With *address* exactly there (MAP_FIXED_NOREPLACE). Raises OSError.
        """

    def fileno(self) -> int:
        """A file descriptor of this process that stands for the open file."""

    def close(self) -> None:
        """Close it; a second close does nothing."""


# ---------------------------------------------------------------- mapping

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int64,
)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)

_PROT_READ_WRITE = 0x3
_MAP_SHARED = 0x01
_MAP_FIXED_NOREPLACE = 0x100000
_MAP_FAILED = 2**64 - 1


def _os_error(path: str | None = None) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number), path)


class MappedMemory:
    """A ``Mapping`` of this process; unmapped when closed, not when forgotten.

    (A restored process keeps its BOs mapped after the object is gone.)
    """

    def __init__(self, address: int, length: int) -> None:
        self.address = address
        self.length = length
        self._bytes: ctypes.Array[ctypes.c_ubyte] | None = (ctypes.c_ubyte * length).from_address(
            address
        )

    def view(self) -> memoryview:
        """All of it, writable, as bytes."""
        if self._bytes is None:
            raise ValueError("the mapping is closed")
        return memoryview(self._bytes).cast("B")

    def close(self) -> None:
        """Unmap; a second close does nothing. Raises BufferError while a view lives."""
        if self._bytes is None:
            return
        alive = weakref.ref(self._bytes)
        self._bytes = None
        left = alive()
        if left is not None:
            self._bytes = left
            raise BufferError("a view of the mapping is still in use")
        if _libc.munmap(self.address, self.length):
            raise _os_error()


def map_file(fd: int, offset: int, length: int, address: int | None = None) -> MappedMemory:
    """Map *length* bytes of *fd* at *offset* (64 bits, unsigned: KFD uses the top two).

    Shared, readable and writable; with *address* exactly there, and never over something
    else (OSError EEXIST). Raises OSError with mmap(2)'s errno.
    """
    flags = _MAP_SHARED | (_MAP_FIXED_NOREPLACE if address is not None else 0)
    if length <= 0:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    signed = ctypes.c_int64(offset).value
    got = _libc.mmap(address, length, _PROT_READ_WRITE, flags, fd, signed)
    if got == _MAP_FAILED:
        raise _os_error()
    if address is not None and got != address:  # before Linux 4.17 the flag is ignored
        _libc.munmap(got, length)
        raise OSError(errno.EEXIST, os.strerror(errno.EEXIST))
    return MappedMemory(got or 0, length)


# ---------------------------------------------------------------- a character device


class RealFile:
    """A character device of this host. Owns *fd*, which is made close-on-exec."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        os.set_inheritable(fd, False)

    @classmethod
    def open(cls, path: str) -> RealFile:
        """Open the device at *path*. Raises OSError."""
        return cls(os.open(path, os.O_RDWR | os.O_CLOEXEC))

    def ioctl(self, request: int, arg: ctypes.Structure) -> None:
        """See ``KfdFile``. A signal without a handler that raises does not restart it: EINTR."""
        fcntl.ioctl(self.fileno(), request, arg, True)

    def open_node(self, path: str) -> int:
        """See ``KfdFile``; the process is this one."""
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)

    def give_fd(self, fd: int) -> int:
        """See ``KfdFile``; the process is this one."""
        return os.dup(fd)

    def close_given(self, number: int) -> None:
        """See ``KfdFile``."""
        os.close(number)

    def mmap(self, offset: int, length: int, address: int | None = None) -> MappedMemory:
        """See ``KfdFile``."""
        return map_file(self.fileno(), offset, length, address)

    def fileno(self) -> int:
        """The fd. Raises OSError(EBADF) once it is closed."""
        if self._fd < 0:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return self._fd

    def close(self) -> None:
        """Close it; a second close does nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


# ---------------------------------------------------------------- opening and finding


def open_device(path: str) -> KfdFile:
    """Open /dev/kfd or a render node of a real or simulated host.

    Raises KfdUnavailable if nothing usable is there.
    """
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISCHR(mode):
            return RealFile.open(path)
        if stat.S_ISSOCK(mode):
            from migrate.kfd.sim.client import SimFile  # noqa: PLC0415 (it imports this module)

            return SimFile.open(path)
    except PermissionError as error:
        raise KfdUnavailable(
            f"{path}: {error.strerror}",
            advice="Be root or a member of the device's group (render).",
        ) from error
    except OSError as error:
        raise KfdUnavailable(f"{path}: {error.strerror}") from error
    raise KfdUnavailable(f"{path} is neither a character device nor a simulated node's socket")


def adopt(fd: int) -> KfdFile:
    """The file that an fd from elsewhere (pidfd_getfd, SCM_RIGHTS) stands for; owns *fd*.

    Raises KfdUnavailable (and leaves *fd* open) if it is no device and no socket.
    """
    mode = os.fstat(fd).st_mode
    if stat.S_ISCHR(mode):
        return RealFile(fd)
    if stat.S_ISSOCK(mode):
        from migrate.kfd.sim.client import SimFile  # noqa: PLC0415 (it imports this module)

        return SimFile.adopt(fd)
    raise KfdUnavailable(f"fd {fd} is neither a character device nor a simulated node's socket")


def is_kfd(file: int | os.stat_result, paths: HostPaths) -> bool:
    """Whether an fd of this process (or a stat of one) is the host's /dev/kfd.

    A stat alone never tells a simulated node's socket: there it answers False.
    """
    found = os.fstat(file) if isinstance(file, int) else file
    try:
        kfd = os.stat(paths.kfd)
    except OSError:
        return False
    if stat.S_ISCHR(kfd.st_mode):
        return stat.S_ISCHR(found.st_mode) and found.st_rdev == kfd.st_rdev
    if not (stat.S_ISSOCK(kfd.st_mode) and stat.S_ISSOCK(found.st_mode)):
        return False
    return isinstance(file, int) and _leads_to(file, kfd)


def _leads_to(fd: int, node: os.stat_result) -> bool:
    """Whether the UNIX socket *fd* is connected to the socket whose inode is *node*."""
    with socket.socket(fileno=os.dup(fd)) as connection:
        if connection.family != socket.AF_UNIX:
            return False
        try:
            peer = connection.getpeername()
            return bool(peer) and os.path.samestat(os.stat(peer), node)
        except OSError:
            return False


def driver_pids(paths: HostPaths) -> set[int]:
    """Processes that are the driver itself: a simulated node is one, a kernel none."""
    try:
        if not stat.S_ISSOCK(os.stat(paths.kfd).st_mode):
            return set()
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.connect(paths.kfd)
            credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    except OSError:
        return set()
    return {int.from_bytes(credentials[:4], "little")}


def find_kfd_fds(pid: int, paths: HostPaths) -> list[int]:
    """Numbers of *pid*'s fds that are the host's /dev/kfd, ascending.

    Raises NoSuchProcess, ForeignProcess, and PtraceDenied where a simulated node's
    socket would have to be looked at and the kernel forbids it.
    """
    folder = f"/proc/{pid}/fd"
    try:
        numbers = sorted(int(name) for name in os.listdir(folder))
    except (FileNotFoundError, ProcessLookupError) as error:
        raise NoSuchProcess(f"no process {pid}") from error
    except PermissionError as error:
        raise ForeignProcess(f"process {pid}: its files can't be listed") from error
    simulated = _is_socket(paths.kfd)
    found = []
    for number in numbers:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # closed meanwhile
            try:
                seen = os.stat(f"{folder}/{number}")
            except PermissionError as error:
                # Listing asks for the same user, following a link for permission to trace.
                raise ForeignProcess(f"process {pid}: its files can't be looked at") from error
            if is_kfd(seen, paths) or (
                simulated and stat.S_ISSOCK(seen.st_mode) and _is_kfd_elsewhere(pid, number, paths)
            ):
                found.append(number)
    return found


def _is_socket(path: str) -> bool:
    try:
        return stat.S_ISSOCK(os.stat(path).st_mode)
    except OSError:
        return False


def _is_kfd_elsewhere(pid: int, number: int, paths: HostPaths) -> bool:
    try:
        fd = steal_fd(pid, number)
    except PermissionError as error:
        raise PtraceDenied(f"process {pid}: fd {number} can't be looked at") from error
    except OSError as error:
        if error.errno == errno.EBADF:  # closed meanwhile
            return False
        raise
    try:
        return is_kfd(fd, paths)
    finally:
        os.close(fd)


_SYS_PIDFD_GETFD = 438  # the same on every architecture


def steal_fd(pid: int, number: int) -> int:
    """A duplicate in this process of fd *number* of *pid* (pidfd_getfd), close-on-exec.

    Raises OSError: EPERM without permission to trace it, EBADF, ESRCH.
    """
    pidfd = os.pidfd_open(pid)
    try:
        fd: int = _libc.syscall(_SYS_PIDFD_GETFD, pidfd, number, 0)
        if fd < 0:
            raise _os_error()
        return fd
    finally:
        os.close(pidfd)
