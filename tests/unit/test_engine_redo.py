"""An operation broken off anywhere and done again has the same effect as done once."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.errors import UsageError
from migrate.kfd.sim.aql import PACKET_SIZE
from scenarios.workloads import contents, device
from scenarios.workloads.device import Queue

PACKETS = 8


class Ring:
    """A queue in private memory, and a packet processor for it."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, 4096)
        base = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.queue = Queue(
            gpu_id=1,
            queue_id=0,
            ring=base,
            packets=PACKETS,
            write_pointer=base + 2048,
            read_pointer=base + 2112,
            doorbell=base + 2176,
        )
        for slot in range(PACKETS):
            device.store(base + slot * PACKET_SIZE, b"\1\0")
        self.ran: list[bytes] = []

    def process(self) -> None:
        """Run what the doorbell and the write pointer show, as the hardware does."""
        while device.load_u64(self.queue.doorbell) > len(self.ran):
            at = len(self.ran) % PACKETS * PACKET_SIZE
            packet = self.memory[at : at + PACKET_SIZE]
            if packet[0] == 1:
                return
            self.ran.append(packet)
            self.memory[at : at + 2] = b"\1\0"
            device.store_u64(self.queue.read_pointer, len(self.ran))


class BrokenOff(Exception):
    """The process was frozen here."""


def packet(index: int) -> bytes:
    return b"\2\0\0\0" + index.to_bytes(PACKET_SIZE - 4, "little")


def break_off(lines: int) -> Callable[..., Any]:
    """A trace function that ends ``device.submit`` before its line number *lines*."""
    left = [lines]

    def trace(frame: FrameType, event: str, _: object) -> Any:
        if frame.f_code.co_filename != device.__file__:
            return None
        if event == "line":
            left[0] -= 1
            if left[0] < 0:
                raise BrokenOff
        return trace

    return trace


@given(st.lists(st.tuples(st.integers(0, 14), st.booleans()), min_size=1, max_size=40))
def test_a_packet_that_is_submitted_again_runs_once(breaks: list[tuple[int, bool]]) -> None:
    """Each packet's submission is broken off between two of its lines, then repeated."""
    ring = Ring()
    before = sys.gettrace()
    for index, (lines, process_between) in enumerate(breaks):
        sys.settrace(break_off(lines))
        try:
            with contextlib.suppress(BrokenOff):
                device.submit(ring.queue, index, packet(index))
        finally:
            sys.settrace(before)
        if process_between:
            ring.process()
        device.submit(ring.queue, index, packet(index))
        ring.process()
        # A packet that was taken is not there again for whoever looks at headers alone.
        assert {ring.memory[slot * PACKET_SIZE] for slot in range(PACKETS)} == {1}
    assert ring.ran == [packet(index) for index in range(len(breaks))]


# ---------------------------------------------------------------- contents


def test_every_chunk_is_different_and_none_is_noise() -> None:
    words = contents.generated(1)
    seen = set()
    for number in range(8):
        chunk = bytearray(contents.CHUNK)
        contents.fill(memoryview(chunk), words, number)
        seen.add(bytes(chunk))
        values = (np.frombuffer(chunk, np.uint16).astype(np.uint32) << 16).view(np.float32)
        assert 0.01 < float(values.std()) < 0.03
    assert len(seen) == 8


def write_safetensors(path: Path, header: bytes, data: bytes) -> str:
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return str(path)


def test_weights_come_from_the_file_and_are_rounded_to_bf16(tmp_path: Path) -> None:
    values = np.array([1.0, -2.5, 3.14159], np.float32)
    header = b'{"__metadata__":{},"w":{"dtype":"F32","shape":[3],"data_offsets":[0,12]}}'
    path = write_safetensors(tmp_path / "w", header, values.tobytes())
    words = contents.from_safetensors(path)
    assert words.nbytes == contents.CHUNK
    assert list(words.view(np.uint16)[:3]) == [0x3F80, 0xC020, 0x4049]


@pytest.mark.parametrize(
    "header",
    [
        b"{",
        b'{"w":{"dtype":"F32","shape":[3],"data_offsets":[0,400]}}',
        b'{"w":{"dtype":"F32","shape":[3],"data_offsets":[8,0]}}',
        b'{"w":{"dtype":"I64","shape":[1],"data_offsets":[0,8]}}',
        b'{"w":{}}',
    ],
)
def test_a_damaged_weights_file_is_refused_by_name(tmp_path: Path, header: bytes) -> None:
    path = write_safetensors(tmp_path / "w", header, bytes(12))
    with pytest.raises(UsageError, match=path):
        contents.from_safetensors(path)
    with pytest.raises(UsageError):
        contents.from_safetensors(str(tmp_path / "none"))
