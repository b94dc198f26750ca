"""The hook in two real CRIUs, over the real driver; the agent's part is played by a drill."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from scenarios.lab import conformance
from scenarios.lab.host import Host, HostSpec
from scenarios.lab.image import NEXT_CRIU
from tests.lab.conftest import SharedHost

pytestmark = [pytest.mark.lab, pytest.mark.timeout(1800)]

Drill = Callable[..., list[str]]
NEXT_HEADERS = f"/{NEXT_CRIU}/usr/include"
CRIUS = {"suite": ("criu", "/usr/include"), "next": (f"/{NEXT_CRIU}/criu", NEXT_HEADERS)}
NO_UNPAUSE = "-no-unpause"


@pytest.fixture(scope="module")
def host(shared_host: SharedHost) -> Iterator[Host]:
    found = shared_host(HostSpec(name="a"))
    builds = [
        f"python3 -m tests.lab.hook_drill build --hook hooks/{name}{broken}"
        f" --include {include} {'--no-unpause' if broken else ''}"
        for name, (_, include) in CRIUS.items()
        for broken in ("", NO_UNPAUSE)
    ]
    conformance.build_for(found, " && ".join(["mkdir hooks", *builds]), "hooks")
    yield found
    conformance.check_kernel(found)


@pytest.fixture(params=list(CRIUS))
def drill(host: Host, request: pytest.FixtureRequest) -> Drill:
    def run(what: str, broken: str = "") -> list[str]:
        criu, _ = CRIUS[request.param]
        hook = f"/root/hooks/{request.param}{broken}"
        line = f"python3 -m tests.lab.hook_drill {what} --hook {hook} --criu {criu}"
        return host.ssh(f"cd /opt/project && timeout 600 {line}").splitlines()

    return run


def test_the_two_crius_are_of_different_versions(host: Host) -> None:
    said = host.ssh(f"criu --version; /{NEXT_CRIU}/criu --version").split()
    versions = [tuple(int(part) for part in word.split(".")[:2]) for word in said[1::2]]
    assert (4, 1) <= versions[0] < versions[1], said


def test_criu_dumps_a_gpu_process_through_the_hook(drill: Drill) -> None:
    said = drill("dump")
    assert "criu succeeded" in said
    assert "program is gone" in said
    assert any(line.startswith("checkpoint with") for line in said)


def check_undone(said: list[str]) -> None:
    """The dump has failed, and nobody has lost anything."""
    assert "criu failed" in said
    assert "program lives" in said
    assert "counter moves" in said


def test_without_its_agent_the_hook_unpauses_and_fails_the_dump(drill: Drill) -> None:
    check_undone(drill("gone"))


def test_a_hook_that_forgets_to_unpause_is_noticed(drill: Drill) -> None:
    said = drill("gone", NO_UNPAUSE)
    assert "counter stands still" in said
    with pytest.raises(AssertionError):
        check_undone(said)


def test_in_hold_the_hook_leaves_the_queues_paused(drill: Drill) -> None:
    said = drill("gone-in-hold")
    assert "program lives" in said  # CRIU's gate refused, so it thaws
    assert "counter stands still" in said


def test_a_dump_the_agent_refuses_leaves_the_program_running(drill: Drill) -> None:
    check_undone(drill("refuse"))
