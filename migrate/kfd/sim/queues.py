"""A user queue and what hardware remembers of it: MQD and control stack.

The MQD has the size of the driver's v9_mqd (compute) or v9_sdma_mqd; the words used are
named after v9_structs.h. What the engine needs to go on where it stopped is in them
and, for a kernel that was preempted in its middle, in the control stack, where the
hardware keeps wave states: so it travels with CHECKPOINT and RESTORE.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING

from migrate.kfd import uapi

if TYPE_CHECKING:
    from migrate.kfd.sim.kernels import Kernel
    from migrate.kfd.sim.process import DeviceData

COMPUTE_MQD_SIZE = 2048
SDMA_MQD_SIZE = 512
DOORBELL_SIZE = 8

# Index of a 32-bit word in struct v9_mqd.
CP_MQD_SAVE_END_TIME_LO = 101  # changes with each eviction
CP_HQD_PQ_RPTR = 139  # packets taken, low half
CP_HQD_CNTL_STACK_OFFSET = 175
CP_HQD_CNTL_STACK_SIZE = 176
CP_HQD_PQ_WPTR_LO = 183
CP_HQD_PQ_WPTR_HI = 184
RESERVED_READ_INDEX_HI = 400  # packets taken, high half
RESERVED_STOPPED = 401  # 1: an exception stopped the queue for good

_WAVE = struct.Struct("<4sIQ40s")  # magic, state length, packet index, state
WAVE_SIZE = _WAVE.size


class QueueType(IntEnum):
    """enum kfd_queue_type of kfd_priv.h."""

    COMPUTE = 0
    SDMA = 1
    SDMA_XGMI = 4


class QueueFormat(IntEnum):
    """enum kfd_queue_format of kfd_priv.h."""

    PM4 = 0
    AQL = 1


KINDS = {
    uapi.KFD_IOC_QUEUE_TYPE_COMPUTE: (QueueType.COMPUTE, QueueFormat.PM4),
    uapi.KFD_IOC_QUEUE_TYPE_COMPUTE_AQL: (QueueType.COMPUTE, QueueFormat.AQL),
    uapi.KFD_IOC_QUEUE_TYPE_SDMA: (QueueType.SDMA, QueueFormat.PM4),
    uapi.KFD_IOC_QUEUE_TYPE_SDMA_XGMI: (QueueType.SDMA_XGMI, QueueFormat.PM4),
}


def mqd_size(kind: int) -> int:
    """Bytes of the MQD of a queue of that type."""
    return COMPUTE_MQD_SIZE if kind == QueueType.COMPUTE else SDMA_MQD_SIZE


@dataclass(eq=False)
class Queue:
    """struct queue with its properties; addresses are GPU virtual addresses."""

    owner: DeviceData
    queue_id: int
    kind: int
    format: int
    ring_address: int
    ring_size: int
    read_pointer: int
    write_pointer: int
    doorbell_id: int
    percent: int = 100
    priority: int = 0
    sdma_id: int = 0
    eop_address: int = 0
    eop_size: int = 0
    ctx_address: int = 0
    ctx_size: int = 0
    ctl_stack_size: int = 0
    gws: int = 0
    # engine state
    read_index: int = 0
    stopped: bool = False  # by an exception
    seen_doorbell: int | None = None  # None: look at the ring whatever the doorbell says
    running: Kernel | None = None
    saved_state: bytes | None = None  # of the kernel at read_index, preempted
    evictions: int = 0
    mqd_rest: bytes = b""  # words of a restored MQD that the engine does not use
    idle: bool = field(default=False)

    @property
    def is_active(self) -> bool:
        """QUEUE_IS_ACTIVE: has a ring, a share, and is not evicted."""
        return (
            self.ring_size > 0
            and self.ring_address != 0
            and self.percent > 0
            and not self.owner.evicted
        )

    @property
    def can_preempt_waves(self) -> bool:
        """Whether there is room for the state of a kernel in its middle (CWSR)."""
        return self.ctx_address != 0 and self.ctl_stack_size >= WAVE_SIZE

    @property
    def cwsr_stack_size(self) -> int:
        """cp_hqd_cntl_stack_size, which init_mqd sets only with a save area."""
        return self.ctl_stack_size if self.ctx_address else 0

    def mqd(self) -> bytes:
        """The MQD as CHECKPOINT copies it."""
        size = mqd_size(self.kind)
        raw = bytearray(self.mqd_rest.ljust(size, b"\0")[:size])
        if self.kind == QueueType.COMPUTE:
            stack = self.cwsr_stack_size
            used = WAVE_SIZE if self.saved_state is not None else 0
            words = {
                CP_MQD_SAVE_END_TIME_LO: self.evictions,
                CP_HQD_PQ_RPTR: self.read_index & 0xFFFFFFFF,
                CP_HQD_CNTL_STACK_OFFSET: stack - used,
                CP_HQD_CNTL_STACK_SIZE: stack,
                CP_HQD_PQ_WPTR_LO: self.read_index & 0xFFFFFFFF,
                CP_HQD_PQ_WPTR_HI: self.read_index >> 32,
                RESERVED_READ_INDEX_HI: self.read_index >> 32,
                RESERVED_STOPPED: int(self.stopped),
            }
            for word, value in words.items():
                struct.pack_into("<I", raw, word * 4, value & 0xFFFFFFFF)
        return bytes(raw)

    def control_stack(self) -> bytes:
        """The control stack as CHECKPOINT copies it; it grows downwards from its end."""
        stack = bytearray(self.cwsr_stack_size)
        if self.saved_state is not None:
            wave = _WAVE.pack(b"WAVE", len(self.saved_state), self.read_index, self.saved_state)
            stack[len(stack) - WAVE_SIZE :] = wave
        return bytes(stack)

    def restore(self, mqd: bytes, control_stack: bytes) -> None:
        """Take up the state that CHECKPOINT copied."""
        self.mqd_rest = mqd
        if self.kind != QueueType.COMPUTE:
            return

        def word(index: int) -> int:
            return int(struct.unpack_from("<I", mqd, index * 4)[0])

        self.read_index = word(CP_HQD_PQ_RPTR) | word(RESERVED_READ_INDEX_HI) << 32
        self.stopped = bool(word(RESERVED_STOPPED))
        self.evictions = word(CP_MQD_SAVE_END_TIME_LO)
        self.ctl_stack_size = word(CP_HQD_CNTL_STACK_SIZE)
        if word(CP_HQD_CNTL_STACK_OFFSET) < len(control_stack):
            magic, length, index, state = _WAVE.unpack(control_stack[-WAVE_SIZE:])
            if magic == b"WAVE" and index == self.read_index:
                self.saved_state = state[:length]
