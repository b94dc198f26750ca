"""A certificate authority of one's own: who may be an agent, who an operator.

Every connection of the product is mTLS, in the demo too, which makes a throwaway
authority. A certificate's CN is the name of the host or person, its OU the role; an
agent's SANs are its host name and addresses. Keys are ECDSA on P-256, which gRPC's
BoringSSL, Python's ssl and every TLS 1.3 peer accept.

A key need not be made here: ``make_request`` makes it where it stays, ``sign_request``
answers with a certificate. What the request asks for beside its key counts for nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import os
import tempfile
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from migrate.errors import UsageError
from migrate.inventory import HOST_NAME, TlsFiles
from migrate.rpc import book

CA_LIFETIME = timedelta(days=3650)
LIFETIME = timedelta(days=365)
# Hosts' clocks differ; a certificate is valid a little before it was made.
CLOCK_SKEW = timedelta(minutes=5)
# What `migrate ca serve` calls itself. No other certificate gets this name, so that no host can
# pose as the authority towards one that enrols.
ENROLMENT_NAME = "enrolment.migrate.invalid"


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
        self.folder = folder
        self.path = folder / "ca.crt"
        self.crl_path = folder / "ca.crl"

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the certificate, hexadecimal: by this a newcomer knows the authority."""
        return self.certificate.fingerprint(hashes.SHA256()).hex()


def create_ca(folder: str | Path, name: str = "migrate", now: datetime | None = None) -> Authority:
    """Make an authority: ``ca.crt`` and ``ca.key`` in *folder* (made if missing).

    Raises UsageError if the folder has one already: certificates that were issued would
    all become worthless.
    """
    base = Path(folder)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, checked_name(name))])
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
        write_file(base / "ca.key", _key_pem(key), 0o600, replace=False)
        write_file(base / "ca.crt", _pem(certificate), 0o644, replace=False)
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
    certificate = _signed(ca, key.public_key(), name, role, hosts, lifetime, now)
    files = TlsFiles(ca=str(ca.path), cert=str(base / f"{name}.crt"), key=str(base / f"{name}.key"))
    try:
        base.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_file(Path(files.key), _key_pem(key), 0o600)
        write_file(Path(files.cert), _pem(certificate), 0o644)
    except OSError as error:
        raise UsageError(f"can't write a certificate to {base}: {error.strerror}") from error
    return files


# ---------------------------------------------------------------- requests


def make_request(name: str, folder: str | Path) -> tuple[Path, Path]:
    """Make ``NAME.key``, which stays where it is made, and ``NAME.csr`` for an authority.

    Raises UsageError, also if there is a key of that name already.
    """
    base = Path(folder)
    key = ec.generate_private_key(ec.SECP256R1())
    paths = base / f"{checked_name(name)}.key", base / f"{name}.csr"
    try:
        base.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_file(paths[0], _key_pem(key), 0o600, replace=False)
        write_file(paths[1], request_pem(key, name), 0o644)
    except FileExistsError as error:
        raise UsageError(
            f"there is a key already: {paths[0]}",
            advice="Move it away if it is not used any more, or choose another folder.",
        ) from error
    except OSError as error:
        raise UsageError(f"can't write to {base}: {error.strerror}") from error
    return paths


def request_pem(key: ec.EllipticCurvePrivateKey, name: str) -> bytes:
    """A certificate signing request (PKCS #10, PEM) for *name*."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, checked_name(name))])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject)
    return request.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def sign_request(
    ca: Authority,
    request: bytes,
    name: str,
    role: Role,
    *,
    hosts: Sequence[str] = (),
    lifetime: timedelta = LIFETIME,
    now: datetime | None = None,
) -> bytes:
    """The certificate (PEM) for the key of a PEM *request*; *name* must be what it asks for.

    Raises UsageError for a request that can't be read, is of another name, proves no
    possession of its key, or has a key of another kind than P-256 and P-384.
    """
    key = key_of_request(request, name)
    return _pem(_signed(ca, key, name, role, hosts, lifetime, now))


def key_of_request(request: bytes, name: str) -> ec.EllipticCurvePublicKey:
    """The key of a PEM *request* for *name*. Raises UsageError, see ``sign_request``."""
    try:
        csr = x509.load_pem_x509_csr(request)
        asked = [a.value for a in csr.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
        proven = csr.is_signature_valid
        key = csr.public_key()
    except Exception as error:  # of many kinds: what it holds is anybody's
        raise UsageError("the certificate signing request can't be read") from error
    if not proven:
        raise UsageError("the certificate signing request is not signed by its own key")
    if asked != [name]:
        raise UsageError(f"the certificate signing request is not for {name}")
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name not in (
        "secp256r1",
        "secp384r1",
    ):
        raise UsageError("the certificate signing request has no key on P-256 or P-384")
    return key


def _signed(
    ca: Authority,
    key: ec.EllipticCurvePublicKey,
    name: str,
    role: Role,
    hosts: Sequence[str],
    lifetime: timedelta,
    now: datetime | None,
) -> x509.Certificate:
    """A certificate that stands in the authority's book. Raises UsageError."""
    subject = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, Role(role).value),
            x509.NameAttribute(NameOID.COMMON_NAME, checked_name(name)),
        ]
    )
    purposes = [ExtendedKeyUsageOID.CLIENT_AUTH]
    if role == Role.AGENT:
        purposes.append(ExtendedKeyUsageOID.SERVER_AUTH)
    certificate = (
        _builder(subject, ca.certificate.subject, key, lifetime, now)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(), critical=True)
        .add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
        .add_extension(alternative_names(name, hosts), critical=False)
        .add_extension(_issuer_key(ca), critical=False)
        .sign(ca.key, hashes.SHA256())
    )
    issued = book.Issued(
        serial=f"{certificate.serial_number:x}",
        name=name,
        role=Role(role).value,
        until=certificate.not_valid_after_utc,
    )
    try:
        book.note(ca.folder, issued)
    except OSError as error:
        raise UsageError(f"can't write to {ca.folder}: {error.strerror}") from error
    return certificate


