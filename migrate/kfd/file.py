"""The ``KfdFile`` seam: an open /dev/kfd or render node, wherever it is.

Implementations: a character device of this host (``RealFile``), the simulated
node's socket (``migrate.kfd.sim.client.SimFile``), and a file in another process
that runs the ioctl on our behalf (``migrate.engine.remote.RemoteFile``: the tracer
helper, the restored process, the CRIU hook). Everything above is the same code.
"""

from __future__ import annotations

import ctypes
from typing import Protocol


class Mapping(Protocol):
    """Memory mapped into this process."""

    @property
    def address(self) -> int:
        """Virtual address of the first byte."""

    def view(self) -> memoryview:
        """All of it, writable, as bytes."""

    def close(self) -> None:
        """Unmap. Every view must have been released."""


class KfdFile(Protocol):
    """An open /dev/kfd or render node."""

    def ioctl(self, request: int, arg: ctypes.Structure) -> None:
        """Run one ioctl; *arg* is updated in place, as are buffers it points to.

        File descriptors in *arg* (drm_fd, dmabuf_fd) are numbers of this process.
        Raises OSError with the kernel's errno.
        """

    def mmap(self, offset: int, length: int, address: int | None = None) -> Mapping:
        """Map *length* bytes at the file's *offset*, shared, readable and writable.

        With *address* exactly there (MAP_FIXED_NOREPLACE). Raises OSError.
        """

    def fileno(self) -> int:
        """A file descriptor of this process that stands for the open file."""

    def close(self) -> None:
        """Close it; a second close does nothing."""
