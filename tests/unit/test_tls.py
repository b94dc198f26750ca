"""TLS over real sockets: who gets in, and what the others are told."""

from __future__ import annotations

import os
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.x509.oid import NameOID

from migrate.errors import (
    AgentUnreachable,
    CertificateRejected,
    MigrateError,
    UsageError,
)
from migrate.inventory import TlsFiles
from migrate.rpc.ca import Authority, Role, create_ca, issue, load_ca
from migrate.rpc.explain import PREFACE, explain_failure
from migrate.rpc.tls import (
    Identity,
    connect,
    open_channel,
    peer_identity,
    read,
    server_credentials,
)

DEADLINE = 30.0
LONG_AGO = datetime.now(UTC) - timedelta(days=10)
DAY = timedelta(days=1)


class WhoAmI(grpc.GenericRpcHandler):
    """One method for every path: it says who calls."""

    def service(
        self, handler_call_details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler[bytes, bytes]:
        def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
            try:
                who = peer_identity(context)
            except MigrateError as error:
                return f"{error.reason}: {error}".encode()
            return f"{who.name} {who.role}".encode()

        return grpc.unary_unary_rpc_method_handler(answer)


@contextmanager
def serving(credentials: grpc.ServerCredentials) -> Iterator[str]:
    server = grpc.server(futures.ThreadPoolExecutor(2))
    server.add_generic_rpc_handlers([WhoAmI()])
    port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait(DEADLINE)


@pytest.fixture
def ca(tmp_path: Path) -> Authority:
    return create_ca(tmp_path / "ours")


@pytest.fixture
def other(tmp_path: Path) -> Authority:
    """An authority of the same name with another key."""
    return create_ca(tmp_path / "theirs")


@pytest.fixture
def operator(ca: Authority, tmp_path: Path) -> TlsFiles:
    return issue(ca, "olga", Role.OPERATOR, tmp_path)


@pytest.fixture
def agent(ca: Authority, tmp_path: Path) -> TlsFiles:
    return issue(ca, "node-a", Role.AGENT, tmp_path, hosts=["127.0.0.1", "::1"])


@pytest.fixture
def address(agent: TlsFiles) -> Iterator[str]:
    with serving(server_credentials(agent)) as at:
        yield at


def unchecked(files: TlsFiles) -> grpc.ServerCredentials:
    """Server credentials that our own checks would refuse to load."""
    pairs = [(Path(files.key).read_bytes(), Path(files.cert).read_bytes())]
    return grpc.ssl_server_credentials(pairs, Path(files.ca).read_bytes(), True)


def ask(channel: grpc.Channel, method: str = "/x/who") -> str:
    call: Callable[..., bytes] = channel.unary_unary(method)
    return call(b"", timeout=DEADLINE).decode()


def with_ca(files: TlsFiles, authority: Authority) -> TlsFiles:
    return TlsFiles(ca=str(authority.path), cert=files.cert, key=files.key)


# ---------------------------------------------------------------- who gets in


@pytest.mark.parametrize("role", list(Role))
def test_the_callee_learns_name_and_role(
    ca: Authority, tmp_path: Path, address: str, role: Role
) -> None:
    files = issue(ca, "peer.example", role, tmp_path)
    with connect(address, "node-a", files, DEADLINE) as channel:
        assert ask(channel) == f"peer.example {role.value}"


def foreign(
    ca: Authority, folder: Path, *attributes: tuple[x509.ObjectIdentifier, str]
) -> TlsFiles:
    """A certificate by our authority whose subject is not one that issue() makes."""
    files = issue(ca, "foreign", Role.VIEWER, folder)
    made = x509.load_pem_x509_certificate(Path(files.cert).read_bytes())
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(oid, value) for oid, value in attributes]))
        .issuer_name(made.issuer)
        .public_key(made.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(made.not_valid_before_utc)
        .not_valid_after(made.not_valid_after_utc)
        .sign(ca.key, hashes.SHA256())
    )
    Path(files.cert).write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    return files


CN, OU = NameOID.COMMON_NAME, NameOID.ORGANIZATIONAL_UNIT_NAME


