"""The hook in a real CRIU, over the real driver; the agent's part is played by a drill."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from scenarios.lab import conformance
from scenarios.lab.host import HostSpec
from tests.lab.conftest import StartHost

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]

Drill = Callable[[str], list[str]]


@pytest.fixture(scope="module")
def drill(start_host: StartHost) -> Iterator[Drill]:
    host = start_host(HostSpec(name="a"))
    conformance.install_project(host)

    def run(what: str) -> list[str]:
        line = f"cd /opt/project && timeout 250 python3 -m tests.lab.hook_drill {what}"
        return host.ssh(line).splitlines()

    yield run
    conformance.check_kernel(host)


def test_criu_dumps_a_gpu_process_through_the_hook(drill: Drill) -> None:
    said = drill("dump")
    assert "criu succeeded" in said
    assert "program is gone" in said
    assert any(line.startswith("checkpoint with") for line in said)


def test_without_its_agent_the_hook_unpauses_and_fails_the_dump(drill: Drill) -> None:
    said = drill("gone")
    assert "criu failed" in said
    assert "program lives" in said
    assert "counter moves" in said


def test_in_hold_the_hook_leaves_the_queues_paused(drill: Drill) -> None:
    said = drill("gone-in-hold")
    assert "program lives" in said  # CRIU's gate refused, so it thaws
    assert "counter stands still" in said


def test_a_dump_the_agent_refuses_leaves_the_program_running(drill: Drill) -> None:
    said = drill("refuse")
    assert "criu failed" in said
    assert "program lives" in said
    assert "counter moves" in said
