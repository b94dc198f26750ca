"""Enrolment over real HTTPS: who gets a certificate, and what everybody else gets."""

from __future__ import annotations

import base64
import json
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

from migrate.cli.main import run
from migrate.errors import (
    AgentBusy,
    AgentUnreachable,
    CertificateRejected,
    MigrateError,
    PermissionRefused,
    UsageError,
)
from migrate.inventory import TlsFiles
from migrate.rpc import audit, book, tokens
from migrate.rpc.ca import (
    ENROLMENT_NAME,
    Authority,
    Role,
    create_ca,
    issue,
    make_request,
    request_pem,
    revoke,
    sign_request,
)
from migrate.rpc.enrol import enrol
from migrate.rpc.enrolment import MAX_BODY, MAX_CONNECTIONS, MAX_FAILURES, EnrolmentServer
from migrate.rpc.revocation import Revocations, refuse_revoked_server
from migrate.rpc.tls import Identity, identity_of, open_channel, read

Capture = pytest.CaptureFixture[str]
HASTE = 1.0  # seconds that a connection may live where a test waits for its end


@pytest.fixture
def ca(tmp_path: Path) -> Authority:
    return create_ca(tmp_path / "ca")


@contextmanager
def serving(ca: Authority, seconds: float = 60.0) -> Iterator[str]:
    with EnrolmentServer(ca, ("127.0.0.1", 0), seconds=seconds) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def certificate_of(files: TlsFiles) -> x509.Certificate:
    return x509.load_pem_x509_certificate(read(files).cert)


# ---------------------------------------------------------------- the way it is meant


