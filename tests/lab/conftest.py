from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from scenarios.lab import build as builder
from scenarios.lab.host import Host, HostSpec
from scenarios.lab.layout import Layout

StartHost = Callable[[HostSpec], Host]


@pytest.fixture(scope="session")
def layout() -> Layout:
    """A built lab."""
    found = Layout.default()
    builder.build(found, print)
    return found


@pytest.fixture(scope="module")
def start_host(layout: Layout) -> Iterator[StartHost]:
    """Boots hosts; those of a module are switched off after it."""
    started: list[Host] = []

    def start(spec: HostSpec) -> Host:
        host = Host(layout, spec.name)
        host.stop()
        host.start(spec)
        started.append(host)
        return host

    yield start
    for host in started:
        host.stop()
