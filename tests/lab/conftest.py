from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from migrate.dataplane.vram import VramMode
from scenarios.lab import build as builder
from scenarios.lab import conformance
from scenarios.lab.cluster import LabCluster
from scenarios.lab.host import Host, HostSpec
from scenarios.lab.layout import Layout
from tests.lab.jobs import prepare
from tests.lab.moves import Keep, Pair, keep_evidence

# Files in the order in which hosts are booted least often: first those of two GPUs each, then
# more GPUs, then what needs a host for itself.
ORDER = (
    *("test_hook", "test_jobs", "test_access", "test_snapshots", "test_conformance"),
    *("test_sdma_migration", "test_migrations", "test_precopy"),
    *("test_visible_gpus", "test_eight_gpus"),
    *("test_hosts", "test_deploy", "test_hang", "test_far_offsets", "test_start"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort the lab's files; a test of a file that is not listed comes last."""

    def rank(item: pytest.Item) -> int:
        if item.path.parent != Path(__file__).parent:
            return -1
        return ORDER.index(item.path.stem) if item.path.stem in ORDER else len(ORDER)

    items.sort(key=rank)


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

    def shared(self, *specs: HostSpec) -> list[Host]:
        """Booted if none like them are up, with the project; their kernel logs are clean."""
        found = [Host(self._layout, spec.name) for spec in specs]
        booting = []
        for host, spec in zip(found, specs, strict=True):
            if self._shared.get(spec.name) != spec or host.running is None:
                self._shared.pop(spec.name, None)
                self._started.add(spec.name)
                host.stop()
                host.launch(spec)
                booting.append((host, spec))
        for host, spec in booting:
            host.wait_ready()
            conformance.install_project(host)
            self._shared[spec.name] = spec
        for host in found:
            conformance.check_kernel(host)
        return found

    def spoil(self, *names: str) -> None:
        """What a test has changed on these hosts is gone at their next use: they boot anew."""
        for name in names:
            self._shared.pop(name, None)

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

    def get(spec: HostSpec) -> Host:
        return hosts.shared(spec)[0]

    return get


@pytest.fixture(scope="session")
def pair(hosts: Hosts, layout: Layout) -> Iterator[Pair]:
    """Hosts a and b with so many GPUs, and their agents; booted when the numbers change."""
    with LabCluster(layout) as cluster:
        ready: list[tuple[int, ...]] = []  # the QEMUs whose agents run

        def get(a: int, b: int) -> LabCluster:
            found = hosts.shared(HostSpec(name="a", gpus=a), HostSpec(name="b", gpus=b))
            now = tuple(host.running.pid for host in found if host.running)
            if ready != [now]:
                for host in found:
                    cluster.hosts[host.name] = host
                    cluster.kill_agent(host.name)
                    prepare(host)
                # Each card is tried at its first use, which is seen with less than 16 of them.
                many = {"vram_access": VramMode.MMAP.value} if a + b == 16 else None
                cluster.start_agents(settings=many)
                ready[:] = [now]
            return cluster

        yield get


@pytest.fixture
def keep(request: pytest.FixtureRequest) -> Keep:
    """``keep_evidence`` for this test."""
    return partial(keep_evidence, request.node.name)
