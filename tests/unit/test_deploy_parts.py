"""The parts of a deployment that need no host."""

from __future__ import annotations

import base64
import io
import json
import os
import socket
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import paramiko
import pytest

from agents.config import load_config
from agents.notify import Notifier
from migrate.deploy import bundle, place, remote, ssh
from migrate.deploy.bundle import Platform, platform_of
from migrate.deploy.place import Place
from migrate.errors import HostUnfit, UsageError

FACTS = {"python": [3, 13, 1], "libc": ["glibc", "2.41"], "machine": "x86_64"}


# ---------------------------------------------------------------- ssh_config


def config(text: str) -> paramiko.SSHConfig:
    return paramiko.SSHConfig.from_text(text)


def test_a_host_is_what_ssh_config_says() -> None:
    found = ssh.resolve(
        "node",
        config(
            "Host node\n HostName 10.0.0.1\n Port 2222\n User olga\n IdentityFile ~/k\n"
            " ProxyJump gate\n IdentitiesOnly yes\n UserKnownHostsFile /x /y\n"
        ),
    )
    assert (found.address, found.port, found.user) == ("10.0.0.1", 2222, "olga")
    assert found.keys == (str(Path("~/k").expanduser()),)
    assert found.known_hosts == ("/x", "/y")
    assert (found.jump, found.only_these) == ("gate", True)


def test_a_host_that_no_config_names_is_what_it_is_called() -> None:
    found = ssh.resolve("node.example", config(""), user="root")
    assert (found.address, found.port, found.user) == ("node.example", 22, "root")
    assert (found.jump, found.only_these) == ("", False)


def test_a_jump_host_may_have_user_and_port() -> None:
    found = ssh._hop("olga@gate:2200", config("Host gate\n HostName 10.0.0.9\n"))
    assert (found.address, found.port, found.user) == ("10.0.0.9", 2200, "olga")


# ---------------------------------------------------------------- bundle


def test_wheels_are_chosen_for_the_host_and_not_for_us() -> None:
    found = platform_of(FACTS)
    assert found == Platform(python=(3, 13), glibc=41, machine="x86_64")
    arguments = found.pip_arguments()
    assert arguments[:2] == ["--python-version", "3.13"]
    assert "manylinux_2_41_x86_64" in arguments
    assert "manylinux_2_17_x86_64" in arguments
    assert "manylinux_2_42_x86_64" not in arguments
    assert "manylinux_2_16_x86_64" not in arguments


@pytest.mark.parametrize(
    ("changed", "said"),
    [({"python": [3, 10, 9]}, "3.10.9 is too old"), ({"libc": ["", ""]}, "not glibc")],
)
def test_a_host_that_no_wheels_are_for_is_refused(changed: dict[str, object], said: str) -> None:
    with pytest.raises(HostUnfit, match=said):
        platform_of({**FACTS, **changed})


