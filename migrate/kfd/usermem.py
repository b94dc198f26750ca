"""Reading and writing this process's memory by address, as the kernel does: with EFAULT.

An ioctl's argument holds plain addresses. Following a wrong one must raise
OSError(EFAULT), as copy_from_user would answer, and not end the process.
process_vm_readv(2) and process_vm_writev(2) on oneself do just that.

``GuardedBuffer`` is the other direction: memory given to the kernel that it can't
overrun. Kernels count a process's objects before they write them out, and have been
seen to write more than they counted.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Callable
from types import TracebackType
from typing import Self


class _IoVec(ctypes.Structure):
    _fields_ = (("iov_base", ctypes.c_void_p), ("iov_len", ctypes.c_size_t))


_libc = ctypes.CDLL(None, use_errno=True)
_PROTOTYPE = (
    ctypes.c_int,
    ctypes.POINTER(_IoVec),
    ctypes.c_ulong,
    ctypes.POINTER(_IoVec),
    ctypes.c_ulong,
    ctypes.c_ulong,
)


def _function(name: str) -> Callable[..., int]:
    function = getattr(_libc, name)
    function.argtypes = _PROTOTYPE
    function.restype = ctypes.c_ssize_t
    return function  # type: ignore[no-any-return]


_readv = _function("process_vm_readv")
_writev = _function("process_vm_writev")


def _transfer(function: Callable[..., int], local: int, remote: int, length: int) -> None:
    done = 0
    while done < length:  # one call moves less than 2 GiB
        ours = _IoVec(local + done, length - done)
        theirs = _IoVec(remote + done, length - done)
        moved = function(os.getpid(), ctypes.byref(ours), 1, ctypes.byref(theirs), 1, 0)
        if moved < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        if moved == 0:
            raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))
        done += moved


def read_memory(address: int, length: int) -> bytes:
    """*length* bytes at *address*. Raises OSError(EFAULT)."""
    _check(address, length)
    buffer = ctypes.create_string_buffer(length)
    _transfer(_readv, ctypes.addressof(buffer), address, length)
    return buffer.raw


def write_memory(address: int, data: bytes) -> None:
    """Write *data* at *address*. Raises OSError(EFAULT), maybe after a part was written."""
    _check(address, len(data))
    buffer = (ctypes.c_char * len(data)).from_buffer_copy(data)
    _transfer(_writev, ctypes.addressof(buffer), address, len(data))


def _check(address: int, length: int) -> None:
    if address + length > 1 << 64:
        raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))


_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_PROT_NONE = 0


class GuardedBuffer:
    """Zeroed memory of *length* bytes that ends at a page nobody can touch.

    It has an address even if *length* is 0. Writing past the end yields EFAULT (or, by
    the CPU, SIGSEGV) and damages nothing.
    """

    def __init__(self, length: int) -> None:
        page = mmap.PAGESIZE
        room = (length + page - 1) // page * page
        self._map = mmap.mmap(-1, room + page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        first = ctypes.c_char.from_buffer(self._map)
        base = ctypes.addressof(first)
        del first  # or it would keep the mapping from being closed
        if _libc.mprotect(base + room, page, _PROT_NONE):
            number = ctypes.get_errno()
            self._map.close()
            raise OSError(number, os.strerror(number))
        self.address = base + room - length
        self.view = memoryview(self._map)[room - length : room]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Unmap it; ``view`` is released, other views of it must have been before."""
        self.view.release()
        self._map.close()
