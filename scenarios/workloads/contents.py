"""What fills the VRAM: bf16 weights, generated or from a file, distinct everywhere."""

from __future__ import annotations

import json
import mmap
import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from migrate.errors import UsageError

Words = npt.NDArray[np.uint64]
CHUNK = 4 << 20  # bytes
# Of four bf16 values the seven bits of mantissa: chunks differ, magnitudes stay.
_MANTISSA = 0x007F_007F_007F_007F
_SCALE = 0.02  # standard deviation of generated weights
_MAX_HEADER = 100 << 20  # bytes; the format's own limit


def generated(seed: int) -> Words:
    """One chunk of bf16 values from a normal distribution."""
    values = np.random.default_rng(seed).standard_normal(CHUNK // 2, np.float32)
    return to_bf16(values * np.float32(_SCALE)).view(np.uint64)


def to_bf16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Round to nearest even; NaN is not expected."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))
    return (rounded >> np.uint32(16)).astype(np.uint16)


def from_safetensors(path: str) -> Words:
    """All tensors of a safetensors file as bf16, cut to whole chunks (at least one).

    Raises UsageError. Format: u64 length, JSON header, data.
    """
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as data:
            values = _tensors(data)
    except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
        raise UsageError(f"{path}: no safetensors file that can be read: {error}") from error
    length = max(1, values.nbytes // CHUNK) * CHUNK
    return np.resize(values, length // 2).view(np.uint64)


def _tensors(data: mmap.mmap) -> npt.NDArray[np.uint16]:
    (length,) = struct.unpack_from("<Q", data)
    if length > min(_MAX_HEADER, len(data) - 8):
        raise ValueError(f"a header of {length} bytes")
    header = json.loads(data[8 : 8 + length])
    parts = []
    for name, tensor in header.items():
        if name == "__metadata__":
            continue
        start, end = (8 + length + int(offset) for offset in tensor["data_offsets"])
        if not 8 + length <= start <= end <= len(data):
            raise ValueError(f"tensor {name} is outside the file")
        parts.append(_as_bf16(tensor["dtype"], data[start:end]))
    if not any(part.size for part in parts):
        raise ValueError("it has no floating-point tensor")
    return np.concatenate(parts)


def _as_bf16(dtype: str, raw: bytes) -> npt.NDArray[np.uint16]:
    if dtype == "BF16":
        return np.frombuffer(raw, np.uint16)
    if dtype == "F32":
        return to_bf16(np.frombuffer(raw, np.float32))
    if dtype == "F16":
        return to_bf16(np.frombuffer(raw, np.float16).astype(np.float32))
    return np.empty(0, np.uint16)  # indexes and the like


def fill(target: memoryview, words: Words, number: int) -> None:
    """Fill chunk *number* of the whole VRAM; the first ``len(words)`` are the words as is."""
    per_chunk = CHUNK // 8
    chunks = len(words) // per_chunk
    turn, part = divmod(number, chunks)
    source = words[part * per_chunk :][: len(target) // 8]
    key = xxhash.xxh3_64_intdigest(struct.pack("<QQ", turn, number)) & _MANTISSA if turn else 0
    np.bitwise_xor(source, np.uint64(key), out=np.frombuffer(target, np.uint64))


def words_of(weights: str | None, seed: int) -> Words:
    """Contents by file, or generated."""
    if weights is None:
        return generated(seed)
    if not Path(weights).exists():
        raise UsageError(f"{weights}: there is no such file")
    return from_safetensors(weights)
