"""``migrate hosts`` against real agents' sockets, and against their absence."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from concurrent import futures
from contextlib import ExitStack
from pathlib import Path

import grpc
import msgspec
import pytest

from migrate.cli.main import run
from migrate.client import agent
from migrate.errors import (
    AgentUnreachable,
    MigrateError,
    NoSuchProcess,
    ProtocolMismatch,
    UnknownHost,
)
from migrate.inventory import HostEntry, Inventory, TlsFiles, load, to_toml
from migrate.rpc.ca import Role, create_ca, issue
from migrate.rpc.errors import abort
from migrate.rpc.pb.agent_pb2 import (
    InfoReply,
    InfoRequest,
    ListReply,
    ListRequest,
    ShowReply,
    ShowRequest,
    WatchRequest,
)
from migrate.rpc.pb.agent_pb2_grpc import AgentServicer, add_AgentServicer_to_server
from migrate.rpc.tls import server_credentials
from migrate.topology.model import HEAP_FB_PUBLIC, MemoryBank, Node, Topology

Capture = pytest.CaptureFixture[str]
GIB = 1 << 30
TOPOLOGY = Topology(
    nodes=(
        Node(number=0, cpu_cores_count=8),
        *(
            Node(
                number=number,
                gpu_id=number * 1000,
                gfx_target_version=90010,
                mem_banks=(MemoryBank(heap_type=HEAP_FB_PUBLIC, size_in_bytes=64 * GIB),),
            )
            for number in (1, 2)
        ),
    )
)


class Answering(AgentServicer):
    """An agent that answers Info, and fails in three ways elsewhere."""

    def Info(self, request: InfoRequest, context: grpc.ServicerContext) -> InfoReply:
        return InfoReply(
            protocol=1,
            version="1.2.3",
            engine="reexec",
            topology=msgspec.json.encode(TOPOLOGY),
            free_vram={1000: 60 * GIB, 2000: 4 * GIB},
        )

    def Show(self, request: ShowRequest, context: grpc.ServicerContext) -> ShowReply:
        abort(context, NoSuchProcess("no process 7", advice="choose another"))

    def List(self, request: ListRequest, context: grpc.ServicerContext) -> ListReply:
        raise ZeroDivisionError


class Nonsense(AgentServicer):
    """An agent of another kind of topology."""

    def Info(self, request: InfoRequest, context: grpc.ServicerContext) -> InfoReply:
        return InfoReply(topology=b'{"nodes": 3}')


def serve(stack: ExitStack, servicer: AgentServicer, files: TlsFiles) -> str:
    server = grpc.server(futures.ThreadPoolExecutor(2))
    add_AgentServicer_to_server(servicer, server)
    port = server.add_secure_port("127.0.0.1:0", server_credentials(files))
    server.start()
    stack.callback(lambda: server.stop(None).wait(30))
    return f"127.0.0.1:{port}"


@pytest.fixture
def inventory(tmp_path: Path) -> Iterator[str]:
    """Hosts that answer, that are down, that answer nonsense, that are someone else."""
    ca = create_ca(tmp_path)
    with ExitStack() as stack:
        down = stack.enter_context(socket.socket())
        down.bind(("127.0.0.1", 0))
        addresses = {
            "up": serve(stack, Answering(), issue(ca, "up", Role.AGENT, tmp_path)),
            "down": f"127.0.0.1:{down.getsockname()[1]}",
            "odd": serve(stack, Nonsense(), issue(ca, "odd", Role.AGENT, tmp_path)),
        }
        addresses["other"] = addresses["up"]
        file = tmp_path / "hosts.toml"
        tls = issue(ca, "olga", Role.VIEWER, tmp_path)
        hosts = {name: HostEntry(address=address) for name, address in addresses.items()}
        file.write_text(to_toml(Inventory(tls=tls, hosts=hosts)))
        yield str(file)


def test_every_host_has_a_row(inventory: str, capsys: Capture) -> None:
    assert run(["hosts", "--inventory", inventory]) == 0
    out, err = capsys.readouterr()
    rows = [line.split() for line in out.splitlines()]
    assert [row[0] for row in rows] == ["NAME", "up", "down", "odd", "other"]
    assert rows[1][2:] == ["ready", "1.2.3", "reexec", "2", "gfx90a", "64.0", "GiB"]
    states = {row[0]: row[2] for row in rows[1:]}
    assert states["down"] == "AGENT_UNREACHABLE"
    assert states["odd"] == "PROTOCOL_MISMATCH"
    assert states["other"] == "CERTIFICATE_REJECTED"
    assert "down: no agent of down listens at" in err
    assert "was not issued for the name other" in err


def test_hosts_for_programs(inventory: str, capsys: Capture) -> None:
    assert run(["hosts", "up", "down", "--json", "--inventory", inventory]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    document = json.loads(out)
    assert document["schema"] == "migrate.hosts/1"
    up, down = document["hosts"]
    assert up["error"] is None
    assert up["gpus"][1] == {
        "gpu_id": 2000,
        "gfx": "gfx90a",
        "vram": 64 * GIB,
        "free_vram": 4 * GIB,
    }
    assert down["gpus"] == []
    assert down["error"]["exit_code"] == AgentUnreachable.exit_code


def test_a_host_that_is_not_in_the_inventory(inventory: str, capsys: Capture) -> None:
    assert run(["hosts", "nix", "--inventory", inventory]) == UnknownHost.exit_code
    assert "it has: down, odd, other, up" in capsys.readouterr().err


def test_an_agents_error_arrives_as_it_was(inventory: str) -> None:
    with pytest.raises(NoSuchProcess, match="no process 7") as caught:
        with agent(load(inventory), "up") as stub:
            stub.Show(ShowRequest(id="x"), timeout=30)
    assert caught.value.hint == "choose another"


def test_a_bug_in_the_agent_is_said_to_be_one(inventory: str) -> None:
    with pytest.raises(MigrateError, match="the agent of up failed: UNKNOWN") as caught:
        with agent(load(inventory), "up") as stub:
            stub.List(ListRequest(), timeout=30)
    assert caught.value.reason == "INTERNAL"


def test_an_agent_without_the_call_is_of_another_release(inventory: str) -> None:
    with pytest.raises(ProtocolMismatch, match="does not know this call"):
        with agent(load(inventory), "up") as stub:
            list(stub.Watch(WatchRequest(id="x"), timeout=30))
