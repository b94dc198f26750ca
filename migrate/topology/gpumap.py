"""``--gpu-map OLD=NEW,...`` and the ids of a GPU through several migrations.

A process keeps for ever the gpu_ids that it saw at its start (KFD's user_gpu_id); what
they stand for (actual_gpu_id) changes with each migration. Maps are from actual id to
actual id, so a chain of any length is a chain of maps; the ids that the process knows
are only read, never changed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from migrate.errors import UsageError
from migrate.model import GpuMap
from migrate.topology.model import Node, Topology

_HOW = (
    "Give pairs like 0x1a97=0x770f,1=renderD129: a GPU is a gpu_id (decimal or hexadecimal),"
    " its index among the host's GPUs (0 is the first), or its render node."
)
_RENDER = re.compile(r"(?:/dev/dri/)?renderD(\d{1,6})")
_HEX = re.compile(r"0[xX][0-9a-fA-F]{1,8}")
_DECIMAL = re.compile(r"[0-9]{1,10}")


def parse_gpu_map(
    text: str,
    source: Topology,
    destination: Topology,
    *,
    identities: Iterable[tuple[int, int]] = (),
) -> tuple[tuple[int, int], ...]:
    """Pairs of (source gpu_id, destination gpu_id), actual ids both.

    A decimal number is a gpu_id if the host has that one, else an index. *identities*
    are the process's pairs of (user_gpu_id, actual_gpu_id): with them a source GPU may
    also be named as the process knows it, where no actual id is meant. Raises UsageError.
    """
    known = dict(identities)
    pairs = []
    for part in text.split(","):
        old, equals, new = (piece.strip() for piece in part.partition("="))
        if not (old and equals and new) or "=" in new:
            raise UsageError(f"--gpu-map: {part.strip()!r} is not OLD=NEW", advice=_HOW)
        pairs.append(
            (find_gpu(old, source, "source", known), find_gpu(new, destination, "destination"))
        )
    for side, which in (("source", 0), ("destination", 1)):
        _no_double([pair[which] for pair in pairs], side)
    return tuple(pairs)


def _no_double(gpu_ids: Sequence[int], side: str) -> None:
    for gpu_id in gpu_ids:
        if gpu_ids.count(gpu_id) > 1:
            raise UsageError(f"--gpu-map: {side} GPU {gpu_id} stands there twice", advice=_HOW)


def find_gpu(
    text: str, topology: Topology, side: str, identities: Mapping[int, int] | None = None
) -> int:
    """The actual gpu_id of a GPU named by gpu_id, index or render node. Raises UsageError."""
    gpus = topology.gpus
    if (render := _RENDER.fullmatch(text)) is not None:
        return _single([gpu for gpu in gpus if gpu.drm_render_minor == int(render[1])], text, side)
    if _HEX.fullmatch(text) is not None:
        number = int(text, 16)
    elif _DECIMAL.fullmatch(text) is not None:
        number = int(text)
    else:
        raise UsageError(f"--gpu-map: {text!r} names no GPU", advice=_HOW)
    if any(gpu.gpu_id == number for gpu in gpus):
        return number
    actual = (identities or {}).get(number)
    if actual is not None:
        return _single([gpu for gpu in gpus if gpu.gpu_id == actual], text, side)
    if _DECIMAL.fullmatch(text) is not None and number < len(gpus):
        return gpus[number].gpu_id
    return _single([], text, side)


def _single(found: Sequence[Node], text: str, side: str) -> int:
    if len(found) != 1:
        many = "no GPU" if not found else f"{len(found)} GPUs"
        raise UsageError(f"--gpu-map: the {side} has {many} {text}", advice=_HOW)
    return found[0].gpu_id


# ---------------------------------------------------------------- chains


def advance(identities: Iterable[tuple[int, int]], gpu_map: GpuMap) -> tuple[tuple[int, int], ...]:
    """The process's (user_gpu_id, actual_gpu_id) pairs after one more migration.

    Raises UsageError if the map lacks one of them or leads two to the same GPU.
    """
    pairs = dict(gpu_map.pairs)
    after = []
    for user, actual in identities:
        if actual not in pairs:
            raise UsageError(f"the map says nothing of GPU {actual}, which the process sees")
        after.append((user, pairs[actual]))
    if len({actual for _, actual in after}) < len(after):
        raise UsageError("the map leads two GPUs of the process to the same GPU")
    return tuple(after)


def compose(maps: Iterable[GpuMap]) -> GpuMap:
    """Several migrations in a row as one map. Raises UsageError where one ends before the next."""
    result: GpuMap | None = None
    for gpu_map in maps:
        result = gpu_map if result is None else GpuMap(pairs=advance(result.pairs, gpu_map))
    return result or GpuMap(pairs=())
