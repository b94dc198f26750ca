"""What programs use to talk to agents: run, watch and wait for migrations.

    from migrate.client import Client

    with Client() as client:
        for process in client.processes("node-a"):
            id = client.run("node-a", "node-b", process.pid, key=f"job-{process.pid}")
            report = client.wait("node-a", id)
            print(report.id, report.status, report.running)

Every call raises MigrateError, whose ``reason`` is stable (docs/exit-codes.md). Documents are
those of docs/schemas. A client may be used from several threads.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import grpc
import msgspec

from migrate import inventory as inventories
from migrate.decode import from_json
from migrate.errors import (
    AgentUnreachable,
    MigrateError,
    ProtocolMismatch,
    StillRunning,
    UnknownMigration,
    UsageError,
)
from migrate.inventory import Host, Inventory, TlsFiles
from migrate.model import Value
from migrate.orchestrator.plan import Options
from migrate.report import Check, Event, ProcessRow, Report, Restored
from migrate.rpc.errors import translated
from migrate.rpc.explain import explain_failure
from migrate.rpc.pb import agent_pb2
from migrate.rpc.pb.agent_pb2_grpc import AgentStub
from migrate.rpc.tls import open_channel
from migrate.status import ENDED
from migrate.topology.model import Topology

REQUEST_SCHEMA = "migrate.request/1"
CALL = 10.0  # seconds for a call that only looks
START = 30.0  # seconds for a call that starts a migration
RECONNECT = 30.0  # seconds that an agent may be away while we watch
AGAIN = 0.5  # seconds between attempts to reach it, and between looks of wait()
PADDING = 8 << 20  # bytes of the call that measures the way
MEASURES = 3  # of which the fastest counts

T = TypeVar("T")


class HostInfo(Value):
    """What an agent says of its host. Sizes in bytes; ``free_vram`` by gpu_id.

    ``hides_gpus``: a process that sees fewer GPUs than the host has can go there.
    """

    name: str
    version: str
    engine: str
    topology: Topology
    free_vram: dict[int, int]
    available_memory: int
    hides_gpus: bool


class Request(Value):
    """What a scheduler asks for: one process moved. The same key never starts two migrations.

    ``start_time``: of the process's row in the process list, 0 for whoever has the pid.
    """

    source: str
    destination: str
    pid: int
    idempotency_key: str = ""
    start_time: int = 0
    options: Options = Options()
    schema: str = REQUEST_SCHEMA


@contextmanager
def agent(inventory: Inventory, name: str) -> Iterator[AgentStub]:
    """The agent of host *name*, by a connection of its own; calls inside raise MigrateError.

    Raises UnknownHost at once, AgentUnreachable or CertificateRejected at the first call.
    """
    host = inventory.host(name)
    with (
        open_channel(host.address, host.name, inventory.tls) as channel,
        translated(lambda said: _explained(said, host, inventory.tls)),
    ):
        yield AgentStub(channel)


def _seconds(stub: AgentStub, request: agent_pb2.InfoRequest) -> float:
    started = time.perf_counter()
    stub.Info(request, timeout=CALL)
    return time.perf_counter() - started


def _explained(said: str, host: Host, files: TlsFiles) -> MigrateError:
    """*said* is a gRPC status code and its details, of a failure that has no MigrateError."""
    code = said.partition(":")[0]
    if code == "UNAVAILABLE":
        return explain_failure(host.address, host.name, files)
    if code == "DEADLINE_EXCEEDED":
        return AgentUnreachable(f"{host.name} at {host.address} did not answer in time")
    if code == "UNIMPLEMENTED":
        return ProtocolMismatch(f"the agent of {host.name} does not know this call")
    return MigrateError(f"the agent of {host.name} failed: {said}")


class Client:
    """The agents of an inventory. Use it as a context manager, or ``close`` it."""

    def __init__(self, inventory: Inventory | str | Path | None = None) -> None:
        """*inventory*: one that is read already, a file, or the user's own.

        Raises UsageError if it can't be read.
        """
        if not isinstance(inventory, Inventory):
            inventory = inventories.load(inventory or inventories.default_path())
        self.inventory = inventory
        self._lock = threading.Lock()
        self._channels: dict[str, grpc.Channel] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections; the next call makes new ones."""
        with self._lock:
            channels = list(self._channels.values())
            self._channels.clear()
        for channel in channels:
            channel.close()

    # ------------------------------------------------------------ hosts

    @property
    def hosts(self) -> tuple[str, ...]:
        """Names of the inventory's hosts, in its order."""
        return tuple(self.inventory.hosts)

    def info(self, host: str) -> HostInfo:
        """What the agent says of itself and its GPUs."""
        with self._agent(host) as stub:
            reply = stub.Info(agent_pb2.InfoRequest(), timeout=CALL)
        return HostInfo(
            name=reply.host,
            version=reply.version,
            engine=reply.engine,
            topology=_decoded(reply.topology, Topology),
            free_vram=dict(reply.free_vram),
            available_memory=reply.available_memory,
            hides_gpus=reply.hides_gpus,
        )

    def measure(self, host: str) -> float:
        """Bytes a second from here to the agent, by gRPC over mTLS, some MiB of them.

        The chunk streams of a migration are faster: it is what the link can do at least.
        """
        padded = agent_pb2.InfoRequest(padding=secrets.token_bytes(PADDING))
        with self._agent(host) as stub:
            empty = min(_seconds(stub, agent_pb2.InfoRequest()) for _ in range(MEASURES))
            full = min(_seconds(stub, padded) for _ in range(MEASURES))
        return PADDING / max(full - empty, 1e-6)

    def processes(self, host: str) -> list[ProcessRow]:
        """The processes that use KFD there."""
        with self._agent(host) as stub:
            reply = stub.ListProcesses(agent_pb2.ListProcessesRequest(), timeout=CALL)
        return _decoded(reply.processes, list[ProcessRow])

    # ------------------------------------------------------------ migrations

    def run(
        self,
        source: str,
        destination: str,
        pid: int,
        *,
        options: Options | None = None,
        key: str = "",
        start_time: int = 0,
    ) -> str:
        """Start a migration; its id.

        *key*: a call with a key that was used before starts nothing and gives that id, also
        if that migration ended long ago. Without one, two calls are two migrations.
        *start_time*: that of the ProcessRow; another process with its pid is then refused.
        """
        return self.submit(
            Request(
                source=source,
                destination=destination,
                pid=pid,
                idempotency_key=key,
                start_time=start_time,
                options=options or Options(),
            )
        )

    def submit(self, request: Request) -> str:
        """As run(), of a request that may have come as JSON. Raises UsageError for a schema
        that is not ours."""
        if request.schema != REQUEST_SCHEMA:
            raise UsageError(f"{request.schema!r} is not {REQUEST_SCHEMA}")
        target = self.inventory.host(request.destination)
        wire = agent_pb2.RunRequest(
            pid=request.pid,
            destination=target.name,
            destination_address=target.peer_address or target.address,
            # A call that gRPC repeats on its own must not start a second one either.
            idempotency_key=request.idempotency_key or secrets.token_hex(16),
            options=msgspec.json.encode(request.options),
            start_time=request.start_time,
        )
        with self._agent(request.source) as stub:
            return str(stub.Run(wire, timeout=START).id)

    def check(
        self, source: str, destination: str, pid: int, *, options: Options | None = None
    ) -> Check:
        """Everything that speaks against a migration, and what it would cost. Starts nothing."""
        target = self.inventory.host(destination)
        request = agent_pb2.CheckRequest(
            pid=pid,
            destination=target.name,
            destination_address=target.address,
            options=msgspec.json.encode(options or Options()),
        )
        with self._agent(source) as stub:
            return _decoded(stub.Check(request, timeout=START).check, Check)

    def checkpoint(
        self, source: str, pid: int, directory: str, *, options: Options, key: str = ""
    ) -> str:
        """Start putting a process into an image at *directory* on host *source*; the id.

        It is followed as a migration. *key*: see ``run``.
        """
        request = agent_pb2.RunRequest(
            pid=pid,
            directory=directory,
            idempotency_key=key or secrets.token_hex(16),
            options=msgspec.json.encode(options),
        )
        with self._agent(source) as stub:
            return str(stub.Run(request, timeout=START).id)

    def restore(
        self, host: str, directory: str, *, options: Options | None = None, again: bool = False
    ) -> Restored:
        """Start the process of an image at *directory* on *host*; returns when it runs."""
        request = agent_pb2.RestoreImageRequest(
            directory=directory, options=msgspec.json.encode(options or Options()), again=again
        )
        with self._agent(host) as stub:
            reply = stub.RestoreImage(request)
        return _decoded(reply.restored, Restored)

    def show(self, source: str, migration: str) -> Report:
        """The report as things stand. Raises UnknownMigration."""
        with self._agent(source) as stub:
            reply = stub.Show(agent_pb2.ShowRequest(id=migration), timeout=CALL)
        return _decoded(reply.report, Report)

    def watch(self, source: str, migration: str) -> Iterator[Event]:
        """Events until the end. An agent that comes back within RECONNECT is followed on.

        Raises AgentUnreachable, UnknownMigration.
        """
        deadline: float | None = None
        while True:
            try:
                with self._agent(source) as stub:
                    for message in stub.Watch(agent_pb2.WatchRequest(id=migration)):
                        deadline = None
                        event = _decoded(message.event, Event)
                        yield event
                        if event.ended:
                            return
            except AgentUnreachable:
                if deadline is None:
                    deadline = time.monotonic() + RECONNECT
                elif time.monotonic() > deadline:
                    raise
                time.sleep(AGAIN)
            except UnknownMigration:
                # Ended before the agent's restart: the journal has the report, no events.
                self.show(source, migration)
                return

    def wait(self, source: str, migration: str, timeout: float | None = None) -> Report:
        """The report of the end, or of an owner that only an operator can name.

        An agent that is away is waited for. *timeout*: seconds. Raises StillRunning when
        they are over, UnknownMigration.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        away: float | None = None
        while True:
            try:
                report = self.show(source, migration)
                away = None
                if report.status in ENDED or report.is_undecided:
                    return report
            except AgentUnreachable:
                away = time.monotonic()
            except UnknownMigration:
                # An agent that has just been started still reads its journal.
                if away is None or time.monotonic() > away + RECONNECT:
                    raise
            if deadline is not None and time.monotonic() > deadline:
                raise StillRunning(f"migration {migration} has not ended within {timeout:g} s")
            time.sleep(AGAIN)

    def history(self, host: str, limit: int = 20) -> list[Report]:
        """Reports of the newest migrations that *host* drove, newest first."""
        with self._agent(host) as stub:
            reply = stub.List(agent_pb2.ListRequest(limit=limit), timeout=CALL)
        return _decoded(reply.reports, list[Report])

    def abort(self, source: str, migration: str) -> agent_pb2.AbortReply:
        """Ask for an abort; the answer says what can be promised."""
        with self._agent(source) as stub:
            return stub.Abort(agent_pb2.AbortRequest(id=migration), timeout=CALL)

    # ------------------------------------------------------------ inside

    @contextmanager
    def _agent(self, name: str) -> Iterator[AgentStub]:
        """A stub on a connection that is kept while it works."""
        host = self.inventory.host(name)
        try:
            with translated(lambda said: _explained(said, host, self.inventory.tls)):
                yield AgentStub(self._channel(host))
        except MigrateError as error:
            # The next call dials anew, and with the certificate that is on the disk then.
            if error.reason in BROKEN:
                self._forget(name)
            raise

    def _channel(self, host: Host) -> grpc.Channel:
        with self._lock:
            channel = self._channels.get(host.name)
            if channel is None:
                channel = open_channel(host.address, host.name, self.inventory.tls)
                self._channels[host.name] = channel
            return channel

    def _forget(self, name: str) -> None:
        with self._lock:
            channel = self._channels.pop(name, None)
        if channel is not None:
            channel.close()


BROKEN = frozenset({"AGENT_UNREACHABLE", "CERTIFICATE_REJECTED"})


def _decoded(data: bytes, kind: type[T]) -> T:
    try:
        return from_json(data, kind)
    except msgspec.DecodeError as error:
        raise ProtocolMismatch(f"the agent's answer can't be read: {error}") from error
