"""Offsets of ``SdmaAccess`` in large buffers: its packets run on memory that is mostly holes.

The engine here is a stand-in below the packets: it decodes the words that ``copy_commands`` makes,
for each generation, and copies between addresses of a card whose VRAM is a sparse file.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import queue
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import cast

import pytest

from migrate.dataplane.sdma.access import SdmaAccess
from migrate.dataplane.sdma.card import Card, Fence
from migrate.dataplane.sdma.packets import COPY_WORDS, GENERATIONS, copy_commands

SIZE = (5 << 30) + 8192  # bytes of the buffer: past 2 and 4 GiB
SLOT = 3 << 20  # more than one packet copies: a boundary lies in it
VRAM, BOUNCE = 0x7F_FFFF_0000, 0x1000_0000_0000  # GPU virtual addresses; VRAM's cross 2**39


class Engine:
    """What ``SdmaAccess`` asks of a card."""

    def __init__(self, major: int) -> None:
        self.slot = SLOT
        self._generation = GENERATIONS[major]
        fd = os.memfd_create("vram")
        os.ftruncate(fd, SIZE)
        self.vram = mmap.mmap(fd, SIZE)
        os.close(fd)
        self._bounce = (ctypes.c_ubyte * (2 * SLOT))()
        self._slots: queue.SimpleQueue[SimpleNamespace] = queue.SimpleQueue()
        base = ctypes.addressof(self._bounce)
        for n in range(2):
            self._slots.put(SimpleNamespace(address=BOUNCE + n * SLOT, pointer=base + n * SLOT))
        self._places = (
            (VRAM, SIZE, ctypes.addressof(ctypes.c_char.from_buffer(self.vram))),
            (BOUNCE, 2 * SLOT, base),
        )
        self.copies = 0

    def import_dmabuf(self, fd: int) -> SimpleNamespace:
        return SimpleNamespace(size=SIZE, address=VRAM, kms=1, close=lambda: None)

    @contextmanager
    def listed(self, buffer: object) -> Iterator[int]:
        yield 1

    def take_slot(self, *, wait: bool) -> SimpleNamespace | None:
        return None if self._slots.empty() and not wait else self._slots.get()

    def give_slot(self, slot: SimpleNamespace) -> None:
        self._slots.put(slot)

    def submit(
        self, bo_list: int, slot: object, source: int, destination: int, length: int
    ) -> Fence:
        commands = copy_commands(self._generation, source, destination, length)
        words = struct.unpack(f"<{len(commands) // 4}I", commands)
        for at in range(0, len(words) - COPY_WORDS + 1, COPY_WORDS):
            if words[at] == 0:
                break
            _, count, _, low, high, to_low, to_high = words[at : at + COPY_WORDS]
            count += self._generation.bias
            ctypes.memmove(
                self._at(to_low | to_high << 32, count), self._at(low | high << 32, count), count
            )
            self.copies += 1
        return Fence(0, self.copies)

    def _at(self, address: int, length: int) -> int:
        for start, size, pointer in self._places:
            if start <= address and address + length <= start + size:
                return pointer + address - start
        raise AssertionError(f"{length} bytes at {address:#x}: nothing is there")

    def wait(self, fence: Fence) -> None:
        """Copies are done when they are submitted."""


@pytest.mark.parametrize("major", sorted(GENERATIONS))
@pytest.mark.parametrize(
    "offset",
    [0, 1, (1 << 31) - 8, 1 << 31, (1 << 32) - (5 << 20) - 3, (1 << 32) + 1, SIZE - (7 << 20)],
)
def test_an_offset_is_the_byte_it_says(major: int, offset: int) -> None:
    engine = Engine(major)
    access = SdmaAccess(cast(Card, engine), -1, SIZE)
    data = os.urandom(7 << 20)  # three slots, the last not full
    access.write(offset, memoryview(data))
    assert engine.vram[offset : offset + len(data)] == data
    for near in (offset - 1, offset + len(data), offset ^ 1 << 31, offset ^ 1 << 32):
        if 0 <= near < SIZE and not offset <= near < offset + len(data):
            assert engine.vram[near] == 0, f"{near:#x} was written"
    back = bytearray(len(data))
    access.read(offset, memoryview(back))
    assert back == data
    assert engine.copies >= 6
    access.close()
