"""The ``mmap`` side of the ``MemoryAccess`` seam, and CPU ranges and blobs.

A BO may shrink under us (the job frees it, a truncated memfd): a load from its mapping would
be SIGBUS and end the agent. So Python never touches the mapping itself; the kernel copies,
and answers EFAULT where a load would trap:

* a file that can be read (memfd) by pread and pwrite, without a mapping at all;
* a dmabuf by a mapping of a window at a time (our PSS stays small) and process_vm_readv on
  ourselves, or, where the pages are device memory that it refuses (VM_PFNMAP, as TTM maps
  VRAM), by write(2) from the mapping into a scratch memfd, which copies by plain loads.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading

from migrate.dataplane.chunks import address_of

WINDOW = 4 << 20  # bytes of a BO mapped at a time by one thread

_libc = ctypes.CDLL(None, use_errno=True)


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


for _name in ("process_vm_readv", "process_vm_writev"):
    _call = getattr(_libc, _name)
    _call.restype = ctypes.c_ssize_t
    _call.argtypes = (
        ctypes.c_int,
        ctypes.POINTER(_Iovec),
        ctypes.c_ulong,
        ctypes.POINTER(_Iovec),
        ctypes.c_ulong,
        ctypes.c_ulong,
    )


def _move(name: str, pid: int, mine: int, theirs: int, length: int) -> None:
    """process_vm_readv(2) or writev of *length* bytes. Raises OSError, also if cut short."""
    done = 0
    while done < length:
        local = _Iovec(mine + done, length - done)
        remote = _Iovec(theirs + done, length - done)
        count = getattr(_libc, name)(pid, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)
        if count < 0:
            code = ctypes.get_errno()
            raise OSError(code, f"{name} of pid {pid} at {theirs + done:#x}: {os.strerror(code)}")
        if not count:
            raise OSError(errno.EFAULT, f"{name} of pid {pid} at {theirs + done:#x} moved nothing")
        done += count


def _bounds(size: int, offset: int, length: int) -> None:
    if offset < 0 or offset + length > size:
        raise OSError(errno.EINVAL, f"bytes {offset:#x} + {length:#x} of an object of {size:#x}")


class ProcessMemoryAccess:
    """A range of another process's memory. Needs ptrace access (process_vm_readv(2))."""

    def __init__(self, pid: int, address: int, length: int) -> None:
        self._pid = pid
        self._address = address
        self.size = length

    def view(self, offset: int, length: int) -> memoryview | None:
        """Always None: the memory is another process's."""
        return None

    def read(self, offset: int, into: memoryview) -> None:
        """See MemoryAccess."""
        _bounds(self.size, offset, len(into))
        if len(into):
            at = self._address + offset
            _move("process_vm_readv", self._pid, address_of(into), at, len(into))

    def write(self, offset: int, data: memoryview) -> None:
        """See MemoryAccess. *data* must be writable memory of ours or bytes."""
        _bounds(self.size, offset, len(data))
        if not len(data):
            return
        source = data if not data.readonly else memoryview(bytearray(data))
        at = self._address + offset
        _move("process_vm_writev", self._pid, address_of(source), at, len(source))

    def close(self) -> None:
        """Nothing is held."""


class BytesAccess:
    """A blob in our own memory; writable if made of a bytearray."""

    def __init__(self, data: bytes | bytearray) -> None:
        self._data = memoryview(data)
        self.size = len(data)

    def view(self, offset: int, length: int) -> memoryview | None:
        """See MemoryAccess."""
        return self._data[offset : offset + length]

    def read(self, offset: int, into: memoryview) -> None:
        """See MemoryAccess."""
        _bounds(self.size, offset, len(into))
        into[:] = self._data[offset : offset + len(into)]

    def write(self, offset: int, data: memoryview) -> None:
        """See MemoryAccess."""
        _bounds(self.size, offset, len(data))
        self._data[offset : offset + len(data)] = data

    def close(self) -> None:
        """Release the view."""
        self._data.release()


