"""``migrate map HOST HOST``: what the agents say of themselves is what the answer rests on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from migrate.errors import NotKfdProcess, VisibleGpus
from migrate.kfd.sysfs import read_topology
from migrate.model import HostPaths
from scenarios.cluster import Cluster
from tests.integration.jobs import migrate


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two GPUs at a, four at b."""
    with Cluster.temporary() as made:
        made.add_host("a")
        made.add_host("b", "mi210x4")
        yield made


def ids(cluster: Cluster, host: str) -> list[str]:
    """gpu_ids that the host's own tree has."""
    topology = read_topology(HostPaths.under(cluster.hosts[host].root).kfd_sysfs)
    return [str(gpu.gpu_id) for gpu in topology.gpus]


def test_two_hosts_are_asked_and_every_gpu_gets_one_of_its_own(cluster: Cluster) -> None:
    answer = migrate(cluster, "map", "a", "b")
    found = answer.document
    assert answer.code == 0, found
    assert sorted(found["map"]) == sorted(ids(cluster, "a"))
    assert len(set(found["map"].values())) == 2
    assert set(found["map"].values()) < set(ids(cluster, "b"))
    assert sorted(found["show"]) == sorted(found["map"].values())


def test_four_gpus_do_not_go_to_the_host_whose_agent_tells_of_two(cluster: Cluster) -> None:
    answer = migrate(cluster, "map", "b", "a")
    assert answer.code == VisibleGpus.exit_code
    assert answer.document["map"] is None
    assert {refusal["rule"] for refusal in answer.document["refusals"]} == {"visible-gpus"}
    # A pid that no KFD process of the host has.
    assert migrate(cluster, "map", "a", "b", "--pid", "1").code == NotKfdProcess.exit_code
