"""What live rounds hold of a running job's VRAM, and that the job never runs short by it."""

from __future__ import annotations

import threading
import time

import pytest

from scenarios.cluster import Cluster, wait_until
from tests.integration.jobs import Outcome, migrate
from tests.integration.lookers import keyed, wait_state

VRAM = 64 << 20  # bytes a GPU
HELD = VRAM * 9 // 10 >> 12 << 12  # what the job frees and takes again
PATIENCE = 120.0  # seconds


@pytest.mark.soak
def test_a_job_that_frees_and_takes_most_of_its_vram_during_pre_copy(own_cluster: Cluster) -> None:
    for name in ("a", "b"):
        own_cluster.add_host(name, node_options=("--vram", str(VRAM)))
    log, swap = own_cluster.folder / "swap.log", own_cluster.folder / "swap"
    end = own_cluster.folder / "swap.end"
    command = ["-m", "tests.integration.churn", "--log", str(log), "--until", str(end)]
    program = own_cluster.workload("a", [*command, "--hold", str(HELD), "--swap", str(swap)])
    wait_until(lambda: log.exists() and b"filled 1" in log.read_bytes(), PATIENCE, "the buffer")
    outcomes: list[Outcome] = []
    options = ("--bandwidth", "4", "--max-rounds", "2", "--idempotency-key", "swap")
    migration = threading.Thread(
        target=lambda: outcomes.append(
            migrate(own_cluster, "run", "a", "b", str(program.pid), *options)
        )
    )
    migration.start()
    try:
        host = own_cluster.hosts["a"]
        wait_state(host, keyed(host, "swap"), "source", "ACTIVE")
        time.sleep(1.0)  # the first round takes some 14 s
        swap.touch()
        wait_until(
            lambda: b"filled 2" in log.read_bytes() or program.poll() is not None,
            PATIENCE,
            "as much VRAM again",
        )
        assert b"filled 2" in log.read_bytes(), "no VRAM for the job: we held what it freed"
    finally:
        migration.join()
    assert outcomes[0].code == 0, outcomes[0].document