class MmapAccess:
    """A BO through its dmabuf, or any memfd or file. Owns *fd* if *own* is true.

    ``offset`` is where the object starts in the file, in bytes: 0 for a dmabuf.
    """

    def __init__(self, fd: int, size: int, *, offset: int = 0, own: bool = True) -> None:
        self._fd = fd
        self._own = own
        self._base = offset
        self.size = size
        self._local = threading.local()
        self._lock = threading.Lock()
        self._windows: list[_Window] = []
        self._closed = False
        self.by_file = self._readable()

    def _readable(self) -> bool:
        try:
            os.pread(self._fd, 1, self._base)
        except OSError:  # dmabufs have no read method: EINVAL
            return False
        return True

    def view(self, offset: int, length: int) -> memoryview | None:
        """Always None: a load from the mapping of a BO that was freed is SIGBUS."""
        return None

    def read(self, offset: int, into: memoryview) -> None:
        """See MemoryAccess. EFAULT if the object's pages are gone."""
        _bounds(self.size, offset, len(into))
        if self.by_file:
            self._file_read(offset, into)
            return
        for at, part in self._pieces(offset, into):
            self._window().read(at, part)

    def write(self, offset: int, data: memoryview) -> None:
        """See MemoryAccess. EFAULT if the object's pages are gone."""
        _bounds(self.size, offset, len(data))
        if self.by_file:
            self._file_write(offset, data)
            return
        for at, part in self._pieces(offset, data):
            self._window().write(at, part)

    def close(self) -> None:
        """See MemoryAccess. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            for window in self._windows:
                window.close()
        if self._own:
            os.close(self._fd)

    def _pieces(self, offset: int, data: memoryview) -> list[tuple[int, memoryview]]:
        """*data* cut where windows end: (offset in the object, part)."""
        pieces = []
        done = 0
        while done < len(data):
            at = offset + done
            length = min(len(data) - done, WINDOW - at % WINDOW)
            pieces.append((at, data[done : done + length]))
            done += length
        return pieces

    def _window(self) -> _Window:
        window: _Window | None = getattr(self._local, "window", None)
        if window is None:
            window = self._local.window = _Window(self._fd, self._base, self.size)
            with self._lock:
                self._windows.append(window)
        return window

    def _file_read(self, offset: int, into: memoryview) -> None:
        done = 0
        while done < len(into):
            count = os.preadv(self._fd, [into[done:]], self._base + offset + done)
            if not count:
                raise OSError(errno.EFAULT, f"the object ends before {offset + done:#x}")
            done += count

    def _file_write(self, offset: int, data: memoryview) -> None:
        done = 0
        while done < len(data):
            done += os.pwrite(self._fd, data[done:], self._base + offset + done)


class _Window:
    """One thread's sliding mapping of a file that only mmap can reach."""

    def __init__(self, fd: int, base: int, size: int) -> None:
        self._fd = fd
        self._base = base
        self._size = size
        self._start = -1
        self._map: mmap.mmap | None = None
        self._scratch = -1

    def _at(self, offset: int, length: int) -> memoryview:
        """The mapping's bytes, never to be touched by Python."""
        start = offset - offset % WINDOW
        if self._map is None or start != self._start:
            if self._map is not None:
                self._map.close()
                self._map = None
            length_mapped = min(WINDOW, self._size - start)
            try:
                self._map = mmap.mmap(self._fd, length_mapped, offset=self._base + start)
            except ValueError as error:  # Python looks at a file's size before it maps
                raise OSError(errno.EFAULT, f"Bad address: the object shrank: {error}") from error
            self._start = start
        return memoryview(self._map)[offset - start : offset - start + length]

    def read(self, offset: int, into: memoryview) -> None:
        with self._at(offset, len(into)) as source:
            if self._scratch < 0:
                try:
                    mine, theirs = address_of(into), address_of(source)
                    _move("process_vm_readv", os.getpid(), mine, theirs, len(into))
                except OSError as error:
                    if error.errno != errno.EFAULT:
                        raise
                else:
                    return
            self._copy_by_file(source, into)

    def _copy_by_file(self, source: memoryview, into: memoryview) -> None:
        """Loads by the kernel's copy_from_user: any mapping, EFAULT in place of SIGBUS."""
        if self._scratch < 0:
            self._scratch = os.memfd_create("migrate-scratch", os.MFD_CLOEXEC)
        done = 0
        while done < len(into):
            count = os.pwrite(self._scratch, source[done:], 0)
            part = into[done : done + count]
            if os.preadv(self._scratch, [part], 0) != count:
                raise OSError(errno.EIO, "scratch file cut short")
            done += count

    def write(self, offset: int, data: memoryview) -> None:
        with self._at(offset, len(data)) as target:
            if not data.readonly and self._scratch < 0:
                try:
                    mine, theirs = address_of(data), address_of(target)
                    _move("process_vm_writev", os.getpid(), mine, theirs, len(data))
                except OSError as error:
                    if error.errno != errno.EFAULT:
                        raise
                else:
                    return
            self._store_by_file(data, target)

    def _store_by_file(self, data: memoryview, target: memoryview) -> None:
        """Stores by the kernel's copy_to_user, as ``_copy_by_file`` loads."""
        if self._scratch < 0:
            self._scratch = os.memfd_create("migrate-scratch", os.MFD_CLOEXEC)
        done = 0
        while done < len(data):
            count = os.pwrite(self._scratch, data[done:], 0)
            put = 0
            while put < count:
                put += os.preadv(self._scratch, [target[done + put : done + count]], put)
            done += count

    def close(self) -> None:
        if self._map is not None:
            self._map.close()
            self._map = None
        if self._scratch >= 0:
            os.close(self._scratch)
            self._scratch = -1
