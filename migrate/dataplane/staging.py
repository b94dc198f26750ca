"""Where received chunks wait until their BO exists: one sparse mapping an object.

The mapping is private anonymous memory with huge pages asked for: measured here, first touch
of it runs at 14 GB/s, of a memfd's mapping at 1.5 and pwrite to a fresh memfd at 3. Frames are
decrypted straight into it. Before that the chunks they cover become unknown in the table and
known again only when frame and digests were found right, so what the table knows is always
true of the memory. Chunks that are zero are never touched.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from migrate.dataplane.access import InPlace, MemoryAccess
from migrate.dataplane.chunks import (
    DIGEST_SIZE,
    ChunkTable,
    address_of,
    chunk_count,
    digests_of,
    is_zero_at,
)
from migrate.dataplane.messages import STATE_CHUNKS, ObjectInfo
from migrate.errors import FrameRejected, InsufficientMemory, VerificationFailed

HUGE_PAGE = 2 << 20  # bytes
PIECE = HUGE_PAGE  # moved at a time by place and verify; whole huge pages are given back
MAX_WORKERS = 8  # threads that place or verify one object
WORTH_A_THREAD = 8 << 20  # bytes
WORTH_SHARING = 2 * WORTH_A_THREAD  # bytes of one object
PAGE = mmap.PAGESIZE
_POPULATE_WRITE = 23  # asm-generic/mman-common.h, since Linux 5.14
T = TypeVar("T")
_NORESERVE = 0x4000  # asm-generic/mman.h; the mmap module lacks it


class StagedObject:
    """One object at the destination: its memory and what is known of its chunks."""

    def __init__(self, info: ObjectInfo) -> None:
        self.info = info
        self.table = ChunkTable(info.size, info.chunk)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE
        self._map = mmap.mmap(-1, -(-max(info.size, 1) // PAGE) * PAGE, flags=flags)
        # Not for core dumps; and so the kernel joins it with no mapping that is not staging.
        self._map.madvise(mmap.MADV_DONTDUMP)
        if info.size >= HUGE_PAGE:
            self._map.madvise(mmap.MADV_HUGEPAGE)
        self.memory = memoryview(self._map)[: info.size]
        self.address = address_of(memoryview(self._map))

    def populate(self) -> None:
        """Touch all of the memory ahead. Raises OSError (ENOMEM)."""
        self._map.madvise(_POPULATE_WRITE)

    def begin(self, offset: int, length: int) -> memoryview:
        """Where to put the bytes of whole chunks, unknown until ``commit``."""
        first = offset // self.info.chunk
        self.table.forget_run(first, chunk_count(length, self.info.chunk))
        return self.memory[offset : offset + length]

    def commit(self, offset: int, length: int, digests: bytes) -> None:
        """The bytes stand, if their digests are these. Raises FrameRejected if not."""
        chunk = self.info.chunk
        for index, part in enumerate(digests_of(self.memory[offset : offset + length], chunk)):
            if part != digests[index * DIGEST_SIZE : (index + 1) * DIGEST_SIZE]:
                raise FrameRejected(
                    f"object {self.info.id}: the chunk at {offset + index * chunk:#x}"
                    " fails its digest"
                )
        self.table.set_run(offset // chunk, digests)

    def copy_from(self, origin: StagedObject, start: int, offset: int, length: int) -> None:
        """Put here, at *offset*, what came for *origin* at *start*; ``commit`` is to follow.

        Raises FrameRejected if these bytes of *origin* are not all known.
        """
        chunk = origin.info.chunk
        first, count = start // chunk, chunk_count(start % chunk + length, chunk)
        known = origin.table.known[first : first + count]
        if start + length > origin.info.size or not all(known):
            raise FrameRejected(
                f"object {self.info.id}: a duplicate of bytes {start:#x} + {length:#x} of"
                f" object {origin.info.id}, which are not here"
            )
        try:  # a view keeps the mapping where it is, should another stream forget the object
            source = origin.memory[start : start + length]
        except ValueError:
            raise FrameRejected(f"object {origin.info.id} is gone") from None
        target = self.begin(offset, length)
        ctypes.memmove(address_of(target), address_of(source), length)

    def store_zeros(self, offset: int, length: int) -> None:
        """These whole chunks are zero."""
        first = offset // self.info.chunk
        count = chunk_count(length, self.info.chunk)
        self.table.forget_run(first, count)
        self.release(offset, length)
        self.table.set_run(first, self.table.zero_digests(first, count))

    def release(self, offset: int, length: int) -> None:
        """Give the memory of whole chunks back; it reads as zeros (madvise(2), DONTNEED)."""
        self._map.madvise(mmap.MADV_DONTNEED, offset, length)

    def is_zero(self, offset: int, length: int) -> bool:
        """Whether these whole chunks are known to be zero."""
        first, count = offset // self.info.chunk, chunk_count(length, self.info.chunk)
        held = self.table.digests[first * DIGEST_SIZE : (first + count) * DIGEST_SIZE]
        return all(self.table.known[first : first + count]) and (
            held == self.table.zero_digests(first, count)
        )

    @property
    def address_range(self) -> tuple[int, int]:
        """First address and the one after the last, to tell staging apart in smaps."""
        return self.address, self.address + len(self._map)

    def close(self) -> None:
        """Free the memory. Idempotent.

        A view that somebody still holds (a stream about to fail, an error's traceback) keeps
        the address range, not the memory.
        """
        if not self._map.closed:
            self._map.madvise(mmap.MADV_DONTNEED)
            with contextlib.suppress(BufferError):
                self.memory.release()
                self._map.close()


class Staging:
    """All objects of one session; *quota* caps the sum of their sizes in bytes."""

    def __init__(self, quota: int, *, max_objects: int = 1 << 15) -> None:
        self._quota = quota
        self._max_objects = max_objects
        self._lock = threading.Lock()
        self._objects: dict[int, StagedObject] = {}
        self._forgotten: set[int] = set()
        self._closed = False

    def declare(self, info: ObjectInfo) -> None:
        """Make room for an object; the same again is no error.

        Raises FrameRejected for a contradiction, InsufficientMemory over the quota.
        """
        with self._lock:
            known = self._objects.get(info.id)
            if known is not None:
                if known.info != info:
                    raise FrameRejected(f"object {info.id} declared twice, differently")
                return
            if self._closed or info.id in self._forgotten:
                raise FrameRejected(f"object {info.id} declared after its end")
            used = sum(o.info.size for o in self._objects.values())
            if used + info.size > self._quota or len(self._objects) >= self._max_objects:
                raise InsufficientMemory(
                    f"object {info.id} of {info.size} bytes exceeds what was reserved:"
                    f" {used} of {self._quota} bytes are taken"
                )
            self._objects[info.id] = StagedObject(info)

    def prepare(self, infos: Iterable[ObjectInfo]) -> None:
        """Declare objects and touch their memory before their bytes come.

        Worth it where the objects are known ahead and mostly not zero: first touch then
        costs nothing of the time on the wire. Raises as ``declare``.
        """
        for info in infos:
            self.declare(info)
            if self.get(info.id).table.known.count(0) == self.get(info.id).table.count:
                self.get(info.id).populate()

    def get(self, object_id: int) -> StagedObject:
        """Raises FrameRejected if it was not declared."""
        staged = self._objects.get(object_id)
        if staged is None:
            raise FrameRejected(f"object {object_id} was not declared")
        return staged

    def forget(self, object_id: int) -> None:
        """The object is gone at the source. Idempotent."""
        with self._lock:
            self._forgotten.add(object_id)
            staged = self._objects.pop(object_id, None)
        if staged is not None:
            staged.close()

    def objects(self) -> tuple[ObjectInfo, ...]:
        """What was declared and not forgotten."""
        with self._lock:
            return tuple(o.info for o in self._objects.values())

    def state(self) -> Iterator[tuple[ObjectInfo, int, bytes]]:
        """What is placed, in parts: object, first chunk, ``ChunkTable.export``."""
        with self._lock:
            staged = list(self._objects.values())
        for one in staged:
            for first in range(0, one.table.count, STATE_CHUNKS):
                count = min(STATE_CHUNKS, one.table.count - first)
                yield one.info, first, one.table.export(first, count)

    def address_ranges(self) -> tuple[tuple[int, int], ...]:
        """Where staging lies in this process, for the accounting of memory."""
        with self._lock:
            return tuple(o.address_range for o in self._objects.values())

    def close(self) -> None:
        """Free everything. Idempotent; no stream of the session may be running."""
        with self._lock:
            self._closed = True
            gone, self._objects = self._objects, {}
        for staged in gone.values():
            staged.close()

    # ------------------------------------------------------------ placement

    def place(self, object_id: int, target: MemoryAccess) -> int:
        """Move an object into *target*, giving staging's pages back on the way.

        Returns bytes placed. Raises VerificationFailed if a chunk never came or the sizes
        differ, OSError from the target.
        """
        staged = self._complete(object_id, target)

        def work(ranges: Iterator[tuple[int, int]]) -> None:
            buffer = memoryview(bytearray(PIECE))
            for offset, length in ranges:
                if staged.is_zero(offset, length):
                    _clear(offset, buffer[:length], target)
                else:
                    target.write(offset, staged.memory[offset : offset + length])
                    staged.release(offset, length)

        _share(staged.info.size, work)
        return staged.info.size

    def _complete(self, object_id: int, target: MemoryAccess) -> StagedObject:
        staged = self._objects.get(object_id)
        if staged is None:
            raise VerificationFailed(f"object {object_id} never came from the source")
        missing = next(staged.table.unknown(), None)
        if missing is not None:
            raise VerificationFailed(
                f"object {object_id}: the chunk at {missing * staged.info.chunk:#x} never came"
            )
        if target.size != staged.info.size:
            raise VerificationFailed(
                f"object {object_id} has {target.size} bytes here, {staged.info.size} came"
            )
        return staged

    def verify(self, object_id: int, target: MemoryAccess, expected: bytes) -> int:
        """Read *target* back and compare each chunk with the source's *expected* digests.

        Returns the number of chunks verified. Raises VerificationFailed naming object and
        offset, OSError from the target.
        """
        staged = self._complete(object_id, target)
        return verify(staged.info, target, expected)


def _clear(offset: int, buffer: memoryview, target: MemoryAccess) -> None:
    """Make a range of the target zero; one that is so already stays untouched and sparse."""
    target.read(offset, buffer)
    if not is_zero_at(address_of(buffer), len(buffer)):
        ctypes.memset(address_of(buffer), 0, len(buffer))
        target.write(offset, buffer)


def verify(info: ObjectInfo, target: MemoryAccess, expected: bytes) -> int:
    """Compare every chunk of *target* with *expected*; see ``Staging.verify``."""
    count = chunk_count(info.size, info.chunk)
    if len(expected) != count * DIGEST_SIZE or target.size != info.size:
        raise VerificationFailed(
            f"object {info.id}: the source lists {len(expected) // DIGEST_SIZE} chunks,"
            f" {count} are here"
        )

    def work(ranges: Iterator[tuple[int, int]]) -> None:
        buffer = memoryview(bytearray(PIECE))
        for offset, length in ranges:
            found = digests_at(target, offset, buffer[:length], info.chunk)
            for index, part in enumerate(found, offset // info.chunk):
                if part != expected[index * DIGEST_SIZE : (index + 1) * DIGEST_SIZE]:
                    raise VerificationFailed(
                        f"object {info.id} ({info.kind.name}): the chunk at"
                        f" {index * info.chunk:#x} differs from the source's"
                    )

    _share(info.size, work)
    return count


def digests_at(target: MemoryAccess, offset: int, room: memoryview, chunk: int) -> list[bytes]:
    """Digests of the chunks of a range as long as *room*, which is where it is read to if it
    can't be looked at where it lies. Raises OSError."""
    if isinstance(target, InPlace):
        with target.lend(offset, len(room)) as data:
            if data is not None:
                return digests_of(data, chunk)
    target.read(offset, room)
    return digests_of(room, chunk)


def pieces(size: int) -> Iterator[tuple[int, int]]:
    """(offset, length) of pieces of at most 2 MiB."""
    for offset in range(0, size, PIECE):
        yield offset, min(PIECE, size - offset)


def _share(size: int, work: Callable[[Iterator[tuple[int, int]]], None]) -> None:
    """Have the pieces of *size* bytes done by as many threads as pay."""
    in_parallel(pieces(size), work, size)


def in_parallel(parts: Iterable[T], work: Callable[[Iterator[T]], None], size: int) -> None:
    """Have *parts*, *size* bytes together, done by as many threads as pay.

    *work* takes them one by one. Raises its first error; no part is begun after one.

    The process stands meanwhile, and so do the streams: the cores have nothing else to do.
    """
    threads = min(MAX_WORKERS, len(os.sched_getaffinity(0)), size // WORTH_A_THREAD)
    if threads < 2:
        work(iter(parts))
        return
    left, lock, failed = iter(parts), threading.Lock(), threading.Event()

    def taken() -> Iterator[T]:
        while not failed.is_set():
            with lock:
                try:
                    part = next(left)
                except StopIteration:
                    return
            yield part

    def take() -> None:
        try:
            work(taken())
        except BaseException:
            failed.set()
            raise

    with ThreadPoolExecutor(threads, thread_name_prefix="data-place") as pool:
        for done in [pool.submit(take) for _ in range(threads)]:
            done.result()
