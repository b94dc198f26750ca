from __future__ import annotations

from collections.abc import Iterator

import pytest

from migrate.kfd.sim.callers import may_checkpoint
from tests.conformance.hosts import Host, any_host, simulated_host


def _options() -> list[str]:
    import os  # noqa: PLC0415

    return [] if may_checkpoint(os.getpid()) else ["--allow-unprivileged"]


@pytest.fixture(scope="session")
def _host() -> Iterator[Host]:
    with any_host(*_options()) as host:
        yield host


@pytest.fixture
def host(_host: Host) -> Iterator[Host]:
    """The host under test, the same for all tests; children are gone after each."""
    yield _host
    _host.end_children()


@pytest.fixture
def broken_host() -> Iterator[Host]:
    """A host that a test may break for good, so a simulated one."""
    with simulated_host(*_options()) as host:
        yield host
