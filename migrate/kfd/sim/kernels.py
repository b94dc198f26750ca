"""The kernels behind the opcodes: numpy on views of GPU memory.

A kernel is asked to ``step`` until it says it is done. Those that may take for ever step
in small portions and can be preempted between them: ``save`` gives the state with which
``start`` goes on, on this GPU or on another one.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import xxhash
from numpy.typing import NDArray

from migrate.kfd.sim.memory import AddressSpace, Bytes
from migrate.kfd.sim.opcodes import (
    KERNARGS,
    ElementType,
    Opcode,
)

_OPCODES = {int(opcode) for opcode in Opcode}
_TYPES = {int(kind) for kind in ElementType}
CHUNK = 1 << 18  # elements worked on at a time: temporaries stay in the cache
Floats = NDArray[np.float32]


class IllegalInstruction(Exception):
    """A kernel_object or kernarg that no hardware could execute."""


class Kernel(Protocol):
    """A kernel that runs."""

    def step(self) -> bool:
        """Run a portion; True when the kernel is done. Raises GpuFault."""

    def save(self) -> bytes:
        """State to go on with (at most 40 bytes)."""


def start(memory: AddressSpace, opcode: int, kernargs: int, state: bytes | None) -> Kernel | None:
    """Run a kernel that ends by itself (None), or begin one that may be preempted.

    *state* is that of an earlier preemption. Raises GpuFault, IllegalInstruction.
    """
    if opcode not in _OPCODES:
        raise IllegalInstruction(f"kernel_object {opcode:#x}")
    layout = KERNARGS[Opcode(opcode)]
    arguments = None if layout is None else memory.load_struct(kernargs, layout)
    if opcode == Opcode.COUNTER:
        return Counter(memory, arguments, state)
    if opcode == Opcode.DELAY:
        return Delay(arguments, state)
    if opcode != Opcode.NOP:
        _RUN[Opcode(opcode)](memory, arguments)
    return None


class Counter:
    """COUNTER: one increment a step; the register is the number of increments."""

    def __init__(self, memory: AddressSpace, arguments: Any, state: bytes | None) -> None:
        self._memory = memory
        self._arguments = arguments
        self._register = struct.unpack("<Q", state)[0] if state else 0

    def step(self) -> bool:
        """Stopped, or one more."""
        if self._memory.load_u64(self._arguments.stop):
            if self._arguments.iterations:
                self._memory.store_u64(self._arguments.iterations, self._register)
            return True
        value = self._memory.load_u64(self._arguments.counter)
        self._memory.store_u64(self._arguments.counter, value + 1)
        self._register += 1
        return False

    def save(self) -> bytes:
        """The register."""
        return struct.pack("<Q", self._register)


class Delay:
    """DELAY: time that passes while the queue is mapped."""

    def __init__(self, arguments: Any, state: bytes | None) -> None:
        left = struct.unpack("<Q", state)[0] if state else arguments.microseconds
        self._end = time.monotonic_ns() + left * 1000

    def step(self) -> bool:
        """Whether the time is over."""
        return bool(time.monotonic_ns() >= self._end)

    def save(self) -> bytes:
        """Microseconds left."""
        return struct.pack("<Q", max(0, self._end - time.monotonic_ns()) // 1000)


class Vector:
    """Elements in GPU memory, read as fp32; bf16 is the upper half of an fp32."""

    def __init__(
        self, memory: AddressSpace, address: int, count: int, kind: int, *, write: bool = False
    ) -> None:
        if kind not in _TYPES or address % 4:
            raise IllegalInstruction(f"element type {kind}, address {address:#x}")
        self._memory = memory
        self._address = address
        self._bf16 = kind == ElementType.BF16
        self._live = memory.view(address, count * self.width, write=write)

    @property
    def width(self) -> int:
        """Bytes an element."""
        return 2 if self._bf16 else 4

    def load(self, first: int, count: int) -> Floats:
        """A copy (bf16) or live view (fp32) of elements as fp32."""
        raw = self._raw(first, count)
        if not self._bf16:
            return raw.view(np.float32)
        wide = raw.view(np.uint16).astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)

    def store(self, first: int, values: Floats) -> None:
        """Store elements, bf16 rounded to nearest even."""
        data = round_bf16(values) if self._bf16 else np.ascontiguousarray(values, np.float32)
        if self._live is not None:
            at = first * self.width
            self._live[at : at + len(data) * self.width] = data.view(np.uint8)
        else:
            self._memory.write(self._address + first * self.width, data.view(np.uint8))

    def _raw(self, first: int, count: int) -> Bytes:
        at = first * self.width
        if self._live is not None:
            return self._live[at : at + count * self.width]
        return self._memory.read(self._address + at, count * self.width)


def round_bf16(values: Floats) -> NDArray[np.uint16]:
    """fp32 to bf16, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    odd = bits >> 16
    odd &= 1
    odd += 0x7FFF
    odd += bits
    odd >>= 16
    rounded = odd.astype(np.uint16)
    nan = np.isnan(values)
    if nan.any():
        rounded[nan] = 0x7FC0
    return rounded


