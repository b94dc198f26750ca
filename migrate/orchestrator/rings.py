"""How many packets wait in a stopped process's rings: what "at any instant" means in numbers."""

from __future__ import annotations

from collections.abc import Sequence

from migrate.dataplane.memory import MmapAccess
from migrate.kfd.process import Checkpointed
from migrate.orchestrator.objects import private_data

QUEUE_FORMAT_AQL = 1  # KFD_QUEUE_FORMAT_AQL of kfd_priv.h
POINTER = 8  # bytes of a read or write pointer of an AQL queue (HSA: uint64)


def pending_packets(checkpoints: Sequence[Checkpointed]) -> int:
    """Packets written and not yet read in all AQL queues.

    Queues whose pointers lie in no buffer with contents (a process's own memory) are left
    out, as are SDMA queues, whose pointers count bytes.
    """
    return sum(
        max(0, written - read)
        for checkpointed in checkpoints
        for queue in private_data(checkpointed.checkpoint).queues
        if queue.format == QUEUE_FORMAT_AQL
        for written, read in [
            (
                _pointer(checkpointed, queue.write_ptr_addr),
                _pointer(checkpointed, queue.read_ptr_addr),
            )
        ]
        if written is not None and read is not None
    )


def read_pointers(checkpoints: Sequence[Checkpointed]) -> dict[int, int]:
    """Value of each AQL queue's read pointer by its address in the process."""
    found = {}
    for checkpointed in checkpoints:
        for queue in private_data(checkpointed.checkpoint).queues:
            if queue.format == QUEUE_FORMAT_AQL:
                value = _pointer(checkpointed, queue.read_ptr_addr)
                if value is not None:
                    found[queue.read_ptr_addr] = value
    return found


def _pointer(checkpointed: Checkpointed, address: int) -> int | None:
    for bucket, fd in zip(checkpointed.checkpoint.bos, checkpointed.dmabufs, strict=True):
        if fd is not None and bucket.addr <= address <= bucket.addr + bucket.size - POINTER:
            access = MmapAccess(fd, bucket.size, own=False)
            try:
                data = bytearray(POINTER)
                access.read(address - bucket.addr, memoryview(data))
            finally:
                access.close()
            return int.from_bytes(data, "little")
    return None
