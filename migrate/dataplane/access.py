"""The ``MemoryAccess`` seam: reading and writing the memory of one object.

An object is a BO (through its dmabuf), a range of CPU memory of a stopped process,
or a blob of the process engine. The data plane knows nothing else of it.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

Buffer = bytes | bytearray | memoryview


class MemoryAccess(Protocol):
    """Random access to one object's bytes; thread-safe for disjoint ranges."""

    @property
    def size(self) -> int:
        """Bytes."""

    def read(self, offset: int, into: memoryview) -> None:
        """Fill *into* from *offset*. Raises OSError."""

    def write(self, offset: int, data: memoryview) -> None:
        """Write *data* at *offset*. Raises OSError."""

    def close(self) -> None:
        """Release mappings and fds held for this access."""


@runtime_checkable
class InPlace(Protocol):
    """What some accesses can besides: memory that is cheap to read is looked at where it lies."""

    def digests(self, offset: int, length: int, chunk: int) -> list[bytes] | None:
        """The digest of each *chunk* of a range as it is now, or None: it has to be read.

        Raises OSError.
        """
