"""The table of rights, cell by cell, over real TLS: every RPC of every service × every role."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.message_factory import GetMessageClass

from migrate.errors import (
    AgentBusy,
    CertificateRejected,
    MigrateError,
    PermissionRefused,
    ProtocolMismatch,
    UsageError,
)
from migrate.inventory import TlsFiles
from migrate.rpc.audit import KEEP, NAME, Audit, Entry
from migrate.rpc.ca import Role, create_ca, issue, revoke
from migrate.rpc.errors import translated
from migrate.rpc.guard import MAX_STREAMING, Guard
from migrate.rpc.revocation import Revocations
from migrate.rpc.rules import OTHERS, PAGE, RULES, methods, page, rule_of
from migrate.rpc.tls import connect, server_credentials

METHODS = dict(methods())
DEADLINE = 60.0
STRANGE = "/migrate.v1.Agent/NoRuleSaysWho"


def streaming(channel: grpc.Channel, method: str) -> Callable[..., Iterator[bytes]]:
    """A call that is answered by a stream of bytes."""
    return channel.unary_stream(method)


class Everything(grpc.GenericRpcHandler):
    """Every method of proto/, and one that no rule names. Each just answers."""

    def __init__(self) -> None:
        self.entered: list[str] = []

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        """A handler of the method's kind."""
        name = str(handler_call_details.method)
        method = METHODS.get(name)
        if method is None and name not in (STRANGE, *OTHERS):
            return None
        request = GetMessageClass(method.input_type) if method else None
        answer = GetMessageClass(method.output_type) if method else None

        def one(_request: object, _context: grpc.ServicerContext) -> object:
            self.entered.append(name)
            if name.endswith("/Abort"):
                raise UsageError("no\nsuch line" + "x" * 5000)
            if name.endswith("/List"):
                raise ZeroDivisionError("a bug")
            return answer() if answer else b""

        def many(request: object, context: grpc.ServicerContext) -> Iterator[object]:
            for _ in range(3):
                yield one(request, context)

        streams = method is not None and method.server_streaming
        make: Any = (
            grpc.unary_stream_rpc_method_handler if streams else grpc.unary_unary_rpc_method_handler
        )
        return make(
            many if streams else one,
            request_deserializer=request.FromString if request else None,
            response_serializer=answer.SerializeToString if answer else None,
        )


