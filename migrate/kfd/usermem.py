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
import mmap
import os
from types import TracebackType
from typing import Self

from migrate import process_vm


def read_memory(address: int, length: int) -> bytes:
    """*length* bytes at *address*. Raises OSError(EFAULT)."""
    buffer = ctypes.create_string_buffer(length)
    process_vm.read(os.getpid(), ctypes.addressof(buffer), address, length)
    return buffer.raw


def write_memory(address: int, data: bytes) -> None:
    """Write *data* at *address*. Raises OSError(EFAULT), maybe after a part was written."""
    buffer = (ctypes.c_char * len(data)).from_buffer_copy(data)
    process_vm.write(os.getpid(), ctypes.addressof(buffer), address, len(data))


_libc = ctypes.CDLL(None, use_errno=True)
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
