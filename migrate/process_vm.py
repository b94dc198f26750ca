"""process_vm_readv(2) and process_vm_writev(2): memory of a process by address, with EFAULT.

They need the permission to trace the process, not a tracer; on oneself they do what
copy_from_user does: a wrong address is an error and no signal.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable


class _IoVec(ctypes.Structure):
    _fields_ = (("iov_base", ctypes.c_void_p), ("iov_len", ctypes.c_size_t))


_libc = ctypes.CDLL(None, use_errno=True)
_VECTOR = ctypes.POINTER(_IoVec)
_PROTOTYPE = (ctypes.c_int, _VECTOR, ctypes.c_ulong, _VECTOR, ctypes.c_ulong, ctypes.c_ulong)


def _function(name: str) -> Callable[..., int]:
    function = getattr(_libc, name)
    function.argtypes = _PROTOTYPE
    function.restype = ctypes.c_ssize_t
    return function  # type: ignore[no-any-return]


_readv = _function("process_vm_readv")
_writev = _function("process_vm_writev")


def read(pid: int, local: int, remote: int, length: int) -> None:
    """Copy *length* bytes from *remote* in *pid* to *local* of ours, addresses both.

    Raises OSError (ESRCH, EFAULT, EPERM), maybe after a part was copied.
    """
    _move(_readv, pid, local, remote, length)


def write(pid: int, local: int, remote: int, length: int) -> None:
    """The other way. Raises as ``read``."""
    _move(_writev, pid, local, remote, length)


def _move(function: Callable[..., int], pid: int, local: int, remote: int, length: int) -> None:
    if not 0 <= remote <= (1 << 64) - length:
        raise OSError(errno.EFAULT, f"{os.strerror(errno.EFAULT)}: {remote:#x} of pid {pid}")
    done = 0
    while done < length:  # one call moves less than 2 GiB
        ours = _IoVec(local + done, length - done)
        theirs = _IoVec(remote + done, length - done)
        moved = function(pid, ctypes.byref(ours), 1, ctypes.byref(theirs), 1, 0)
        if moved <= 0:
            code = ctypes.get_errno() if moved < 0 else errno.EFAULT
            raise OSError(code, f"{os.strerror(code)}: {remote + done:#x} of pid {pid}")
        done += moved
