"""The CPU side of a frozen process: sent while the engine still writes it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack

from migrate.dataplane.access import MemoryAccess
from migrate.dataplane.messages import ObjectInfo, ObjectKind
from migrate.engine.seam import CpuImage, Piece, ProcessEngine
from migrate.errors import MigrateError
from migrate.model import ProcessRef
from migrate.orchestrator.objects import ObjectTable, opened
from migrate.orchestrator.plan import ObjectOrder

Came = tuple[ObjectInfo, Piece]


class CpuBefore:
    """CPU memory of the running process: objects to iterate over once.

    If that fails it ends early, so that the round does not: see ``failed``.
    """

    def __init__(self, pieces: Iterator[tuple[Piece, MemoryAccess]], table: ObjectTable) -> None:
        self.came: list[Came] = []
        self.failed: MigrateError | None = None
        self._pieces = pieces
        self._table = table

    def __iter__(self) -> Iterator[tuple[ObjectInfo, MemoryAccess]]:
        try:
            for piece, access in self._pieces:
                info = self._table.piece(piece)
                self.came.append((info, piece))
                yield info, access
        except MigrateError as error:
            self.failed = error


class CpuSide:
    """Objects to iterate over once; then ``image`` is whole and ``orders`` has all of them.

    First come the files that are sent while they are written, in pieces; then what is there
    only once the dump is finished. The iteration raises CheckpointFailed. ``close`` at the end.
    ``before``: what was sent before and still counts.
    """

    def __init__(
        self,
        engine: ProcessEngine,
        process: ProcessRef,
        image: CpuImage,
        table: ObjectTable,
        before: Sequence[Came] = (),
    ) -> None:
        self.image = image
        self.bytes = 0  # sent in the freeze, of memory
        self.orders: tuple[ObjectOrder, ...] = ()
        self._engine = engine
        self._process = process
        self._table = table
        self._before = before
        self._open = ExitStack()

    def __iter__(self) -> Iterator[tuple[ObjectInfo, MemoryAccess]]:
        came: list[Came] = []
        for piece, access in self._engine.pieces(self._process):
            info = self._table.piece(piece)
            came.append((info, piece))
            yield info, access
        self.image = self._engine.finish_dump(self._process, self.image)
        whole = {piece.name for _, piece in came}
        rest = (
            *self._table.ranges(self.image.ranges),
            *self._table.blobs(
                [b for b in self.image.blobs if b.name not in whole and not b.sparse]
            ),
        )
        self.bytes = sum(piece.size for _, piece in came)
        self.bytes += sum(cpu.length for cpu in self.image.ranges)
        files = {blob.name: blob for blob in self.image.blobs}
        pieces = (
            ObjectOrder(
                object_id=info.id,
                kind=ObjectKind.BLOB,
                size=info.size,
                blob=files[piece.name],
                offset=piece.offset,
            )
            for info, piece in (*self._before, *came)
        )
        self.orders = (*rest, *pieces)
        yield from self._open.enter_context(
            opened(
                rest,
                cpu=lambda wanted: self._engine.memory(self._process, wanted),
                blob=lambda wanted: self._engine.blob(self._process, wanted),
            )
        )

    def close(self) -> None:
        """Close what is open of it. Idempotent."""
        self._open.close()
