"""What live rounds hold of a running job's VRAM, and that the job never runs short by it."""

from __future__ import annotations

import threading
import time

import pytest

from migrate.errors import Cancelled
from scenarios.cluster import Cluster, wait_until
from tests.integration.jobs import Outcome, command, migrate
from tests.integration.lookers import keyed, wait_state

VRAM = 64 << 20  # bytes a GPU
HELD = VRAM * 8 // 10 >> 12 << 12  # what the job frees and takes again; less than this is free
PATIENCE = 120.0  # seconds


@pytest.mark.soak
@pytest.mark.timeout(400)
def test_a_job_that_frees_and_takes_most_of_its_vram_during_pre_copy(own_cluster: Cluster) -> None:
    for name in ("a", "b"):
        own_cluster.add_host(name, node_options=("--vram", str(VRAM)))
    log, swap = own_cluster.folder / "swap.log", own_cluster.folder / "swap"
    end = own_cluster.folder / "swap.end"
    churn = ["-m", "tests.integration.churn", "--log", str(log), "--until", str(end)]
    program = own_cluster.workload("a", [*churn, "--hold", str(HELD), "--swap", str(swap)])
    wait_until(lambda: log.exists() and b"filled 1" in log.read_bytes(), PATIENCE, "the buffer")
    outcomes: list[Outcome] = []
    options = ("--bandwidth", "0.1", "--max-rounds", "2", "--idempotency-key", "swap")
    migration = threading.Thread(
        target=lambda: outcomes.append(
            command(own_cluster, "run", "a", "b", str(program.pid), *options)
        )
    )
    host = own_cluster.hosts["a"]
    migration.start()
    try:
        wait_state(host, keyed(host, "swap"), "source", "ACTIVE")
        time.sleep(1.0)  # the first round would take more than 8 minutes
        swap.touch()
        wait_until(lambda: b"filled 2" in log.read_bytes(), PATIENCE, "as much VRAM again")
    finally:
        migrate(own_cluster, "abort", keyed(host, "swap"))
        migration.join()
    # The round is over at once when its only buffer is let go: it may have moved meanwhile.
    assert outcomes[0].code in (0, Cancelled.exit_code), outcomes[0].document