def enrolment_pair(ca: Authority) -> tuple[bytes, bytes]:
    """Certificate and key (PEM) for ``migrate ca serve``: no role, so no agent takes it."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, ENROLMENT_NAME)])
    names = x509.SubjectAlternativeName([x509.DNSName(ENROLMENT_NAME)])
    purpose = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
    certificate = (
        _builder(subject, ca.certificate.subject, key.public_key(), LIFETIME, None)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(), critical=True)
        .add_extension(purpose, critical=False)
        .add_extension(names, critical=False)
        .add_extension(_issuer_key(ca), critical=False)
        .sign(ca.key, hashes.SHA256())
    )
    return _pem(certificate), _key_pem(key)


# ---------------------------------------------------------------- revocation


def revoke(ca: Authority, name_or_serial: str, now: datetime | None = None) -> list[str]:
    """Revoke every certificate of a name, or the one of a serial number (hexadecimal).

    Writes ``ca.crl``. Returns the serial numbers; revoking again is fine. Raises UsageError
    if the book has no such certificate.
    """
    found = [
        issued.serial
        for issued in book.read(ca.folder)
        if name_or_serial in (issued.name, issued.serial)
    ]
    if not found:
        raise UsageError(
            f"no certificate of {name_or_serial!r} was issued by the authority in {ca.folder}",
            advice=f"{ca.folder / book.NAME} lists all that were.",
        )
    start = now if now is not None else datetime.now(UTC)
    with _locked(ca.folder):
        number, entries = _revoked_before(ca)
        known = {entry.serial_number for entry in entries}
        entries += [
            x509.RevokedCertificateBuilder()
            .serial_number(int(serial, 16))
            .revocation_date(start)
            .build()
            for serial in found
            if int(serial, 16) not in known
        ]
        crl = (
            x509.CertificateRevocationListBuilder(revoked_certificates=entries)
            .issuer_name(ca.certificate.subject)
            .last_update(start - CLOCK_SKEW)
            .next_update(start + CA_LIFETIME)
            .add_extension(x509.CRLNumber(number + 1), critical=False)
            .add_extension(_issuer_key(ca), critical=False)
            .sign(ca.key, hashes.SHA256())
        )
        try:
            write_file(ca.crl_path, crl.public_bytes(serialization.Encoding.PEM), 0o644)
        except OSError as error:
            raise UsageError(f"can't write {ca.crl_path}: {error.strerror}") from error
    return found


def _revoked_before(ca: Authority) -> tuple[int, list[x509.RevokedCertificate]]:
    try:
        old = x509.load_pem_x509_crl(ca.crl_path.read_bytes())
        number = old.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
    except FileNotFoundError:
        return 0, []
    except (ValueError, x509.ExtensionNotFound) as error:
        raise UsageError(f"{ca.crl_path} can't be read: {error}") from error
    return number, list(old)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Two that revoke at once do it one after the other."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


# ---------------------------------------------------------------- parts


def checked_name(name: str) -> str:
    """*name*, if it can stand in a certificate. Raises UsageError."""
    if not HOST_NAME.fullmatch(name) or name == ENROLMENT_NAME:
        raise UsageError(
            f"{name!r} can't be the name in a certificate",
            advice="Use 1 to 64 letters, digits, dots, dashes and underscores.",
        )
    return name


def alternative_names(name: str, hosts: Sequence[str]) -> x509.SubjectAlternativeName:
    """The SAN: host names and addresses, each once. Raises UsageError."""
    names: list[x509.GeneralName] = []
    for host in dict.fromkeys((name, *hosts)):
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(host)))
        except ValueError:
            names.append(x509.DNSName(checked_name(host)))
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


def write_file(path: Path, data: bytes, mode: int, *, replace: bool = True) -> None:
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
