"""Bringing an agent to one host, and taking it away again, step by step.

Nothing is changed before the host has passed its check. Every step can be done again: what is
there already stays as it is, and an agent is restarted only if something of it has changed.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from importlib.resources import files
from pathlib import Path
from typing import Any

import msgspec
import paramiko
from cryptography import x509

from migrate.client import Client
from migrate.deploy import bundle, place, remote
from migrate.deploy.bundle import Bundle
from migrate.deploy.place import UNIT, Place
from migrate.deploy.ssh import Connection
from migrate.errors import (
    AgentUnreachable,
    CertificateRejected,
    DeployFailed,
    HostUnfit,
    MigrateError,
    UsageError,
)
from migrate.inventory import split_address
from migrate.model import Value
from migrate.rpc.ca import Authority, Role, sign_request

ROOM = 600 << 20  # bytes that an installation and its predecessor want
MAX_SKEW = 120.0  # seconds that the clocks may differ: certificates are valid from 5 minutes ago
RENEW = timedelta(days=30)  # a certificate that ends earlier is renewed
VERIFY = 180.0  # seconds that a started agent has to answer: TimeoutStartSec of its unit
KEEP = 1  # releases besides the one in use

Said = Callable[[str], None]


class Service(StrEnum):
    """Who starts the agent, and starts it again."""

    SYSTEMD = "systemd"
    BACKGROUND = "background"  # a process of its own: nobody restarts it, a reboot ends it
    NONE = "none"  # somebody else's business: the command to run is told


class Wanted(Value):
    """What an operator wants on a host. ``{host}`` in paths is the host's name."""

    prefix: str = place.PREFIX
    service: Service | None = None  # None: systemd if the host has it
    allow_from: tuple[str, ...] = ()
    engine: str = ""
    root: str = ""
    metrics_listen: str = ""
    hook: bool = True
    user: str = ""
    python: str = "python3"

    def at(self, host: str) -> Wanted:
        """For one host."""
        return msgspec.structs.replace(
            self,
            prefix=self.prefix.replace("{host}", host),
            root=self.root.replace("{host}", host),
        )


class Outcome(Value):
    """One host's result. ``changed``: steps that did something; ``warnings`` for people."""

    host: str
    ok: bool
    release: str = ""
    changed: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    start: str = ""  # how to start it, where that was left to others
    error: dict[str, Any] | None = None


