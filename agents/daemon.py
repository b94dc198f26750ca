"""The agent process: everything wired together, served until SIGTERM."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import signal
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import grpc

from agents.config import AgentConfig
from agents.destination import Destinations
from agents.engines import ready_engine
from agents.health import Health
from agents.images import Images
from agents.logs import use_json_lines
from agents.notify import Notifier
from agents.operator_servicer import OperatorServicer
from agents.peer_servicer import PeerServicer
from agents.source import Sources
from agents.watchdog import Watchdog
from migrate import faults
from migrate.dataplane.channel import TcpListener
from migrate.dataplane.peak_memory import PeakMemory as PeakMemorySampler
from migrate.dataplane.receiver import Receiver
from migrate.engine.limits import keep_buffers_apart, raise_open_files
from migrate.errors import AgentBusy, JournalUnusable, UsageError
from migrate.inventory import split_address
from migrate.journal import Journal
from migrate.model import HostPaths
from migrate.orchestrator.host import Host
from migrate.orchestrator.image_peer import PREFIX, ImagePeer
from migrate.orchestrator.peer import Peer
from migrate.report import PeakMemory
from migrate.rpc import tls
from migrate.rpc.audit import Audit
from migrate.rpc.guard import Guard
from migrate.rpc.pb import agent_pb2_grpc, peer_pb2_grpc
from migrate.rpc.peer import GrpcPeer
from migrate.rpc.revocation import Revocations

if TYPE_CHECKING:
    from agents.metrics import AgentCollector

_log = logging.getLogger(__name__)

WORKERS = 64  # calls at once; a watcher holds one as long as it watches
JOURNAL_FAILED = 74  # exit code: EX_IOERR of sysexits.h
WAKE = 0.5  # seconds
STOP_GRACE = 5.0  # seconds that calls under way have at the end


class Agent:
    """One host's agent. ``start`` returns when it answers; ``stop`` ends it."""

    def __init__(self, config: AgentConfig) -> None:
        """Open everything that can fail. Raises MigrateError."""
        self.config = config
        paths = config.host_paths()
        self._lock = _only_agent(paths)
        self.journal = Journal(Path(paths.run) / "journal.db", fail_stop=_journal_failed)
        self._memory = PeakMemorySampler(self._staging_ranges, exclude=_not_a_helper)
        self.host = Host(
            name=config.name,
            paths=paths,
            journal=self.journal,
            engine=ready_engine(config.engine, paths),
            peak_memory=self._peak,
            vram_mode=config.vram_access,
        )
        data_host, data_port = split_address(config.data_listen)
        listener = TcpListener(data_host, data_port)
        self._receiver = Receiver(listener)
        revocations = Revocations(config.tls)
        self._dialled = weakref.WeakSet[GrpcPeer]()
        self._dialling = threading.Lock()
        self.sources = Sources(self.host, self._dial)
        data = (
            split_address(config.data_advertise) if config.data_advertise else ("", listener.port)
        )
        self.destinations = Destinations(
            self.host, self._receiver, data, self._dial, revocations.is_revoked
        )
        self._images = Images(self.host, self.destinations)
        guard = Guard(config.name, revocations, Audit(Path(paths.run)))
        self._server = grpc.server(
            ThreadPoolExecutor(WORKERS), interceptors=[guard], options=tls.SERVER_OPTIONS
        )
        self._health = Health(self._server)
        self.port = self._serve()
        self._observe()

    @property
    def address(self) -> str:
        """What other hosts dial: ``advertise``, or where it listens."""
        host, _ = split_address(self.config.listen)
        return self.config.advertise or f"{host}:{self.port}"

    def start(self) -> None:
        """Recover what the journal has, then answer."""
        # From here on a source is let go if we die; before it nothing was frozen by us.
        json_log = self.config.name if self.config.log_format == "json" else ""
        self._watchdog = Watchdog(self.host.paths, self.host.engine.name, json_log)
        self._memory.start()
        self._receiver.start()
        # Copies that were never granted are ended before anybody can grant them.
        self.destinations.recover()
        self._server.start()
        self._health.serving(True)
        self.destinations.start()
        for migration in self.sources.recover(self._watchdog.let_go):
            _log.warning("going on with migration %s", migration)
        if self._collector is not None:
            self._collector.recover()

    def is_well(self) -> bool:
        """Whether the journal can be read, without which nothing goes on."""
        try:
            self.journal.last("", "")
        except JournalUnusable as error:
            _log.error("not well: %s", error)
            return False
        return True

    def stop(self) -> None:
        """Undo what was not granted, leave the rest on record, and end."""
        self._health.serving(False)
        undone = self.sources.stop()
        self.destinations.stop()
        self._server.stop(STOP_GRACE).wait()
        # gRPC waits for ever for a connection that is open when the interpreter ends.
        with self._dialling:
            dialled = list(self._dialled)
        for peer in dialled:
            peer.close()
        self._receiver.close()
        self._memory.stop()
        for close in self._closers:
            close()
        self.journal.close()
        self._watchdog.close(needed=not undone)
        os.close(self._lock)

    def _serve(self) -> int:
        agent_pb2_grpc.add_AgentServicer_to_server(
            OperatorServicer(self.host, self.sources, self.destinations, self._images),
            self._server,
        )
        peer_pb2_grpc.add_PeerServicer_to_server(
            PeerServicer(self.journal, self.sources, self.destinations, self.config.allow_from),
            self._server,
        )
        credentials = tls.server_credentials(self.config.tls)
        try:
            return self._server.add_secure_port(self.config.listen, credentials)
        except RuntimeError as error:
            raise UsageError(
                f"can't listen on {self.config.listen}: {error}",
                advice="Is another agent running, or is the address not of this host?",
            ) from error

    def _observe(self) -> None:
        """Metrics and traces, where they are wanted: their packages are an extra."""
        self._collector: AgentCollector | None = None
        self._closers: list[Callable[[], None]] = []
        if self.config.metrics_listen:
            from agents.metrics import AgentCollector, MetricsServer  # noqa: PLC0415

            self._collector = AgentCollector(self.host, self.sources, self.destinations, self._peak)
            self.sources.listeners.append(self._collector.totals.count)
            server = MetricsServer(self.config.metrics_listen, self._collector)
            self._closers.append(server.close)
            self.metrics_port = server.port
            _log.info("metrics at port %d", server.port)
        if self.config.otlp_endpoint:
            from agents.tracing import Tracer  # noqa: PLC0415

            tracer = Tracer(self.config.name, self.config.otlp_endpoint)
            self.sources.listeners.append(tracer.ended)
            self._closers.append(tracer.close)

    def _dial(self, name: str, address: str) -> Peer:
        if name.startswith(PREFIX):
            return ImagePeer(
                name, self.config.name, self.sources.command_of, reading=self._images.reading
            )
        peer = GrpcPeer(
            name,
            address,
            self.config.tls,
            source=self.config.name,
            source_address=self.address,
            store_id=self.journal.store_id,
        )
        with self._dialling:
            self._dialled.add(peer)
        return peer

    def _peak(self) -> PeakMemory:
        peak = self._memory.peak
        return PeakMemory(agent=peak.agent, staging=peak.staging)

    def _staging_ranges(self) -> tuple[tuple[int, int], ...]:
        return self.destinations.staging_ranges()


