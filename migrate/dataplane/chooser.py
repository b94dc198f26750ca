"""Which codec a run travels by."""

from __future__ import annotations

from migrate.dataplane.codecs import Encoder
from migrate.dataplane.messages import Codec, ObjectInfo


class Chooser:
    """Raw for everything."""

    def encode(
        self, encoder: Encoder, info: ObjectInfo, raw: memoryview
    ) -> tuple[Codec, memoryview]:
        """The codec and the payload of a run."""
        return Codec.RAW, encoder.encode(Codec.RAW, raw)

    def sent(self, payload: int, seconds: float) -> None:
        """A payload of so many bytes was given to the wire in that time."""
