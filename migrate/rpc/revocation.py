"""Certificates that were revoked: ``ca.crl`` beside the ``ca`` file, read again when it changes.

``migrate ca revoke`` writes it; a copy of it belongs into the TLS folder of every agent and
client. gRPC's Python interface can't check a list in the handshake, so an agent looks at each
call, and at each message of a call that streams: a connection that was open before is no way
around it.
"""

from __future__ import annotations

import logging
import os
import socket
import ssl
import threading
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from migrate.errors import CertificateRejected, UsageError
from migrate.inventory import TlsFiles, split_address

logger = logging.getLogger(__name__)

NAME = "ca.crl"


class Revocations:
    """The serial numbers that are revoked now. Safe to use from several threads.

    A new list that can't be used (damaged, of another authority, older than the one at
    hand, or gone) leaves the one at hand in force.
    """

    def __init__(self, files: TlsFiles) -> None:
        """Raises UsageError if there is a list and it can't be used."""
        self._ca = Path(files.ca)
        self._path = self._ca.with_name(NAME)
        self._lock = threading.Lock()
        self._number = -1
        self._serials: frozenset[int] = frozenset()
        self._stamp = self._now()
        if self._stamp is not None:
            self._load()

    def is_revoked(self, serial: int) -> bool:
        """Whether the certificate of that serial number is revoked now."""
        with self._lock:
            stamp = self._now()
            if stamp != self._stamp:
                self._stamp = stamp
                try:
                    self._load()
                except UsageError as error:
                    logger.warning("%s; the list before it stays in force", error)
            return serial in self._serials

    def check(self, certificate: x509.Certificate, whose: str) -> None:
        """Raises CertificateRejected if *certificate* is revoked; *whose* is for the message."""
        if self.is_revoked(certificate.serial_number):
            raise CertificateRejected(
                f"the certificate of {whose} was revoked",
                advice="Enrol anew, if it should have a certificate at all.",
            )

    def __bool__(self) -> bool:
        """Whether anything is revoked."""
        self.is_revoked(0)
        return bool(self._serials)

    def _now(self) -> tuple[int, int] | None:
        try:
            stat = os.stat(self._path)
        except OSError:
            return None
        return stat.st_mtime_ns, stat.st_ino

    def _load(self) -> None:
        try:
            found = x509.load_pem_x509_crl(self._path.read_bytes())
            key = x509.load_pem_x509_certificate(self._ca.read_bytes()).public_key()
            number = found.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
        except (OSError, ValueError, x509.ExtensionNotFound) as error:
            raise UsageError(f"the revocation list {self._path} can't be used: {error}") from error
        if not isinstance(key, ec.EllipticCurvePublicKey) or not found.is_signature_valid(key):
            raise UsageError(f"the revocation list {self._path} is not by the authority beside it")
        if number < self._number:
            raise UsageError(f"the revocation list {self._path} is older than the one in force")
        self._number = number
        self._serials = frozenset(entry.serial_number for entry in found)


def refuse_revoked_server(address: str, name: str, files: TlsFiles, timeout: float = 5.0) -> None:
    """Raises CertificateRejected if what answers at ``host:port`` shows a revoked certificate.

    A handshake of its own, made only if anything is revoked, because gRPC does not tell a
    client which certificate it saw. What can't be reached is left to the real connection.
    """
    revoked = Revocations(files)
    if not revoked:
        return
    context = ssl.create_default_context(cafile=files.ca)
    context.load_cert_chain(files.cert, files.key)
    try:
        with (
            socket.create_connection(split_address(address), timeout) as plain,
            context.wrap_socket(plain, server_hostname=name) as tls,
        ):
            shown = tls.getpeercert(binary_form=True)
    except OSError:
        return
    if shown:
        revoked.check(x509.load_der_x509_certificate(shown), name)
