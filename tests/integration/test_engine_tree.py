"""The reexec engine with a parent and a child: they stand, go on, come over and end together."""

from __future__ import annotations

import random
import subprocess
import time
from collections.abc import Iterator

import pytest

from migrate.engine import procfs
from migrate.engine.reexec import ReexecEngine, decode_tree
from migrate.errors import EngineUnsupported
from migrate.model import ProcessRef
from scenarios.cluster import Cluster, wait_until
from tests.integration.engine_rig import dying_agent
from tests.integration.test_sharing import NEWER, PATIENCE, Sharers

pytestmark = pytest.mark.timeout(300)

CHILD = """
import os, sys, time
from migrate.kfd.file import open_device
kept = open_device(os.path.join(os.environ["MIGRATE_HOST_ROOT"], "kfd"))
print("ready", flush=True)
time.sleep(1000)
"""
PARENT = f"""
import subprocess, sys, time
from migrate.engine.runtime import Runtime
runtime = Runtime.start()
runtime.kfd
subprocess.run([sys.executable, "-c", {CHILD!r}])
"""


@pytest.fixture
def nodes() -> Iterator[Cluster]:
    with Cluster.temporary() as cluster:
        for name in ("a", "b"):
            cluster.add_node(name, node_options=NEWER)
        yield cluster


@pytest.fixture
def program(nodes: Cluster) -> Sharers:
    found = Sharers(nodes, "--child")
    found.sees(found.child, 3)
    return found


def tree(program: Sharers) -> tuple[ProcessRef, ProcessRef]:
    pid = program.process.pid
    (child,) = procfs.descendants(pid)
    return procfs.reference(pid), procfs.reference(child)


def test_both_stand_and_go_on_at_any_moment(nodes: Cluster, program: Sharers) -> None:
    engine, paths = ReexecEngine(nodes.hosts["a"].paths), nodes.hosts["a"].paths
    root, child = tree(program)
    assert engine.survey(root.pid).kfd_processes == (root.pid, child.pid)
    for _ in range(15):
        image = engine.freeze(root)
        assert [m.pid for m in decode_tree(image.state).members] == [root.pid, child.pid]
        assert procfs.all_stopped(root.pid)
        assert procfs.all_stopped(child.pid)
        assert ReexecEngine(paths).is_frozen(root)
        before = [program.said(log) for log in (program.log, program.child)]
        time.sleep(0.02)
        assert [program.said(log) for log in (program.log, program.child)] == before
        ReexecEngine(paths).thaw(root)
        assert not engine.is_frozen(root)
        time.sleep(random.random() * 0.02)
    program.sees(program.child, program.seen(program.log) + 5)
    program.ends(program.log, program.child)


def test_one_that_runs_is_no_frozen_tree(nodes: Cluster, program: Sharers) -> None:
    engine = ReexecEngine(nodes.hosts["a"].paths)
    root, child = tree(program)
    engine.freeze(root)
    engine.thaw(child)
    assert not engine.is_frozen(root)
    engine.thaw(root)
    program.ends(program.log, program.child)


def test_kill_ends_the_child_too(nodes: Cluster, program: Sharers) -> None:
    engine = ReexecEngine(nodes.hosts["a"].paths)
    root, child = tree(program)
    engine.freeze(root)
    engine.kill(root)
    assert not procfs.is_alive(root)
    assert not procfs.is_alive(child)
    engine.kill(root)


def test_an_agent_that_dies_while_it_builds_leaves_no_copy(
    nodes: Cluster, program: Sharers
) -> None:
    """kill -9; each copy ends by itself, the child's as its parent's."""
    roots = [str(nodes.hosts[name].root) for name in ("a", "b")]
    root, child = tree(program)
    with dying_agent("building", roots[0], str(root.pid), roots[1]) as (_, said):
        copy = procfs.reference(int(said))
        (other,) = procfs.descendants(copy.pid)
        copies = (copy, procfs.reference(other))
    wait_until(lambda: not any(map(procfs.is_alive, copies)), PATIENCE, "the copies to end")
    engine = ReexecEngine(nodes.hosts["a"].paths)
    assert engine.is_frozen(root)
    assert procfs.is_alive(child)
    engine.thaw(root)
    broken_off = "the agent broke off: this copy was never released\n"
    program.ends(program.log, program.child, output=2 * broken_off)


def test_a_child_with_kfd_and_no_runtime_is_a_blocker(nodes: Cluster) -> None:
    output = nodes.folder / "output"
    with output.open("wb") as stream:
        parent = nodes.workload("a", ["-c", PARENT], output=stream)
    wait_until(lambda: output.read_bytes() == b"ready\n", PATIENCE, "the child")
    (child,) = procfs.descendants(parent.pid)
    survey = ReexecEngine(nodes.hosts["a"].paths).survey(parent.pid)
    assert survey.kfd_processes == (parent.pid,)
    (blocker,) = survey.blockers
    assert blocker.reason == EngineUnsupported.reason
    assert f"its child {child}" in blocker.message
    ReexecEngine(nodes.hosts["a"].paths).kill(survey.process)
    procfs_child = procfs.reference(child)
    assert procfs.is_alive(procfs_child)  # it was not ours to end
    subprocess.run(["kill", "-9", str(child)], check=True)