@pytest.mark.parametrize(
    "attributes",
    [
        [(CN, "olga")],
        [(OU, "admin")],
        [(CN, "olga"), (OU, "root")],
        [(CN, "olga"), (OU, "viewer"), (OU, "admin")],
        [(CN, "olga"), (CN, "node-a"), (OU, "agent")],
        [(CN, "olga"), (OU, "Admin")],
    ],
)
def test_a_subject_that_is_not_one_name_and_one_role_is_nobody(
    ca: Authority, tmp_path: Path, address: str, attributes: list[tuple[x509.ObjectIdentifier, str]]
) -> None:
    files = foreign(ca, tmp_path, *attributes)
    with connect(address, "node-a", files, DEADLINE) as channel:
        assert ask(channel).startswith(CertificateRejected.reason)


def test_the_name_is_checked_not_the_address(address: str, operator: TlsFiles) -> None:
    """The certificate has 127.0.0.1, too, but it is node-a that was wanted there."""
    with pytest.raises(CertificateRejected, match="not issued for the name node-b"):
        connect(address, "node-b", operator, DEADLINE)


def first_answer(address: str, ca: Authority, files: TlsFiles | None) -> bytes:
    """What an HTTP/2 client hears first, with or without a certificate of its own."""
    context = ssl.create_default_context(cafile=str(ca.path))
    context.set_alpn_protocols(["h2"])
    if files is not None:
        context.load_cert_chain(files.cert, files.key)
    host, _, port = address.rpartition(":")
    with (
        socket.create_connection((host, int(port)), DEADLINE) as plain,
        context.wrap_socket(plain, server_hostname="node-a") as tls,
    ):
        try:
            tls.sendall(PREFACE)
            return tls.recv(9)
        except (ConnectionError, ssl.SSLError):
            return b""


def test_a_client_without_certificate_gets_no_answer(
    ca: Authority, address: str, operator: TlsFiles
) -> None:
    assert first_answer(address, ca, operator)[3] == 4  # SETTINGS
    assert first_answer(address, ca, None) == b""


def test_a_plaintext_client_gets_no_answer(address: str) -> None:
    with grpc.insecure_channel(address) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            ask(channel)
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE


# ---------------------------------------------------------------- why not


def test_closed_port(operator: TlsFiles) -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))  # bound, not listening: nobody else gets it
        address = f"127.0.0.1:{reserved.getsockname()[1]}"
        with pytest.raises(AgentUnreachable, match="no agent of node-a listens at"):
            connect(address, "node-a", operator, DEADLINE)


def test_name_that_does_not_resolve(operator: TlsFiles) -> None:
    error = explain_failure("nowhere.invalid:1", "node-a", operator, DEADLINE)
    assert isinstance(error, AgentUnreachable)
    assert "does not resolve" in str(error)


def test_agent_of_another_authority(other: Authority, tmp_path: Path, operator: TlsFiles) -> None:
    files = issue(other, "node-a", Role.AGENT, tmp_path / "theirs")
    with serving(server_credentials(files)) as address:
        with pytest.raises(CertificateRejected, match="not issued by the authority in"):
            connect(address, "node-a", operator, DEADLINE)


def test_our_certificate_of_another_authority(
    ca: Authority, other: Authority, tmp_path: Path, address: str
) -> None:
    files = with_ca(issue(other, "olga", Role.OPERATOR, tmp_path / "theirs"), ca)
    with pytest.raises(CertificateRejected, match="rejected our certificate .* not issued by"):
        connect(address, "node-a", files, DEADLINE)


def test_agent_that_trusts_another_authority(
    other: Authority, agent: TlsFiles, operator: TlsFiles
) -> None:
    with serving(server_credentials(with_ca(agent, other))) as address:
        with pytest.raises(CertificateRejected, match="agent trusts another authority"):
            connect(address, "node-a", operator, DEADLINE)


def test_agent_with_an_expired_certificate(
    ca: Authority, tmp_path: Path, operator: TlsFiles
) -> None:
    files = issue(ca, "node-a", Role.AGENT, tmp_path, lifetime=DAY, now=LONG_AGO)
    with pytest.raises(CertificateRejected, match="expired"):
        server_credentials(files)
    with serving(unchecked(files)) as address:
        with pytest.raises(CertificateRejected, match="certificate of node-a .* has expired$"):
            connect(address, "node-a", operator, DEADLINE)


