"""The inventory: which hosts there are, where their agents listen, our certificate.

A TOML file, ``~/.config/migrate/hosts.toml`` unless ``--inventory`` or
``$MIGRATE_INVENTORY`` names another::

    [tls]
    ca = "ca.crt"            # paths are relative to this file
    cert = "operator.crt"
    key = "operator.key"

    [hosts.node-a]           # the name must be the one in the agent's certificate
    address = "node-a.example:7601"
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from migrate.decode import convert
from migrate.errors import UnknownHost, UsageError
from migrate.model import Value

ENVIRONMENT = "MIGRATE_INVENTORY"
ADVICE = "See the inventory's form in README.md."
# A host's name is the CN of its certificate, at most 64 characters there.
HOST_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,62}[A-Za-z0-9])?")

# What msgspec says, in the words of TOML.
PHRASES = (
    ("Object missing required field", "missing key"),
    ("Object contains unknown field", "unknown key"),
    ("Expected `str`", "expected a string"),
    ("Expected `object`", "expected a table"),
)

T = TypeVar("T")


class TlsFiles(Value):
    """Paths of one party's certificate, key and the authority it trusts (all PEM)."""

    ca: str
    cert: str
    key: str


class HostEntry(Value):
    """One host as the file has it.

    ``address``: "host:port" of its agent; an IPv6 address in brackets. ``peer_address``:
    what other agents dial, where that differs (we come through a forwarded port).
    """

    address: str
    peer_address: str = ""


class Host(Value):
    """A host that can be dialled: *name* must be in its agent's certificate."""

    name: str
    address: str
    peer_address: str = ""  # empty: as ``address``


class Inventory(Value):
    """The file's contents, paths made absolute."""

    tls: TlsFiles
    hosts: dict[str, HostEntry] = msgspec.field(default_factory=dict)

    def host(self, name: str) -> Host:
        """Raises UnknownHost, naming the hosts that there are."""
        entry = self.hosts.get(name)
        if entry is None:
            known = ", ".join(sorted(self.hosts)) or "none"
            raise UnknownHost(f"no host {name!r} in the inventory (it has: {known})")
        return Host(name=name, address=entry.address, peer_address=entry.peer_address)

    def all_hosts(self) -> tuple[Host, ...]:
        """Every host, in the file's order."""
        return tuple(
            Host(name=name, address=e.address, peer_address=e.peer_address)
            for name, e in self.hosts.items()
        )


def default_path(environment: Mapping[str, str] = os.environ) -> Path:
    """$MIGRATE_INVENTORY, or hosts.toml of the user's configuration folder."""
    if named := environment.get(ENVIRONMENT):
        return Path(named)
    base = environment.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(base) / "migrate" / "hosts.toml"


def load(path: str | Path) -> Inventory:
    """Read an inventory. Raises UsageError naming the file and the line or key."""
    file = Path(path)
    try:
        text = file.read_bytes()
    except OSError as error:
        raise UsageError(
            f"can't read the inventory {file}: {error.strerror}",
            advice=f"Name one by --inventory or ${ENVIRONMENT}. {ADVICE}",
        ) from error
    inventory = parse(text, str(file))
    base = file.absolute().parent
    tls = {
        key: str(base / Path(value).expanduser())
        for key, value in msgspec.structs.asdict(inventory.tls).items()
    }
    for key, value in tls.items():
        if not Path(value).is_file():
            raise UsageError(f"{file}: tls.{key}: there is no file {value}", advice=ADVICE)
    return Inventory(tls=TlsFiles(**tls), hosts=inventory.hosts)


def parse(text: bytes, source: str) -> Inventory:
    """An inventory from TOML; *source* names it in errors. Raises UsageError."""
    try:
        document = msgspec.toml.decode(text)  # errors end in line and column
        # Each host by itself, because msgspec's errors do not name the key of a dict.
        for name, entry in _table(document, "hosts").items():
            _convert(entry, HostEntry, f"hosts.{name}")
        inventory = _convert(document, Inventory, "")
    except (msgspec.DecodeError, UnicodeDecodeError, UsageError) as error:
        raise UsageError(f"{source}: {error}", advice=ADVICE) from error
    for name, entry in inventory.hosts.items():
        if not HOST_NAME.fullmatch(name):
            raise UsageError(f"{source}: hosts: {name!r} is not a host name", advice=ADVICE)
        for key in ("address", "peer_address"):
            value = getattr(entry, key)
            if key == "peer_address" and not value:
                continue
            try:
                _, port = split_address(value)
            except UsageError as error:
                raise UsageError(f"{source}: hosts.{name}.{key}: {error}", advice=ADVICE) from error
            if port == 0:
                raise UsageError(f"{source}: hosts.{name}.{key}: port 0 can't be dialled")
    return inventory


def _table(document: dict[str, Any], key: str) -> dict[str, Any]:
    value = document.get(key)
    return value if isinstance(value, dict) else {}  # another type is _convert()'s to refuse


def _convert(value: object, kind: type[T], where: str) -> T:
    """convert(), whose errors are put as ``tls.key: expected a string, got int``."""
    try:
        return convert(value, kind)
    except msgspec.ValidationError as error:
        problem, _, path = str(error).partition(" - at ")
        path = path.strip("`").removeprefix("$").lstrip(".")
    for theirs, ours in PHRASES:
        problem = problem.replace(theirs, ours)
    place = ".".join(part for part in (where, path) if part)
    raise UsageError(f"{place}: {problem}" if place else problem)


def split_address(address: str) -> tuple[str, int]:
    """``host:port`` or ``[IPv6]:port`` to its two parts. Raises UsageError.

    Port 0 is an address to listen at (any free port), not one to dial.
    """
    host, separator, port = address.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    bracketed = bare != host
    valid_host = bool(re.fullmatch(r"[0-9A-Fa-f:.%\w]+" if bracketed else r"[\w.-]+", bare))
    # isdecimal() alone admits digits of other scripts.
    valid_port = port.isascii() and port.isdecimal() and int(port[:6]) < 1 << 16
    if not (separator and valid_host and valid_port):
        raise UsageError(
            f"{address!r} is not an address of an agent",
            advice="Write host:port, with an IPv6 address in brackets.",
        )
    return bare, int(port)


def to_toml(inventory: Inventory) -> str:
    """The inventory as a file that load() reads."""
    lines = ["[tls]"]
    lines += [f"{k} = {_quoted(v)}" for k, v in msgspec.structs.asdict(inventory.tls).items()]
    for name, entry in inventory.hosts.items():
        lines += ["", f"[hosts.{_quoted(name)}]", f"address = {_quoted(entry.address)}"]
        if entry.peer_address:
            lines.append(f"peer_address = {_quoted(entry.peer_address)}")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    # A JSON string is a TOML basic string; the standard library only reads TOML.
    return msgspec.json.encode(text).decode()
