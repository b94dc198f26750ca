"""A card whose VRAM goes past what 32 bits can address: copies by its DMA engine."""

from __future__ import annotations

import pytest

from scenarios.lab.host import HostSpec
from tests.lab.conftest import StartHost
from tests.lab.test_access import access

pytestmark = [pytest.mark.lab, pytest.mark.timeout(3000)]


def test_offsets_past_2_gib(start_host: StartHost) -> None:
    host = start_host(HostSpec(name="b", gpus=1, memory_mb=768, vram_mb=4096))
    said = access(host, "-k", "past_2_gib")
    assert "1 passed" in said
