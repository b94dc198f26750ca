"""Where received chunks wait until their BO exists: one sparse memfd an object.

Only bytes that were authenticated and whose digest was checked are written here, so what the
table knows is always true of the file. Chunks that are zero take no memory.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator

from migrate.dataplane.access import MemoryAccess
from migrate.dataplane.chunks import (
    DIGEST_SIZE,
    ChunkTable,
    address_of,
    chunk_count,
    digest,
    is_zero_at,
)
from migrate.dataplane.messages import ObjectInfo
from migrate.errors import FrameRejected, InsufficientMemory, VerificationFailed

PIECE = 1 << 20  # bytes moved at a time by place and verify
_KEEP_SIZE, _PUNCH_HOLE = 1, 2  # linux/falloc.h

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def punch(fd: int, offset: int, length: int) -> None:
    """Give the pages of a range back; it reads as zeros. Raises OSError."""
    if _libc.fallocate(fd, _KEEP_SIZE | _PUNCH_HOLE, offset, length):
        code = ctypes.get_errno()
        raise OSError(code, f"fallocate: {os.strerror(code)}")


class StagedObject:
    """One object at the destination: its file and what is known of its chunks."""

    def __init__(self, info: ObjectInfo) -> None:
        self.info = info
        self.table = ChunkTable(info.size, info.chunk)
        self.fd = os.memfd_create(f"migrate-staging-{info.id}", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, info.size)

    def store(self, offset: int, data: memoryview, digests: bytes) -> None:
        """Keep checked bytes of whole chunks."""
        first = offset // self.info.chunk
        self.table.forget_run(first, len(digests) // DIGEST_SIZE)
        done = 0
        while done < len(data):
            done += os.pwrite(self.fd, data[done:], offset + done)
        self.table.set_run(first, digests)

    def store_zeros(self, offset: int, length: int) -> None:
        """These whole chunks are zero."""
        first = offset // self.info.chunk
        count = chunk_count(length, self.info.chunk)
        if any(self.table.known[first : first + count]):
            self.table.forget_run(first, count)
            punch(self.fd, offset, length)
        self.table.set_run(first, self.table.zero_digests(first, count))

    def is_zero(self, offset: int, length: int) -> bool:
        """Whether these whole chunks are known to be zero."""
        first, count = offset // self.info.chunk, chunk_count(length, self.info.chunk)
        held = self.table.digests[first * DIGEST_SIZE : (first + count) * DIGEST_SIZE]
        return all(self.table.known[first : first + count]) and bytes(
            held
        ) == self.table.zero_digests(first, count)

    def close(self) -> None:
        """Free the file. Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class Staging:
    """All objects of one session; *quota* caps the sum of their sizes in bytes."""

    def __init__(self, quota: int, *, max_objects: int = 1 << 16) -> None:
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

    def resident(self) -> int:
        """Bytes of host memory that staging holds now."""
        with self._lock:
            return sum(os.fstat(o.fd).st_blocks * 512 for o in self._objects.values())

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
        buffer = memoryview(bytearray(PIECE))
        for offset, length in pieces(staged.info.size):
            part = buffer[:length]
            if staged.is_zero(offset, length):
                _clear(offset, part, target)
                continue
            _fill(staged.fd, offset, target.view(offset, length), part, target)
            punch(staged.fd, offset, length)
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


def _fill(
    fd: int, offset: int, view: memoryview | None, buffer: memoryview, target: MemoryAccess
) -> None:
    """Copy a piece of the staging file into the target, by its view if it has one."""
    into = buffer if view is None else view
    done = 0
    while done < len(into):
        count = os.preadv(fd, [into[done:]], offset + done)
        if not count:
            raise OSError("the staging file is too short")
        done += count
    if view is None:
        target.write(offset, buffer)


def verify(info: ObjectInfo, target: MemoryAccess, expected: bytes) -> int:
    """Compare every chunk of *target* with *expected*; see ``Staging.verify``."""
    count = chunk_count(info.size, info.chunk)
    if len(expected) != count * DIGEST_SIZE or target.size != info.size:
        raise VerificationFailed(
            f"object {info.id}: the source lists {len(expected) // DIGEST_SIZE} chunks,"
            f" {count} are here"
        )
    buffer = memoryview(bytearray(PIECE))
    for offset, length in pieces(info.size):
        part = buffer[:length]
        target.read(offset, part)
        for at in range(0, length, info.chunk):
            index = (offset + at) // info.chunk
            wanted = expected[index * DIGEST_SIZE : (index + 1) * DIGEST_SIZE]
            if digest(part[at : at + info.chunk]) != wanted:
                raise VerificationFailed(
                    f"object {info.id} ({info.kind.name}): the chunk at"
                    f" {offset + at:#x} differs from the source's"
                )
    return count


def pieces(size: int) -> Iterator[tuple[int, int]]:
    """(offset, length) of pieces of at most 1 MiB."""
    for offset in range(0, size, PIECE):
        yield offset, min(PIECE, size - offset)
