"""Memory of the simulated GPUs: backings (sparse memfds), BOs, GPU address spaces.

A backing is the memory itself; a BO is a process's handle to it. Whoever outside the
node holds a backing (a mapping, a dmabuf) holds a *re-opened* description of its
memfd, as does the node, so that the inode's writer count tells whether anybody does:
F_SETLEASE(F_WRLCK) succeeds only for the one and only writer. That is how VRAM of
freed BOs stays allocated while somebody still has a dmabuf of it.
"""

from __future__ import annotations

import bisect
import ctypes
import errno
import fcntl
import mmap
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from migrate.kfd import uapi

if TYPE_CHECKING:
    from migrate.kfd.sim.device import Gpu
    from migrate.kfd.sim.process import DeviceData, SimProcess

PAGE = 4096
_ZEROS = memoryview(bytes(2 << 20))
Bytes = NDArray[np.uint8]


def align_up(size: int, step: int) -> int:
    """ALIGN(): *size* rounded up to a multiple of *step*, a power of two."""
    return (size + step - 1) & ~(step - 1)


def page_align(size: int) -> int:
    """Bytes rounded up to whole pages."""
    return align_up(size, PAGE)


class Backing:
    """Memory of *size* bytes that can be mapped and passed around; sparse, zeroed."""

    def __init__(self, name: str, size: int, vram_of: Gpu | None = None) -> None:
        self.size = size
        self.vram_of = vram_of
        self.users = 0  # BOs of it
        self._window: mmap.mmap | None = None
        raw = os.memfd_create(name, os.MFD_CLOEXEC)
        try:
            os.ftruncate(raw, size)
            self.fd = os.open(f"/proc/self/fd/{raw}", os.O_RDWR | os.O_CLOEXEC)
        except OverflowError:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)) from None
        finally:
            os.close(raw)

    def reopen(self) -> int:
        """A new open file description of the memory, for somebody outside the node."""
        return os.open(f"/proc/self/fd/{self.fd}", os.O_RDWR | os.O_CLOEXEC)

    @property
    def inode(self) -> int:
        """Number that tells which backing a passed fd is of."""
        return os.fstat(self.fd).st_ino

    def is_held(self) -> bool:
        """Whether anybody outside the node has an fd or a mapping of it."""
        try:
            fcntl.fcntl(self.fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        except BlockingIOError:
            return True
        fcntl.fcntl(self.fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        return False

    def window(self) -> mmap.mmap:
        """The whole memory in the node's address space; made when first needed."""
        if self._window is None:
            self._window = mmap.mmap(self.fd, self.size)
        return self._window

    def forget_window(self) -> None:
        """Drop the mapping; views that are still used keep it alive until they go."""
        self._window = None

    def wipe(self) -> None:
        """Make it zero, every page of it populated. Nobody else holds it. Raises OSError."""
        self._window = None
        for offset in range(0, self.size, len(_ZEROS)):
            os.pwrite(self.fd, _ZEROS[: self.size - offset], offset)

    def close(self) -> None:
        """Give the memory back (to those who still hold it, it stays)."""
        self._window = None
        os.close(self.fd)


class FreeVram:
    """Freed VRAM of one GPU that stays populated, for BOs of the same size to come.

    A card's VRAM is there before anything is in it; a fresh memfd's pages are made one by one
    at their first touch. So up to *limit* bytes, those in use among them, are not given back
    when they are freed. They are wiped then, as by AMDGPU_GEM_CREATE_VRAM_WIPE_ON_RELEASE, which
    KFD sets for every BO in VRAM.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._free: list[Backing] = []  # the oldest first

    def put(self, backing: Backing, used: int) -> None:
        """Take what was freed and nobody holds; *used* bytes are in use without it."""
        if used + self._bytes() + backing.size > self._limit:
            backing.close()
            return
        try:
            backing.wipe()
        except OSError:  # the host is short of memory: pages that were never touched
            backing.close()
        else:
            self._free.append(backing)

    def take(self, size: int, used: int) -> Backing | None:
        """Memory of just *size* bytes, which are among the *used* ones; None: there is none."""
        found = next((backing for backing in self._free if backing.size == size), None)
        if found is not None:
            self._free.remove(found)
        while self._free and used + self._bytes() > self._limit:
            self._free.pop(0).close()
        return found

    def _bytes(self) -> int:
        return sum(backing.size for backing in self._free)


@dataclass(eq=False)
class Bo:
    """One buffer object of one process, as ALLOC_MEMORY_OF_GPU made it."""

    owner: DeviceData
    va: int
    size: int  # bytes of memory; an AQL_QUEUE_MEM BO has twice as many addresses
    flags: int
    mmap_offset: int
    backing: Backing | None  # None: a userptr, the memory is the process's own
    user_address: int = 0
    imported: bool = False
    mapped: list[DeviceData] = field(default_factory=list)

    @property
    def span(self) -> int:
        """Bytes of GPU virtual addresses."""
        return (
            self.size * 2 if self.flags & uapi.KFD_IOC_ALLOC_MEM_FLAGS_AQL_QUEUE_MEM else self.size
        )


class GpuFault(Exception):
    """A GPU access to an address that is not mapped, or not so."""

    def __init__(self, address: int, *, write: bool) -> None:
        super().__init__(f"GPU access to {address:#x}")
        self.address = address
        self.write = write


class AddressSpace:
    """What one process has mapped on one GPU: GPU virtual address to BO."""

    def __init__(self, process: SimProcess) -> None:
        self._process = process
        self._starts: list[int] = []
        self._bos: list[Bo] = []

    def insert(self, bo: Bo) -> None:
        """Map *bo*. Raises OSError(EINVAL) if its addresses are taken or not pages."""
        at = bisect.bisect_left(self._starts, bo.va)
        before = self._bos[at - 1] if at else None
        after = self._bos[at] if at < len(self._bos) else None
        if (
            bo.va % PAGE
            or (before is not None and before.va + before.span > bo.va)
            or (after is not None and bo.va + bo.span > after.va)
        ):
            raise OSError(errno.EINVAL, "GPU address conflict")
        self._starts.insert(at, bo.va)
        self._bos.insert(at, bo)

    def remove(self, bo: Bo) -> None:
        """Unmap *bo*."""
        at = self._bos.index(bo)
        del self._starts[at], self._bos[at]

    def _pieces(self, address: int, length: int, *, write: bool) -> list[tuple[Bo, int, int]]:
        """(BO, offset, length) of the pieces that make up a range. Raises GpuFault."""
        pieces = []
        while length > 0:
            at = bisect.bisect_right(self._starts, address) - 1
            bo = self._bos[at] if at >= 0 else None
            if bo is None or address >= bo.va + bo.span:
                raise GpuFault(address, write=write)
            if write and not bo.flags & uapi.KFD_IOC_ALLOC_MEM_FLAGS_WRITABLE:
                raise GpuFault(address, write=write)
            offset = (address - bo.va) % bo.size
            part = min(length, bo.size - offset)
            pieces.append((bo, offset, part))
            address += part
            length -= part
        return pieces

    def view(self, address: int, length: int, *, write: bool = False) -> Bytes | None:
        """A live view of a range, or None where it is not one piece of node memory."""
        pieces = self._pieces(address, length, write=write)
        if len(pieces) != 1 or pieces[0][0].backing is None:
            return None
        bo, offset, part = pieces[0]
        assert bo.backing is not None
        return np.frombuffer(bo.backing.window(), np.uint8, part, offset)

    def read(self, address: int, length: int) -> Bytes:
        """The bytes of a range; a view where possible, else a copy. Raises GpuFault."""
        view = self.view(address, length)
        if view is not None:
            return view
        out = np.empty(length, np.uint8)
        at = 0
        for bo, offset, part in self._pieces(address, length, write=False):
            out[at : at + part] = self._read_piece(bo, offset, part, address + at)
            at += part
        return out

    def write(self, address: int, data: Bytes) -> None:
        """Store *data* at an address. Raises GpuFault."""
        at = 0
        for bo, offset, part in self._pieces(address, len(data), write=True):
            piece = data[at : at + part]
            if bo.backing is not None:
                np.frombuffer(bo.backing.window(), np.uint8, part, offset)[:] = piece
            elif not self._process.write_memory(bo.user_address + offset, piece.tobytes()):
                raise GpuFault(address + at, write=True)
            at += part

    def _read_piece(self, bo: Bo, offset: int, part: int, address: int) -> Bytes:
        if bo.backing is not None:
            return np.frombuffer(bo.backing.window(), np.uint8, part, offset)
        data = self._process.read_memory(bo.user_address + offset, part)
        if data is None:
            raise GpuFault(address, write=False)
        return np.frombuffer(data, np.uint8)

    def load_u64(self, address: int) -> int:
        """One aligned u64. Raises GpuFault."""
        return int(self.read(address, 8).view(np.uint64)[0])

    def store_u64(self, address: int, value: int) -> None:
        """One aligned u64, in one store where the memory is the node's. Raises GpuFault."""
        word = np.array([value & 0xFFFFFFFFFFFFFFFF], np.uint64)
        view = self.view(address, 8, write=True)
        if view is None:
            self.write(address, word.view(np.uint8))
        else:
            view.view(np.uint64)[0] = word[0]

    def load_struct(self, address: int, kind: type[ctypes.Structure]) -> ctypes.Structure:
        """A copy of the struct at *address*. Raises GpuFault."""
        return kind.from_buffer_copy(self.read(address, ctypes.sizeof(kind)).tobytes())
