"""How a host gets its first certificate: its key is made here and never leaves.

The authority's certificate is fetched without trust and believed only if it has the
fingerprint that the token names; everything after that is checked against it.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import ssl
from pathlib import Path
from typing import TypeVar

import msgspec
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from migrate.decode import from_json
from migrate.errors import (
    AgentUnreachable,
    CertificateRejected,
    ProtocolMismatch,
    UsageError,
    by_reason,
)
from migrate.inventory import TlsFiles, split_address
from migrate.rpc.ca import ENROLMENT_NAME, request_pem, write_file
from migrate.rpc.enrolment import EnrolAnswer, EnrolRequest
from migrate.rpc.errors import WireError
from migrate.rpc.revocation import NAME as CRL_NAME
from migrate.rpc.tls import identity_of
from migrate.rpc.tokens import Token

MAX_ANSWER = 16 << 20  # bytes; the revocation list is the largest part
T = TypeVar("T")


def enrol(address: str, token: Token, folder: str | Path, timeout: float = 20.0) -> TlsFiles:
    """Enrol this host with the authority at ``host:port``: ``ca.crt``, ``NAME.crt``, ``NAME.key``.

    Files of an earlier enrolment are replaced, each at once; a running agent follows.
    Raises AgentUnreachable, CertificateRejected, PermissionRefused, UsageError.
    """
    ca = _authority(address, token, timeout)
    key = ec.generate_private_key(ec.SECP256R1())
    request = EnrolRequest(
        id=token.id,
        secret=base64.b64encode(token.secret).decode(),
        request=request_pem(key, token.name).decode(),
    )
    context = ssl.create_default_context(cadata=ca.public_bytes(serialization.Encoding.DER))
    status, data = _ask(address, context, timeout, "POST", "/enrol", msgspec.json.encode(request))
    if status != 200:
        error = _read(data, WireError)
        raise by_reason(error.reason)(error.message, advice=error.advice)
    answer = _read(data, EnrolAnswer)
    _check(answer.certificate.encode(), ca, key, token.name)
    return _write(Path(folder), token.name, ca, key, answer)


def _authority(address: str, token: Token, timeout: float) -> x509.Certificate:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # the fingerprint decides, see below
    status, data = _ask(address, context, timeout, "GET", "/ca.crt")
    try:
        certificate = x509.load_pem_x509_certificate(data)
    except ValueError as error:
        raise ProtocolMismatch(
            f"what answers at {address} is no authority of migrate (status {status})"
        ) from error
    der = certificate.public_bytes(serialization.Encoding.DER)
    if hashlib.sha256(der).hexdigest() != token.fingerprint:
        raise CertificateRejected(
            f"what answers at {address} is not the authority that made the token",
            advice="Check the address. If it is right, somebody is in between.",
        )
    return certificate


def _ask(
    address: str,
    context: ssl.SSLContext,
    timeout: float,
    method: str,
    path: str,
    body: bytes | None = None,
) -> tuple[int, bytes]:
    host, port = split_address(address)
    connection = http.client.HTTPConnection(host, port, timeout=timeout)
    try:
        connection.connect()
        # The name is the authority's, whatever address leads to it.
        connection.sock = context.wrap_socket(connection.sock, server_hostname=ENROLMENT_NAME)
        connection.request(method, path, body)
        answer = connection.getresponse()
        return answer.status, answer.read(MAX_ANSWER)
    except ssl.SSLCertVerificationError as error:
        raise CertificateRejected(
            f"what answers at {address} is not the authority that made the token:"
            f" {error.verify_message}"
        ) from error
    except (OSError, http.client.HTTPException) as error:
        raise AgentUnreachable(
            f"no enrolment service answers at {address}: {error}",
            advice="Is `migrate ca serve` running there, and its port reachable?",
        ) from error
    finally:
        connection.close()


def _read(data: bytes, kind: type[T]) -> T:
    try:
        return from_json(data, kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ProtocolMismatch("the enrolment service's answer can't be read") from error


def _check(pem: bytes, ca: x509.Certificate, key: ec.EllipticCurvePrivateKey, name: str) -> None:
    try:
        certificate = x509.load_pem_x509_certificate(pem)
        certificate.verify_directly_issued_by(ca)
        ours = (
            certificate.public_key() == key.public_key() and identity_of(certificate).name == name
        )
    except (ValueError, TypeError, InvalidSignature) as error:
        raise CertificateRejected(f"the new certificate is not the authority's: {error}") from error
    if not ours:
        raise CertificateRejected("the new certificate is not for our key and name")


def _write(
    folder: Path, name: str, ca: x509.Certificate, key: ec.EllipticCurvePrivateKey, got: EnrolAnswer
) -> TlsFiles:
    files = TlsFiles(
        ca=str(folder / "ca.crt"), cert=str(folder / f"{name}.crt"), key=str(folder / f"{name}.key")
    )
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_file(Path(files.ca), ca.public_bytes(serialization.Encoding.PEM), 0o644)
        if got.crl:
            write_file(folder / CRL_NAME, got.crl.encode(), 0o644)
        write_file(Path(files.key), private, 0o600)
        write_file(Path(files.cert), got.certificate.encode(), 0o644)
    except OSError as error:
        raise UsageError(f"can't write to {folder}: {error.strerror}") from error
    return files