class Field:
    """A guarded server, and a channel for each role."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        self.ca = create_ca(folder / "ca")
        self.files = {role: issue(self.ca, f"a-{role}", role, folder / "tls") for role in Role}
        server_files = self.files[Role.AGENT]
        self.handlers = Everything()
        guard = self.guard = Guard("here", Revocations(server_files), Audit(folder))
        server = grpc.server(futures.ThreadPoolExecutor(4), interceptors=[guard])
        server.add_generic_rpc_handlers([self.handlers])
        port = server.add_secure_port("127.0.0.1:0", server_credentials(server_files))
        server.start()
        stack.callback(lambda: server.stop(None).wait())
        self.address = f"127.0.0.1:{port}"
        self.channels = {
            role: stack.enter_context(self.connect(files)) for role, files in self.files.items()
        }

    def connect(self, files: TlsFiles) -> grpc.Channel:
        """A channel with these files."""
        return connect(self.address, "a-agent", files, DEADLINE)

    def ask(self, channel: grpc.Channel, method: str, data: bytes = b"") -> list[bytes]:
        """The answers, as bytes. Raises MigrateError."""
        descriptor = METHODS.get(method)
        with translated():
            if descriptor is not None and descriptor.server_streaming:
                return list(streaming(channel, method)(data, timeout=DEADLINE))
            single: Callable[..., bytes] = channel.unary_unary(method)
            return [single(data, timeout=DEADLINE)]

    def audited(self) -> list[dict[str, str]]:
        """The lines of the audit log."""
        path = self.folder / NAME
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture(scope="module")
def field(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Field]:
    with ExitStack() as stack:
        yield Field(tmp_path_factory.mktemp("rights"), stack)


def test_every_rpc_has_a_rule_and_every_rule_an_rpc() -> None:
    assert set(RULES) == set(METHODS), "say in migrate/rpc/rules.py who may make the call"


@pytest.mark.parametrize("role", list(Role))
@pytest.mark.parametrize("method", sorted({*METHODS, *OTHERS}))
def test_each_cell(field: Field, method: str, role: Role) -> None:
    rule = rule_of(method)
    assert rule is not None
    before = len(field.handlers.entered)
    refusal: MigrateError | None = None
    try:
        field.ask(field.channels[role], method)
    except MigrateError as error:
        refusal = error if isinstance(error, PermissionRefused) else None
    # Another one may still be coming to its end in the server.
    entered = method in field.handlers.entered[before:]
    assert entered is (role in rule.roles) is (refusal is None)
    if refusal is not None:
        assert f"a-{role}" in refusal.message


def allowed(role: Role) -> set[str]:
    return {m.removeprefix("/migrate.v1.") for m, rule in RULES.items() if role in rule.roles}


def test_what_the_roles_are_for() -> None:
    """Said here once more, by hand: agents are no clients, and rights grow with the role."""
    assert all(name.startswith("Peer/") for name in allowed(Role.AGENT))
    assert not any(m.startswith("Peer/") for m in allowed(Role.ADMIN))
    assert allowed(Role.VIEWER) < allowed(Role.OPERATOR) < allowed(Role.ADMIN)
    assert {"Agent/List", "Agent/Watch"} <= allowed(Role.VIEWER)
    for name in ("Agent/Run", "Agent/Abort"):
        assert name in allowed(Role.OPERATOR) - allowed(Role.VIEWER)
    assert "Agent/Resolve" in allowed(Role.ADMIN) - allowed(Role.OPERATOR)


@pytest.mark.parametrize("role", list(Role))
def test_a_call_without_a_rule_is_refused(field: Field, role: Role) -> None:
    with pytest.raises(PermissionRefused, match="nobody may"):
        field.ask(field.channels[role], STRANGE)
    assert STRANGE not in field.handlers.entered


def test_nothing_is_parsed_for_somebody_who_may_not_call(field: Field) -> None:
    rubbish = b"\xff\xff\xff"
    with pytest.raises(PermissionRefused):
        field.ask(field.channels[Role.VIEWER], "/migrate.v1.Agent/Run", rubbish)
    with pytest.raises(ProtocolMismatch, match="can't be read"):
        field.ask(field.channels[Role.OPERATOR], "/migrate.v1.Agent/Run", rubbish)


def test_a_revoked_certificate_is_refused_at_once_on_an_open_connection(field: Field) -> None:
    files = issue(field.ca, "mallory", Role.ADMIN, field.folder / "tls")
    with field.connect(files) as channel:
        field.ask(channel, "/migrate.v1.Agent/Info")
        stream = streaming(channel, "/migrate.v1.Agent/Watch")(b"", timeout=DEADLINE)
        assert next(stream) == b""
        revoke(field.ca, "mallory")
        with pytest.raises(CertificateRejected, match="mallory was revoked"):
            field.ask(channel, "/migrate.v1.Agent/Info")
        field.ask(field.channels[Role.ADMIN], "/migrate.v1.Agent/Info")
        with contextlib.suppress(grpc.RpcError):  # refused in its middle, if it was not over
            list(stream)
    (line,) = [a for a in field.audited() if (a["name"], a["rpc"]) == ("mallory", "Info")]
    assert line == {
        **line,
        "outcome": "refused",
        "reason": "CERTIFICATE_REJECTED",
    }


def test_those_who_watch_leave_workers_to_the_others(field: Field) -> None:
    channel = field.channels[Role.VIEWER]
    guard = field.guard
    with ExitStack() as stack:
        for _ in range(MAX_STREAMING):
            stack.enter_context(guard.room())
        with pytest.raises(AgentBusy, match="followed already"):
            field.ask(channel, "/migrate.v1.Agent/Watch")
        field.ask(channel, "/migrate.v1.Agent/Info")
    assert len(field.ask(channel, "/migrate.v1.Agent/Watch")) == 3


# ---------------------------------------------------------------- the audit log


def test_a_line_an_action(field: Field) -> None:
    before = len(field.audited())
    field.ask(field.channels[Role.OPERATOR], "/migrate.v1.Agent/Info")
    with pytest.raises(MigrateError, match="a bug"):
        field.ask(field.channels[Role.OPERATOR], "/migrate.v1.Agent/List")
    assert len(field.audited()) == before  # looking is no action
    request = GetMessageClass(METHODS["/migrate.v1.Peer/Grant"].input_type)
    data = request(migration="m1", token=b"secret token").SerializeToString()
    field.ask(field.channels[Role.AGENT], "/migrate.v1.Peer/Grant", data)
    with pytest.raises(PermissionRefused):
        field.ask(field.channels[Role.VIEWER], "/migrate.v1.Peer/Grant", data)
    with pytest.raises(UsageError):
        field.ask(field.channels[Role.ADMIN], "/migrate.v1.Agent/Abort")
    granted, refused, failed = field.audited()[before:]
    assert granted == {
        **granted,
        "host": "here",
        "name": "a-agent",
        "role": "agent",
        "rpc": "Grant",
        "migration": "m1",
        "outcome": "ok",
    }
    assert granted["from"].startswith("ipv4:127.0.0.1:")
    assert (refused["outcome"], refused["reason"]) == ("refused", "PERMISSION_REFUSED")
    assert (refused["name"], refused["migration"]) == ("a-viewer", "")  # it was not even read
    assert (failed["outcome"], failed["reason"]) == ("failed", "USAGE")
    assert len(failed["message"]) <= 300
    text = (field.folder / NAME).read_text()
    assert "secret token" not in text
    assert (field.folder / NAME).stat().st_mode & 0o777 == 0o600


def test_the_log_is_renamed_when_it_is_full(tmp_path: Path) -> None:
    audit = Audit(tmp_path, max_bytes=2000, now=lambda: datetime(2026, 1, 1, tzinfo=UTC))
    for number in range(200):
        audit.write(
            Entry(
                time=audit.time(),
                host="h",
                name=f"n{number}",
                role="admin",
                serial="1",
                source="x",
                rpc="Run",
            )
        )
    files = sorted(tmp_path.iterdir())
    assert len(files) == KEEP + 1
    assert all(file.stat().st_size <= 2000 for file in files)
    assert '"n199"' in (tmp_path / NAME).read_text().splitlines()[-1]
    newest_old = (tmp_path / f"{NAME}.1").read_text().splitlines()
    first = json.loads((tmp_path / NAME).read_text().splitlines()[0])["name"]
    assert json.loads(newest_old[-1])["name"] == f"n{int(first[1:]) - 1}"


# ---------------------------------------------------------------- the page


def test_the_page_has_the_table_of_now() -> None:
    assert PAGE.read_text() == page(PAGE.read_text()), "run python -m migrate.rpc.rules"