def test_our_own_wheel_is_the_same_each_time_and_runs(tmp_path: Path) -> None:
    data = bundle.own_wheel()
    assert data == bundle.own_wheel()
    with zipfile.ZipFile(io.BytesIO(data)) as wheel:
        names = wheel.namelist()
        wheel.extractall(tmp_path)
    assert "agents/migrate-agent.service" in names
    assert "agents/hook/hook.c" in names
    assert not [name for name in names if "__pycache__" in name or name.startswith("scenarios")]
    code = (
        "import migrate.client, agents.daemon, importlib.metadata as m; print(m.version('migrate'))"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        cwd="/",
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == version("migrate")


def test_what_an_agent_needs_is_what_the_metadata_says() -> None:
    names = " ".join(bundle.requirements())
    assert "grpcio>=" in names
    assert "prometheus-client" in names  # by the extra
    assert "opentelemetry" not in names
    assert "pytest" not in names


# ---------------------------------------------------------------- configuration and unit


def test_the_configuration_is_one_that_an_agent_reads(tmp_path: Path) -> None:
    text = place.config(
        Place(), "node-a", "[::1]:7601", allow_from=("node-b",), engine="reexec",
        metrics_listen="127.0.0.1:9751",
    )  # fmt: skip
    path = tmp_path / "agent.toml"
    path.write_text(text)
    found = load_config(path)
    assert (found.listen, found.advertise) == ("0.0.0.0:7601", "[::1]:7601")
    assert found.allow_from == ("node-b",)
    assert found.host_paths().run == "/var/lib/migrate"
    assert found.tls.key == str(tmp_path / "node-a.key")


def test_values_can_not_break_out_of_the_configuration() -> None:
    text = place.config(Place(), "a", "a:1", root='/x"\nname = "evil')
    assert tomllib.loads(text)["root"] == '/x"\nname = "evil'
    assert tomllib.loads(text)["name"] == "a"


def unit(spot: Place) -> str:
    return place.unit(spot, files("agents").joinpath("migrate-agent.service").read_text())


def test_the_unit_lets_processes_live_and_starts_our_program() -> None:
    text = unit(Place())
    assert "@" not in text.replace("@.", "")
    assert (
        "ExecStart=/opt/migrate/current/bin/migrate agent serve --config /etc/migrate/agent.toml"
        in text
    )
    for line in ("Type=notify", "KillMode=process", "Restart=always", "OOMPolicy=continue"):
        assert f"\n{line}\n" in text
    assert "\nWatchdogSec=" in text
    # All of these would be inherited by users' processes.
    settings = [line.partition("=")[0] for line in text.splitlines() if not line.startswith("#")]
    for forbidden in ("NoNewPrivileges", "SystemCallFilter", "MemoryMax", "User"):
        assert forbidden not in settings
    assert not [s for s in settings if s.startswith(("Protect", "Private", "ReadOnly"))]


def test_systemd_itself_finds_no_fault_with_the_unit(tmp_path: Path) -> None:
    path = tmp_path / "migrate-agent.service"
    # The program must exist for the verifier.
    path.write_text(unit(Place()).replace("/opt/migrate/current/bin/migrate", "/bin/true"))
    try:
        done = subprocess.run(
            ["systemd-analyze", "verify", "--man=no", str(path)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    except FileNotFoundError:
        pytest.skip("no systemd-analyze (Debian: systemd)")
    mine = [line for line in done.stderr.splitlines() if "migrate-agent" in line]
    assert mine == []


@pytest.mark.parametrize("prefix", ["/a b", "/a%n", "/a\nExecStart=/bin/sh", "/a$HOME"])
def test_a_prefix_that_means_more_to_systemd_is_refused(prefix: str) -> None:
    with pytest.raises(UsageError, match="can't stand in a systemd unit"):
        unit(Place(prefix=prefix))


# ---------------------------------------------------------------- what runs over there


def call(function: str, *arguments: object) -> object:
    """As ssh.Connection does it, without the ssh."""
    done = subprocess.run(
        [sys.executable, "-", json.dumps([function, arguments])],
        input=Path(remote.__file__).read_bytes(),
        capture_output=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def test_a_file_is_written_once_and_the_one_before_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "etc" / "agent.toml"
    for text, expected in (("one", True), ("one", False), ("two", True)):
        data = base64.b64encode(text.encode()).decode()
        assert call("write", str(path), data, 0o600) is expected
    assert path.read_text() == "two"
    assert path.with_name("agent.toml.old").read_text() == "one"
    assert path.stat().st_mode & 0o777 == 0o600
    assert sorted(p.name for p in path.parent.iterdir()) == ["agent.toml", "agent.toml.old"]


def test_a_release_is_switched_at_once_and_old_ones_go(tmp_path: Path) -> None:
    releases, current = tmp_path / "releases", tmp_path / "current"
    for number in range(4):
        (releases / str(number)).mkdir(parents=True)
        os.utime(releases / str(number), (number, number))
        assert remote.activate(str(current), str(releases / str(number)), 1)
        assert os.readlink(current) == str(releases / str(number))
    assert sorted(p.name for p in releases.iterdir()) == ["2", "3"]
    assert not remote.activate(str(current), str(releases / "3"), 1)


def test_a_damaged_upload_is_not_installed(tmp_path: Path) -> None:
    (tmp_path / "uploads").mkdir()
    (tmp_path / "uploads" / "x.whl").write_bytes(b"damaged")
    release = tmp_path / "releases" / "1"
    with pytest.raises(SystemExit, match="damaged"):
        remote.install(str(release), str(tmp_path / "uploads"), {"x.whl": "0" * 64})
    assert remote.missing(str(release))


def test_a_pid_of_somebody_else_is_not_stopped(tmp_path: Path) -> None:
    pid_file = tmp_path / "agent.pid"
    other = subprocess.Popen(["sleep", "60"])
    try:
        pid_file.write_text(str(other.pid))
        assert remote.stop("/etc/migrate/agent.toml", str(pid_file)) is False
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


# ---------------------------------------------------------------- sd_notify


@pytest.mark.parametrize("abstract", [False, True])
def test_the_service_manager_is_told(tmp_path: Path, abstract: bool) -> None:
    address = f"\0migrate-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(address)
        notifier = Notifier(
            {"NOTIFY_SOCKET": address.replace("\0", "@"), "WATCHDOG_USEC": "60000000"}
        )
        notifier.ready("answers at a:1")
        notifier.alive()
        notifier.stopping()
        said = [manager.recv(1000).decode() for _ in range(3)]
    assert said == ["READY=1\nSTATUS=answers at a:1", "WATCHDOG=1", "STOPPING=1"]
    assert notifier.watchdog == 60.0


def test_without_a_service_manager_nothing_is_said(tmp_path: Path) -> None:
    Notifier({}).ready("x")
    quiet = Notifier({"NOTIFY_SOCKET": str(tmp_path / "gone"), "WATCHDOG_PID": "1"})
    quiet.ready("x")
    assert quiet.watchdog == 0.0
