"""Where things are on a host, its configuration and its systemd unit."""

from __future__ import annotations

import msgspec

from migrate.engine.criu import HOOK
from migrate.errors import UsageError
from migrate.inventory import split_address
from migrate.model import Value

PREFIX = "/opt/migrate"
UNIT = "migrate-agent.service"


class Place(Value):
    """Paths on a host. With another prefix than /opt/migrate all is below it."""

    prefix: str = PREFIX

    @property
    def _own(self) -> bool:
        return self.prefix != PREFIX

    @property
    def releases(self) -> str:
        """A folder for each release."""
        return f"{self.prefix}/releases"

    @property
    def current(self) -> str:
        """Leads to the release in use."""
        return f"{self.prefix}/current"

    @property
    def uploads(self) -> str:
        """For what is on its way."""
        return f"{self.prefix}/uploads"

    @property
    def etc(self) -> str:
        """Configuration, certificate and key."""
        return f"{self.prefix}/etc" if self._own else "/etc/migrate"

    @property
    def state(self) -> str:
        """Journal and logs: kept over a reboot, and by --remove unless told."""
        return f"{self.prefix}/state" if self._own else "/var/lib/migrate"

    @property
    def hook(self) -> str:
        """CRIU's --libdir, where the agent looks for it (``migrate.engine.criu.HOOK``)."""
        return f"{self.state}/{HOOK}"

    @property
    def config(self) -> str:
        """agent.toml."""
        return f"{self.etc}/agent.toml"

    @property
    def unit(self) -> str:
        """The systemd unit."""
        return f"/etc/systemd/system/{UNIT}"

    @property
    def pid_file(self) -> str:
        """Of an agent that is not systemd's."""
        return f"{self.state}/agent.pid"

    @property
    def log(self) -> str:
        """Of an agent that is not systemd's."""
        return f"{self.state}/agent.log"

    @property
    def program(self) -> str:
        """The command ``migrate`` there."""
        return f"{self.current}/bin/migrate"

    def serve(self) -> list[str]:
        """The command line of the agent."""
        return [self.program, "agent", "serve", "--config", self.config]


def config(
    place: Place,
    name: str,
    address: str,
    *,
    allow_from: tuple[str, ...] = (),
    engine: str = "",
    root: str = "",
    metrics_listen: str = "",
) -> str:
    """agent.toml of host *name*, which others dial at *address*."""
    _, port = split_address(address)
    values: dict[str, object] = {
        "name": name,
        "listen": f"0.0.0.0:{port}",
        "advertise": address,
        "allow_from": list(allow_from),
    }
    if engine:
        values["engine"] = engine
    if metrics_listen:
        values["metrics_listen"] = metrics_listen
    if root:
        values["root"] = root
    lines = ["# Written by `migrate agent deploy`, which replaces it: see agent.toml.old."]
    lines += [f"{key} = {msgspec.json.encode(value).decode()}" for key, value in values.items()]
    if not root:
        lines += ["", "[paths]", f"run = {msgspec.json.encode(place.state).decode()}"]
    lines += ["", "[tls]"]
    for key, file in (("ca", "ca.crt"), ("cert", f"{name}.crt"), ("key", f"{name}.key")):
        lines.append(f'{key} = "{file}"')
    return "\n".join(lines) + "\n"


def unit(place: Place, template: str) -> str:
    """The systemd unit from the template beside the agent's code. Raises UsageError."""
    for text in (place.prefix, place.etc, place.state):
        if any(character.isspace() or character in "%\"'\\$" for character in text):
            raise UsageError(f"{text!r} can't stand in a systemd unit")
    return (
        template.replace("@PROGRAM@", place.program)
        .replace("@CONFIG@", place.config)
        .replace("@STATE@", place.state)
    )
