"""``MemoryAccess`` to a file of CRIU's, by pread and pwrite: nothing of it is mapped here."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Self


class ImageFile:
    """*size* bytes of the file that *fd* is open on, which is closed with this."""

    def __init__(self, fd: int, size: int) -> None:
        self._fd = fd
        self.size = size

    @classmethod
    def at(cls, path: Path, size: int) -> Self:
        """To read a file that CRIU wrote. Raises OSError, also for a link."""
        return cls(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW), size)

    def read(self, offset: int, into: memoryview) -> None:
        """See MemoryAccess. EFAULT where the file has ended."""
        self._check(offset, len(into))
        self._read(offset, into)

    def write(self, offset: int, data: memoryview) -> None:
        """See MemoryAccess."""
        self._check(offset, len(data))
        self._write(offset, data)

    def _read(self, offset: int, into: memoryview) -> None:
        done = 0
        while done < len(into):
            count = os.preadv(self._fd, [into[done:]], offset + done)
            if not count:
                raise OSError(errno.EFAULT, f"the file ends before {offset + done:#x}")
            done += count

    def _write(self, offset: int, data: memoryview) -> None:
        done = 0
        while done < len(data):
            done += os.pwrite(self._fd, data[done:], offset + done)

    def close(self) -> None:
        """Idempotent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _check(self, offset: int, length: int) -> None:
        if offset < 0 or offset + length > self.size:
            raise OSError(errno.EINVAL, f"bytes {offset:#x} + {length:#x} of {self.size:#x}")
