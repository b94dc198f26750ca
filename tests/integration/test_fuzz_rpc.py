"""The short form of ``python -m scenarios.bench.fuzz_rpc``; the long one makes 200,000 calls."""

from __future__ import annotations

import secrets

import pytest

from scenarios.bench.fuzz_rpc import fuzz
from scenarios.cluster import Cluster


@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    ("count", "seed"),
    [
        pytest.param(600, 1, id="short"),
        pytest.param(20_000, secrets.randbits(32), id="long", marks=pytest.mark.soak),
    ],
)
def test_malformed_calls_have_no_effect(count: int, seed: int) -> None:
    with Cluster.temporary() as cluster:
        for name in ("a", "b"):
            cluster.add_host(name)
        result = fuzz(cluster, count, seed)
    print(result)
    assert result["held"], result
