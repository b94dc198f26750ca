"""SDMA packets: goldens from the kernel's emitters, and that any copy is cut right."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.dataplane.sdma.packets import (
    COPY_WORDS,
    GENERATIONS,
    IB_PAD_WORDS,
    MAX_COPY,
    copy_commands,
    linear_copy,
)

# What sdma_v*_emit_copy_buffer(ib, 0x1_2345_6000, 0x7fff_0000_1000, 0x1000, false) writes:
# only version 3 puts byte_count there, the others byte_count - 1.
GOLDEN = {
    3: (0x00000001, 0x1000, 0, 0x23456000, 0x1, 0x00001000, 0x7FFF),
    4: (0x00000001, 0x0FFF, 0, 0x23456000, 0x1, 0x00001000, 0x7FFF),
    5: (0x00000001, 0x0FFF, 0, 0x23456000, 0x1, 0x00001000, 0x7FFF),
    6: (0x00000001, 0x0FFF, 0, 0x23456000, 0x1, 0x00001000, 0x7FFF),
}


@pytest.mark.parametrize("major", sorted(GENERATIONS))
def test_the_words_are_the_kernels(major: int) -> None:
    copy = linear_copy(GENERATIONS[major], 0x1_2345_6000, 0x7FFF_0000_1000, 0x1000)
    assert copy == GOLDEN[major]


def copies(commands: bytes, bias: int) -> Iterator[tuple[int, int, int]]:
    """Source, destination and bytes of each packet, by a reader written apart."""
    words = struct.unpack(f"<{len(commands) // 4}I", commands)
    at = 0
    while at < len(words):
        if words[at] == 0:
            at += 1
            continue
        assert words[at] == 1
        assert words[at + 2] == 0
        count, low, high, to_low, to_high = (words[at + i] for i in (1, 3, 4, 5, 6))
        assert count < 1 << 22
        yield low + (high << 32), to_low + (to_high << 32), count + bias
        at += COPY_WORDS


@given(
    major=st.sampled_from(sorted(GENERATIONS)),
    source=st.integers(0, (1 << 48) - (1 << 36)),
    destination=st.integers(0, (1 << 48) - (1 << 36)),
    length=st.one_of(
        st.integers(1, 100),
        st.integers(1, 1 << 26),
        st.sampled_from([MAX_COPY - 1, MAX_COPY, MAX_COPY + 1, 2 * MAX_COPY, 3 << 30]),
    ),
)
def test_every_byte_is_copied_once(major: int, source: int, destination: int, length: int) -> None:
    generation = GENERATIONS[major]
    commands = copy_commands(generation, source, destination, length)
    assert len(commands) % (4 * IB_PAD_WORDS) == 0
    done = 0
    for start, to, count in copies(commands, generation.bias):
        assert (start, to) == (source + done, destination + done)
        assert 0 < count <= MAX_COPY
        done += count
    assert done == length


@pytest.mark.parametrize("length", [0, -1, MAX_COPY + 1])
def test_what_one_packet_cannot_say(length: int) -> None:
    with pytest.raises(ValueError, match="one packet copies"):
        linear_copy(GENERATIONS[4], 0, 0x1000, length)


@pytest.mark.parametrize(("source", "destination"), [(-1, 0), ((1 << 64) - 1, 0), (0, 1 << 64)])
def test_addresses_have_64_bits(source: int, destination: int) -> None:
    with pytest.raises(ValueError, match="is not an address"):
        linear_copy(GENERATIONS[4], source, destination, 2)


@pytest.mark.parametrize("length", [0, -5])
def test_nothing_is_no_copy(length: int) -> None:
    with pytest.raises(ValueError, match="can't be copied"):
        copy_commands(GENERATIONS[5], 0, 0, length)
