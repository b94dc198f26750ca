"""The gRPC servicer for operators and schedulers: run, watch, show, list, abort.

Who may make which call is in ``migrate.rpc.rules``, and is checked before a method is entered.
Methods raise MigrateError; ``migrate.rpc.guard`` makes a status of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version

import grpc
import msgspec

from agents.aborting import abort
from agents.destination import Destinations
from agents.images import Images
from agents.peer_servicer import parsed
from agents.processes import list_processes
from agents.recovering import recover
from agents.resolving import resolve
from agents.source import Sources
from migrate.errors import UsageError
from migrate.inventory import HOST_NAME, split_address
from migrate.orchestrator.checks import check_options
from migrate.orchestrator.host import Host, available_memory
from migrate.orchestrator.image_peer import PREFIX
from migrate.orchestrator.plan import PROTOCOL, Options
from migrate.rpc.pb import agent_pb2, agent_pb2_grpc

MAX_LIST = 1000
MAX_PATH = 4096  # PATH_MAX of Linux


def checked_pid(pid: int) -> int:
    """Raises UsageError for what can be no pid."""
    if not 0 < pid < 1 << 22:  # PID_MAX_LIMIT of Linux
        raise UsageError(f"{pid} is not a pid")
    return pid


def folder(path: str) -> str:
    """A path as it may come from outside. Raises UsageError."""
    if not path.startswith("/") or len(path) >= MAX_PATH or "\0" in path or ".." in path.split("/"):
        raise UsageError(f"{path!r} is not an absolute path on the agent's host")
    return path


class OperatorServicer(agent_pb2_grpc.AgentServicer):
    """What a person or a scheduler may ask of this host."""

    def __init__(
        self, host: Host, sources: Sources, destinations: Destinations, images: Images
    ) -> None:
        self._host = host
        self._sources = sources
        self._destinations = destinations
        self._images = images

    def Info(
        self, request: agent_pb2.InfoRequest, context: grpc.ServicerContext
    ) -> agent_pb2.InfoReply:
        """Who this agent is and what its host has."""
        return agent_pb2.InfoReply(
            protocol=PROTOCOL,
            version=version("migrate"),
            host=self._host.name,
            store_id=self._host.journal.store_id,
            engine=self._host.engine.name,
            topology=msgspec.json.encode(self._host.topology()),
            free_vram=self._host.free_vram(),
            available_memory=available_memory(),
            hides_gpus=self._host.engine.can_hide_gpus,
        )

    def ListProcesses(
        self, request: agent_pb2.ListProcessesRequest, context: grpc.ServicerContext
    ) -> agent_pb2.ListProcessesReply:
        """The processes that use KFD here."""
        rows = list_processes(self._host.paths, self._sources.migration_of)
        return agent_pb2.ListProcessesReply(processes=msgspec.json.encode(rows))

    def Check(
        self, request: agent_pb2.CheckRequest, context: grpc.ServicerContext
    ) -> agent_pb2.CheckReply:
        """Preflight alone."""
        _check_target(request.pid, request.destination, request.destination_address)
        options = parsed(request.options or b"{}", Options)
        check_options(options)
        found = self._sources.check(
            request.pid, request.destination, request.destination_address, options
        )
        return agent_pb2.CheckReply(check=msgspec.json.encode(found))

    def Run(
        self, request: agent_pb2.RunRequest, context: grpc.ServicerContext
    ) -> agent_pb2.RunReply:
        """Start a migration, to a host or into an image."""
        if request.directory:
            return self._checkpoint(request)
        _check_target(request.pid, request.destination, request.destination_address)
        pid = request.pid
        options = parsed(request.options or b"{}", Options)
        check_options(options)
        migration = self._sources.start(
            pid,
            request.destination,
            request.destination_address,
            options,
            request.idempotency_key,
            request.start_time,
        )
        return agent_pb2.RunReply(id=migration)

    def _checkpoint(self, request: agent_pb2.RunRequest) -> agent_pb2.RunReply:
        if request.destination:
            raise UsageError("a destination or a directory, not both")
        options = parsed(request.options or b"{}", Options)
        check_options(options)
        migration = self._sources.start(
            checked_pid(request.pid),
            f"{PREFIX}{folder(request.directory)}",
            "",
            options,
            request.idempotency_key,
            request.start_time,
        )
        return agent_pb2.RunReply(id=migration)

    def RestoreImage(
        self, request: agent_pb2.RestoreImageRequest, context: grpc.ServicerContext
    ) -> agent_pb2.RestoreImageReply:
        """Start a process anew from an image."""
        options = parsed(request.options or b"{}", Options)
        check_options(options)
        found = self._images.restore(folder(request.directory), options, again=request.again)
        return agent_pb2.RestoreImageReply(restored=msgspec.json.encode(found))

    def Watch(
        self, request: agent_pb2.WatchRequest, context: grpc.ServicerContext
    ) -> Iterator[agent_pb2.Event]:
        """Stream events until the migration has ended or the client is gone."""
        migration = self._sources.get(request.id)
        for event in migration.narrator.follow(request.from_sequence):
            if not context.is_active():
                return
            if event is not None:
                yield agent_pb2.Event(event=msgspec.json.encode(event))

    def Show(
        self, request: agent_pb2.ShowRequest, context: grpc.ServicerContext
    ) -> agent_pb2.ShowReply:
        """The report of a migration, ended or not."""
        return agent_pb2.ShowReply(report=msgspec.json.encode(self._sources.report(request.id)))

    def List(
        self, request: agent_pb2.ListRequest, context: grpc.ServicerContext
    ) -> agent_pb2.ListReply:
        """The newest reports."""
        reports = self._sources.reports(min(request.limit or 20, MAX_LIST))
        return agent_pb2.ListReply(reports=msgspec.json.encode(reports))

    def Abort(
        self, request: agent_pb2.AbortRequest, context: grpc.ServicerContext
    ) -> agent_pb2.AbortReply:
        """Ask for an abort; the answer says what can be promised."""
        outcome, message = abort(self._host.name, self._sources, self._destinations, request.id)
        return agent_pb2.AbortReply(outcome=outcome, message=message)

    def Recover(
        self, request: agent_pb2.RecoverRequest, context: grpc.ServicerContext
    ) -> agent_pb2.RecoverReply:
        """Go on now with what the journal has unfinished."""
        rows = recover(
            self._host.name,
            self._host.journal,
            self._sources,
            self._destinations,
            request.id,
        )
        return agent_pb2.RecoverReply(rows=msgspec.json.encode(rows))

    def Resolve(
        self, request: agent_pb2.ResolveRequest, context: grpc.ServicerContext
    ) -> agent_pb2.ResolveReply:
        """Take an operator's decision about an owner that nobody else can name."""
        message = resolve(
            self._host.name,
            self._sources,
            self._destinations,
            request.id,
            owner=request.owner,
            fenced=request.fenced,
        )
        return agent_pb2.ResolveReply(message=message)


def _check_target(pid: int, destination: str, address: str) -> None:
    """Raises UsageError."""
    if not HOST_NAME.fullmatch(destination):
        raise UsageError(f"{destination!r} is not a host name")
    split_address(address)
    if not 0 < pid < 1 << 22:  # PID_MAX_LIMIT of Linux
        raise UsageError(f"{pid} is not a pid")
