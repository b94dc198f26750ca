"""What `migrate run` waits for: an end, or an owner that only an operator can name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent import futures
from pathlib import Path

import grpc
import msgspec

from migrate.cli.following import follow
from migrate.cli.output import Output
from migrate.inventory import HostEntry, Inventory, to_toml
from migrate.inventory import load as load_inventory
from migrate.report import End, Event, Failure, Report
from migrate.rpc.ca import Role, create_ca, issue
from migrate.rpc.pb import agent_pb2
from migrate.rpc.pb.agent_pb2_grpc import AgentServicer, add_AgentServicer_to_server
from migrate.rpc.tls import server_credentials
from migrate.status import Owner, Status

UNDECIDED = Report(
    id="m",
    status=Status.HANDOVER,
    owner=Owner.UNKNOWN,
    running="unknown",
    source=End(host="a", pid=1),
    destination=End(host="b"),
)
TAKEN_BACK = Failure(reason="TAKEN_BACK", message="it is back", advice="none", exit_code=85)
UNANSWERED = Failure(reason="UNANSWERED", message="nobody says", advice="fence", exit_code=80)


class Restarted(AgentServicer):
    """An agent that was just restarted after GRANTED; *reports* one after the other."""

    def __init__(self, reports: Sequence[Report]) -> None:
        self.reports = list(reports)

    def Watch(
        self, request: agent_pb2.WatchRequest, context: grpc.ServicerContext
    ) -> Iterator[agent_pb2.Event]:
        event = Event(
            id="m", sequence=1, status=Status.HANDOVER, owner=Owner.UNKNOWN, phase="handover"
        )
        yield agent_pb2.Event(event=msgspec.json.encode(event))

    def Show(
        self, request: agent_pb2.ShowRequest, context: grpc.ServicerContext
    ) -> agent_pb2.ShowReply:
        found = self.reports.pop(0) if len(self.reports) > 1 else self.reports[0]
        return agent_pb2.ShowReply(report=msgspec.json.encode(found))


def followed(folder: Path, reports: Sequence[Report]) -> Report:
    ca = create_ca(folder)
    server = grpc.server(futures.ThreadPoolExecutor(2))
    add_AgentServicer_to_server(Restarted(reports), server)
    credentials = server_credentials(issue(ca, "a", Role.AGENT, folder))
    port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    file = folder / "hosts.toml"
    hosts = {"a": HostEntry(address=f"127.0.0.1:{port}")}
    file.write_text(to_toml(Inventory(tls=issue(ca, "olga", Role.VIEWER, folder), hosts=hosts)))
    output = Output()
    output.json = True
    try:
        return follow(load_inventory(file), "a", "m", output)
    finally:
        server.stop(None).wait(30)


def test_an_owner_that_is_unknown_for_a_moment_is_no_end(tmp_path: Path) -> None:
    """It was: with exit code 0, because nothing had failed yet."""
    back = msgspec.structs.replace(
        UNDECIDED, status=Status.FAILED, owner=Owner.SOURCE, failure=TAKEN_BACK
    )
    assert followed(tmp_path, [UNDECIDED, UNDECIDED, back]).failure == TAKEN_BACK


def test_an_owner_that_nobody_can_name_ends_the_wait(tmp_path: Path) -> None:
    stuck = msgspec.structs.replace(UNDECIDED, failure=UNANSWERED)
    assert followed(tmp_path, [UNDECIDED, stuck]).failure == UNANSWERED
