from __future__ import annotations

from collections.abc import Iterator

import pytest

from migrate.kfd.sim.callers import may_checkpoint
from tests.conformance.hosts import Host, any_host, simulated_host


def _options() -> list[str]:
    import os  # noqa: PLC0415

    return [] if may_checkpoint(os.getpid()) else ["--allow-unprivileged"]


@pytest.fixture(scope="module")
def _module_host() -> Iterator[Host]:
    with any_host(*_options()) as host:
        yield host


@pytest.fixture
def host(_module_host: Host) -> Iterator[Host]:
    """The host under test; children are gone after each test."""
    yield _module_host
    _module_host.end_children()


@pytest.fixture
def broken_host() -> Iterator[Host]:
    """A host that a test may break for good, so a simulated one."""
    with simulated_host(*_options()) as host:
        yield host