def test_a_host_enrols(ca: Authority, tmp_path: Path) -> None:
    token = tokens.create(ca, "node-a", ("10.0.0.1",))
    old = os.umask(0)
    try:
        with serving(ca) as address:
            files = enrol(address, tokens.parse(token.text()), tmp_path / "tls")
    finally:
        os.umask(old)
    certificate = certificate_of(files)
    assert identity_of(certificate) == Identity(name="node-a", role=Role.AGENT)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["node-a"]
    assert [str(ip) for ip in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.1"]
    assert Path(files.key).stat().st_mode & 0o777 == 0o600
    assert read(files).ca == ca.path.read_bytes()
    # The key was never at the authority, and the secret is not kept there.
    secret = base64.urlsafe_b64encode(token.secret).rstrip(b"=")
    for path in (p for p in ca.folder.rglob("*") if p.is_file()):
        data = path.read_bytes()
        assert Path(files.key).read_bytes() not in data
        for form in (token.secret, secret, token.secret.hex().encode()):
            assert form not in data, path
    assert [(i.name, i.role) for i in book.read(ca.folder)] == [("node-a", "agent")]
    (line,) = (ca.folder / audit.NAME).read_text().splitlines()
    assert json.loads(line) == {**json.loads(line), "name": "node-a", "outcome": "ok"}


def test_by_the_command_line_token_on_stdin(tmp_path: Path, capsys: Capture) -> None:
    folder, out = str(tmp_path / "ca"), str(tmp_path / "tls")
    assert run(["ca", "init", folder]) == 0
    assert run(["ca", "token", folder, "node-a", "--out", str(tmp_path / "token")]) == 0
    assert (tmp_path / "token").stat().st_mode & 0o777 == 0o600
    reader, writer = os.pipe()
    server = subprocess.Popen(
        [
            sys.executable, "-m", "migrate", "ca", "serve", folder,
            "--listen", "127.0.0.1:0", "--ready-fd", str(writer),
        ],
        pass_fds=[writer],
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        os.close(writer)
        address = os.read(reader, 100).decode().strip()
        os.close(reader)
        assert address, "it did not start"
        capsys.readouterr()
        command = ["agent", "enroll", address, "--token-file", str(tmp_path / "token")]
        assert run([*command, "--out", out, "--json"]) == 0
        files = msgspec.json.decode(capsys.readouterr().out, type=TlsFiles)
        assert identity_of(certificate_of(files)).name == "node-a"
        assert run([*command, "--out", out]) == PermissionRefused.exit_code
        assert "used before" in capsys.readouterr().err
    finally:
        server.terminate()
        server.wait(30)


def test_without_a_network(tmp_path: Path, capsys: Capture) -> None:
    ca, host = str(tmp_path / "ca"), tmp_path / "host"
    assert run(["ca", "init", ca]) == 0
    assert run(["agent", "csr", "node-a", "--out", str(host)]) == 0
    before = (host / "node-a.key").read_bytes()
    assert (host / "node-a.key").stat().st_mode & 0o777 == 0o600
    assert run(["ca", "sign", ca, "node-a", str(host / "node-a.csr"), "--host", "::1"]) == 0
    files = TlsFiles(ca=f"{ca}/ca.crt", cert=str(host / "node-a.crt"), key=str(host / "node-a.key"))
    assert identity_of(certificate_of(files)) == Identity(name="node-a", role=Role.AGENT)
    assert run(["agent", "csr", "node-a", "--out", str(host)]) == UsageError.exit_code
    assert "a key already" in capsys.readouterr().err
    assert (host / "node-a.key").read_bytes() == before


# ---------------------------------------------------------------- tokens


def test_a_token_is_for_one_name_once_and_for_minutes(ca: Authority) -> None:
    token = tokens.create(ca, "node-a")
    assert token.secret.hex() not in repr(token)
    with pytest.raises(PermissionRefused, match="is not known"):
        tokens.redeem(ca, token.id, bytes(32))
    with pytest.raises(PermissionRefused, match="is not known"):
        tokens.redeem(ca, "0" * 16, token.secret)
    late = datetime.now(UTC) + tokens.LIFETIME + timedelta(seconds=1)
    with pytest.raises(PermissionRefused, match="expired at"):
        tokens.redeem(ca, token.id, token.secret, now=late)

    def unfit(_record: tokens.TokenRecord) -> None:
        raise UsageError("unfit")

    with pytest.raises(UsageError, match="unfit"):
        tokens.redeem(ca, token.id, token.secret, unfit)
    assert tokens.redeem(ca, token.id, token.secret).name == "node-a"
    with pytest.raises(PermissionRefused, match="was used before"):
        tokens.redeem(ca, token.id, token.secret)


def test_of_many_who_use_a_token_at_once_one_wins(ca: Authority) -> None:
    token = tokens.create(ca, "node-a")
    gate = threading.Barrier(16)

    def attempt(_number: int) -> bool:
        gate.wait()
        try:
            tokens.redeem(ca, token.id, token.secret)
        except PermissionRefused:
            return False
        return True

    with ThreadPoolExecutor(16) as pool:
        assert sum(pool.map(attempt, range(16))) == 1


@pytest.mark.parametrize("id_", ["", "../../etc/passwd", "a" * 16 + "/", "\0" * 16, "A" * 16])
def test_an_id_never_leads_out_of_the_folder(ca: Authority, id_: str) -> None:
    tokens.create(ca, "node-a")
    with pytest.raises(PermissionRefused, match="is not known"):
        tokens.redeem(ca, id_, bytes(32))


@pytest.mark.parametrize("name", ["", "a/b", "-a", ENROLMENT_NAME])
def test_no_token_for_a_name_that_no_certificate_gets(ca: Authority, name: str) -> None:
    with pytest.raises(UsageError, match="can't be the name"):
        tokens.create(ca, name)


@pytest.mark.parametrize("spoil", ["", "x", "migrate1:a:b:c:d", "{0}:x", "{0}\nx", "migrate2{1}"])
def test_damaged_tokens(ca: Authority, spoil: str) -> None:
    text = tokens.create(ca, "node-a").text()
    assert tokens.parse(f" {text}\n").name == "node-a"
    with pytest.raises(UsageError) as caught:
        tokens.parse(spoil.format(text, text[8:]))
    assert text.split(":")[3] not in str(caught.value) + caught.value.hint


# ---------------------------------------------------------------- who is refused


def test_another_authority_in_between(ca: Authority, tmp_path: Path) -> None:
    token = tokens.create(ca, "node-a")
    with serving(create_ca(tmp_path / "theirs")) as address:
        with pytest.raises(CertificateRejected, match="not the authority that made the token"):
            enrol(address, token, tmp_path / "tls")
    assert not (tmp_path / "tls").exists()
    assert tokens.redeem(ca, token.id, token.secret).name == "node-a"  # it never saw the secret


def test_a_host_of_the_authority_in_between(ca: Authority, tmp_path: Path) -> None:
    """It has a certificate of the right authority and can show ca.crt, but not the name."""
    files = issue(ca, "node-b", Role.AGENT, tmp_path / "b")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(files.cert, files.key)
    heard = []

    def serve(server: socket.socket) -> None:
        for _ in range(2):
            peer, _ = server.accept()
            try:
                with context.wrap_socket(peer, server_side=True) as tls:
                    heard.append(tls.recv(1 << 16))
                    pem = ca.path.read_bytes()
                    tls.sendall(b"HTTP/1.0 200 OK\r\n\r\n" + pem)
            except OSError:
                continue

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=serve, args=(server,))
        thread.start()
        with pytest.raises(CertificateRejected, match="not the authority that made the token"):
            enrol(f"127.0.0.1:{server.getsockname()[1]}", tokens.create(ca, "a"), tmp_path / "tls")
        thread.join()
    assert len(heard) == 1
    assert heard[0].startswith(b"GET ")


def test_nobody_there(ca: Authority, tmp_path: Path) -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{reserved.getsockname()[1]}"
        with pytest.raises(AgentUnreachable, match="no enrolment service"):
            enrol(address, tokens.create(ca, "a"), tmp_path / "tls")


def test_who_guesses_is_slowed_down(ca: Authority, tmp_path: Path) -> None:
    token = tokens.create(ca, "node-a")
    wrong = msgspec.structs.replace(token, secret=bytes(32))
    with serving(ca) as address:
        for _ in range(MAX_FAILURES):
            with pytest.raises(PermissionRefused, match="is not known"):
                enrol(address, wrong, tmp_path / "tls")
        with pytest.raises(AgentBusy, match="too many failed"):
            enrol(address, token, tmp_path / "tls")
    lines = (ca.folder / audit.NAME).read_text().splitlines()
    assert [json.loads(line)["outcome"] for line in lines] == ["refused"] * MAX_FAILURES


def other_request(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey, *names: str) -> bytes:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name) for name in names])
    built = x509.CertificateSigningRequestBuilder().subject_name(subject)
    return built.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def forged(name: str) -> bytes:
    """A request with somebody else's key in it: its signature does not hold."""
    one, other = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    der = x509.load_pem_x509_csr(request_pem(one, name)).public_bytes(serialization.Encoding.DER)
    keys = [
        key.public_key().public_bytes(
            serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint
        )
        for key in (one, other)
    ]
    assert keys[0] in der
    return x509.load_der_x509_csr(der.replace(keys[0], keys[1])).public_bytes(
        serialization.Encoding.PEM
    )


