"""Memory of another process: process_vm_readv(2) and process_vm_writev(2).

They need the permission to trace the process, not a tracer, and block no other thread
of this process.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable


class _IoVec(ctypes.Structure):
    _fields_ = (("iov_base", ctypes.c_void_p), ("iov_len", ctypes.c_size_t))


_libc = ctypes.CDLL(None, use_errno=True)


def _function(name: str) -> Callable[..., int]:
    function = getattr(_libc, name)
    vector = ctypes.POINTER(_IoVec)
    function.argtypes = (
        ctypes.c_int,
        vector,
        ctypes.c_ulong,
        vector,
        ctypes.c_ulong,
        ctypes.c_ulong,
    )
    function.restype = ctypes.c_ssize_t
    return function  # type: ignore[no-any-return]


_readv = _function("process_vm_readv")
_writev = _function("process_vm_writev")


class ProcessMemory:
    """``MemoryAccess`` to *length* bytes at *address* of process *pid*."""

    def __init__(self, pid: int, address: int, length: int) -> None:
        self._pid = pid
        self._address = address
        self.size = length

    def view(self, offset: int, length: int) -> memoryview | None:
        """Another process's memory has no view here: always None."""
        return None

    def read(self, offset: int, into: memoryview) -> None:
        """Fill *into* from *offset*. Raises OSError (ESRCH, EFAULT, EPERM)."""
        local = (ctypes.c_ubyte * len(into)).from_buffer(into)
        self._move(_readv, offset, ctypes.addressof(local), len(into))

    def write(self, offset: int, data: memoryview) -> None:
        """Write *data* at *offset*. Raises OSError (ESRCH, EFAULT, EPERM)."""
        source: ctypes.Array[ctypes.c_ubyte]
        kind = ctypes.c_ubyte * len(data)
        source = kind.from_buffer_copy(data) if data.readonly else kind.from_buffer(data)
        self._move(_writev, offset, ctypes.addressof(source), len(data))

    def _move(self, function: Callable[..., int], offset: int, local: int, length: int) -> None:
        if offset < 0 or offset + length > self.size:
            raise OSError(errno.EFAULT, f"{length} bytes at {offset} of {self.size}")
        done = 0
        while done < length:  # one call moves less than 2 GiB
            ours = _IoVec(local + done, length - done)
            theirs = _IoVec(self._address + offset + done, length - done)
            moved = function(self._pid, ctypes.byref(ours), 1, ctypes.byref(theirs), 1, 0)
            if moved <= 0:
                number = ctypes.get_errno() if moved < 0 else errno.EFAULT
                raise OSError(number, os.strerror(number))
            done += moved

    def close(self) -> None:
        """Nothing is held."""
