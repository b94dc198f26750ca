"""The ``MemoryAccess`` seam: reading and writing the memory of one object.

An object is a BO (through its dmabuf), a range of CPU memory of a stopped process,
or a blob of the process engine. The data plane knows nothing else of it.
"""

from __future__ import annotations

from typing import Protocol

Buffer = bytes | bytearray | memoryview


class MemoryAccess(Protocol):
    """Random access to one object's bytes; thread-safe for disjoint ranges."""

    @property
    def size(self) -> int:
        """Bytes."""

    def view(self, offset: int, length: int) -> memoryview | None:
        """A live, zero-copy view of a range, or None where the CPU can't have one."""

    def read(self, offset: int, into: memoryview) -> None:
        """Fill *into* from *offset*. Raises OSError."""

    def write(self, offset: int, data: memoryview) -> None:
        """Write *data* at *offset*. Raises OSError."""

    def close(self) -> None:
        """Release mappings and fds held for this access."""
