"""How runs of chunks are made smaller. Every codec is exact; the digest of the raw bytes tells.

Byte planes: bytes of equal weight of 2- or 4-byte values side by side, so that sign and
exponent bytes, which repeat, meet each other and the noise of the mantissa stays apart.
"""

from __future__ import annotations

import numpy as np
import zstandard

from migrate.dataplane.frame import MAX_PAYLOAD
from migrate.dataplane.messages import Codec
from migrate.errors import FrameRejected

PLANES = {Codec.PLANES2_ZSTD: 2, Codec.PLANES4_ZSTD: 4}


class Encoder:
    """Compresses runs of at most 1 MiB. Not thread-safe; keeps buffers and contexts."""

    def __init__(self) -> None:
        self._contexts: dict[int, zstandard.ZstdCompressor] = {}
        self._planes = np.empty(MAX_PAYLOAD, dtype=np.uint8)

    def encode(self, codec: Codec, raw: memoryview, level: int = 1) -> memoryview:
        """The payload for *raw*; may be longer than it."""
        if codec is Codec.RAW:
            return raw
        context = self._contexts.get(level)
        if context is None:
            context = zstandard.ZstdCompressor(
                level=level, write_checksum=False, write_content_size=True
            )
            self._contexts[level] = context
        return memoryview(context.compress(self._split(codec, raw)))

    def _split(self, codec: Codec, raw: memoryview) -> memoryview:
        width = PLANES.get(codec)
        if width is None:
            return raw
        whole = len(raw) - len(raw) % width
        values = np.frombuffer(raw, dtype=np.uint8)
        out = self._planes[: len(raw)]
        out[:whole].reshape(width, -1)[:] = values[:whole].reshape(-1, width).T
        out[whole:] = values[whole:]
        return out.data


class Decoder:
    """The other way; the input comes from the wire and is not trusted to be well-formed."""

    def __init__(self) -> None:
        self._context = zstandard.ZstdDecompressor(max_window_size=MAX_PAYLOAD)

    def decode(self, codec: Codec, payload: memoryview, into: memoryview) -> None:
        """Fill *into* with the raw bytes.

        Raises FrameRejected if the payload does not give exactly as many.
        """
        data = np.frombuffer(self._decompress(payload, len(into)), dtype=np.uint8)
        out = np.frombuffer(into, dtype=np.uint8)
        width = PLANES.get(codec, 1)
        whole = len(out) - len(out) % width
        out[:whole].reshape(-1, width)[:] = data[:whole].reshape(width, -1).T
        out[whole:] = data[whole:]

    def _decompress(self, payload: memoryview, length: int) -> bytes:
        try:
            # The content size in the zstd header is checked before anything is allocated.
            if zstandard.frame_content_size(payload) != length:
                raise FrameRejected(f"compressed run does not hold {length} bytes")
            data = self._context.decompress(payload, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise FrameRejected(f"compressed run is damaged: {error}") from None
        if len(data) != length:
            raise FrameRejected(f"compressed run holds {len(data)} bytes, not {length}")
        return data
