"""Arithmetic of the simulated GPU's kernels, against numpy in double precision."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import xxhash

from migrate.kfd import uapi
from migrate.kfd.sim import kernels
from migrate.kfd.sim.memory import AddressSpace, Backing, Bo, GpuFault
from migrate.kfd.sim.opcodes import (
    AxpbyKernargs,
    CounterKernargs,
    DelayKernargs,
    ElementType,
    HashKernargs,
    MatmulKernargs,
    Opcode,
)

BASE = 0x100000
SIZE = 1 << 16


@pytest.fixture
def memory() -> AddressSpace:
    space = AddressSpace(None)  # type: ignore[arg-type]  # only a userptr asks for the process
    flags = uapi.KFD_IOC_ALLOC_MEM_FLAGS_VRAM | uapi.KFD_IOC_ALLOC_MEM_FLAGS_WRITABLE
    space.insert(Bo(None, BASE, SIZE, flags, 0, Backing("test", SIZE)))  # type: ignore[arg-type]
    return space


def put(memory: AddressSpace, offset: int, values: np.ndarray) -> int:
    memory.write(BASE + offset, np.ascontiguousarray(values).view(np.uint8).reshape(-1))
    return BASE + offset


def run(memory: AddressSpace, opcode: Opcode, arguments: ctypes.Structure) -> None:
    at = put(memory, 0, np.frombuffer(bytes(arguments), np.uint8))
    assert kernels.start(memory, opcode, at, None) is None


def widened(halves: np.ndarray) -> np.ndarray:
    return (halves.astype(np.uint32) << 16).view(np.float32)


def test_bf16_rounds_to_nearest_even_and_keeps_nan() -> None:
    bits = np.array([0x3F800000, 0x3F808000, 0x3F818000, 0x3F808001, 0x7F800001], np.uint32)
    rounded = kernels.round_bf16(bits.view(np.float32))
    assert rounded.tolist() == [0x3F80, 0x3F80, 0x3F82, 0x3F81, 0x7FC0]


@pytest.mark.parametrize("y_type", list(ElementType))
@pytest.mark.parametrize("x_type", list(ElementType))
def test_axpby(memory: AddressSpace, x_type: ElementType, y_type: ElementType) -> None:
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((2, 1000)).astype(np.float32)

    def stored(values: np.ndarray, kind: ElementType) -> np.ndarray:
        return values if kind == ElementType.F32 else kernels.round_bf16(values)

    at_x = put(memory, 0x1000, stored(x, x_type))
    at_y = put(memory, 0x4000, stored(y, y_type))
    run(memory, Opcode.AXPBY, AxpbyKernargs(at_y, at_x, 1000, 0.5, -2.0, y_type, x_type))
    seen_x = x if x_type == ElementType.F32 else widened(kernels.round_bf16(x))
    seen_y = y if y_type == ElementType.F32 else widened(kernels.round_bf16(y))
    wanted = stored(np.float32(0.5) * seen_x + np.float32(-2) * seen_y, y_type)
    got = memory.read(at_y, wanted.nbytes).view(wanted.dtype)
    assert got.tolist() == wanted.tolist()


def test_axpby_with_beta_zero_does_not_read_y(memory: AddressSpace) -> None:
    at_x = put(memory, 0x1000, np.ones(4, np.float32))
    at_y = put(memory, 0x2000, np.full(4, np.nan, np.float32))
    run(memory, Opcode.AXPBY, AxpbyKernargs(at_y, at_x, 4, 3.0, 0.0, 0, 0))
    assert memory.read(at_y, 16).view(np.float32).tolist() == [3.0] * 4


@pytest.mark.parametrize("transpose_a", [0, 1])
@pytest.mark.parametrize("transpose_b", [0, 1])
@pytest.mark.parametrize("accumulate", [0, 1])
def test_matmul(memory: AddressSpace, transpose_a: int, transpose_b: int, accumulate: int) -> None:
    m, n, k = 5, 7, 3
    rng = np.random.default_rng(2)
    a = rng.integers(-4, 4, (m, k)).astype(np.float32)
    b = rng.integers(-4, 4, (k, n)).astype(np.float32)
    c = rng.integers(-4, 4, (m, n)).astype(np.float32)
    at_a = put(memory, 0x1000, a.T if transpose_a else a)
    at_b = put(memory, 0x2000, kernels.round_bf16(b.T if transpose_b else b))
    at_c = put(memory, 0x3000, c)
    arguments = MatmulKernargs(
        at_c, at_a, at_b, m, n, k, 0, 0, ElementType.BF16, transpose_a, transpose_b, accumulate
    )
    run(memory, Opcode.MATMUL, arguments)
    wanted = a @ b + (c if accumulate else 0)
    assert memory.read(at_c, 4 * m * n).view(np.float32).tolist() == wanted.reshape(-1).tolist()


def test_hash_is_a_chain(memory: AddressSpace) -> None:
    source = put(memory, 0x1000, np.arange(100, dtype=np.uint8))
    digest = put(memory, 0x2000, np.array([42], np.uint64))
    for _ in range(2):
        run(memory, Opcode.HASH, HashKernargs(digest, source, 100))
    data = bytes(range(100))
    once = xxhash.xxh3_64_intdigest(data, 42)
    assert memory.load_u64(digest) == xxhash.xxh3_64_intdigest(data, once)


def test_a_counter_goes_on_with_its_register(memory: AddressSpace) -> None:
    at = BASE + 0x1000
    arguments = put(memory, 0, np.frombuffer(bytes(CounterKernargs(at, at + 8, at + 16)), np.uint8))
    first = kernels.start(memory, Opcode.COUNTER, arguments, None)
    assert first is not None
    assert not any(first.step() for _ in range(5))
    second = kernels.start(memory, Opcode.COUNTER, arguments, first.save())
    assert second is not None
    assert not any(second.step() for _ in range(3))
    memory.store_u64(at + 8, 1)
    assert second.step()
    assert (memory.load_u64(at), memory.load_u64(at + 16)) == (8, 8)


def test_a_delay_goes_on_with_what_is_left(memory: AddressSpace) -> None:
    arguments = put(memory, 0, np.frombuffer(bytes(DelayKernargs(3_600_000_000)), np.uint8))
    first = kernels.start(memory, Opcode.DELAY, arguments, None)
    assert first is not None
    assert not first.step()
    ended = kernels.start(memory, Opcode.DELAY, arguments, bytes(8))
    assert ended is not None
    assert ended.step()
    assert 0 < int.from_bytes(first.save(), "little") <= 3_600_000_000


def test_what_is_no_opcode_is_an_illegal_instruction(memory: AddressSpace) -> None:
    with pytest.raises(kernels.IllegalInstruction):
        kernels.start(memory, 0xDEAD, BASE, None)


def test_a_range_that_leaves_the_bo_faults_at_its_first_missing_byte(memory: AddressSpace) -> None:
    with pytest.raises(GpuFault) as fault:
        memory.read(BASE + SIZE - 8, 16)
    assert fault.value.address == BASE + SIZE


def test_a_backing_knows_whether_somebody_else_holds_it() -> None:
    import mmap  # noqa: PLC0415
    import os  # noqa: PLC0415

    backing = Backing("test", 4096)
    backing.window()
    assert not backing.is_held()
    fd = backing.reopen()
    assert backing.is_held()
    mapping = mmap.mmap(fd, 4096)
    os.close(fd)
    assert backing.is_held()
    mapping.close()
    assert not backing.is_held()
    backing.close()