REQUESTS: dict[str, tuple[Callable[[], bytes], str]] = {
    "rubbish": (lambda: b"rubbish", "can't be read"),
    "other name": (lambda: request_pem(ec.generate_private_key(ec.SECP256R1()), "b"), "not for a"),
    "two names": (
        lambda: other_request(ec.generate_private_key(ec.SECP256R1()), "a", "b"),
        "not for a",
    ),
    "RSA": (
        lambda: other_request(rsa.generate_private_key(65537, 2048), "a"),
        "no key on P-256",
    ),
    "weak curve": (
        lambda: other_request(ec.generate_private_key(ec.SECP224R1()), "a"),
        "no key on P-256",
    ),
    "forged": (lambda: forged("a"), "not signed by its own key"),
}


@pytest.mark.parametrize("kind", REQUESTS)
def test_requests_that_get_no_certificate(ca: Authority, kind: str) -> None:
    make, said = REQUESTS[kind]
    with pytest.raises(UsageError, match=said):
        sign_request(ca, make(), "a", Role.AGENT)
    assert book.read(ca.folder) == []


def test_a_request_gets_the_role_that_the_authority_gives(ca: Authority, tmp_path: Path) -> None:
    """Whatever its subject says beside the name."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, "admin"),
            x509.NameAttribute(NameOID.COMMON_NAME, "a"),
        ]
    )
    asked = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(subject)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("b")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = sign_request(ca, asked.public_bytes(serialization.Encoding.PEM), "a", Role.AGENT)
    got = x509.load_pem_x509_certificate(pem)
    assert identity_of(got) == Identity(name="a", role=Role.AGENT)
    assert not got.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    names = got.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["a"]


# ---------------------------------------------------------------- bad input on the wire


def spoken(address: str, said: bytes) -> bytes:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    host, _, port = address.rpartition(":")
    with (
        socket.create_connection((host, int(port)), 60) as plain,
        context.wrap_socket(plain) as tls,
    ):
        answer = b""
        try:
            tls.sendall(said)
            while data := tls.recv(1 << 16):
                answer += data
        except OSError:
            pass
        return answer


def posted(body: bytes, length: int | str | None = None) -> bytes:
    size = len(body) if length is None else length
    return b"POST /enrol HTTP/1.0\r\nContent-Length: %s\r\n\r\n" % str(size).encode() + body


@pytest.mark.parametrize(
    ("said", "status"),
    [
        (posted(b"rubbish"), b"400"),
        (posted(b"\xff\xfe"), b"400"),
        (posted(b"{}"), b"400"),
        (posted(b'{"id":1,"secret":2,"request":3}'), b"400"),
        (posted(b'{"id":"x","secret":"\\u00e4","request":"x"}'), b"400"),
        (posted(b'{"id":"x","secret":"","request":"x"}'), b"403"),
        (posted(b"[" * 10_000), b"400"),
        (posted(b"x", MAX_BODY + 1), b"413"),
        (posted(b"x", "-1"), b"413"),
        (posted(b"x", "9" * 5000), b"413"),
        (b"POST /enrol HTTP/1.0\r\n\r\n", b"413"),
        (b"GET /ca.key HTTP/1.0\r\n\r\n", b"404"),
        (b"GET /../ca.key HTTP/1.0\r\n\r\n", b"404"),
        (b"GET /" + b"x" * 70_000 + b" HTTP/1.0\r\n\r\n", b"414"),
        (b"PUT /enrol HTTP/1.0\r\n\r\n", b"501"),
    ],
)
def test_nonsense_is_answered_and_has_no_effect(
    ca: Authority, tmp_path: Path, said: bytes, status: bytes
) -> None:
    token = tokens.create(ca, "node-a")
    with serving(ca) as address:
        answer = spoken(address, said)
        assert status in answer.split(b"\r\n")[0], answer[:200]
        assert b"PRIVATE" not in answer
        enrol(address, token, tmp_path / "tls")


def test_those_who_say_nothing_or_little_are_cut_off(ca: Authority, tmp_path: Path) -> None:
    """More connections than there is room for, silent or a byte at a time: none lives long."""
    with serving(ca, HASTE) as address:
        host, _, port = address.rpartition(":")
        silent = [
            socket.create_connection((host, int(port)), 60) for _ in range(2 * MAX_CONNECTIONS)
        ]
        deadline = time.monotonic() + 60
        ended = 0
        for sock in silent:
            with sock:
                try:
                    while time.monotonic() < deadline:
                        sock.sendall(b"\x16")
                        sock.settimeout(0.1)
                        try:
                            if not sock.recv(100):
                                break
                        except TimeoutError:
                            continue
                except OSError:
                    pass
                ended += time.monotonic() < deadline
        assert ended == len(silent)
        for attempt in range(50):  # the room of the last one may just be given back
            try:
                enrol(address, tokens.create(ca, "node-a"), tmp_path / "tls")
                break
            except MigrateError:
                assert attempt < 49
                time.sleep(0.2)


# ---------------------------------------------------------------- revocation


def test_revoked_by_name_or_serial_and_the_list_only_grows(ca: Authority, tmp_path: Path) -> None:
    files = {n: issue(ca, n, Role.OPERATOR, tmp_path) for n in ("olga", "otto", "oona")}
    again = issue(ca, "olga", Role.OPERATOR, tmp_path / "second")
    serial = {n: certificate_of(f).serial_number for n, f in files.items()}
    watched = Revocations(files["olga"])
    assert not watched
    assert len(revoke(ca, "olga")) == 2
    assert watched.is_revoked(serial["olga"])
    assert watched.is_revoked(certificate_of(again).serial_number)
    assert not watched.is_revoked(serial["otto"])
    revoke(ca, f"{serial['otto']:x}")
    revoke(ca, "olga")
    assert watched.is_revoked(serial["olga"])
    assert watched.is_revoked(serial["otto"])
    assert not watched.is_revoked(serial["oona"])
    with pytest.raises(UsageError, match="no certificate of 'nobody'"):
        revoke(ca, "nobody")


def test_a_list_that_can_not_be_used_leaves_the_old_one(ca: Authority, tmp_path: Path) -> None:
    files = issue(ca, "olga", Role.OPERATOR, tmp_path)
    issue(ca, "otto", Role.OPERATOR, tmp_path)
    serial = certificate_of(files).serial_number
    watched = Revocations(files)
    revoke(ca, "otto")
    older = ca.crl_path.read_bytes()
    revoke(ca, "olga")
    assert watched.is_revoked(serial)
    theirs = create_ca(tmp_path / "theirs")
    issue(theirs, "x", Role.VIEWER, tmp_path / "x")
    revoke(theirs, "x")
    for bad in (b"", b"rubbish", older, theirs.crl_path.read_bytes()):
        ca.crl_path.write_bytes(bad)
        assert watched.is_revoked(serial), bad[:20]
    for bad in (b"", theirs.crl_path.read_bytes()):
        ca.crl_path.write_bytes(bad)
        with pytest.raises(UsageError, match="revocation list"):
            Revocations(files)
    ca.crl_path.unlink()
    assert watched.is_revoked(serial)


def test_a_server_with_a_revoked_certificate(ca: Authority, tmp_path: Path) -> None:
    files = issue(ca, "node-b", Role.AGENT, tmp_path)
    ours = issue(ca, "node-a", Role.AGENT, tmp_path)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(files.cert, files.key)

    def serve(server: socket.socket) -> None:
        while True:
            try:
                peer, _ = server.accept()
                with context.wrap_socket(peer, server_side=True) as tls:
                    tls.recv(1)
            except OSError:
                return

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=serve, args=(server,))
        thread.start()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        refuse_revoked_server(address, "node-b", ours)
        issue(ca, "node-c", Role.AGENT, tmp_path)
        revoke(ca, "node-c")
        refuse_revoked_server(address, "node-b", ours)
        revoke(ca, "node-b")
        with pytest.raises(CertificateRejected, match="node-b was revoked"):
            open_channel(address, "node-b", ours)
        server.shutdown(socket.SHUT_RDWR)
        thread.join()
    assert make_request("x", tmp_path / "y")[0].exists()