def test_agent_with_a_certificate_of_the_future(
    ca: Authority, tmp_path: Path, operator: TlsFiles
) -> None:
    files = issue(ca, "node-a", Role.AGENT, tmp_path, now=datetime.now(UTC) + DAY)
    with serving(unchecked(files)) as address:
        with pytest.raises(CertificateRejected, match="not valid yet"):
            connect(address, "node-a", operator, DEADLINE)


def test_our_expired_certificate(ca: Authority, tmp_path: Path, address: str) -> None:
    files = issue(ca, "olga", Role.OPERATOR, tmp_path, lifetime=DAY, now=LONG_AGO)
    with pytest.raises(CertificateRejected, match=r"our own certificate .*olga.crt expired"):
        connect(address, "node-a", files, DEADLINE)
    # Expired while the channel was open: the agent refuses the next handshake.
    error = explain_failure(address, "node-a", files, DEADLINE)
    assert isinstance(error, CertificateRejected)
    assert "expired" in str(error)


def test_a_client_certificate_is_no_agent(ca: Authority, tmp_path: Path) -> None:
    """An operator's certificate can't be used to pose as a host."""
    impostor = issue(ca, "node-a", Role.OPERATOR, tmp_path)
    caller = issue(ca, "olga", Role.OPERATOR, tmp_path)
    with serving(unchecked(impostor)) as address:
        with pytest.raises(CertificateRejected):
            connect(address, "node-a", caller, DEADLINE)


@contextmanager
def speaking(first: bytes) -> Iterator[str]:
    """A service that says *first* to each that connects and closes."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    peer, _ = server.accept()
                except OSError:
                    return
                with peer:
                    peer.settimeout(DEADLINE)
                    try:
                        peer.recv(1 << 16)
                        peer.sendall(first)
                        peer.shutdown(socket.SHUT_WR)
                        while peer.recv(1 << 16):
                            pass
                    except OSError:
                        pass

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"127.0.0.1:{server.getsockname()[1]}"
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join(DEADLINE)


def test_an_agent_that_ends_at_that_moment(agent: TlsFiles, operator: TlsFiles) -> None:
    """It closes as one that rejects us, but then nobody listens any more."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(agent.cert, agent.key)

    def serve_one_and_end() -> None:
        peer, _ = server.accept()
        with peer, context.wrap_socket(peer, server_side=True) as tls:
            server.close()
            tls.recv(1)

    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        thread = threading.Thread(target=serve_one_and_end)
        thread.start()
        error = explain_failure(address, "node-a", operator, DEADLINE)
        thread.join(DEADLINE)
    assert isinstance(error, AgentUnreachable)
    assert "no agent of node-a listens" in str(error)


@pytest.mark.parametrize(
    ("first", "said"),
    [(b"SSH-2.0-x\r\n" * 9, "does not speak TLS"), (b"", "before it showed a certificate")],
)
def test_another_service(operator: TlsFiles, first: bytes, said: str) -> None:
    with speaking(first) as address:
        with pytest.raises(AgentUnreachable, match=said):
            connect(address, "node-a", operator, DEADLINE)


def test_silence_ends_in_time(operator: TlsFiles) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        for attempt in (connect, explain_failure):
            try:
                result: object = attempt(address, "node-a", operator, 0.2)
            except AgentUnreachable as error:
                result = error
            assert isinstance(result, AgentUnreachable)
            assert "did not answer within 0.2 s" in str(result)


def test_an_agent_that_answers_after_all(address: str, operator: TlsFiles) -> None:
    error = explain_failure(address, "node-a", operator, DEADLINE)
    assert isinstance(error, AgentUnreachable)
    assert "answers now" in str(error)


# ---------------------------------------------------------------- rotation


def served_serial(address: str, ca: Authority, operator: TlsFiles) -> int:
    context = ssl.create_default_context(cafile=str(ca.path))
    context.load_cert_chain(operator.cert, operator.key)
    host, _, port = address.rpartition(":")
    with (
        socket.create_connection((host, int(port)), DEADLINE) as plain,
        context.wrap_socket(plain, server_hostname="node-a") as tls,
    ):
        shown = tls.getpeercert(binary_form=True)
    assert shown
    return x509.load_der_x509_certificate(shown).serial_number


