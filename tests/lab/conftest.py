from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from scenarios.lab import build as builder
from scenarios.lab import conformance
from scenarios.lab.host import Host, HostSpec
from scenarios.lab.layout import Layout

StartHost = Callable[[HostSpec], Host]
SharedHost = Callable[[HostSpec], Host]


@pytest.fixture(scope="session")
def layout() -> Layout:
    """A built lab."""
    found = Layout.default()
    builder.build(found, print)
    return found


class Hosts:
    """The hosts of a run: fresh ones, and those that tests leave as they found them."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._shared: dict[str, HostSpec] = {}
        self._started: set[str] = set()

    def fresh(self, spec: HostSpec) -> Host:
        """Booted now, for this module alone."""
        host = Host(self._layout, spec.name)
        self._shared.pop(spec.name, None)
        self._started.add(spec.name)
        host.stop()
        host.start(spec)
        return host

    def shared(self, spec: HostSpec) -> Host:
        """Booted if none like it is up, with the project; its kernel log is clean."""
        host = Host(self._layout, spec.name)
        if self._shared.get(spec.name) != spec or host.running is None:
            host = self.fresh(spec)
            conformance.install_project(host)
            self._shared[spec.name] = spec
        conformance.check_kernel(host)
        return host

    def stop_fresh(self) -> None:
        """Switch off what a module had for itself."""
        for name in self._started - set(self._shared):
            Host(self._layout, name).stop()
        self._started &= set(self._shared)

    def stop(self) -> None:
        """Switch off everything."""
        self._shared.clear()
        self.stop_fresh()


@pytest.fixture(scope="session")
def hosts(layout: Layout) -> Iterator[Hosts]:
    """All hosts of the run."""
    found = Hosts(layout)
    yield found
    found.stop()


@pytest.fixture(scope="module")
def start_host(hosts: Hosts) -> Iterator[StartHost]:
    """Boots fresh hosts; those of a module are switched off after it."""
    yield hosts.fresh
    hosts.stop_fresh()


@pytest.fixture(scope="module")
def shared_host(hosts: Hosts) -> SharedHost:
    """A host for tests that leave nothing behind: one that is up already, if it is alike."""
    return hosts.shared
