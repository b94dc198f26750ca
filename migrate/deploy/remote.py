"""What runs on the host that is deployed to. It is sent there and knows the standard library alone.

    python3 - JSON  < this file

JSON is ``[name of a function below, its arguments]``; the last line of stdout is the answer, JSON
too. Everything can be done twice: what is done already stays as it is.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

DONE = ".done"
END = 60.0  # seconds that an agent may take to end


def probe(prefix: str, kfd: str) -> dict[str, Any]:
    """What the host is and has. Changes nothing."""
    existing = Path(prefix)
    while not existing.exists():
        existing = existing.parent
    return {
        "python": list(sys.version_info[:3]),
        "executable": sys.executable,
        "libc": list(platform.libc_ver()),
        "machine": platform.machine(),
        "kernel": platform.release(),
        "time": time.time(),
        "uid": os.getuid(),
        "systemd": Path("/run/systemd/system").is_dir(),
        "writable": os.access(existing, os.W_OK),
        "disk": shutil.disk_usage(existing).free,
        "kfd": Path(kfd).exists(),
        "criu": _version(["criu", "--version"]),
        "compiler": shutil.which("cc") is not None,
        "criu_header": Path("/usr/include/criu/criu-plugin.h").exists(),
        "cgroup2": Path("/sys/fs/cgroup/cgroup.controllers").exists(),
    }


def _version(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.splitlines()[0].strip() if done.stdout else ""


def missing(release: str) -> bool:
    """Whether a release is not installed whole."""
    return not (Path(release) / DONE).exists()


def install(release: str, uploads: str, sums: dict[str, str]) -> None:
    """A virtual environment with the wheels in *uploads*, without pip and without network."""
    folder = Path(release)
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Without pip: Debian's python3 alone can do that.
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    version = "python{}.{}".format(*sys.version_info)
    site = folder / "lib" / version / "site-packages"
    for name, digest in sums.items():
        data = (Path(uploads) / name).read_bytes()
        if hashlib.sha256(data).hexdigest() != digest:
            raise SystemExit(f"{name} was damaged on its way")
        with zipfile.ZipFile(Path(uploads) / name) as wheel:
            wheel.extractall(site)
    for command in ("migrate", "migrate-agent"):
        function = "main" if command == "migrate" else "agent_main"
        script = folder / "bin" / command
        script.write_text(
            f"#!{folder}/bin/python\nfrom migrate.cli.main import {function}\n{function}()\n"
        )
        script.chmod(0o755)
    (folder / DONE).touch()
    shutil.rmtree(uploads)


def activate(current: str, release: str, keep: int) -> bool:
    """Make *current* lead to *release*, at once; older releases but *keep* are removed.

    True if it led elsewhere before.
    """
    link, target = Path(current), Path(release)
    if link.is_symlink() and os.readlink(link) == str(target):
        return False
    new = link.with_name(f".{link.name}.new")
    new.unlink(missing_ok=True)
    new.symlink_to(target)
    new.replace(link)
    others = [p for p in target.parent.iterdir() if p != target]
    for old in sorted(others, key=lambda p: p.stat().st_mtime, reverse=True)[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    return True


def write(path: str, data: str, mode: int) -> bool:
    """Write a file (Base64), whole or not at all. True if it was another one before.

    What was there before is kept as ``NAME.old``.
    """
    target, contents = Path(path), base64.b64decode(data)
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
    try:
        if target.read_bytes() == contents:
            target.chmod(mode)
            return False
        shutil.copy2(target, f"{target}.old")
    except FileNotFoundError:
        pass
    new = target.with_name(f".{target.name}.new")
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with os.fdopen(fd, "wb") as file:
        file.write(contents)
        file.flush()
        os.fsync(fd)
    new.chmod(mode)
    new.replace(target)
    return True


def folder(path: str, mode: int) -> None:
    """Make a folder, for its owner alone or as *mode* says."""
    Path(path).mkdir(parents=True, exist_ok=True)
    Path(path).chmod(mode)


def read(path: str) -> str | None:
    """A file as Base64, None if there is none."""
    try:
        return base64.b64encode(Path(path).read_bytes()).decode()
    except FileNotFoundError:
        return None


def run(command: list[str]) -> dict[str, Any]:
    """Run one of our own programs there."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    return {"code": done.returncode, "output": (done.stdout + done.stderr)[-4000:]}


# ------------------------------------------------------------ without systemd


def _agent(pid_file: str, config: str) -> int | None:
    """The pid of the agent that was started with *config*, None if it does not run."""
    try:
        pid = int(Path(pid_file).read_text())
        line = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, ValueError):
        return None
    return pid if config.encode() in line and state != "Z" else None


def start(command: list[str], config: str, pid_file: str, log: str) -> bool:
    """Start an agent in a session of its own. False if it runs already."""
    if _agent(pid_file, config) is not None:
        return False
    with open(log, "ab") as stream:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
            cwd="/",
        )
    Path(pid_file).write_text(f"{process.pid}\n")
    return True


def stop(config: str, pid_file: str) -> bool:
    """SIGTERM, and wait: the agent undoes what was not granted. False if none runs.

    Processes that it owns are none of its affair any more: they run on.
    """
    pid = _agent(pid_file, config)
    if pid is None:
        return False
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + END
    while _agent(pid_file, config) is not None:
        if time.monotonic() > deadline:
            raise SystemExit(f"the agent (pid {pid}) does not end")
        time.sleep(0.1)
    Path(pid_file).unlink(missing_ok=True)
    return True


def remove(paths: list[str]) -> None:
    """Remove what was installed."""
    for path in map(Path, paths):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def tail(path: str) -> str:
    """The end of a log."""
    try:
        return Path(path).read_text(errors="replace")[-2000:]
    except OSError:
        return ""


if __name__ == "__main__":
    os.umask(0o022)
    function, arguments = json.loads(sys.argv[1])
    print(json.dumps(globals()[function](*arguments)))
