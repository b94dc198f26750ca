"""Mutated frames: the short form, and the long one behind the soak mark."""

from __future__ import annotations

import json

import pytest

from migrate.dataplane.staging import StagedObject
from scenarios.bench.fuzz_frames import Fuzz, NotHeld, main


def test_mutated_frames_are_refused() -> None:
    fuzz = Fuzz(seed=20)
    fuzz.run(1500)
    assert fuzz.outcomes["FrameRejected"] > 500
    assert fuzz.outcomes["ProtocolMismatch"]


def test_the_fuzzer_sees_a_receiver_that_does_not_check_digests(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def careless(self: StagedObject, offset: int, length: int, digests: bytes) -> None:
        self.table.set_run(offset // self.info.chunk, digests)

    monkeypatch.setattr(StagedObject, "commit", careless)
    with pytest.raises(NotHeld):
        Fuzz(seed=20).run(1500)


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_a_million_mutated_frames(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--count", "1000000"]) == 0
    assert json.loads(capsys.readouterr().out)["frames"] == 1_000_000
