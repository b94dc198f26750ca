"""``migrate recover``: asked at once, an agent goes on; asked again, it says that it has."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from migrate import inventory
from migrate.client import agent
from migrate.rpc.pb.agent_pb2 import RecoverRequest
from scenarios.cluster import AgentSetup, Cluster, wait_until
from tests.integration.jobs import migrate, start_job
from tests.integration.lookers import ended, started, states, wait_state


def rows(cluster: Cluster, host: str, migration: str = "") -> list[dict[str, Any]]:
    """As the command asks, without its start."""
    with agent(inventory.load(cluster.inventory), host) as stub:
        reply = stub.Recover(RecoverRequest(id=migration), timeout=100)
    found: list[dict[str, Any]] = json.loads(reply.rows)
    return found


@pytest.mark.timeout(300)
def test_what_is_unfinished_is_told_and_gone_on_with(own_cluster: Cluster) -> None:
    stays = "import os\nos.environ['MIGRATE_FAULTS'] = 'destination.owned.before-write=exit'"
    own_cluster.add_host("a")
    there = own_cluster.add_host("b", setup=AgentSetup(prelude=stays))
    here = own_cluster.hosts["a"]
    job = start_job(own_cluster, "a", "job")
    assert rows(own_cluster, "a") == rows(own_cluster, "b") == []
    migration = started(own_cluster, "a", "b", str(job.pid), "--max-rounds", "1")
    wait_state(here, migration, "source", "GRANTED")
    assert there.agent is not None
    there.agent.wait()  # the grant came, and its agent is gone: nobody can answer
    (row,) = rows(own_cluster, "a")
    assert (row["id"], row["side"], row["state"]) == (migration, "source", "GRANTED")
    assert "b is asked for its answer" in row["message"]
    assert states(here, migration, "source")[-1] == "GRANTED"  # to ask decides nothing
    own_cluster.start_agent("b", AgentSetup())
    deadline = time.monotonic() + 100
    while rows(own_cluster, "a", migration)[0]["state"] != "ROLLED_BACK":
        assert time.monotonic() < deadline
    assert ended(here, migration)["failure"]["reason"] == "REFUSED"
    # The report is journaled a moment before the agent has done with it.
    wait_until(
        lambda: rows(own_cluster, "a", migration)[0]["message"] == "nothing is unfinished",
        what="its end",
    )
    (row,) = rows(own_cluster, "b", migration)
    assert (row["side"], row["state"]) == ("destination", "ABORTED")
    assert row["message"] == "nothing is unfinished"
    assert rows(own_cluster, "a") == rows(own_cluster, "b") == []
    assert migrate(own_cluster, "recover", "a", "0" * 16).code == 18
    said = migrate(own_cluster, "recover", "a", migration)
    assert (said.code, said.document["rows"]) == (0, rows(own_cluster, "a", migration))
    aborted = migrate(own_cluster, "abort", migration)
    assert (aborted.code, aborted.document["outcome"]) == (0, "ALREADY_ENDED")
    job.runs_on()
    assert job.finish()["pids"] == [job.pid]