def test_a_new_certificate_is_served_without_a_restart(
    ca: Authority, agent: TlsFiles, operator: TlsFiles, address: str
) -> None:
    with connect(address, "node-a", operator, DEADLINE) as channel:
        before = served_serial(address, ca, operator)
        issue(ca, "node-a", Role.AGENT, Path(agent.cert).parent)
        after = served_serial(address, ca, operator)
        assert before != after
        assert ask(channel) == "olga operator"  # the open connection stays
        Path(agent.key).write_text("rubbish")
        assert served_serial(address, ca, operator) == after


# ---------------------------------------------------------------- files


def test_keys_are_private_even_with_a_careless_umask(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        files = issue(create_ca(tmp_path / "ca"), "olga", Role.VIEWER, tmp_path / "new" / "folder")
    finally:
        os.umask(old)
    for key in (tmp_path / "ca" / "ca.key", Path(files.key)):
        assert key.stat().st_mode & 0o777 == 0o600
    assert {p.name for p in (tmp_path / "ca").iterdir()} == {"ca.key", "ca.crt", "issued.jsonl"}


def test_an_authority_is_never_replaced(tmp_path: Path) -> None:
    first = create_ca(tmp_path)
    with pytest.raises(UsageError, match="has an authority already"):
        create_ca(tmp_path)
    again = load_ca(tmp_path)
    assert again.certificate == first.certificate
    assert Identity(name="olga", role=Role.VIEWER)
    files = issue(again, "olga", Role.VIEWER, tmp_path)
    assert read(files).ca == first.path.read_bytes()


@pytest.mark.parametrize("name", ["", "-a", "a b", "a/b", "../a", "a" * 65, "ä", "a\n", "*.a"])
def test_names_that_no_certificate_gets(ca: Authority, tmp_path: Path, name: str) -> None:
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UsageError, match="can't be the name"):
        issue(ca, name, Role.VIEWER, tmp_path)
    with pytest.raises(UsageError, match="can't be the name"):
        issue(ca, "fine", Role.VIEWER, tmp_path, hosts=[name])
    assert sorted(tmp_path.iterdir()) == before


def spoil_missing(files: TlsFiles) -> None:
    Path(files.cert).unlink()


def spoil_damaged(files: TlsFiles) -> None:
    Path(files.cert).write_text("-----BEGIN CERTIFICATE-----\nrubbish")


def spoil_key(files: TlsFiles) -> None:
    Path(files.key).write_text("rubbish")


def spoil_mode(files: TlsFiles) -> None:
    Path(files.key).chmod(0o640)


def spoil_pair(files: TlsFiles) -> None:
    folder = Path(files.key).parent
    stranger = issue(load_ca(folder / "ours"), "stranger", Role.VIEWER, folder)
    os.replace(stranger.key, files.key)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (spoil_missing, "can't read .*olga.crt: No such file"),
        (spoil_damaged, "olga.crt is not a PEM certificate"),
        (spoil_key, "olga.key has no usable private key"),
        (spoil_mode, r"olga.key can be read by others \(mode 0640\)"),
        (spoil_pair, "olga.key is not the key of .*olga.crt"),
    ],
)
def test_files_that_can_not_be_used(
    operator: TlsFiles, spoil: Callable[[TlsFiles], None], said: str
) -> None:
    read(operator)
    spoil(operator)
    with pytest.raises(UsageError, match=said):
        open_channel("127.0.0.1:1", "node-a", operator)


def test_an_authority_that_can_not_be_used(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no authority in"):
        load_ca(tmp_path)
    create_ca(tmp_path / "a")
    create_ca(tmp_path / "b")
    os.replace(tmp_path / "b" / "ca.key", tmp_path / "a" / "ca.key")
    with pytest.raises(UsageError, match="is not the key of"):
        load_ca(tmp_path / "a")
    (tmp_path / "a" / "ca.key").write_text("rubbish")
    with pytest.raises(UsageError, match="can't be read"):
        load_ca(tmp_path / "a")
