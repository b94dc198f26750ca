"""An agent's configuration: one TOML file, checked whole before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from migrate.dataplane.vram import VramMode
from migrate.decode import from_toml
from migrate.errors import UsageError
from migrate.inventory import HOST_NAME, TlsFiles, split_address
from migrate.model import HostPaths, Value

ADVICE = "See `migrate agent serve --help` for an example of the file."


class AgentConfig(Value):
    """What an agent must know. Relative paths are relative to the file's folder.

    ``name`` is the host's name, as in its certificate and in inventories. ``listen`` is
    host:port of the control channel (port 0: any), ``advertise`` what other agents dial,
    ``data_listen`` the address of the chunk streams and ``data_advertise`` what sources
    dial for them, if that differs (a forwarded port). ``root`` is the folder of a simulated
    host; without it the paths are those of the machine. ``allow_from`` names the hosts
    whose agents may send processes here: none unless said. ``metrics_listen`` is host:port
    of the Prometheus endpoint, which anybody who reaches it may read (port 0: any; off unless
    said); ``log_format`` is "text" or "json" (a JSON object a line); ``otlp_endpoint`` is
    where traces go (``http://host:4317``; off unless said).
    """

    name: str
    tls: TlsFiles
    listen: str = "0.0.0.0:7601"
    advertise: str = ""
    data_listen: str = "0.0.0.0:0"
    data_advertise: str = ""
    engine: str = "reexec"
    vram_access: VramMode = VramMode.AUTO
    root: str = ""
    paths: HostPaths | None = None
    allow_from: tuple[str, ...] = ()
    metrics_listen: str = ""
    log_format: Literal["text", "json"] = "text"
    otlp_endpoint: str = ""

    def host_paths(self) -> HostPaths:
        """Where this host's kfd, sysfs and run directory are."""
        if self.root:
            return HostPaths.under(self.root)
        return self.paths or HostPaths()


def load_config(path: Path) -> AgentConfig:
    """Read and check a file. Raises UsageError naming file and key."""
    try:
        config = from_toml(path.read_bytes(), AgentConfig)
    except OSError as error:
        raise UsageError(f"can't read {path}: {error.strerror}", advice=ADVICE) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: {error}", advice=ADVICE) from error
    if not HOST_NAME.fullmatch(config.name):
        raise UsageError(f"{path}: name: {config.name!r} is not a host name", advice=ADVICE)
    for key in ("listen", "data_listen", "advertise", "data_advertise", "metrics_listen"):
        value = getattr(config, key)
        if value:
            split_address(value)
    base = path.absolute().parent
    tls = msgspec.structs.asdict(config.tls)
    return msgspec.structs.replace(
        config,
        root=str(base / config.root) if config.root else "",
        tls=TlsFiles(**{key: str(base / value) for key, value in tls.items()}),
    )
