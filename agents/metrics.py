"""Prometheus metrics of an agent: read from what is there when they are scraped.

Off unless ``metrics_listen`` is set. The endpoint has neither TLS nor authentication, as
Prometheus exporters have it: let it listen on loopback or on a network of one's own. Names
follow ``kubevirt_vmi_migration_*`` of KubeVirt, with ``migrate_`` before them.

Totals are counted from the reports in the journal, so they go on where they were after a
restart of the agent.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from importlib.metadata import version
from typing import TYPE_CHECKING

from agents.processes import list_processes
from migrate.errors import MigrateError, UsageError
from migrate.inventory import split_address
from migrate.report import PeakMemory, Report
from migrate.status import ENDED, MAY_RUN, DestinationState, Owner, Status

if TYPE_CHECKING:
    from prometheus_client.core import Metric

    from agents.destination import Destinations
    from agents.source import Sources
    from migrate.orchestrator.host import Host
    from migrate.orchestrator.source import SourceMigration

try:
    import prometheus_client
    from prometheus_client.core import (
        CounterMetricFamily,
        GaugeMetricFamily,
        HistogramMetricFamily,
        InfoMetricFamily,
    )
    from prometheus_client.registry import Collector
except ModuleNotFoundError as missing:  # an extra: see pyproject.toml
    raise UsageError(
        f"metrics_listen: there is no module {missing.name}",
        advice="Install migrate[agent], or leave metrics_listen out.",
    ) from missing

DOWNTIME = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)  # seconds
DURATION = (1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 900.0, 3600.0)
PARTS = (
    "stop", "checkpoint", "delta", "build", "placement", "read_back", "engine", "handover"
)  # fmt: skip
LABELS = ("migration", "source", "destination")
RUNNING = tuple(status for status in Status if status not in ENDED)


class Histogram:
    """Counts in buckets, made by whoever scrapes."""

    def __init__(self, bounds: Iterable[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """One more value."""
        place = next((n for n, b in enumerate(self._bounds) if value <= b), len(self._bounds))
        self._counts[place] += 1
        self._sum += value

    def family(self, name: str, text: str) -> HistogramMetricFamily:
        """As Prometheus wants it: cumulative."""
        total, buckets = 0, []
        for bound, count in zip((*map(str, self._bounds), "+Inf"), self._counts, strict=True):
            total += count
            buckets.append((bound, total))
        family = HistogramMetricFamily(name, text)
        family.add_metric([], buckets, self._sum)
        return family


class Totals:
    """What all ended migrations add up to. Each is counted once, whoever tells of it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counted: set[str] = set()
        self.outcomes: dict[tuple[str, str], int] = {}
        self.sums: dict[str, float] = {}
        self.parts = dict.fromkeys(PARTS, 0.0)
        self.downtime = Histogram(DOWNTIME)
        self.duration = Histogram(DURATION)

    def count(self, report: Report) -> None:
        """Add a report, if it is an ended migration's and not counted yet."""
        with self._lock:
            if report.status not in ENDED or report.id in self._counted:
                return
            self._counted.add(report.id)
            key = (report.status.value, report.failure.reason if report.failure else "")
            self.outcomes[key] = self.outcomes.get(key, 0) + 1
            self.duration.observe(report.seconds)
            moved = report.bytes
            for name, value in (
                ("data_transferred_bytes", moved.wire),
                ("data_zero_bytes", moved.zero),
                ("data_unchanged_bytes", moved.unchanged),
                ("chunks_verified", report.chunks_verified),
                ("stream_resumes", report.stream_resumes),
                ("rounds", len(report.rounds)),
            ):
                self.sums[name] = self.sums.get(name, 0) + value
            if report.downtime is not None:
                self.downtime.observe(report.downtime.seconds)
                for part in PARTS:
                    self.parts[part] += getattr(report.downtime, part)


