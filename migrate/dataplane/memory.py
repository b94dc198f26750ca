"""The ``mmap`` side of the ``MemoryAccess`` seam, and CPU ranges and blobs.

A BO's pages may vanish under us (a truncated memfd, a driver that can't bring them back). So
Python never touches the mapping itself: bytes are copied by :mod:`.sigbus`, which answers
EFAULT where a load would trap. Holes of a sparse memfd are read by pread(2), which makes no
pages of them; mincore(2) tells them, not lseek(2) with SEEK_HOLE, which looks at every page up
to the next hole: the whole rest of the file, for each piece (measured: a migration took 5 CPU
seconds a GB of a memfd of 512 MiB that way, 0.6 this way). Written is a memfd by pwrite(2) where
pages are missing, which it makes at half the cost of touching them in a mapping (measured: 0.4
against 0.7 CPU seconds a GB). Where they are present a mapping is as cheap to write to, many
threads may, and it is there for reading back (0.2, then 0.08; 0.2 by pread(2)), if its page table
is filled ahead: a store that finds no entry makes one page's, a load those of 16 (0.35 without).
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from migrate import process_vm
from migrate.dataplane import sigbus
from migrate.dataplane.access import Buffer, MemoryAccess, MemoryGone
from migrate.dataplane.chunks import address_of

LARGE = 64 << 20  # bytes; to unmap a GiB of filled page tables takes 40 ms

_libc = ctypes.CDLL(None, use_errno=True)
_POPULATE_READ = 22  # asm-generic/mman-common.h, since Linux 5.14
_madvise = _libc.madvise
_madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_mincore = _libc.mincore
_mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)


def check_bounds(size: int, offset: int, length: int) -> None:
    """Raises OSError (EINVAL) unless the range lies in an object of *size* bytes."""
    if offset < 0 or offset + length > size:
        raise OSError(errno.EINVAL, f"bytes {offset:#x} + {length:#x} of an object of {size:#x}")


def _readable(data: memoryview) -> memoryview:
    """Memory whose address Python tells: *data*, or a copy of it if it is read-only."""
    return memoryview(bytearray(data)) if data.readonly else data


class ProcessMemoryAccess:
    """*length* bytes at *address* of another process. Needs ptrace access."""

    def __init__(self, pid: int, address: int, length: int) -> None:
        self._pid = pid
        self._address = address
        self.size = length

    def read(self, offset: int, into: memoryview) -> None:
        """See MemoryAccess. ESRCH, EFAULT, EPERM."""
        check_bounds(self.size, offset, len(into))
        if not len(into):
            return
        try:
            process_vm.read(self._pid, address_of(into), self._address + offset, len(into))
        except OSError as error:
            if error.errno != errno.EFAULT or not self._read_device(offset, into):
                raise

    def _read_device(self, offset: int, into: memoryview) -> bool:
        """Read a mapping of a device's memory, as BOs' are; whether it was one.

        It has no pages to lend (VM_PFNMAP), but /proc/PID/mem asks its driver
        (``__access_remote_vm`` in mm/memory.c, ``ttm_bo_vm_access``).
        """
        try:
            with open(f"/proc/{self._pid}/mem", "rb", buffering=0) as memory:
                return os.preadv(memory.fileno(), [into], self._address + offset) == len(into)
        except OSError:
            return False

    def write(self, offset: int, data: memoryview) -> None:
        """See MemoryAccess. ESRCH, EFAULT, EPERM."""
        check_bounds(self.size, offset, len(data))
        if len(data):
            source = _readable(data)
            process_vm.write(self._pid, address_of(source), self._address + offset, len(data))

    def close(self) -> None:
        """Nothing is held."""


class BytesAccess:
    """A blob in our own memory; writable if *data* is."""

    def __init__(self, data: Buffer) -> None:
        self._data = memoryview(data)
        self.size = len(data)

    def read(self, offset: int, into: memoryview) -> None:
        """See MemoryAccess."""
        check_bounds(self.size, offset, len(into))
        into[:] = self._data[offset : offset + len(into)]

    def write(self, offset: int, data: memoryview) -> None:
        """See MemoryAccess."""
        check_bounds(self.size, offset, len(data))
        self._data[offset : offset + len(data)] = data

    def close(self) -> None:
        """Release the view."""
        self._data.release()


class PartAccess:
    """*size* bytes from *offset* of another object; ``close`` closes that one."""

    def __init__(self, whole: MemoryAccess, offset: int, size: int) -> None:
        self._whole = whole
        self._offset = offset
        self.size = size

    def read(self, offset: int, into: memoryview) -> None:
        """See MemoryAccess."""
        check_bounds(self.size, offset, len(into))
        self._whole.read(self._offset + offset, into)

    def write(self, offset: int, data: memoryview) -> None:
        """See MemoryAccess."""
        check_bounds(self.size, offset, len(data))
        self._whole.write(self._offset + offset, data)

    def close(self) -> None:
        """See MemoryAccess."""
        self._whole.close()


class MmapAccess:
    """A BO through its dmabuf, or any memfd or file. Owns *fd* if *own* is true.

    ``offset`` is where the object starts in the file, in bytes: 0 for a dmabuf. It is mapped
    whole at the first read, until ``close``. ``cached``: of a dmabuf, whether its mapping is
    ordinary cached memory; a file's always is.
    """

    def __init__(
        self, fd: int, size: int, *, offset: int = 0, own: bool = True, cached: bool = False
    ) -> None:
        self._fd = fd
        self._own = own
        self._base = offset
        self.size = size
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._map: mmap.mmap | None = None
        self._mapping: sigbus.Mapping | None = None
        self._closed = False
        self._users = 0  # copies under way
        self._writing = threading.Lock()  # of the file: see _file_write
        self.by_file = self._readable()  # whether it is written by pwrite
        self._cached = cached or self.by_file

    def _readable(self) -> bool:
        try:
            os.pread(self._fd, 1, self._base)
        except OSError:  # dmabufs have no read method: EINVAL
            return False
        return True

    def read(self, offset: int, into: memoryview) -> None:
        """See MemoryAccess. EFAULT if the object's pages are gone, then and for good."""
        check_bounds(self.size, offset, len(into))
        if not len(into):
            return
        with self._using() as mapping:
            if not self.by_file or _is_present(mapping.start + offset, len(into)):
                sigbus.copy(address_of(into), mapping.start + offset, len(into), mapping)
            else:
                self._file_read(offset, into)

    @contextmanager
    def lend(self, offset: int, length: int) -> Iterator[memoryview | None]:
        """See InPlace. None of what is slow to read, and of holes."""
        check_bounds(self.size, offset, length)
        if not self._cached or not length:
            yield None
            return
        with self._using() as mapping:
            if self.by_file and not _is_present(mapping.start + offset, length):
                yield None
                return
            assert self._map is not None
            with sigbus.reading(mapping), memoryview(self._map)[offset : offset + length] as data:
                yield data

    def write(self, offset: int, data: memoryview) -> None:
        """See MemoryAccess. EFAULT if the object's pages are gone, then and for good."""
        check_bounds(self.size, offset, len(data))
        if not len(data):
            return
        with self._using() as mapping:
            start = mapping.start + offset
            if self.by_file and not _is_present(start, len(data)):
                self._file_write(offset, data)
                return
            if self.by_file:
                _fill_page_table(start, len(data))
            source = _readable(data)
            sigbus.copy(start, address_of(source), len(data), mapping)

    def close(self) -> None:
        """See MemoryAccess. Idempotent; other threads' copies end first, new ones fail.

        A large mapping is given back a moment later, by a thread of its own: nobody waits for it;
        one that an error's traceback still has a view of, when that is gone.
        """
        with self._idle:
            if self._closed:
                return
            self._closed = True
            while self._users:
                self._idle.wait()
            gone, self._map, self._mapping = self._map, None, None
        if gone is not None and self.size >= LARGE:
            threading.Thread(target=_unmap, args=(gone,), name="unmap").start()
        elif gone is not None:
            _unmap(gone)
        if self._own:
            os.close(self._fd)

    @contextmanager
    def _using(self) -> Iterator[sigbus.Mapping]:
        """The mapping, which ``close`` leaves alone meanwhile."""
        mapping = self._begin()
        try:
            yield mapping
        finally:
            with self._idle:
                self._users -= 1
                if self._closed:
                    self._idle.notify_all()

    def _begin(self) -> sigbus.Mapping:
        with self._lock:
            if self._closed:
                raise MemoryGone(errno.EBADF, os.strerror(errno.EBADF))
            if self._mapping is None:
                try:
                    self._map = mmap.mmap(self._fd, self.size, offset=self._base)
                except ValueError as error:  # Python looks at a file's size before it maps
                    message = f"Bad address: the object shrank: {error}"
                    raise MemoryGone(errno.EFAULT, message) from error
                except OSError as error:
                    raise MemoryGone(error.errno, f"can't be mapped: {error.strerror}") from error
                pages = -(-self.size // mmap.PAGESIZE) * mmap.PAGESIZE
                self._mapping = sigbus.Mapping(address_of(memoryview(self._map)), pages)
            self._mapping.check()
            self._users += 1
            return self._mapping

    def _file_read(self, offset: int, into: memoryview) -> None:
        done = 0
        while done < len(into):
            count = os.preadv(self._fd, [into[done:]], self._base + offset + done)
            if not count:
                raise OSError(errno.EFAULT, f"Bad address: the object ends before {offset:#x}")
            done += count

    def _file_write(self, offset: int, data: memoryview) -> None:
        # One at a time, as in the kernel, where the others would spin for the inode's lock
        # (two threads, measured: 0.57 CPU seconds a GB, waiting here 0.36).
        with self._writing:
            done = 0
            while done < len(data):
                done += os.pwrite(self._fd, data[done:], self._base + offset + done)


def _unmap(block: mmap.mmap) -> None:
    with suppress(BufferError):
        block.close()


def _fill_page_table(address: int, length: int) -> None:
    """Let a mapped range whose pages are present be used without faults; a hint, no more."""
    start = address & -mmap.PAGESIZE
    _madvise(start, address + length - start, _POPULATE_READ)


def _is_present(address: int, length: int) -> bool:
    """Whether all pages of a mapped range are in memory; to touch others would make them."""
    start = address & -mmap.PAGESIZE
    pages = -(-(address + length - start) // mmap.PAGESIZE)
    found = ctypes.create_string_buffer(pages)  # a byte a page, 1: present
    return not _mincore(start, address + length - start, found) and found.raw.count(1) == pages
