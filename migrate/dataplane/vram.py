"""Which side of the ``MemoryAccess`` seam serves a BO: ``mmap`` or the card's DMA engine.

GTT is host memory and always mapped. VRAM is read through the BAR at a small fraction of the
link on ordinary PCIe cards, and at memory speed where it is coherent to the CPU: which of the
two sides is faster is measured, per card and direction, at the first use.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import Literal, get_args

import msgspec

from migrate.dataplane.access import InPlace, MemoryAccess
from migrate.dataplane.memory import MmapAccess
from migrate.dataplane.sdma.access import SdmaAccess
from migrate.dataplane.sdma.card import Cards
from migrate.errors import MigrationFailed
from migrate.report import VramBytes

_log = logging.getLogger(__name__)

SAMPLE = 8 << 20  # bytes a measurement moves at most
PIECE = 1 << 20  # bytes of one call in it
SECONDS = 0.05  # a slow side is measured for no longer
TOO_SMALL = 256 << 10  # bytes; such a BO is mapped and says nothing about a card

Direction = Literal["read", "write"]
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)


class VramMode(StrEnum):
    """``vram_access`` of an agent's configuration."""

    AUTO = "auto"
    MMAP = "mmap"
    SDMA = "sdma"


class VramTally:
    """Bytes of VRAM by the side they went by; many threads add."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._bytes = VramBytes()

    def add(self, field: str, count: int) -> None:
        """*field* is one of VramBytes."""
        with self._lock:
            now = getattr(self._bytes, field) + count
            self._bytes = msgspec.structs.replace(self._bytes, **{field: now})

    @property
    def bytes(self) -> VramBytes:
        """So far."""
        with self._lock:
            return self._bytes


class CountedAccess:
    """A BO in VRAM, whose bytes are counted once they are over."""

    def __init__(self, access: MemoryAccess, mode: VramMode, tally: VramTally) -> None:
        self._access = access
        self._mode = mode
        self._tally = tally
        self.size = access.size

    def read(self, offset: int, into: memoryview) -> None:
        """See MemoryAccess."""
        self._access.read(offset, into)
        self._tally.add(f"{self._mode}_read", len(into))

    @contextmanager
    def lend(self, offset: int, length: int) -> Iterator[memoryview | None]:
        """See InPlace; counted as read."""
        if not isinstance(self._access, InPlace):
            yield None
            return
        with self._access.lend(offset, length) as data:
            yield data
        if data is not None:
            self._tally.add(f"{self._mode}_read", length)

    def write(self, offset: int, data: memoryview) -> None:
        """See MemoryAccess."""
        self._access.write(offset, data)
        self._tally.add(f"{self._mode}_written", len(data))

    def close(self) -> None:
        """See MemoryAccess."""
        self._access.close()


class VramAccess:
    """Opens BOs of one host. *node_of* gives the render node of a gpu_id. Thread-safe."""

    def __init__(self, mode: VramMode, node_of: Callable[[int], str]) -> None:
        self.mode = mode
        self._node_of = node_of
        self._cards = Cards()
        self._lock = threading.Lock()
        self._chosen: dict[tuple[int, Direction], VramMode] = {}

    def open(
        self,
        fd: int,
        size: int,
        gpu_id: int | None,
        direction: Direction,
        tally: VramTally | None = None,
    ) -> MemoryAccess:
        """Access to a BO by its dmabuf, which stays the caller's.

        *gpu_id* is the actual id of the GPU whose VRAM it is, None for GTT. *direction* is
        what it is opened for; both work. To measure writing, bytes are read and written back:
        nothing else may write to a BO that is opened for that. What goes from and to VRAM
        is added to *tally*, but for the measurement. Raises MigrationFailed if ``sdma`` was
        asked for and does not work.
        """
        if gpu_id is None:  # KFD asks for GTT without USWC: cached (amdgpu_amdkfd_gpuvm.c)
            return MmapAccess(fd, size, own=False, cached=True)
        mode = self._mode_for(fd, size, gpu_id, direction)
        access: MemoryAccess
        if mode is VramMode.SDMA:
            access = self._by_engine(fd, size, gpu_id)
        else:
            access = MmapAccess(fd, size, own=False)
        return access if tally is None else CountedAccess(access, mode, tally)

    def is_mapped(self, fd: int, size: int, gpu_id: int | None) -> bool:
        """Whether both directions of a BO go by its mapping; arguments as of ``open``."""
        return gpu_id is None or all(
            self._mode_for(fd, size, gpu_id, direction) is VramMode.MMAP for direction in DIRECTIONS
        )

    def close(self) -> None:
        """Give the cards back."""
        self._cards.close()

    def _mode_for(self, fd: int, size: int, gpu_id: int, direction: Direction) -> VramMode:
        """MMAP or SDMA; measured if nothing else says which."""
        if self.mode is not VramMode.AUTO:
            return self.mode
        if size < TOO_SMALL:
            return VramMode.MMAP
        with self._lock:
            key = (gpu_id, direction)
            if key not in self._chosen:
                self._chosen[key] = self._choose(fd, size, gpu_id, direction)
            return self._chosen[key]

    def _by_engine(self, fd: int, size: int, gpu_id: int) -> MemoryAccess:
        try:
            return SdmaAccess(self._cards.open(self._node_of(gpu_id)), fd, size)
        except OSError as error:
            raise MigrationFailed(
                f"VRAM of GPU {gpu_id:#x} by SDMA: {error}",
                advice="`migrate doctor` on that host says what is missing; `vram_access ="
                ' "auto"` in its agent.toml maps VRAM instead.',
            ) from error

    def _choose(self, fd: int, size: int, gpu_id: int, direction: Direction) -> VramMode:
        try:
            engine = self._by_engine(fd, size, gpu_id)
        except MigrationFailed as error:
            _log.info("%s of GPU %#x goes by mmap: %s", direction, gpu_id, error)
            return VramMode.MMAP
        mapped = MmapAccess(fd, size, own=False)
        try:
            rates = {
                VramMode.SDMA: measure(engine, direction),
                VramMode.MMAP: measure(mapped, direction),
            }
        except OSError as error:
            _log.warning("%s of GPU %#x goes by mmap: %s", direction, gpu_id, error)
            return VramMode.MMAP
        finally:
            engine.close()
            mapped.close()
        best = max(rates, key=lambda mode: rates[mode])
        _log.info(
            "%s of GPU %#x goes by %s: mmap %.0f MB/s, sdma %.0f MB/s",
            *(direction, gpu_id, best, rates[VramMode.MMAP] / 1e6, rates[VramMode.SDMA] / 1e6),
        )
        return best


def measure(access: MemoryAccess, direction: Direction) -> float:
    """Bytes a second, of a sample from the start. Writes back what it read. Raises OSError."""
    length = min(access.size, PIECE)
    buffer = memoryview(bytearray(length))
    access.read(0, buffer)  # the first touch makes mappings; not measured
    call = access.read if direction == "read" else access.write
    moved = 0
    started = time.perf_counter()
    while moved < SAMPLE:
        call(0, buffer)
        moved += length
        if time.perf_counter() - started > SECONDS:
            break
    return moved / max(time.perf_counter() - started, 1e-9)
