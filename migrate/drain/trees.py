"""Which processes of a host move together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import msgspec

from migrate.report import ProcessRow


def trees(rows: Iterable[ProcessRow]) -> list[ProcessRow]:
    """A row a tree, its root's, with the queues and the VRAM of all of it.

    A child is moved with its root and never by itself: they may have buffers in common, and one
    of them is no use without the other.
    """
    found = list(rows)
    roots = [row for row in found if not row.root]
    return [_whole(root, [row for row in found if row.root == root.pid]) for root in roots]


def _whole(root: ProcessRow, others: Iterable[ProcessRow]) -> ProcessRow:
    vram, queues = Counter(root.vram), root.queues
    for row in others:
        vram.update(row.vram)
        queues += row.queues
    return msgspec.structs.replace(root, vram=dict(vram), queues=queues)
