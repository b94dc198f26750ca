"""Buffers with more than one handle: sent once, and one again at the destination."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrate.engine import procfs
from migrate.faults import VARIABLE
from scenarios.cluster import AgentSetup, Cluster, wait_until
from scenarios.ports import free_port
from tests.integration.jobs import migrate
from tests.integration.lookers import (
    copy_pid,
    ended,
    is_stopped,
    is_there,
    kill_agent,
    started,
)
from tests.integration.sharers import MEMORY, SAVE_AREA, SIZE
from tests.lab.sharing_job import ask

PATIENCE = 60.0  # seconds
NEWER = ("--kfd-minor", "12")  # has EXPORT_DMABUF, and imports on another GPU

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster.temporary() as made:
        for name in ("a", "b"):
            made.add_host(name, node_options=NEWER)
        yield made


class Sharers:
    """The program, and what its processes say."""

    def __init__(self, cluster: Cluster, *options: str) -> None:
        folder = Path(tempfile.mkdtemp(dir=cluster.folder))
        self.log, self._end = folder / "log", folder / "end"
        command = ["-m", "tests.integration.sharers", "--log", str(self.log)]
        command += ["--until", str(self._end), *options]
        self._output = folder / "output"
        with self._output.open("ab") as output:
            self.process = cluster.workload("a", command, output=output.fileno())
        self.child = self.log.with_name("log.child")

    def said(self, log: Path) -> list[str]:
        """The lines of a log."""
        return log.read_text().split() if log.exists() else []

    def seen(self, log: Path) -> int:
        """What the buffer held when the process looked last."""
        return max((int(word) for word in self.said(log) if word != "ok"), default=0)

    def sees(self, log: Path, value: int) -> None:
        """Wait until the process has seen that much in the buffer."""

        def sees() -> bool:
            assert self._output.read_text() == ""
            return self.seen(log) >= value

        wait_until(sees, PATIENCE, f"{value} in {log.name}")

    def ends(self, *logs: Path, output: str = "") -> None:
        """Tell them to end; they say that all was right, and *output* is all they printed."""
        self._end.touch()
        for log in logs:
            wait_until(lambda log=log: self.said(log)[-1] == "ok", PATIENCE, f"the end of {log}")
        assert self._output.read_text() == output


def test_handles_of_one_process_on_two_gpus_are_of_one_buffer_after_a_move(
    cluster: Cluster,
) -> None:
    """The GPU writes through each of the three in turn, and each step finds what was before."""
    program = Sharers(cluster, "--handles", "3")
    program.sees(program.log, 5)
    outcome = migrate(cluster, "run", "a", "b", str(program.process.pid))
    assert outcome.code == 0, outcome.document
    moved = outcome.report.bytes
    assert (moved.vram, moved.gtt) == (SIZE, MEMORY + SAVE_AREA)
    program.sees(program.log, program.seen(program.log) + 10)
    program.ends(program.log)


def test_what_a_parent_writes_its_child_reads_after_a_move(cluster: Cluster) -> None:
    """Two processes, a handle of one buffer each; both move, the buffer once."""
    program = Sharers(cluster, "--child")
    program.sees(program.child, 5)
    rows = migrate(cluster, "ps", "a").document["processes"]
    parent = program.process.pid
    assert len([row for row in rows if row["root"] == parent and row["pid"] != parent]) == 1
    outcome = migrate(cluster, "run", "a", "b", str(program.process.pid))
    assert outcome.code == 0, outcome.document
    moved = outcome.report.bytes
    assert (moved.vram, moved.gtt) == (SIZE, 2 * (MEMORY + SAVE_AREA))
    written = program.seen(program.log)
    program.sees(program.log, written + 10)
    program.sees(program.child, written + 10)
    program.ends(program.log, program.child)


def test_the_labs_job_sees_itself_share(cluster: Cluster) -> None:
    """What tests/lab moves between kernels works where it is not moved."""
    port = free_port()
    job = cluster.workload("a", ["-m", "tests.lab.sharing_job", "--port", str(port)])

    def shares() -> bool:
        try:
            found = ask(port, "status")
        except ConnectionRefusedError:
            return False
        assert found["error"] == ""
        return bool(found["seen"] > 3 and found["child_seen"] > 3)

    wait_until(shares, PATIENCE, "both to see what the other wrote")
    assert ask(port, "finish")["child_ended"] == 0
    assert job.wait(PATIENCE) == 0


@pytest.mark.soak
def test_a_destination_agent_killed_while_it_holds_both_copies_leaves_none(
    cluster: Cluster,
) -> None:
    """kill -9 with the buffer shared again and nothing granted: both copies are ended."""
    program = Sharers(cluster, "--child")
    program.sees(program.child, 5)
    there = cluster.hosts["b"]
    kill_agent(there)
    prelude = f"import os\nos.environ[{VARIABLE!r}] = 'destination.prepared.after-write=stop'"
    agent = cluster.start_agent("b", AgentSetup(prelude=prelude)).agent
    assert agent is not None
    migration = started(cluster, "a", "b", str(program.process.pid))
    wait_until(lambda: is_stopped(agent.pid), PATIENCE, "the moment")
    copy = copy_pid(there, migration)
    assert copy is not None
    copies = [copy, *procfs.descendants(copy)]
    assert len(copies) == 2
    kill_agent(there)
    cluster.start_agent("b", AgentSetup())
    report = ended(cluster.hosts["a"], migration)
    assert (report["owner"], report["running"]) == ("source", "source")
    wait_until(lambda: not any(map(is_there, copies)), PATIENCE, "the copies to be ended")
    program.sees(program.child, program.seen(program.log) + 5)
    program.ends(program.log, program.child)


@pytest.mark.soak
def test_a_parent_and_a_child_come_out_of_an_image_sharing(cluster: Cluster) -> None:
    program = Sharers(cluster, "--child")
    program.sees(program.child, 5)
    image = program.log.with_name("image")
    stored = migrate(cluster, "checkpoint", "a", str(program.process.pid), str(image))
    assert stored.code == 0, stored.document
    assert stored.report.bytes.vram == SIZE
    restored = migrate(cluster, "restore", "b", str(image))
    assert restored.code == 0, restored.document
    written = program.seen(program.log)
    program.sees(program.child, written + 10)
    program.ends(program.log, program.child)
