"""SSH to a host, as ``ssh`` would do it: by ~/.ssh/config, agent, key files and known hosts.

A host whose key is not known is refused, never added. Nothing from outside reaches a shell but
quoted: the one command that is run is ``python3 - JSON``, its program comes by stdin.
"""

from __future__ import annotations

import getpass
import json
import logging
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import paramiko

from migrate.deploy import remote
from migrate.errors import DeployFailed, HostKeyUnknown, SshFailed
from migrate.model import Value

TIMEOUT = 30.0  # seconds to connect and log in
COMMAND = 600.0  # seconds of silence after which a command is given up
KNOWN_HOSTS = ("~/.ssh/known_hosts", "~/.ssh/known_hosts2")
SYSTEM_KNOWN_HOSTS = ("/etc/ssh/ssh_known_hosts",)

logging.getLogger("paramiko").setLevel(logging.CRITICAL)  # our errors say it better


class Target(Value):
    """Where and as whom to log in, by an ssh_config."""

    name: str
    address: str
    port: int
    user: str
    keys: tuple[str, ...] = ()
    known_hosts: tuple[str, ...] = ()
    key_alias: str = ""
    jump: str = ""
    only_these: bool = False  # IdentitiesOnly: neither ssh-agent nor the usual files


def resolve(name: str, config: paramiko.SSHConfig, user: str = "") -> Target:
    """What *config* says of a host; *user* overrides it."""
    found = config.lookup(name)
    known = str(found.get("userknownhostsfile", "")).split() or list(KNOWN_HOSTS)
    jump = str(found.get("proxyjump", ""))
    return Target(
        name=name,
        address=str(found["hostname"]),
        port=int(found.get("port", 22)),
        user=user or str(found.get("user", getpass.getuser())),
        keys=tuple(str(Path(key).expanduser()) for key in found.get("identityfile", ())),
        known_hosts=tuple(str(Path(path).expanduser()) for path in known),
        key_alias=str(found.get("hostkeyalias", "")),
        jump="" if jump.lower() == "none" else jump,
        only_these=str(found.get("identitiesonly", "no")).lower() == "yes",
    )


def load_config(path: Path | None) -> paramiko.SSHConfig:
    """An ssh_config, ~/.ssh/config unless named. Raises SshFailed."""
    file = path or Path("~/.ssh/config").expanduser()
    if path is None and not file.exists():
        return paramiko.SSHConfig()
    try:
        return paramiko.SSHConfig.from_path(str(file))
    except (OSError, paramiko.SSHException) as error:
        raise SshFailed(f"can't read {file}: {error}") from error


class Connection:
    """One host, logged in to. Use it as a context manager."""

    def __init__(
        self, name: str, config: paramiko.SSHConfig, *, user: str = "", python: str = "python3"
    ) -> None:
        """Connect, through a jump host if there is one. Raises SshFailed, HostKeyUnknown."""
        self._python = python
        self._jumps: list[paramiko.SSHClient] = []
        try:
            self._client = self._open(resolve(name, config, user), config)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Log out, of the jump hosts last."""
        for client in reversed(self._jumps):
            client.close()

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run a function of ``remote`` over there. Raises DeployFailed with what it said."""
        order = json.dumps([function.__name__, arguments])
        command = f"{shlex.quote(self._python)} - {shlex.quote(order)}"
        program = Path(remote.__file__).read_bytes()
        try:
            stdin, stdout, stderr = self._client.exec_command(command, timeout=COMMAND)
            stdin.write(program)
            stdin.channel.shutdown_write()
            output, errors = stdout.read().decode(), stderr.read().decode()
            code = stdout.channel.recv_exit_status()
        except (paramiko.SSHException, OSError) as error:
            raise SshFailed(f"the connection broke: {error}") from error
        if code:
            raise DeployFailed(f"{function.__name__} failed there: {errors.strip()[-800:]}")
        try:
            return json.loads(output.splitlines()[-1])
        except (IndexError, json.JSONDecodeError) as error:
            raise DeployFailed(f"{function.__name__} gave no answer: {output[-300:]!r}") from error

    def upload(self, files: dict[str, Path], folder: str, said: Callable[[int], None]) -> None:
        """Copy files into *folder*, which is made; *said* gets the bytes so far."""
        self.call(remote.folder, folder, 0o700)
        before = 0
        try:
            with self._client.open_sftp() as sftp:
                for name, path in files.items():
                    sftp.put(str(path), f"{folder}/{name}", callback=_counting(before, said))
                    before += path.stat().st_size
        except (paramiko.SSHException, OSError) as error:
            raise SshFailed(f"the upload failed: {error}") from error

    def _open(self, target: Target, config: paramiko.SSHConfig) -> paramiko.SSHClient:
        through = None
        if target.jump:
            # Of several jumps, each is reached through the one before it.
            for hop in target.jump.split(","):
                through = self._login(_hop(hop.strip(), config), through)
        return self._login(target, through)

    def _login(self, target: Target, through: paramiko.SSHClient | None) -> paramiko.SSHClient:
        client = paramiko.SSHClient()
        for file in (*SYSTEM_KNOWN_HOSTS, *target.known_hosts):
            if Path(file).exists():
                client.load_host_keys(file)
        client.set_missing_host_key_policy(_Refuse(target))
        self._jumps.append(client)
        where = f"{target.user}@{target.address}:{target.port}"
        try:
            sock = None
            if through is not None:
                transport = through.get_transport()
                assert transport is not None
                sock = transport.open_channel(
                    "direct-tcpip", (target.address, target.port), ("127.0.0.1", 0)
                )
            client.connect(
                target.address,
                target.port,
                target.user,
                # The stub knows of one file; paramiko takes a list.
                key_filename=cast(str, [k for k in target.keys if Path(k).exists()] or None),
                allow_agent=not target.only_these,
                look_for_keys=not target.only_these,
                sock=sock,
                timeout=TIMEOUT,
                banner_timeout=TIMEOUT,
                auth_timeout=TIMEOUT,
            )
        except paramiko.BadHostKeyException as error:
            raise HostKeyUnknown(
                f"the key of {target.name} ({where}) is not the one that is known: {error}"
            ) from error
        except (paramiko.SSHException, OSError, EOFError) as error:
            raise SshFailed(f"can't log in to {target.name} ({where}): {error}") from error
        return client


def _counting(before: int, said: Callable[[int], None]) -> Callable[[int, int], None]:
    return lambda done, _all: said(before + done)


def _hop(text: str, config: paramiko.SSHConfig) -> Target:
    """``[user@]host[:port]`` of a ProxyJump."""
    user, _, rest = text.rpartition("@")
    name, colon, port = rest.partition(":")
    target = resolve(name, config, user)
    if not colon:
        return target
    values = {f: getattr(target, f) for f in target.__struct_fields__}
    return Target(**{**values, "port": int(port)})


class _Refuse(paramiko.MissingHostKeyPolicy):
    """A key that nobody vouched for ends it: whoever answers would get root's work."""

    def __init__(self, target: Target) -> None:
        self._target = target

    def missing_host_key(
        self, client: paramiko.SSHClient, hostname: str, key: paramiko.PKey
    ) -> None:
        """Refuse, naming the key."""
        del client
        raise HostKeyUnknown(
            f"{hostname} has a key that is in none of {', '.join(self._target.known_hosts)}:"
            f" {key.get_name()} {key.fingerprint}"
        )
