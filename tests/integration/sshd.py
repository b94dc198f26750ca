"""Real SSH servers on loopback, each with a host key of its own, for tests of deployment."""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from scenarios.cluster import end, wait_until
from scenarios.ports import free_port

SSHD = shutil.which("sshd") or ("/usr/sbin/sshd" if Path("/usr/sbin/sshd").exists() else "")


def make_key(path: Path) -> str:
    """A key pair; the public line."""
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "test", "-f", str(path)], check=True
    )
    return path.with_suffix(".pub").read_text().strip()


@dataclass
class Servers:
    """Any number of servers; ``config`` is the ssh_config that leads to them."""

    folder: Path
    ports: dict[str, int] = field(default_factory=dict)
    _processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    _blocks: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.folder.mkdir(mode=0o700)
        (self.folder / "authorized").write_text(make_key(self.folder / "user") + "\n")
        self.known_hosts = self.folder / "known_hosts"
        self.known_hosts.touch()
        self.config = self.folder / "config"

    def start(self, name: str, *, jump: str = "", known: bool = True) -> None:
        """A server that lets this user in with the one key."""
        if os.getuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)  # where sshd as root wants to be confined
        port, key = free_port(), self.folder / f"{name}-host"
        public = make_key(key)
        if known:
            with self.known_hosts.open("a") as file:
                file.write(f"[127.0.0.1]:{port} {public}\n")
        configuration = self.folder / f"{name}.sshd_config"
        configuration.write_text(
            f"Port {port}\nListenAddress 127.0.0.1\nHostKey {key}\n"
            f"AuthorizedKeysFile {self.folder}/authorized\nPidFile {self.folder}/{name}.pid\n"
            "StrictModes no\nUsePAM no\nPasswordAuthentication no\n"
            "KbdInteractiveAuthentication no\nSubsystem sftp internal-sftp\n"
        )
        with (self.folder / f"{name}.log").open("wb") as log:
            self._processes.append(
                subprocess.Popen(
                    [SSHD, "-D", "-e", "-f", str(configuration)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                )
            )
        self.ports[name] = port
        self._blocks.append(
            f"Host {name}\n  HostName 127.0.0.1\n  Port {port}\n  User {getpass.getuser()}\n"
            + (f"  ProxyJump {jump}\n" if jump else "")
        )
        shared = (
            f"Host *\n  IdentityFile {self.folder}/user\n  IdentitiesOnly yes\n"
            f"  UserKnownHostsFile {self.known_hosts}\n"
        )
        self.config.write_text("\n".join([*self._blocks, shared]))
        wait_until(lambda: _listens(port), 30, f"sshd {name}")

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def stop(self) -> None:
        for process in self._processes:
            end(process)


def _listens(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0