def _fill(memory: AddressSpace, k: Any) -> None:
    if k.length % 4 or k.destination % 4:
        raise IllegalInstruction("FILL of half words")
    target = memory.view(k.destination, k.length, write=True)
    if target is not None:
        target.view(np.uint32)[:] = k.value
        return
    for at in range(0, k.length, 4 * CHUNK):
        part = np.full(min(CHUNK, (k.length - at) // 4), k.value, np.uint32)
        memory.write(k.destination + at, part.view(np.uint8))


def _copy(memory: AddressSpace, k: Any) -> None:
    target = memory.view(k.destination, k.length, write=True)
    source = memory.view(k.source, k.length)
    if target is not None and source is not None:
        np.copyto(target, source)
        return
    for at in range(0, k.length, 4 * CHUNK):
        part = memory.read(k.source + at, min(4 * CHUNK, k.length - at))
        memory.write(k.destination + at, part)


def _add(memory: AddressSpace, k: Any) -> None:
    if k.destination % 8 or k.source % 8:
        raise IllegalInstruction("ADD of unaligned words")
    value = np.uint64(k.value)
    target = memory.view(k.destination, k.count * 8, write=True)
    source = memory.view(k.source, k.count * 8)
    if target is not None and source is not None:
        np.add(source.view(np.uint64), value, out=target.view(np.uint64))
        return
    for at in range(0, k.count * 8, 8 * CHUNK):
        part = memory.read(k.source + at, min(8 * CHUNK, k.count * 8 - at)).view(np.uint64) + value
        memory.write(k.destination + at, part.view(np.uint8))


def _axpby(memory: AddressSpace, k: Any) -> None:
    x = Vector(memory, k.x, k.count, k.x_type)
    y = Vector(memory, k.y, k.count, k.y_type, write=True)
    alpha, beta = np.float32(k.alpha), np.float32(k.beta)
    for first in range(0, k.count, CHUNK):
        count = min(CHUNK, k.count - first)
        total = x.load(first, count) * alpha
        if beta:
            total += y.load(first, count) * beta
        y.store(first, total)


def _matmul(memory: AddressSpace, k: Any) -> None:
    a = Vector(memory, k.a, k.m * k.k, k.a_type).load(0, k.m * k.k)
    b = Vector(memory, k.b, k.k * k.n, k.b_type).load(0, k.k * k.n)
    c = Vector(memory, k.c, k.m * k.n, k.c_type, write=True)
    left = a.reshape(k.k, k.m).T if k.transpose_a else a.reshape(k.m, k.k)
    right = b.reshape(k.n, k.k).T if k.transpose_b else b.reshape(k.k, k.n)
    total = np.matmul(left, right)
    if k.accumulate:
        total += c.load(0, k.m * k.n).reshape(k.m, k.n)
    c.store(0, total.reshape(-1))


def _hash(memory: AddressSpace, k: Any) -> None:
    seed = memory.load_u64(k.digest)
    digest = xxhash.xxh3_64_intdigest(memory.read(k.source, k.length).data, seed)
    memory.store_u64(k.digest, digest)


_RUN: dict[Opcode, Callable[[AddressSpace, Any], None]] = {
    Opcode.FILL: _fill,
    Opcode.COPY: _copy,
    Opcode.ADD: _add,
    Opcode.AXPBY: _axpby,
    Opcode.MATMUL: _matmul,
    Opcode.HASH: _hash,
}
