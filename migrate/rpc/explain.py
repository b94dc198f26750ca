"""Why a gRPC channel does not connect.

gRPC says UNAVAILABLE for a closed port and for every refusal of TLS, with details that
change between releases. A second, plain TLS handshake with the same files tells them
apart, because Python's ssl keeps OpenSSL's verification code.
"""

from __future__ import annotations

import socket
import ssl
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509

from migrate.errors import AgentUnreachable, CertificateRejected, MigrateError, UsageError
from migrate.inventory import TlsFiles, split_address

# X509_V_ERR_* of OpenSSL's x509_vfy.h.
NOT_YET_VALID, EXPIRED, HOSTNAME_MISMATCH, IP_ADDRESS_MISMATCH = 9, 10, 62, 64

# What an HTTP/2 client says first (RFC 9113, 3.4), with empty SETTINGS. A server that
# accepted our certificate answers with its own SETTINGS.
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\x04\0\0\0\0\0"

# The peer closed. Which of them Python raises for the same event changed within 3.11.
ENDED = (ConnectionError, ssl.SSLEOFError, ssl.SSLZeroReturnError)


def explain_failure(address: str, name: str, files: TlsFiles, timeout: float = 5.0) -> MigrateError:
    """The error that says why the agent of host *name* at ``host:port`` can't be reached.

    Returned, not raised: AgentUnreachable, CertificateRejected, or UsageError for an
    address that is none. Takes up to *timeout* seconds for each step.
    """
    try:
        target = split_address(address)
        context = _context(files)
    except UsageError as error:
        return error
    try:
        with socket.create_connection(target, timeout) as plain:
            explained = _explain_tls(plain, context, f"{name} at {address}", name, files)
        # An agent that was just ending closes too: then nobody listens any more.
        socket.create_connection(target, timeout).close()
        return explained
    except TimeoutError:
        return AgentUnreachable(f"{name} at {address} did not answer within {timeout:g} s")
    except socket.gaierror as error:
        return AgentUnreachable(
            f"the address of {name}, {address}, does not resolve: {error.strerror}",
            advice="Check the host's address in the inventory and the name service.",
        )
    except OSError as error:
        return AgentUnreachable(f"no agent of {name} listens at {address}: {error.strerror}")


def _context(files: TlsFiles) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=files.ca)
        context.load_cert_chain(files.cert, files.key)
    except OSError as error:  # ssl.SSLError is one
        raise UsageError(f"our TLS files ({files.cert}) can't be used: {error}") from error
    context.set_alpn_protocols(["h2"])
    return context


def _explain_tls(
    plain: socket.socket, context: ssl.SSLContext, peer: str, name: str, files: TlsFiles
) -> MigrateError:
    try:
        tls = context.wrap_socket(plain, server_hostname=name)
    except ssl.SSLCertVerificationError as error:
        return CertificateRejected(_their_certificate(error, peer, name, files))
    except ENDED:
        return AgentUnreachable(f"{peer} closed the connection before it showed a certificate")
    except ssl.SSLError as error:
        if "ALERT" in (error.reason or ""):
            return CertificateRejected(_our_certificate(peer, files, error.reason))
        return AgentUnreachable(
            f"what answers for {peer} does not speak TLS",
            advice="Check the port in the inventory: another service listens there.",
        )
    with tls:
        return _explain_http2(tls, peer, files)


def _explain_http2(tls: ssl.SSLSocket, peer: str, files: TlsFiles) -> MigrateError:
    """With TLS 1.3 a client is done before the server has seen its certificate.

    gRPC's server then closes without an alert, before its first byte.
    """
    try:
        tls.sendall(PREFACE)
        answer = tls.recv(1)
    except ENDED:
        answer = b""
    except ssl.SSLError as error:
        return CertificateRejected(_our_certificate(peer, files, error.reason))
    if not answer:
        return CertificateRejected(_our_certificate(peer, files, None))
    if tls.selected_alpn_protocol() != "h2":
        return AgentUnreachable(
            f"what answers for {peer} speaks TLS but not HTTP/2",
            advice="Check the port in the inventory: another service listens there.",
        )
    return AgentUnreachable(f"{peer} did not accept the call in time, though it answers now")


def _their_certificate(
    error: ssl.SSLCertVerificationError, peer: str, name: str, files: TlsFiles
) -> str:
    if error.verify_code == EXPIRED:
        return f"the certificate of {peer} has expired"
    if error.verify_code == NOT_YET_VALID:
        return f"the certificate of {peer} is not valid yet: compare the clocks"
    if error.verify_code in (HOSTNAME_MISMATCH, IP_ADDRESS_MISMATCH):
        return f"the certificate of {peer} was not issued for the name {name}"
    return (
        f"the certificate of {peer} was not issued by the authority in {files.ca}"
        f" ({error.verify_message})"
    )


def _our_certificate(peer: str, files: TlsFiles, alert: str | None) -> str:
    said = f"{peer} rejected our certificate {files.cert}"
    if alert:
        said += f" ({alert.lower().replace('_', ' ')})"
    try:
        ours = x509.load_pem_x509_certificate(Path(files.cert).read_bytes())
        check_dates(ours, files.cert)
        ours.verify_directly_issued_by(x509.load_pem_x509_certificate(Path(files.ca).read_bytes()))
    except CertificateRejected as error:
        return f"{said}: {error}"
    except Exception:  # of many kinds, and each means just this
        return f"{said}: it was not issued by the authority in {files.ca}"
    return f"{said}: the agent trusts another authority, or its clock is wrong"


def check_dates(certificate: x509.Certificate, path: str) -> None:
    """Raises CertificateRejected if *certificate* (of the file *path*) is not valid now."""
    now = datetime.now(UTC)
    start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now > end:
        raise CertificateRejected(f"our own certificate {path} expired at {end:%Y-%m-%d %H:%M} UTC")
    if now < start:
        raise CertificateRejected(
            f"our own certificate {path} is valid only from {start:%Y-%m-%d %H:%M} UTC on",
            advice="Set this host's clock.",
        )
