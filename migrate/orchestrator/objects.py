"""Which memory a migration moves: BOs with contents and CPU ranges, each with an id.

An id is given at first sight and never again to something else, so that a chunk of a
buffer that was freed between two rounds can't be taken for one of its successor. A BO is
recognised by its KFD process, handle, address, size and flags.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from migrate.dataplane.access import MemoryAccess
from migrate.dataplane.messages import ObjectInfo, ObjectKind
from migrate.dataplane.vram import VramAccess, VramTally
from migrate.engine.seam import Blob, CpuRange, Piece
from migrate.errors import SvmUnsupported
from migrate.kfd.privdata import PrivateData, decode
from migrate.kfd.process import Checkpointed, KfdCheckpoint
from migrate.model import Value
from migrate.orchestrator.plan import BoKey, ObjectOrder, Share
from migrate.orchestrator.sharing import Place, places

PAGE = 4096  # bytes, in which the driver counts SVM ranges

_Key = tuple[object, ...]


def private_data(checkpoint: KfdCheckpoint) -> PrivateData:
    """The checkpoint's private data, decoded. Raises BrokenPrivateData."""
    return decode(
        checkpoint.priv_data,
        len(checkpoint.devices),
        len(checkpoint.bos),
        checkpoint.num_objects,
    )


def refuse_svm(private: PrivateData) -> None:
    """Raises SvmUnsupported: SVM pages may be in VRAM, and no dmabuf shows them."""
    if private.svm_ranges:
        first = private.svm_ranges[0]
        raise SvmUnsupported(
            f"the process has {len(private.svm_ranges)} SVM ranges,"
            f" the first at {first.start_addr * PAGE:#x}"
        )


