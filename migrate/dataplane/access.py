"""The ``MemoryAccess`` seam: reading and writing the memory of one object.

An object is a BO (through its dmabuf), a range of CPU memory of a stopped process,
or a blob of the process engine. The data plane knows nothing else of it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
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

    def lend(self, offset: int, length: int) -> AbstractContextManager[memoryview | None]:
        """A range as it lies in memory, to be read only; None: it has to be copied by ``read``.

        It changes as the memory does. Touch it by code that holds no lock but the GIL. Raises
        MemoryGone, also at its end: whatever was made of the bytes is to be thrown away then.
        """


class MemoryGone(OSError):
    """An object, or pages of it, are gone for good, or were never there to be mapped."""
