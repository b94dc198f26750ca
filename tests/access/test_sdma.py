"""What only the ``sdma`` side has: packets that an engine accepts or refuses."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from migrate.dataplane.sdma.access import SdmaAccess
from migrate.dataplane.sdma.card import COMMANDS, SLOTS, Card, Cards, Slot
from migrate.dataplane.sdma.packets import copy_commands
from migrate.kfd.sysfs import read_topology, read_vram
from tests.access.conftest import SIZE, SLOT, Owned, own
from tests.conformance.hosts import Host
from tests.conformance.kit import VRAM

pytestmark = pytest.mark.timeout(600)

Words = list[int]


def words(commands: bytes) -> Words:
    return list(struct.unpack(f"<{len(commands) // 4}I", commands))


@contextmanager
def counted(card: Card, bias: int) -> Iterator[None]:
    """The card's packets count bytes with another bias: wrong by design."""
    right = card.generation
    card.generation = msgspec.structs.replace(right, bias=bias)
    try:
        yield
    finally:
        card.generation = right


def test_the_library_is_the_distributions(card: Card) -> None:
    print(f"library: {card.library.version}, SDMA {card.generation.major}")
    assert card.library.version.startswith("libdrm_amdgpu.so.1")


@pytest.mark.parametrize("error", [-1, +1])
def test_an_off_by_one_in_the_byte_count_fails(card: Card, owned: Owned, error: int) -> None:
    before = os.urandom(SIZE)
    owned.write(0, before)
    access = SdmaAccess(card, owned.fd, SIZE)
    after = os.urandom(SIZE)
    with counted(card, card.generation.bias - error):
        if error > 0:  # a byte behind the end of the buffer: the engine refuses the job
            with pytest.raises(OSError, match="amdgpu_cs") as caught:
                access.write(0, memoryview(after))
            assert caught.value.errno == errno.ECANCELED
        else:
            access.write(0, memoryview(after))
    assert owned.read(0, SIZE) != after
    access.write(0, memoryview(after))  # the card works again
    assert owned.read(0, SIZE) == after
    access.close()


def _submit(card: Card, access: SdmaAccess, change: Callable[[Words, Slot], Words]) -> None:
    """Copy a page from the bounce buffer to the BO by commands that *change* has spoilt."""
    slot = card.take_slot(wait=True)
    assert slot is not None
    ctypes.memset(slot.pointer, 0xEE, SLOT)
    original = copy_commands(card.generation, slot.address, access._buffer.address, 4096)
    spoilt = change(words(original), slot)
    data = struct.pack(f"<{len(spoilt)}I", *spoilt)
    try:
        fence = card.submit_commands(access._list, slot, data)
        card.wait(fence)
    finally:
        card.give_slot(slot)


def _with(index: int, value: Callable[[int], int]) -> Callable[[Words, Slot], Words]:
    def change(packet: Words, _: Slot) -> Words:
        return [value(w) if at == index else w for at, w in enumerate(packet)]

    return change


WRONG: dict[str, Callable[[Words, Slot], Words]] = {
    "opcode": _with(0, lambda w: w & ~0xFF | 0x0B),
    "unknown opcode": _with(0, lambda w: w | 0xFF),
    "sub-opcode": _with(0, lambda w: w | 1 << 8),
    "encrypted": _with(0, lambda w: w | 1 << 16),
    "TMZ": _with(0, lambda w: w | 1 << 18),
    "broadcast": _with(0, lambda w: w | 1 << 27),
    "a reserved bit of the header": _with(0, lambda w: w | 1 << 31),
    "more bits than the count has": _with(1, lambda w: w | 1 << 22),
    "another reserved bit of the count": _with(1, lambda w: w | 1 << 31),
    "byte swap": _with(2, lambda _: 1 << 16),
    "a source that is not mapped": _with(4, lambda w: w ^ 1 << 10),
    "a destination that is not mapped": _with(6, lambda w: w ^ 1 << 10),
    "a source above 48 bits": _with(4, lambda w: w | 1 << 31),
    "a range that leaves the buffer": _with(1, lambda _: SIZE),
    "a NOP that skips beyond the end": _with(7, lambda _: 5 << 16),
    "a second packet cut short": lambda packet, _: [*packet[:7], 1, *packet[1:7], 1, 0],
    "a good packet, then a wrong one": lambda packet, _: [*packet[:7], 0x55, *[0] * 8],
}
REFUSED_AT_ONCE: dict[str, Callable[[Words, Slot], Words]] = {
    "no padding": lambda packet, _: packet[:7],
    "nothing": lambda _, __: [],
}


