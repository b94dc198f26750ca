"""mTLS for gRPC: credentials from files, the peer's identity, channels that say why.

Every connection is mutual TLS; there is no plaintext mode. A client dials an address but
checks the certificate against the host's *name*, so that an address that went to another
machine is noticed.
"""

from __future__ import annotations

import logging
import os
import queue
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.x509.oid import NameOID

from migrate.errors import AgentUnreachable, CertificateRejected, UsageError
from migrate.inventory import TlsFiles
from migrate.model import Value
from migrate.rpc.ca import Role
from migrate.rpc.explain import check_dates, explain_failure
from migrate.rpc.revocation import refuse_revoked_server

logger = logging.getLogger(__name__)

Options: TypeAlias = Sequence[tuple[str, str | int]]

# A manifest has 16 bytes a chunk: 64 MiB are the digests of 1 TiB in chunks of 256 KiB.
MAX_MESSAGE = 64 << 20
OPTIONS: Options = (
    ("grpc.max_receive_message_length", MAX_MESSAGE),
    ("grpc.max_send_message_length", MAX_MESSAGE),
)
SERVER_OPTIONS: Options = (
    *OPTIONS,
    # Who connects and does not finish the handshake is gone after that; gRPC's own is 120 s.
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.max_concurrent_streams", 128),
)
CHANNEL_OPTIONS: Options = (
    *OPTIONS,
    # Agents are dialled directly; a proxy of the user's environment knows nothing of them.
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 5000),
)


class Identity(Value):
    """Who a certificate says the peer is: a host's or a person's name, and the role."""

    name: str
    role: Role


class Pem(Value):
    """One party's files, read."""

    ca: bytes
    cert: bytes
    key: bytes


def read(files: TlsFiles) -> Pem:
    """Read and check one party's files.

    Raises UsageError for a file that is missing, damaged, of another pair or readable by
    others; CertificateRejected for a certificate that is not valid at this time.
    """
    pem = Pem(ca=_bytes(files.ca), cert=_bytes(files.cert), key=_bytes(files.key))
    mode = Path(files.key).stat().st_mode
    if mode & 0o077:
        raise UsageError(
            f"the key {files.key} can be read by others (mode {mode & 0o777:04o})",
            advice=f"chmod 600 {files.key}; make a new pair if others could have read it.",
        )
    certificate = _certificate(files.cert, pem.cert)
    _certificate(files.ca, pem.ca)
    try:
        key = serialization.load_pem_private_key(pem.key, None)
    except (ValueError, TypeError) as error:
        raise UsageError(f"{files.key} has no usable private key") from error
    if key.public_key() != certificate.public_key():
        raise UsageError(f"{files.key} is not the key of {files.cert}")
    check_dates(certificate, files.cert)
    return pem


def _bytes(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UsageError(f"can't read {path}: {error.strerror}") from error


def _certificate(path: str, pem: bytes) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(pem)
    except ValueError as error:
        raise UsageError(f"{path} is not a PEM certificate") from error


# ---------------------------------------------------------------- server


class _Reloader:
    """Gives gRPC the certificate of each handshake: files that were replaced are re-read.

    Files that can't be used keep the ones in use: a rotation that is half done, or done
    wrong, ends no connection.
    """

    def __init__(self, files: TlsFiles) -> None:
        self.files = files
        self.stamp = self._stamp()
        self.initial = self._configuration()

    def _stamp(self) -> tuple[tuple[int, int], ...]:
        stats = [os.stat(p) for p in (self.files.ca, self.files.cert, self.files.key)]
        return tuple((s.st_mtime_ns, s.st_ino) for s in stats)

    def _configuration(self) -> grpc.ServerCertificateConfiguration:
        pem = read(self.files)
        return grpc.ssl_server_certificate_configuration([(pem.key, pem.cert)], pem.ca)

    def __call__(self) -> grpc.ServerCertificateConfiguration | None:
        try:
            stamp = self._stamp()
            if stamp == self.stamp:
                return None
            configuration = self._configuration()
        except Exception as error:  # gRPC would refuse every client from now on
            logger.warning("the new TLS files can't be used, the old ones stay: %s", error)
            return None
        self.stamp = stamp
        return configuration


def server_credentials(files: TlsFiles) -> grpc.ServerCredentials:
    """Credentials that want a client certificate and follow a rotation. Raises as read()."""
    read(files)
    reloader = _Reloader(files)
    return grpc.dynamic_ssl_server_credentials(
        reloader.initial,
        reloader,  # type: ignore[arg-type]  # the stub lacks None, which means no change
        require_client_authentication=True,
    )


def peer_certificate(context: grpc.ServicerContext) -> x509.Certificate:
    """What the caller showed in the handshake. Raises CertificateRejected."""
    chain = context.auth_context().get("x509_pem_cert")
    if not chain:
        raise CertificateRejected("the caller showed no certificate")
    return x509.load_pem_x509_certificate(bytes(next(iter(chain))))


def peer_identity(context: grpc.ServicerContext) -> Identity:
    """Who is calling. Raises CertificateRejected if the certificate names no role of ours."""
    return identity_of(peer_certificate(context))


def identity_of(certificate: x509.Certificate) -> Identity:
    """The name (CN) and role (OU) of a certificate. Raises CertificateRejected."""
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    units = certificate.subject.get_attributes_for_oid(NameOID.ORGANIZATIONAL_UNIT_NAME)
    if len(names) != 1 or len(units) != 1:
        raise CertificateRejected("the certificate's subject has not one CN and one OU")
    try:
        return Identity(name=str(names[0].value), role=Role(str(units[0].value)))
    except ValueError as error:
        raise CertificateRejected(f"the certificate's role is unknown: {error}") from error


# ---------------------------------------------------------------- client


def open_channel(address: str, name: str, files: TlsFiles, options: Options = ()) -> grpc.Channel:
    """A channel to the agent of host *name* at ``host:port``; connects when it is used.

    Raises as read(), and CertificateRejected if what answers was revoked. A call that fails
    with UNAVAILABLE is told apart by explain_failure().
    """
    pem = read(files)
    refuse_revoked_server(address, name, files)
    credentials = grpc.ssl_channel_credentials(pem.ca, pem.key, pem.cert)
    target: Options = (("grpc.ssl_target_name_override", name),)
    return grpc.secure_channel(address, credentials, (*CHANNEL_OPTIONS, *target, *options))


def connect(
    address: str, name: str, files: TlsFiles, timeout: float = 10.0, options: Options = ()
) -> grpc.Channel:
    """As open_channel(), but connected: fails at the first refusal, not at *timeout* (s).

    Raises AgentUnreachable or CertificateRejected with the reason.
    """
    channel = open_channel(address, name, files, options)
    states: queue.SimpleQueue[grpc.ChannelConnectivity] = queue.SimpleQueue()
    report = states.put
    channel.subscribe(report, try_to_connect=True)
    deadline = time.monotonic() + timeout
    try:
        while (
            state := states.get(timeout=max(0.0, deadline - time.monotonic()))
        ) != grpc.ChannelConnectivity.READY:
            if state == grpc.ChannelConnectivity.TRANSIENT_FAILURE:
                raise explain_failure(address, name, files, timeout)
    except queue.Empty as error:
        channel.close()
        raise AgentUnreachable(
            f"{name} at {address} did not answer within {timeout:g} s"
        ) from error
    except BaseException:
        channel.close()
        raise
    channel.unsubscribe(report)
    return channel
