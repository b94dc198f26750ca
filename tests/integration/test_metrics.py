"""Metrics, health and JSON log lines of agents at work, read by the readers that others use."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from migrate import inventory
from migrate.client import Client
from migrate.orchestrator.plan import Options
from migrate.rpc.ca import Role
from migrate.rpc.tls import open_channel
from migrate.status import Status
from scenarios.cluster import AgentSetup, Cluster, wait_until
from tests.integration.jobs import start_job

parser = pytest.importorskip("prometheus_client.parser", reason="the extra migrate[agent]")
RATE = "migrate_migration_memory_transfer_rate_bytes"
DASHBOARD = Path(__file__).parents[2] / "docs" / "grafana-dashboard.json"

Samples = dict[str, list[tuple[dict[str, str], float]]]


@pytest.fixture(scope="module")
def observed() -> Iterator[Cluster]:
    """Two hosts whose agents export metrics and log JSON lines."""
    with Cluster.temporary() as cluster:
        for name in ("a", "b"):
            settings = {"metrics_listen": "127.0.0.1:0", "log_format": "json"}
            cluster.add_host(name, setup=AgentSetup(settings=settings))
        yield cluster


def log_lines(cluster: Cluster, host: str) -> list[dict[str, str]]:
    text = (cluster.folder / f"{host}.agent.log").read_text()
    return [json.loads(line) for line in text.splitlines()]


def endpoint(cluster: Cluster, host: str) -> str:
    for line in reversed(log_lines(cluster, host)):
        if line["message"].startswith("metrics at port "):
            return f"http://127.0.0.1:{line['message'].rpartition(' ')[2]}/metrics"
    raise AssertionError("no port in the log")


def scrape(cluster: Cluster, host: str) -> Samples:
    with urllib.request.urlopen(endpoint(cluster, host), timeout=60) as answer:
        text = answer.read().decode()
    found: Samples = {}
    for family in parser.text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def value(samples: Samples, name: str, **labels: str) -> float:
    return sum(v for found, v in samples.get(name, ()) if labels.items() <= found.items())


def test_a_migration_is_seen_while_it_runs_and_when_it_has_ended(observed: Cluster) -> None:
    before = scrape(observed, "a"), scrape(observed, "b")
    job = start_job(observed, "a", "seen")
    with Client(observed.inventory) as client:
        assert value(scrape(observed, "a"), "migrate_gpu_processes") == 1
        # Slow on purpose, so that there is something to see.
        migration = client.run("a", "b", job.pid, options=Options(bandwidth=1 << 20))
        during: Samples = {}
        deadline = time.monotonic() + 100
        while time.monotonic() < deadline:
            during = scrape(observed, "a")
            if value(during, RATE) > 0:
                break
        (labels, total), = during["migrate_migration_data_total_bytes"]  # fmt: skip
        assert labels == {"migration": migration, "source": "a", "destination": "b"}
        assert total > 1 << 20
        processed = value(during, "migrate_migration_data_processed_bytes")
        assert processed + value(during, "migrate_migration_data_remaining_bytes") == total
        assert value(during, RATE) > 0
        assert sum(v for _, v in during["migrate_migrations_in_phase"]) == 1
        report = client.wait("a", migration, 100)
        assert report.status is Status.COMPLETED
    ended = {"outcome": "completed", "reason": ""}
    wait_until(lambda: "migrate_migrations_ended_total" in scrape(observed, "a"), 60, "the count")
    after = scrape(observed, "a")
    assert value(after, "migrate_migrations_ended_total", **ended) == 1
    assert value(after, "migrate_migration_downtime_seconds_count") == 1
    downtime = report.downtime
    assert downtime is not None
    assert value(after, "migrate_migration_downtime_seconds_sum") == pytest.approx(downtime.seconds)
    parts = value(after, "migrate_migration_downtime_part_seconds_total")
    assert parts == pytest.approx(downtime.seconds, abs=1e-6)
    wire = value(after, "migrate_migration_data_transferred_bytes_total")
    assert wire == report.bytes.wire
    assert "migrate_migration_data_total_bytes" not in after
    # The driver forgets a process that has ended, and a helper's, a moment later.
    wait_until(lambda: value(scrape(observed, "a"), "migrate_gpu_processes") == 0, 60, "none at a")
    # The agent, which resumed the copy, is none.
    wait_until(lambda: value(scrape(observed, "b"), "migrate_gpu_processes") == 1, 60, "one at b")
    there = scrape(observed, "b")
    assert value(there, "migrate_owned_copies") == 1
    assert value(there, "migrate_destination_copies", state="OWNED") == 1
    assert value(before[1], "migrate_owned_copies") == 0

    lines = [line for line in log_lines(observed, "b") if line.get("migration") == migration]
    assert lines
    assert {line["host"] for line in lines} == {"b"}


def test_totals_go_on_after_a_restart(observed: Cluster) -> None:
    first = scrape(observed, "a")
    observed.kill_agent("a")
    observed.start_agent("a")
    again = scrape(observed, "a")
    totals = {
        name
        for name in first
        if name.startswith("migrate_migration") and name.endswith(("_total", "_count", "_sum"))
    }
    assert len(totals) >= 10
    assert {name: again[name] for name in totals} == {name: first[name] for name in totals}


def test_there_are_enough_metrics_and_the_dashboard_asks_only_for_what_there_is(
    observed: Cluster,
) -> None:
    text = urllib.request.urlopen(endpoint(observed, "a"), timeout=60).read().decode()
    families = {family.name for family in parser.text_string_to_metric_families(text)}
    ours = {name for name in families if name.startswith("migrate_")}
    assert len(ours) >= 25, sorted(ours)
    exported = ours | {f"{n}{s}" for n in ours for s in ("_total", "_bucket", "_sum", "_count")}
    dashboard = json.loads(DASHBOARD.read_text())
    queries = [t["expr"] for panel in dashboard["panels"] for t in panel.get("targets", ())]
    assert len(queries) >= 10
    asked = {name for query in queries for name in re.findall(r"migrate_[a-z_]+", query)}
    assert asked <= exported, sorted(asked - exported)


def test_health_is_told_to_everybody_with_a_certificate(observed: Cluster) -> None:
    pytest.importorskip("grpc_health", reason="the extra migrate[agent]")
    from grpc_health.v1 import health_pb2, health_pb2_grpc  # noqa: PLC0415

    host = inventory.load(observed.inventory).host("a")
    viewer = observed.certificate("viewer", Role.VIEWER)
    with open_channel(host.address, host.name, viewer) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for service in ("", "migrate.v1.Agent", "migrate.v1.Peer"):
            answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=30)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_reflection_lists_the_services(observed: Cluster) -> None:
    pytest.importorskip("grpc_reflection", reason="the extra migrate[agent]")
    from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc  # noqa: PLC0415

    host = inventory.load(observed.inventory).host("a")
    ask = reflection_pb2.ServerReflectionRequest(list_services="")
    with open_channel(host.address, host.name, observed.certificate("v", Role.VIEWER)) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        (answer,) = stub.ServerReflectionInfo(iter([ask]), timeout=30)
    names = {service.name for service in answer.list_services_response.service}
    assert {"migrate.v1.Agent", "migrate.v1.Peer", "grpc.health.v1.Health"} <= names
    # Without a certificate there is not even a connection.
    ca = Path(inventory.load(observed.inventory).tls.ca).read_bytes()
    anonymous = grpc.ssl_channel_credentials(ca)
    options = (("grpc.ssl_target_name_override", "a"),)
    with grpc.secure_channel(host.address, anonymous, options) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        with pytest.raises(grpc.RpcError):
            list(stub.ServerReflectionInfo(iter([ask]), timeout=30))