def _journal_failed(why: str) -> None:
    """End at once, as by kill -9: see migrate.journal. A new agent reads what there is."""
    _log.critical("%s; the agent ends", why)
    os._exit(JOURNAL_FAILED)


def _not_a_helper(pid: int) -> bool:
    """Restored processes are our children, but not ours: each has a session of its own."""
    try:
        return os.getsid(pid) != os.getsid(0)
    except ProcessLookupError:
        return True


def _only_agent(paths: HostPaths) -> int:
    """A lock held as long as the agent lives: two agents on one journal would both decide."""
    run = Path(paths.run)
    try:
        run.mkdir(parents=True, exist_ok=True, mode=0o700)
        fd = os.open(run / "agent.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise UsageError(
            f"can't use the run directory {run}: {error.strerror}",
            advice="Run the agent as a user that may write there, or set paths.run.",
        ) from error
    try:
        os.lockf(fd, os.F_TLOCK, 0)
    except OSError as error:
        os.close(fd)
        raise AgentBusy(f"another agent uses {run}") from error
    return fd


def serve(config: AgentConfig, ready_fd: int | None = None) -> None:
    """Run an agent until SIGTERM or SIGINT. *ready_fd* gets its address when it answers."""
    faulthandler.register(signal.SIGUSR1)  # stacks of all threads to stderr, for a stuck agent
    raise_open_files()
    keep_buffers_apart()
    faults.arm(os.environ.get(faults.VARIABLE, ""))
    if config.log_format == "json":
        use_json_lines(config.name)
    agent = Agent(config)
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    agent.start()
    if ready_fd is not None:
        with contextlib.suppress(BrokenPipeError):
            os.write(ready_fd, f"{agent.address}\n".encode())
        os.close(ready_fd)
    _log.info("agent of %s answers at %s", config.name, agent.address)
    notifier = Notifier()
    notifier.ready(f"answers at {agent.address}")
    # A signal that came while the whole process was stopped may be taken by another thread,
    # and then nothing wakes this one, which alone runs handlers.
    while not ended.wait(WAKE):
        if notifier.watchdog and agent.is_well():
            notifier.alive()
    notifier.stopping()
    agent.stop()