@pytest.mark.parametrize("what", sorted(WRONG))
def test_a_wrong_packet_fails_and_changes_nothing(card: Card, owned: Owned, what: str) -> None:
    before = os.urandom(SIZE)
    owned.write(0, before)
    access = SdmaAccess(card, owned.fd, SIZE)
    with pytest.raises(OSError, match="amdgpu_cs_query_fence_status") as caught:
        _submit(card, access, WRONG[what])
    assert caught.value.errno == errno.ECANCELED
    assert owned.read(0, SIZE) == before
    _submit(card, access, lambda packet, _: packet)  # what was spoilt works as it was
    assert owned.read(0, 4096) == b"\xee" * 4096
    access.close()


@pytest.mark.parametrize("what", sorted(REFUSED_AT_ONCE))
def test_commands_of_a_wrong_size_are_refused(card: Card, owned: Owned, what: str) -> None:
    access = SdmaAccess(card, owned.fd, SIZE)
    with pytest.raises(OSError, match="amdgpu_cs_submit_raw2") as caught:
        _submit(card, access, REFUSED_AT_ONCE[what])
    assert caught.value.errno == errno.EINVAL
    access.close()


def test_a_buffer_that_is_not_listed_is_not_touched(card: Card, owned: Owned) -> None:
    access = SdmaAccess(card, owned.fd, SIZE)
    owned.write(0, b"as it was")
    with card.listed(card.bounce) as other:
        right, access._list = access._list, other
        with pytest.raises(OSError, match="amdgpu_cs"):
            access.write(0, memoryview(b"something else"))
        access._list = right
    assert owned.read(0, 9) == b"as it was"
    access.close()


def test_bounce_memory_is_bounded_and_given_back(card: Card, owned: Owned) -> None:
    limit = SLOTS * (SLOT + COMMANDS)
    before = _gtt(owned.node)
    second = Card(owned.node, SLOT)
    try:
        access = SdmaAccess(second, owned.fd, SIZE)
        access.read(0, memoryview(bytearray(SIZE)))
        assert second.bounce.size == limit
        if before is not None:
            used = _gtt(owned.node)
            assert used is not None
            assert used - before <= limit
        access.close()
    finally:
        second.close()
    assert _gtt(owned.node) == before


def _gtt(node: str) -> int | None:
    """Bytes of GTT in use (amdgpu's sysfs); None where it is not shown."""
    file = Path("/sys/class/drm") / Path(node).name / "device/mem_info_gtt_used"
    return int(file.read_text()) if file.exists() else None


def test_offsets_past_2_gib(_host: Host, cards: Cards) -> None:  # noqa: PT019
    size = (3 << 30) + 8192
    free = next(iter(read_vram(_host.paths, read_topology(_host.paths.topology)))).free
    if free < size:
        pytest.skip(f"needs {size >> 20} MiB of VRAM, {free >> 20} are free")
    owned = own(_host, size, VRAM)
    access = SdmaAccess(cards.open(owned.node), owned.fd, size)
    for offset in (0, (1 << 31) - 8, (1 << 31) + 1, size - 64):
        data = os.urandom(64)
        access.write(offset, memoryview(bytearray(data)))
        assert owned.read(offset, 64) == data
        back = bytearray(64)
        access.read(offset, memoryview(back))
        assert back == data
    assert owned.read(1, 64) != owned.read((1 << 31) + 1, 64)
    access.close()
    os.close(owned.fd)
    owned.child.close()
