"""SDMA packets that copy memory, as words. No I/O.

The formats are those of the kernel's own driver: ``sdma_v3_0_emit_copy_buffer`` to
``sdma_v6_0_emit_copy_buffer`` and the ``*_sdma_pkt_open.h`` beside them (drivers/gpu/drm/amd/
amdgpu). A linear copy is seven words in all of them; what differs is how bytes are counted.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from migrate.model import Value

OP_NOP = 0
OP_COPY = 1
SUB_OP_COPY_LINEAR = 0
COPY_WORDS = 7
WORD = 4  # bytes
IB_PAD_WORDS = 8  # an indirect buffer ends on this boundary: sdma_v4_0_ring_pad_ib
# Bytes of one packet. The count field has 22 bits up to SDMA 5.0 and 30 later; ROCr and the
# driver of SDMA 3 stay below 0x3fffe0 ("not 0x3fffff due to HW limitation"), and so do we.
MAX_COPY = 0x3FFFE0
_ADDRESSES = 1 << 64


class Generation(Value):
    """A generation of the engine. ``bias`` is what its count field has less than bytes."""

    major: int
    bias: int


# SDMA 3 is gfx8's (count in bytes), 4 is gfx9's, 5 gfx10's, 6 gfx11's (bytes less one).
# SDMA 7 (gfx12) wants other header bits and was not looked at; SDMA 2 (gfx7) neither.
GENERATIONS = {
    3: Generation(major=3, bias=0),
    4: Generation(major=4, bias=1),
    5: Generation(major=5, bias=1),
    6: Generation(major=6, bias=1),
}


def linear_copy(
    generation: Generation, source: int, destination: int, length: int
) -> tuple[int, ...]:
    """The seven words that copy *length* bytes between two GPU virtual addresses.

    Raises ValueError if one packet can't say that.
    """
    if not 0 < length <= MAX_COPY:
        raise ValueError(f"one packet copies 1 to {MAX_COPY} bytes, not {length}")
    for address in (source, destination):
        if not 0 <= address <= _ADDRESSES - length:
            raise ValueError(f"{address:#x} is not an address of {length} bytes")
    return (
        OP_COPY | SUB_OP_COPY_LINEAR << 8,
        length - generation.bias,
        0,  # no byte swap
        source & 0xFFFFFFFF,
        source >> 32,
        destination & 0xFFFFFFFF,
        destination >> 32,
    )


def pieces(length: int) -> Iterator[tuple[int, int]]:
    """*length* bytes as offset and length of one packet each."""
    for offset in range(0, length, MAX_COPY):
        yield offset, min(MAX_COPY, length - offset)


def copy_commands(generation: Generation, source: int, destination: int, length: int) -> bytes:
    """An indirect buffer that copies *length* bytes, padded with NOPs. Raises ValueError."""
    if length <= 0:
        raise ValueError(f"{length} bytes can't be copied")
    words: list[int] = []
    for offset, part in pieces(length):
        words += linear_copy(generation, source + offset, destination + offset, part)
    words += [OP_NOP] * (-len(words) % IB_PAD_WORDS)
    return struct.pack(f"<{len(words)}I", *words)
