"""Enrolment tokens: one host may get one certificate, once, within minutes.

A token's text is ``migrate1:NAME:ID:SECRET:FINGERPRINT``. The authority keeps the SHA-256 of
the secret alone (32 random bytes, so that a plain hash suffices) in ``tokens/ID.json``. The
fingerprint is that of the authority's certificate, by which the newcomer knows whom it talks
to, as with the discovery hash of kubeadm. ``tokens/ID.used`` is made, and on the disk, before
a certificate is signed: a crash may waste a token, never let it be used twice.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec

from migrate.decode import from_json
from migrate.errors import PermissionRefused, UsageError
from migrate.inventory import HOST_NAME
from migrate.model import Value
from migrate.rpc.ca import Authority, alternative_names

FOLDER = "tokens"
LIFETIME = timedelta(minutes=15)
SECRET_BYTES = 32
_ID = re.compile(r"[0-9a-f]{16}")
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")


class Token(Value):
    """A token as its bearer has it. Never print or log one."""

    name: str
    id: str
    secret: bytes
    fingerprint: str

    def text(self) -> str:
        """What is handed to the host."""
        secret = base64.urlsafe_b64encode(self.secret).rstrip(b"=").decode()
        return ":".join(("migrate1", self.name, self.id, secret, self.fingerprint))

    def __repr__(self) -> str:
        return f"Token(name={self.name!r}, id={self.id!r})"


class TokenRecord(Value):
    """A token as the authority has it. ``hosts`` go into the certificate's SAN."""

    id: str
    digest: str
    name: str
    hosts: tuple[str, ...]
    expires: datetime


def parse(text: str) -> Token:
    """Read a token. Raises UsageError, which does not repeat it."""
    parts = text.strip().split(":")
    if len(parts) != 5 or parts[0] != "migrate1":
        raise UsageError("this is not an enrolment token", advice="`migrate ca token` makes one.")
    _, name, id_, secret, fingerprint = parts
    try:
        raw = base64.urlsafe_b64decode(secret + "=" * (-len(secret) % 4))
    except ValueError:
        raw = b""
    valid = HOST_NAME.fullmatch(name) and _ID.fullmatch(id_) and _FINGERPRINT.fullmatch(fingerprint)
    if not valid or len(raw) != SECRET_BYTES:
        raise UsageError("the enrolment token is damaged", advice="Copy it whole.")
    return Token(name=name, id=id_, secret=raw, fingerprint=fingerprint)


def create(
    ca: Authority,
    name: str,
    hosts: tuple[str, ...] = (),
    *,
    lifetime: timedelta = LIFETIME,
    now: datetime | None = None,
) -> Token:
    """A token for the host *name*, on the authority's record. Raises UsageError."""
    alternative_names(name, hosts)  # raises now what would be raised at the enrolment
    secret = secrets.token_bytes(SECRET_BYTES)
    record = TokenRecord(
        id=secrets.token_hex(8),
        digest=_digest(secret),
        name=name,
        hosts=hosts,
        expires=(now if now is not None else datetime.now(UTC)) + lifetime,
    )
    folder = ca.folder / FOLDER
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        _create(folder / f"{record.id}.json", msgspec.json.encode(record))
    except OSError as error:
        raise UsageError(f"can't write to {folder}: {error.strerror}") from error
    return Token(name=name, id=record.id, secret=secret, fingerprint=ca.fingerprint)


def redeem(
    ca: Authority,
    id_: str,
    secret: bytes,
    check: Callable[[TokenRecord], None] = lambda _record: None,
    now: datetime | None = None,
) -> TokenRecord:
    """Use a token up. *check* may raise before that, and then it is not used up.

    Raises PermissionRefused; who does not know the secret learns nothing else.
    """
    folder = ca.folder / FOLDER
    record = _record(folder, id_)
    digest = record.digest if record is not None else _digest(b"")
    if not hmac.compare_digest(_digest(secret), digest) or record is None:
        raise _refused("is not known")
    if (now if now is not None else datetime.now(UTC)) > record.expires:
        raise _refused(f"expired at {record.expires:%Y-%m-%d %H:%M} UTC")
    if (folder / f"{id_}.used").exists():
        raise _refused("was used before")
    check(record)
    try:
        _create(folder / f"{id_}.used", b"")
    except FileExistsError:
        raise _refused("was used before") from None
    return record


def _refused(why: str) -> PermissionRefused:
    return PermissionRefused(
        f"the enrolment token {why}", advice="Make another one by `migrate ca token`."
    )


def _record(folder: Path, id_: str) -> TokenRecord | None:
    if not _ID.fullmatch(id_):  # it becomes part of a path
        return None
    try:
        return from_json((folder / f"{id_}.json").read_bytes(), TokenRecord)
    except (OSError, msgspec.DecodeError):
        return None


def _digest(secret: bytes) -> str:
    return hashlib.sha256(secret).hexdigest()


def _create(path: Path, data: bytes) -> None:
    """A new file, on the disk with its name when this returns. Raises FileExistsError."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, data)
        os.fsync(fd)
    finally:
        os.close(fd)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