class AgentCollector(Collector):
    """The metrics of one agent. *peak* gives the agent's peak memory so far."""

    def __init__(
        self,
        host: Host,
        sources: Sources,
        destinations: Destinations,
        peak: Callable[[], PeakMemory],
    ) -> None:
        self._host = host
        self._sources = sources
        self._destinations = destinations
        self._peak = peak
        self.totals = Totals()

    def recover(self) -> None:
        """Count what the journal knows of earlier."""
        for report in self._sources.reports(1 << 31):
            self.totals.count(report)

    def describe(self) -> Iterator[Metric]:
        """Nothing, so that registering does not collect."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """All metrics as they are now."""
        info = InfoMetricFamily("migrate_agent", "This agent.")
        info.add_metric(
            [],
            {
                "host": self._host.name,
                "version": version("migrate"),
                "engine": self._host.engine.name,
            },
        )
        yield info
        yield from self._running()
        yield from self._of_totals()
        yield from self._copies()
        yield from self._machine()

    # ------------------------------------------------------------ under way

    def _running(self) -> Iterator[Metric]:
        live = self._sources.running()
        phases = GaugeMetricFamily(
            "migrate_migrations_in_phase", "Migrations from this host by status.", labels=["phase"]
        )
        for status in RUNNING:
            phases.add_metric([status], sum(m.narrator.status is status for m in live))
        yield phases
        unknown = sum(m.narrator.owner is Owner.UNKNOWN for m in live)
        yield _gauge(
            "migrate_migrations_owner_unknown", "Granted, and no answer yet: see exit 90.", unknown
        )
        paused = sum(self._sources.is_paused(m.id) for m in live)
        yield _gauge(
            "migrate_paused_processes", "Processes here whose queues or threads stand.", paused
        )
        yield from _each(live)

    # ------------------------------------------------------------ ended

    def _of_totals(self) -> Iterator[Metric]:
        totals = self.totals
        outcomes = CounterMetricFamily(
            "migrate_migrations_ended", "Ended migrations.", labels=["outcome", "reason"]
        )
        for key, count in sorted(totals.outcomes.items()):
            outcomes.add_metric(list(key), count)
        yield outcomes
        for name, text in (
            ("data_transferred_bytes", "Bytes on the wire."),
            ("data_zero_bytes", "Bytes that were not sent because they were zero."),
            ("data_unchanged_bytes", "Bytes not sent because the destination had them."),
            ("chunks_verified", "Chunks whose digest was checked after placement."),
            ("stream_resumes", "Connections that broke and were made anew."),
            ("rounds", "Passes over memory, the last one of each included."),
        ):
            yield CounterMetricFamily(
                f"migrate_migration_{name}", text, value=totals.sums.get(name, 0)
            )
        parts = CounterMetricFamily(
            "migrate_migration_downtime_part_seconds", "Downtime by its parts.", labels=["part"]
        )
        for part, seconds in totals.parts.items():
            parts.add_metric([part], seconds)
        yield parts
        yield totals.downtime.family(
            "migrate_migration_downtime_seconds", "From the first stopped thread to the release."
        )
        yield totals.duration.family("migrate_migration_duration_seconds", "From start to end.")

    # ------------------------------------------------------------ this host

    def _copies(self) -> Iterator[Metric]:
        states = self._destinations.states()
        copies = GaugeMetricFamily(
            "migrate_destination_copies", "Migrations to this host by state.", labels=["state"]
        )
        for state in DestinationState:
            copies.add_metric([state], sum(found is state for found, _ in states))
        yield copies
        owned = sum(state in MAY_RUN and there for state, there in states)
        yield _gauge("migrate_owned_copies", "Processes that came here, are owned and live.", owned)

    def _machine(self) -> Iterator[Metric]:
        try:
            free = self._host.free_vram()
            rows = list_processes(self._host.paths, lambda _pid: None)
        except MigrateError:
            free, rows = {}, []  # a driver that is gone must not hide the rest
        vram = GaugeMetricFamily("migrate_gpu_vram_free_bytes", "Free VRAM.", labels=["gpu_id"])
        for gpu_id, size in free.items():
            vram.add_metric([str(gpu_id)], size)
        yield vram
        yield _gauge("migrate_gpu_processes", "Processes that use KFD.", len(rows))
        peak = self._peak()
        yield _gauge("migrate_agent_memory_peak_bytes", "PSS without BOs and staging.", peak.agent)
        yield _gauge("migrate_agent_staging_peak_bytes", "Staging.", peak.staging)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)


def _each(live: Iterable[SourceMigration]) -> Iterator[Metric]:
    """What is told of each migration while it runs."""

    def family(name: str, text: str) -> GaugeMetricFamily:
        return GaugeMetricFamily(f"migrate_migration_{name}", text, labels=LABELS)

    total = family("data_total_bytes", "Bytes of the process's memory in this round.")
    processed = family("data_processed_bytes", "Of them looked at.")
    left = family("data_remaining_bytes", "Of them not looked at yet.")
    rate = family("memory_transfer_rate_bytes", "Bytes a second in this round.")
    dirty = family("dirty_memory_rate_bytes", "Bytes a second that changed between two rounds.")
    rounds = family("precopy_rounds", "Rounds that are over.")
    predicted = family("predicted_downtime_seconds", "If the process were stopped now.")
    started = family("start_time_seconds", "Seconds since the epoch.")
    resumes = family("connection_resumes", "Connections that broke and were made anew.")
    for migration in live:
        labels = [migration.id, migration.host.name, migration.peer.name]
        event, figures = migration.narrator.last(), migration.figures
        if event is not None and event.total:
            total.add_metric(labels, event.total)
            processed.add_metric(labels, event.total - event.left)
            left.add_metric(labels, event.left)
            rate.add_metric(labels, event.rate)
        done = list(figures.rounds)
        rounds.add_metric(labels, len(done))
        if len(done) > 1:
            last = done[-1]
            dirty.add_metric(labels, last.changed / max(last.seconds, 1e-6))
        if figures.predicted is not None:
            predicted.add_metric(labels, figures.predicted)
        started.add_metric(labels, datetime.fromisoformat(figures.started).timestamp())
        resumes.add_metric(labels, migration.stream_resumes())
    yield from (total, processed, left, rate, dirty, rounds, predicted, started, resumes)


class MetricsServer:
    """The HTTP endpoint, ``/metrics`` at host:port."""

    def __init__(self, listen: str, collector: AgentCollector) -> None:
        """Listen and serve. Raises UsageError."""
        registry = prometheus_client.CollectorRegistry()
        registry.register(collector)
        prometheus_client.ProcessCollector(registry=registry)
        host, port = split_address(listen)
        try:
            self._server, self._thread = prometheus_client.start_http_server(port, host, registry)
        except OSError as error:
            raise UsageError(f"metrics_listen: can't listen on {listen}: {error}") from error
        self.port = int(self._server.server_port)

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=5)
