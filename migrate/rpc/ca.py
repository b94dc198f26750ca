"""A certificate authority of one's own: who may be an agent, who an operator.

Every connection of the product is mTLS, in the demo too, which makes a throwaway
authority. A certificate's CN is the name of the host or person, its OU the role; an
agent's SANs are its host name and addresses. Keys are ECDSA on P-256, which gRPC's
BoringSSL, Python's ssl and every TLS 1.3 peer accept.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from migrate.errors import UsageError
from migrate.inventory import HOST_NAME, TlsFiles

CA_LIFETIME = timedelta(days=3650)
LIFETIME = timedelta(days=365)
# Hosts' clocks differ; a certificate is valid a little before it was made.
CLOCK_SKEW = timedelta(minutes=5)


class Role(StrEnum):
    """What a certificate allows: agents talk to agents, the others are clients."""

    AGENT = "agent"
    VIEWER = "viewer"
    OPERATOR = "operator"
    ADMIN = "admin"


class Authority:
    """An authority's certificate and key, in memory. See create_ca() and load_ca()."""

    def __init__(
        self, folder: Path, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey
    ) -> None:
        self.certificate = certificate
        self.key = key
        self.path = folder / "ca.crt"


def create_ca(folder: str | Path, name: str = "migrate", now: datetime | None = None) -> Authority:
    """Make an authority: ``ca.crt`` and ``ca.key`` in *folder* (made if missing).

    Raises UsageError if the folder has one already: certificates that were issued would
    all become worthless.
    """
    base = Path(folder)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, _checked(name))])
    key = ec.generate_private_key(ec.SECP256R1())
    usage = _key_usage(key_cert_sign=True, crl_sign=True, digital_signature=False)
    certificate = (
        _builder(subject, subject, key.public_key(), CA_LIFETIME, now)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .sign(key, hashes.SHA256())
    )
    try:
        base.mkdir(parents=True, exist_ok=True, mode=0o700)
        _write(base / "ca.key", _key_pem(key), 0o600, replace=False)
        _write(base / "ca.crt", _pem(certificate), 0o644, replace=False)
    except FileExistsError as error:
        raise UsageError(
            f"{base} has an authority already: {error.filename2 or error.filename}",
            advice="Choose another folder, or move the old authority away if it is not used.",
        ) from error
    except OSError as error:
        raise UsageError(f"can't write an authority to {base}: {error.strerror}") from error
    return Authority(base, certificate, key)


def load_ca(folder: str | Path) -> Authority:
    """The authority of *folder*. Raises UsageError if it is missing, damaged or mismatched."""
    base = Path(folder)
    try:
        certificate = x509.load_pem_x509_certificate((base / "ca.crt").read_bytes())
        key = serialization.load_pem_private_key((base / "ca.key").read_bytes(), None)
    except OSError as error:
        raise UsageError(f"no authority in {base}: {error.strerror}: {error.filename}") from error
    except (ValueError, TypeError) as error:
        raise UsageError(f"the authority in {base} can't be read: {error}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise UsageError(f"the authority in {base} has no elliptic curve key")
    if key.public_key() != certificate.public_key():
        raise UsageError(f"{base}/ca.key is not the key of {base}/ca.crt")
    return Authority(base, certificate, key)


def issue(
    ca: Authority,
    name: str,
    role: Role,
    folder: str | Path,
    *,
    hosts: Sequence[str] = (),
    lifetime: timedelta = LIFETIME,
    now: datetime | None = None,
) -> TlsFiles:
    """Make a key and a certificate for *name*: ``NAME.crt``, ``NAME.key`` in *folder*.

    *hosts* are further host names and IP addresses for the SAN, which always has *name*.
    An earlier pair of the same name is replaced, each file at once. Raises UsageError.
    """
    base = Path(folder)
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, Role(role).value),
            x509.NameAttribute(NameOID.COMMON_NAME, _checked(name)),
        ]
    )
    purposes = [ExtendedKeyUsageOID.CLIENT_AUTH]
    if role == Role.AGENT:
        purposes.append(ExtendedKeyUsageOID.SERVER_AUTH)
    issuer = ca.certificate.subject
    certificate = (
        _builder(subject, issuer, key.public_key(), lifetime, now)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(), critical=True)
        .add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
        .add_extension(_alternative_names(name, hosts), critical=False)
        .add_extension(_issuer_key(ca), critical=False)
        .sign(ca.key, hashes.SHA256())
    )
    files = TlsFiles(ca=str(ca.path), cert=str(base / f"{name}.crt"), key=str(base / f"{name}.key"))
    try:
        base.mkdir(parents=True, exist_ok=True, mode=0o700)
        _write(Path(files.key), _key_pem(key), 0o600)
        _write(Path(files.cert), _pem(certificate), 0o644)
    except OSError as error:
        raise UsageError(f"can't write a certificate to {base}: {error.strerror}") from error
    return files


def _checked(name: str) -> str:
    if not HOST_NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} can't be the name in a certificate",
            advice="Use 1 to 64 letters, digits, dots, dashes and underscores.",
        )
    return name


def _alternative_names(name: str, hosts: Sequence[str]) -> x509.SubjectAlternativeName:
    names: list[x509.GeneralName] = []
    for host in dict.fromkeys((name, *hosts)):
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(host)))
        except ValueError:
            names.append(x509.DNSName(_checked(host)))
    return x509.SubjectAlternativeName(names)


def _issuer_key(ca: Authority) -> x509.AuthorityKeyIdentifier:
    # Tells authorities of the same name apart, so that a peer can say which one it misses.
    public_key = ca.certificate.public_key()
    assert isinstance(public_key, ec.EllipticCurvePublicKey)
    return x509.AuthorityKeyIdentifier.from_issuer_public_key(public_key)


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public_key: ec.EllipticCurvePublicKey,
    lifetime: timedelta,
    now: datetime | None,
) -> x509.CertificateBuilder:
    start = now if now is not None else datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start - CLOCK_SKEW)
        .not_valid_after(start + lifetime)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )


def _key_usage(
    *, digital_signature: bool = True, key_cert_sign: bool = False, crl_sign: bool = False
) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        encipher_only=False,
        decipher_only=False,
    )


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _write(path: Path, data: bytes, mode: int, *, replace: bool = True) -> None:
    """Write a file that is either complete or not there, and never readable by others.

    mkstemp() creates with mode 0600; link() instead of rename() refuses to replace.
    """
    fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(fd)
            os.fchmod(fd, mode)
        if replace:
            os.replace(temporary, path)
        else:
            os.link(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
