"""What the simulated GPU can execute: ``kernel_object`` numbers and kernarg layouts.

A kernel dispatch packet's ``kernel_object`` is one of :class:`Opcode` instead of the
address of machine code; ``kernarg_address`` is the GPU virtual address of the struct
named after the opcode below (:data:`KERNARGS`). All addresses in kernargs are GPU
virtual addresses of the process; the grid and workgroup sizes are ignored. Matrices
are dense, row-major. Arithmetic is done in fp32 whatever the element types; storing
bf16 rounds to nearest even.

The opcodes up to ``COUNTER`` are also those of the lab's software GPU, so that
the conformance suite runs there; the rest exist here only.
"""

from __future__ import annotations

import ctypes
from enum import IntEnum

U32 = ctypes.c_uint32
U64 = ctypes.c_uint64
F32 = ctypes.c_float


class Opcode(IntEnum):
    """Values of ``kernel_object``. Any other value stops the queue with an exception."""

    NOP = 1
    FILL = 2
    COPY = 3
    ADD = 4
    COUNTER = 5
    AXPBY = 16
    MATMUL = 17
    HASH = 18
    DELAY = 19


class ElementType(IntEnum):
    """Type of the elements of a vector or matrix."""

    F32 = 0
    BF16 = 1


class FillKernargs(ctypes.Structure):
    """FILL: every aligned u32 of destination becomes *value*. *length* in bytes (4·n)."""

    _fields_ = [("destination", U64), ("length", U64), ("value", U32), ("pad", U32)]


class CopyKernargs(ctypes.Structure):
    """COPY: *length* bytes; the ranges must not overlap."""

    _fields_ = [("destination", U64), ("source", U64), ("length", U64)]


class AddKernargs(ctypes.Structure):
    """ADD: destination[i] = source[i] + value over *count* u64 words, wrapping.

    destination may be source. Not idempotent then: a repeated packet shows.
    """

    _fields_ = [("destination", U64), ("source", U64), ("count", U64), ("value", U64)]


class CounterKernargs(ctypes.Structure):
    """COUNTER: a persistent kernel; increments the u64 at *counter* again and again.

    It ends when the u64 at *stop* is not 0 and then stores its own number of
    increments, kept in a register, at *iterations* (0: not stored). The register is the
    kernel's resumption state: lost or doubled, iterations ≠ counter's growth.

    As on hardware only a queue with a save area (ctx_save_restore_address, and room in
    ctl_stack_size, 4096 will do) can be evicted while it runs; without one the scheduler
    hangs: ETIME.
    """

    _fields_ = [("counter", U64), ("stop", U64), ("iterations", U64)]


class AxpbyKernargs(ctypes.Structure):
    """AXPBY: y[i] = alpha·x[i] + beta·y[i]; y is not read when beta is 0.

    With beta 0 and different types it is a conversion.
    """

    _fields_ = [
        ("y", U64),
        ("x", U64),
        ("count", U64),
        ("alpha", F32),
        ("beta", F32),
        ("y_type", U32),
        ("x_type", U32),
    ]


class MatmulKernargs(ctypes.Structure):
    """MATMUL: c[m,n] = op(a)·op(b) (+ c if *accumulate*).

    op(a) is m×k: a is stored m×k, or k×m with *transpose_a*; likewise b k×n.
    """

    _fields_ = [
        ("c", U64),
        ("a", U64),
        ("b", U64),
        ("m", U32),
        ("n", U32),
        ("k", U32),
        ("c_type", U32),
        ("a_type", U32),
        ("b_type", U32),
        ("transpose_a", U32),
        ("transpose_b", U32),
        ("accumulate", U32),
        ("pad", U32),
    ]


class HashKernargs(ctypes.Structure):
    """HASH: the u64 at *digest* becomes xxh3_64(source[0:length], seed=old digest).

    A chain over time: it comes out right only if every step ran once, in order.
    """

    _fields_ = [("digest", U64), ("source", U64), ("length", U64)]


class DelayKernargs(ctypes.Structure):
    """DELAY: keep the queue busy for *microseconds*; evicted at once, resumed with the rest."""

    _fields_ = [("microseconds", U64)]


KERNARGS: dict[Opcode, type[ctypes.Structure] | None] = {
    Opcode.NOP: None,
    Opcode.FILL: FillKernargs,
    Opcode.COPY: CopyKernargs,
    Opcode.ADD: AddKernargs,
    Opcode.COUNTER: CounterKernargs,
    Opcode.AXPBY: AxpbyKernargs,
    Opcode.MATMUL: MatmulKernargs,
    Opcode.HASH: HashKernargs,
    Opcode.DELAY: DelayKernargs,
}
