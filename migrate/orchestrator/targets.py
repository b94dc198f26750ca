"""Where the contents of a copy's memory go: access to each object, for placing and reading back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Self

from migrate.dataplane.access import MemoryAccess
from migrate.dataplane.vram import Direction, VramAccess, VramTally
from migrate.engine.seam import HeldProcess
from migrate.errors import RestoreFailed
from migrate.kfd.process import Restored
from migrate.orchestrator.objects import vram_of
from migrate.orchestrator.plan import BoKey, ObjectOrder, RestoreOrder

WORTH_KEEPING = 2 << 20  # bytes; to map less again costs little
MAX_KEPT = 4096  # mappings; a process may have 65530 (vm.max_map_count), staging's among them


class Targets:
    """The objects of one order, each opened by one thread at a time. Closes what it keeps."""

    def __init__(
        self,
        held: HeldProcess,
        order: RestoreOrder,
        restored: Sequence[Restored],
        vram: VramAccess,
        tally: VramTally,
    ) -> None:
        self._held = held
        self._order = order
        self._restored = restored
        self._vram = vram
        self._tally = tally
        self._kept: dict[int, MemoryAccess] = {}  # by object id
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    @contextmanager
    def open(self, item: ObjectOrder, direction: Direction) -> Iterator[MemoryAccess]:
        """Access to one object. First all are opened for writing, one after another.

        A mapping that serves both directions is kept: its page table is filled once.
        """
        access = self._kept.get(item.object_id)
        if access is None:
            access = self._open(item, direction)
            if direction == "write" and self._is_kept(item):
                self._kept[item.object_id] = access
                self._stack.callback(access.close)
        try:
            yield access
        finally:
            if item.object_id not in self._kept:
                access.close()

    def _open(self, item: ObjectOrder, direction: Direction) -> MemoryAccess:
        if item.bo is None:
            assert item.cpu is not None
            return self._held.memory(item.cpu)
        fd, gpu_id = dmabuf(self._restored, item.bo), self._gpu(item.bo)
        return self._vram.open(fd, item.size, gpu_id, direction, self._tally)

    def _is_kept(self, item: ObjectOrder) -> bool:
        if item.bo is None or item.size < WORTH_KEEPING or len(self._kept) >= MAX_KEPT:
            return False
        fd = dmabuf(self._restored, item.bo)
        return self._vram.is_mapped(fd, item.size, self._gpu(item.bo))

    def _gpu(self, bo: BoKey) -> int | None:
        """The GPU here in whose VRAM it is."""
        was = vram_of(self._order.checkpoints[bo.process], bo.index)
        return None if was is None else self._order.gpu_map[was]


def dmabuf(restored: Sequence[Restored], bo: BoKey) -> int:
    """The dmabuf of a restored BO. Raises RestoreFailed."""
    fd = restored[bo.process].dmabufs[bo.index]
    if fd is None:
        raise RestoreFailed(f"BO {bo.index} of KFD process {bo.process} has no dmabuf here")
    return fd
