"""Simulated hosts with agents, shared by tests that do not harm them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from scenarios.cluster import Cluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Three hosts, a, b and c, alike but for their gpu_ids."""
    with Cluster.temporary() as cluster:
        for name in ("a", "b", "c"):
            cluster.add_host(name)
        yield cluster


@pytest.fixture
def own_cluster() -> Iterator[Cluster]:
    """An empty cluster for a test that breaks things."""
    with Cluster.temporary() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def pair() -> Iterator[Cluster]:
    """Two hosts, a and b, for one file: a test that ends an agent leaves an ordinary one."""
    with Cluster.temporary() as pair:
        for name in ("a", "b"):
            pair.add_host(name)
        yield pair
