"""An AEAD that is none, for the benchmark alone: it copies where AES-GCM would encrypt.

The product has no plaintext mode and none can be set: whoever makes a Sender or a Receiver in
``agents`` takes the default. Here it tells what of the data plane's cost is not encryption.
"""

from __future__ import annotations

import ctypes

from cryptography.exceptions import InvalidTag

from migrate.dataplane.access import Buffer
from migrate.dataplane.chunks import address_of
from migrate.dataplane.frame import TAG

_NO_TAG = bytes(TAG)
_copy = ctypes.CDLL(None).memcpy  # without the GIL, as AES-GCM
_copy.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_copy.restype = None
_LARGE = 4096  # bytes; less is copied by Python


class NoAead:
    """Contents in the clear and a tag of zeros."""

    def __init__(self, key: bytes) -> None:
        pass

    def encrypt_into(
        self, nonce: Buffer, data: Buffer, associated_data: Buffer | None, buf: Buffer
    ) -> int:
        """See Aead."""
        out = memoryview(buf)
        _move(out, memoryview(data))
        out[len(data) :] = _NO_TAG
        return len(out)

    def decrypt_into(
        self, nonce: Buffer, data: Buffer, associated_data: Buffer | None, buf: Buffer
    ) -> int:
        """See Aead."""
        sealed = memoryview(data)
        if bytes(sealed[-TAG:]) != _NO_TAG:
            raise InvalidTag
        _move(memoryview(buf), sealed[:-TAG])
        return len(sealed) - TAG


def _move(target: memoryview, source: memoryview) -> None:
    if len(source) < _LARGE or source.readonly:
        target[: len(source)] = source
    else:
        _copy(address_of(target), address_of(source), len(source))
