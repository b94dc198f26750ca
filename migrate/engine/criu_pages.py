"""CRIU's page files on the source: pipes, so that no such file is ever whole anywhere.

CRIU opens ``pages-N.img`` in its images folder for writing, numbers them from 1 in the order
of the files ``pagemap-*.img`` (page_ids in criu/image.c), and only appends. There it finds
links to pipes of the agent, which hands on what comes as pieces: CRIU writes no faster than
they are taken. If the agent dies, CRIU's write fails, and it lets go of the process.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from migrate.dataplane.chunks import address_of
from migrate.dataplane.memory import check_bounds
from migrate.engine.seam import Piece

PIECE = 16 << 20  # bytes
PIECES = 6  # held at a time: what the source needs beyond the process is 100 MiB
SHARED = 64  # page files that are piped beside one for each task: of shared memory
_WAIT = 0.1  # seconds between looks whether it was closed


class PagePipes:
    """The page files of one dump, which travel as *prefix* and their name."""

    def __init__(self, images: Path, count: int, prefix: str = "") -> None:
        """Links to *count* pipes in *images*; files beyond them CRIU makes itself.

        Raises OSError.
        """
        self._prefix = prefix
        self._images = images
        self._state = threading.Condition()
        self._room = PIECES
        self._buffers: list[bytearray] = []
        self._closed = False
        self._reading = False
        self._read: dict[int, str] = {}  # name by fd
        self._write: list[int] = []
        self._sizes: dict[str, int] = {}
        self._buffer: bytearray | None = None  # the piece that is being read
        self._filled, self._of, self._ended = 0, "", False
        for number in range(1, count + 1):
            read, write = os.pipe2(os.O_CLOEXEC)
            self._write.append(write)
            self._read[read] = f"pages-{number}.img"
            os.set_blocking(read, False)
            (images / self._read[read]).symlink_to(f"/proc/{os.getpid()}/fd/{write}")

    def pieces(self) -> Iterator[tuple[Piece, PieceAccess]]:
        """All that CRIU writes, until ``written``. Once; ends early if it is closed."""
        with self._state:
            if self._closed:
                return
            self._reading = True
        try:
            yield from self._pieces()
        finally:
            with self._state:
                self._reading = False
                if self._closed:
                    self._close_read()

    def _pieces(self) -> Iterator[tuple[Piece, PieceAccess]]:
        poll = select.poll()
        for fd in self._read:
            poll.register(fd, select.POLLIN)
        open_fds, under_way = len(self._read), -1
        while open_fds and not self._closed:
            for fd, _ in sorted(poll.poll(_WAIT * 1000)):  # in the order CRIU writes them
                if fd != under_way:
                    yield from self._cut()
                    under_way = fd
                while self._fill(fd):
                    yield from self._cut()
                if self._ended:
                    poll.unregister(fd)
                    open_fds -= 1
        yield from self._cut()

    def _fill(self, fd: int) -> bool:
        """Read until the pipe is empty; whether the piece is full before."""
        self._ended = False
        if self._closed:
            return False
        if self._buffer is None:
            self._buffer, self._filled, self._of = self._take(), 0, self._read[fd]
        room = memoryview(self._buffer)
        while not self._closed and self._filled < PIECE:
            try:
                count = os.readv(fd, [room[self._filled :]])
            except BlockingIOError:
                return False
            if not count:
                self._ended = True
                return False
            self._filled += count
        return not self._closed

    def _cut(self) -> Iterator[tuple[Piece, PieceAccess]]:
        """What was read is a piece."""
        buffer, self._buffer = self._buffer, None
        if buffer is None:
            return
        if not self._filled:
            self._give_back(buffer)
            return
        offset = self._sizes.get(self._of, 0)
        self._sizes[self._of] = offset + self._filled
        piece = Piece(name=self._prefix + self._of, offset=offset, size=self._filled)
        access = PieceAccess(buffer, self._filled, lambda: self._give_back(buffer))
        with self._state:
            self._reading = False  # whoever has the piece may never ask for another one
        yield piece, access
        with self._state:
            self._reading = not self._closed

    def _take(self) -> bytearray:
        """A buffer, once there is room for one; once it is closed, one that is not used."""
        with self._state:
            while not self._room and not self._closed:
                self._state.wait()
            self._room -= 1
            return self._buffers.pop() if self._buffers else bytearray(PIECE)

    def _give_back(self, buffer: bytearray) -> None:
        with self._state:
            self._room += 1
            if not self._closed:
                self._buffers.append(buffer)
            self._state.notify_all()

    def written(self) -> None:
        """CRIU is done: what is in the pipes is the rest. Idempotent."""
        with self._state:
            write, self._write = self._write, []
        for fd in write:
            os.close(fd)

    def settle(self) -> dict[str, int]:
        """Sizes of the files that went this way; what CRIU opened and left empty is a file."""
        opened = len(list(self._images.glob("pagemap-*.img")))
        for number in range(1, opened + 1):
            path = self._images / f"pages-{number}.img"
            if path.is_symlink() and path.name not in self._sizes:
                path.unlink()
                path.touch(0o600)
        return dict(self._sizes)

    def close(self) -> None:
        """Idempotent, at any time."""
        self.written()
        with self._state:
            if self._closed:
                return
            self._closed = True
            self._buffers.clear()
            self._state.notify_all()
            if not self._reading:
                self._close_read()

    def _close_read(self) -> None:
        for fd in self._read:
            os.close(fd)
        self._read = {}


class PieceAccess:
    """``MemoryAccess`` to the bytes of a piece, which are gone once it is closed."""

    def __init__(self, data: bytearray, size: int, release: Callable[[], None]) -> None:
        self._data: bytearray | None = data
        self._release = release
        self.size = size

    def read(self, offset: int, into: memoryview) -> None:
        """See MemoryAccess. EBADF if it is closed."""
        data = self._data
        if data is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        check_bounds(self.size, offset, len(into))
        if len(into):
            ctypes.memmove(address_of(into), address_of(data) + offset, len(into))

    def write(self, offset: int, data: memoryview) -> None:
        """It is read only."""
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    def close(self) -> None:
        """Idempotent."""
        data, self._data = self._data, None
        if data is not None:
            self._release()