class Deployment:
    """One host. ``run`` installs or upgrades, ``remove`` takes it away."""

    def __init__(
        self,
        client: Client,
        host: str,
        wanted: Wanted,
        *,
        config: paramiko.SSHConfig,
        ca: Authority | None = None,
        cache: Path | None = None,
        say: Said = lambda _step: None,
    ) -> None:
        self._client = client
        self._host = client.inventory.host(host)
        self._wanted = wanted.at(host)
        self._place = Place(prefix=self._wanted.prefix)
        self._config = config
        self._ca = ca
        self._cache = cache or bundle.default_cache()
        self._say = say
        self._changed: list[str] = []
        self._warnings: list[str] = []
        for path in (self._place.prefix, self._wanted.root or "/"):
            if not path.startswith("/") or ".." in Path(path).parts:
                raise UsageError(f"{path!r} is not an absolute path")

    # ------------------------------------------------------------ the whole

    def run(self) -> Outcome:
        """Install, upgrade, or find that nothing is to be done. Raises MigrateError."""
        with self._connection() as there:
            self._say("checking")
            facts = there.call(remote.probe, self._place.prefix, self._kfd())
            service = self._check(facts)
            self._say("fetching wheels")
            made = bundle.make(bundle.platform_of(facts), self._cache)
            self._install(there, made)
            self._build_hook(there, facts)
            self._enrol(there)
            self._configure(there, service, self._engine(facts))
            self._say("starting")
            start = self._start(there, service)
            if service is not Service.NONE:
                self._say("verifying")
                self._verify(there)
        self._say("ready")
        return Outcome(
            host=self._host.name,
            ok=True,
            release=made.release,
            changed=tuple(self._changed),
            warnings=tuple(self._warnings),
            start=start,
        )

    def remove(self, *, purge: bool) -> Outcome:
        """Stop the agent and remove it. The journal, key and certificate stay, unless *purge*.

        Processes that came to the host run on.
        """
        spot = self._place
        with self._connection() as there:
            self._say("stopping")
            facts = there.call(remote.probe, spot.prefix, self._kfd())
            if facts["systemd"] and there.call(remote.read, spot.unit) is not None:
                self._systemctl(there, "disable", "--now", UNIT)
                there.call(remote.remove, [spot.unit])
                self._systemctl(there, "daemon-reload")
            there.call(remote.stop, spot.config, spot.pid_file)
            self._say("removing")
            paths = [spot.current, spot.releases, spot.hook, spot.uploads]
            if purge:
                paths += [spot.etc, spot.state, spot.prefix]
            there.call(remote.remove, paths)
        self._say("removed")
        return Outcome(host=self._host.name, ok=True, changed=("removed",))

    # ------------------------------------------------------------ steps

    def _connection(self) -> Connection:
        self._say("connecting")
        wanted = self._wanted
        return Connection(self._host.name, self._config, user=wanted.user, python=wanted.python)

    @property
    def _peers(self) -> str:
        """What other agents dial: where it listens. Ours may be a port that is forwarded there."""
        return self._host.peer_address or self._host.address

    def _kfd(self) -> str:
        return f"{self._wanted.root}/kfd" if self._wanted.root else "/dev/kfd"

    def _check(self, facts: dict[str, Any]) -> Service:
        """All that is wrong at once. Raises HostUnfit; the rest becomes warnings."""
        bundle.platform_of(facts)
        found = []
        if not facts["writable"]:
            found.append(f"{self._place.prefix} can't be written by the user that logs in")
        if facts["disk"] < ROOM:
            found.append(f"{facts['disk'] >> 20} MiB of disk are free, {ROOM >> 20} are wanted")
        skew = facts["time"] - time.time()
        if abs(skew) > MAX_SKEW:
            found.append(f"its clock is {skew:+.0f} s off ours (certificates have dates)")
        elif abs(skew) > MAX_SKEW / 10:
            self._warnings.append(f"its clock is {skew:+.0f} s off ours")
        if not facts["kfd"]:
            found.append(f"there is no {self._kfd()} (amdgpu with CONFIG_HSA_AMD)")
        service = self._wanted.service or (
            Service.SYSTEMD if facts["systemd"] else Service.BACKGROUND
        )
        if service is Service.SYSTEMD and not (facts["systemd"] and facts["uid"] == 0):
            found.append("a systemd unit wants systemd, and root to log in as")
        if found:
            raise HostUnfit(f"{self._host.name}: {'; '.join(found)}")
        if facts["uid"] != 0:
            self._warnings.append("not root: only that user's processes can be moved")
        if service is Service.BACKGROUND:
            self._warnings.append("no service manager: nothing starts the agent after a reboot")
        return service

    def _engine(self, facts: dict[str, Any]) -> str:
        """The one that moves any program, if the host has all it needs; "" for the agent's own."""
        if self._wanted.engine or self._wanted.root or facts["uid"] != 0:
            return self._wanted.engine
        wants = {
            "criu": facts["criu"],
            "cgroup v2": facts["cgroup2"],
            "a C compiler": facts["compiler"],
            "CRIU's development files": facts["criu_header"],
        }
        missing = [name for name, there in wants.items() if not there]
        if missing and self._wanted.hook:
            self._warnings.append(
                f"no {', no '.join(missing)}: without them its engine is reexec, which moves only"
                " programs that use its runtime"
            )
        return "criu" if not missing and self._wanted.hook else ""

    def _install(self, there: Connection, made: Bundle) -> None:
        release = f"{self._place.releases}/{made.release}"
        if there.call(remote.missing, release):
            total = made.bytes
            there.upload(
                made.files,
                self._place.uploads,
                lambda done: self._say(f"uploading {100 * done // total} %"),
            )
            self._say("installing")
            there.call(remote.install, release, self._place.uploads, made.sums)
        if there.call(remote.activate, self._place.current, release, KEEP):
            self._changed.append("release")

    def _build_hook(self, there: Connection, facts: dict[str, Any]) -> None:
        """Where a compiler and CRIU's header are. Without the hook there is no criu engine."""
        if not (self._wanted.hook and facts["compiler"] and facts["criu_header"]):
            return
        if "release" not in self._changed:
            return
        self._say("building the hook")
        code = (
            "import sys; from pathlib import Path; from agents.hook import ensure_hook;"
            " ensure_hook(Path(sys.argv[1]))"
        )
        program = f"{self._place.current}/bin/python"
        done = there.call(remote.run, [program, "-c", code, self._place.hook])
        if done["code"]:
            self._warnings.append(f"the hook could not be built: {done['output'][-300:]}")

    def _enrol(self, there: Connection) -> None:
        """A key that is made there and stays there, and a certificate by our authority."""
        name, etc = self._host.name, self._place.etc
        there.call(remote.folder, etc, 0o700)
        there.call(remote.folder, self._place.state, 0o700)
        old = there.call(remote.read, f"{etc}/{name}.crt")
        if old is not None and self._ca is None:
            return
        if self._ca is None:
            raise UsageError(
                f"{name} has no certificate yet",
                advice="Name the folder of the authority by --ca (see `migrate ca init`).",
            )
        authority = self._ca.path.read_bytes()
        if there.call(remote.write, f"{etc}/ca.crt", _base64(authority), 0o644):
            self._changed.append("authority")
        if old is not None and self._is_good(base64.b64decode(old)):
            return
        self._say("enrolling")
        request = there.call(remote.read, f"{etc}/{name}.csr")
        if request is None:
            done = there.call(remote.run, [self._place.program, "agent", "csr", name, "--out", etc])
            request = there.call(remote.read, f"{etc}/{name}.csr")
            if done["code"] or request is None:
                raise DeployFailed(f"no key could be made: {done['output'][-400:]}")
        dialled = {split_address(address)[0] for address in (self._host.address, self._peers)}
        signed = sign_request(
            self._ca, base64.b64decode(request), name, Role.AGENT, hosts=sorted(dialled)
        )
        there.call(remote.write, f"{etc}/{name}.crt", _base64(signed), 0o644)
        self._changed.append("certificate")

    def _is_good(self, pem: bytes) -> bool:
        assert self._ca is not None
        try:
            certificate = x509.load_pem_x509_certificate(pem)
            certificate.verify_directly_issued_by(self._ca.certificate)
        except Exception:  # of many kinds: whatever it is, it is replaced
            return False
        return certificate.not_valid_after_utc > datetime.now(UTC) + RENEW

    def _configure(self, there: Connection, service: Service, engine: str) -> None:
        wanted, spot = self._wanted, self._place
        text = place.config(
            spot,
            self._host.name,
            self._peers,
            allow_from=tuple(name for name in wanted.allow_from if name != self._host.name),
            engine=engine,
            root=wanted.root,
            metrics_listen=wanted.metrics_listen,
        )
        if there.call(remote.write, spot.config, _base64(text.encode()), 0o600):
            self._changed.append("configuration")
        if service is Service.SYSTEMD:
            template = files("agents").joinpath("migrate-agent.service").read_text()
            data = _base64(place.unit(spot, template).encode())
            if there.call(remote.write, spot.unit, data, 0o644):
                self._changed.append("unit")
                self._systemctl(there, "daemon-reload")

    def _start(self, there: Connection, service: Service) -> str:
        spot, command = self._place, self._place.serve()
        # A new certificate alone is followed by a running agent.
        renewed = bool({"release", "configuration", "unit"} & set(self._changed))
        if service is Service.NONE:
            return " ".join(command)
        if service is Service.SYSTEMD:
            self._systemctl(there, "enable", UNIT)
            active = there.call(remote.run, ["systemctl", "is-active", UNIT])["code"] == 0
            if not active or renewed:
                self._systemctl(there, "restart", UNIT)
                self._changed.append("started")
            return ""
        if renewed:
            there.call(remote.stop, spot.config, spot.pid_file)
        if there.call(remote.start, command, spot.config, spot.pid_file, spot.log):
            self._changed.append("started")
        return ""

    def _systemctl(self, there: Connection, *arguments: str) -> None:
        done = there.call(remote.run, ["systemctl", *arguments])
        if done["code"]:
            raise DeployFailed(f"systemctl {' '.join(arguments)}: {done['output'].strip()[-400:]}")

    def _verify(self, there: Connection) -> None:
        """The agent answers us by mTLS, as that host and with that release."""
        deadline = time.monotonic() + VERIFY
        while True:
            try:
                info = self._client.info(self._host.name)
                break
            except (AgentUnreachable, CertificateRejected) as error:
                if time.monotonic() > deadline:
                    log = there.call(remote.tail, self._place.log)
                    raise DeployFailed(
                        f"it was started and does not answer: {error.message}",
                        advice=f"{error.hint}\n{log[-800:]}".strip(),
                    ) from error
            time.sleep(0.5)
        if info.name != self._host.name:
            raise DeployFailed(f"the agent that answers calls itself {info.name}")


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def failed(host: str, error: MigrateError) -> Outcome:
    """The outcome of a host where it did not go well."""
    document = {
        "reason": error.reason,
        "message": error.message,
        "advice": error.hint,
        "exit_code": error.exit_code,
    }
    return Outcome(host=host, ok=False, error=document)


def first_error(outcomes: Sequence[Outcome]) -> int:
    """The exit code of several hosts: that of the first that failed, 0 if none did."""
    return next((int(o.error["exit_code"]) for o in outcomes if o.error is not None), 0)