def lent(checkpoint: KfdCheckpoint) -> Iterator[CpuRange]:
    """The process's own memory that its GPUs may write: whole pages of each userptr BO."""
    for bucket, record in zip(checkpoint.bos, private_data(checkpoint).bos, strict=True):
        if bucket.is_userptr:
            first = record.user_addr // PAGE * PAGE
            end = -(-(record.user_addr + bucket.size) // PAGE) * PAGE
            yield CpuRange(pid=checkpoint.pid, address=first, length=end - first)


class ObjectTable:
    """The ids of one migration, at the source."""

    def __init__(self) -> None:
        self._ids: dict[_Key, int] = {}

    def bos(
        self, process: int, checkpoint: KfdCheckpoint, shares: Iterable[Share] = ()
    ) -> list[ObjectOrder]:
        """One order for every BO whose contents must be moved, in bucket order.

        Those that *shares* imports are left out: their owners' contents are theirs.
        Raises SvmUnsupported: ranges may be made at any time, so each round looks.
        """
        imported = {share.importer for share in shares}
        orders = []
        private = private_data(checkpoint)
        refuse_svm(private)
        for index, (bucket, record) in enumerate(zip(checkpoint.bos, private.bos, strict=True)):
            place = BoKey(process=process, index=index)
            if not bucket.has_contents or place in imported:
                continue
            key = ("bo", process, record.idr_handle, bucket.addr, bucket.size, bucket.alloc_flags)
            orders.append(
                ObjectOrder(
                    object_id=self._id(key),
                    kind=ObjectKind.VRAM if bucket.is_vram else ObjectKind.GTT,
                    size=bucket.size,
                    bo=place,
                )
            )
        return orders

    def ranges(self, ranges: Sequence[CpuRange]) -> list[ObjectOrder]:
        """One order for every range of CPU memory."""
        return [
            ObjectOrder(
                object_id=self._id(("cpu", r.pid, r.address, r.length)),
                kind=ObjectKind.CPU,
                size=r.length,
                cpu=r,
            )
            for r in ranges
        ]

    def blobs(self, blobs: Sequence[Blob]) -> list[ObjectOrder]:
        """One order for every file of the engine's."""
        return [
            ObjectOrder(
                object_id=self._id(("blob", blob.name, blob.size)),
                kind=ObjectKind.BLOB,
                size=blob.size,
                blob=blob,
            )
            for blob in blobs
        ]

    def piece(self, piece: Piece) -> ObjectInfo:
        """The object that a part of a file is."""
        number = self._id(("piece", piece.name, piece.offset))
        return ObjectInfo(id=number, kind=ObjectKind.BLOB, size=piece.size)

    def _id(self, key: _Key) -> int:
        return self._ids.setdefault(key, len(self._ids) + 1)


def vram_of(checkpoint: KfdCheckpoint, index: int) -> int | None:
    """The actual gpu_id of the GPU whose VRAM BO *index* is; None for memory of the host."""
    bucket = checkpoint.bos[index]
    actual = {device.user_gpu_id: device.actual_gpu_id for device in checkpoint.devices}
    return actual[bucket.gpu_id] if bucket.is_vram else None


@contextmanager
def opened(
    orders: Sequence[ObjectOrder],
    cpu: Callable[[CpuRange], MemoryAccess],
    blob: Callable[[Blob], MemoryAccess],
) -> Iterator[list[tuple[ObjectInfo, MemoryAccess]]]:
    """CPU ranges and blobs with access to their memory, closed at the end."""
    with ExitStack() as stack:
        result: list[tuple[ObjectInfo, MemoryAccess]] = []
        for order in orders:
            if order.blob is not None:
                access = blob(order.blob)
            else:
                assert order.cpu is not None
                access = cpu(order.cpu)
            stack.callback(access.close)
            info = ObjectInfo(id=order.object_id, kind=order.kind, size=order.size)
            result.append((info, access))
        yield result


def buffers(orders: Sequence[ObjectOrder], checkpoints: Sequence[Checkpointed]) -> dict[int, Place]:
    """Which buffer each BO is, by object id: its place in its render node's file.

    The kernel gives the place to the buffer itself, and to no other one while that lives, which
    a dmabuf of ours makes it do (``drm_vma_node``). The dmabuf's inode would not tell: Linux 6.1
    exports a new one at each checkpoint.
    """
    found = {
        BoKey(process=number, index=index): place
        for number, one in enumerate(checkpoints)
        for index, place in places(one.checkpoint)
    }
    return {order.object_id: found[order.bo] for order in orders if order.bo is not None}


class _Kept(Value):
    """A BO that is open: which buffer that is, a dmabuf of it, and the access."""

    buffer: Place
    fd: int
    access: MemoryAccess


class OpenBos:
    """Access to a process's BOs that outlives a round.

    To map a GiB anew costs a tenth of a second of a core, and the last time that is in the
    freeze. What is open keeps freed VRAM allocated: see ``holding``. One thread uses it.
    """

    def __init__(self, vram: VramAccess, tally: VramTally | None = None) -> None:
        self._vram = vram
        self._tally = tally
        self._open: dict[int, _Kept] = {}  # by object id

    def open(
        self, orders: Sequence[ObjectOrder], checkpoints: Sequence[Checkpointed]
    ) -> list[tuple[ObjectInfo, MemoryAccess]]:
        """The BOs of *orders*, of which those that were open still are; all others are closed.

        Takes the dmabufs out of *checkpoints*. Raises OSError, MigrationFailed.
        """
        now = buffers(orders, checkpoints)
        for number in [n for n, kept in self._open.items() if now.get(n) != kept.buffer]:
            self.close(number)
        for order in orders:
            assert order.bo is not None
            checkpointed = checkpoints[order.bo.process]
            fd = checkpointed.dmabufs[order.bo.index]
            assert fd is not None
            if order.object_id in self._open:
                os.close(fd)
            else:
                gpu_id = vram_of(checkpointed.checkpoint, order.bo.index)
                access = self._vram.open(fd, order.size, gpu_id, "read", self._tally)
                kept = _Kept(buffer=now[order.object_id], fd=fd, access=access)
                self._open[order.object_id] = kept
            checkpointed.dmabufs[order.bo.index] = None
        return [
            (
                ObjectInfo(id=order.object_id, kind=order.kind, size=order.size),
                self._open[order.object_id].access,
            )
            for order in orders
        ]

    def buffers(self) -> dict[int, Place]:
        """Which buffers are open, by object id."""
        return {number: kept.buffer for number, kept in self._open.items()}

    def close(self, number: int) -> None:
        """Let go of one that is open."""
        kept = self._open.pop(number)
        kept.access.close()
        os.close(kept.fd)

    def close_all(self) -> None:
        """Let go of all. Idempotent."""
        for number in list(self._open):
            self.close(number)
