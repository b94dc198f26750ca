"""What is uploaded: our own code as a wheel, and the wheels that it needs, for the host's Python.

Wheels are fetched here, at the operator's side, by pip, and kept: a host needs no internet, and
a second deployment of the same release needs none here either.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import subprocess
import sys
import threading
import zipfile
from collections.abc import Mapping
from importlib.metadata import requires, version
from importlib.util import find_spec
from pathlib import Path

import msgspec

from migrate.decode import convert
from migrate.errors import DeployFailed, HostUnfit
from migrate.model import Value

PACKAGES = ("migrate", "agents")
EXTRA = "agent"
OLDEST_PYTHON = (3, 11)
OLDEST_GLIBC = 17  # of manylinux2014, the oldest that our dependencies are built for
_lock = threading.Lock()  # one pip at a time: hosts that are alike share its work


class Platform(Value):
    """For what wheels are chosen. ``glibc`` is the minor version of glibc 2."""

    python: tuple[int, int]
    glibc: int
    machine: str

    @property
    def name(self) -> str:
        """As a folder's name."""
        return f"cp{self.python[0]}{self.python[1]}-glibc2.{self.glibc}-{self.machine}"

    def pip_arguments(self) -> list[str]:
        """What makes pip choose for it, not for this machine."""
        arguments = ["--python-version", f"{self.python[0]}.{self.python[1]}"]
        arguments += ["--implementation", "cp", "--only-binary=:all:"]
        for minor in range(self.glibc, OLDEST_GLIBC - 1, -1):
            arguments += ["--platform", f"manylinux_2_{minor}_{self.machine}"]
        return [*arguments, "--platform", f"manylinux2014_{self.machine}"]


def platform_of(facts: Mapping[str, object]) -> Platform:
    """From what ``remote.probe`` found. Raises HostUnfit."""
    python = convert(facts["python"], tuple[int, int, int])
    name, number = convert(facts["libc"], tuple[str, str])
    if python[:2] < OLDEST_PYTHON:
        raise HostUnfit(
            f"Python {'.'.join(map(str, python))} is too old",
            advice="migrate needs Python 3.11 or later there; --python names another one.",
        )
    if name != "glibc":
        raise HostUnfit(f"its C library is {name or 'unknown'}, not glibc")
    return Platform(
        python=python[:2], glibc=int(number.split(".")[1]), machine=str(facts["machine"])
    )


class Bundle(Value):
    """Files of one release by name; ``release`` names exactly these contents."""

    release: str
    files: dict[str, Path]
    sums: dict[str, str]

    @property
    def bytes(self) -> int:
        """In all."""
        return sum(path.stat().st_size for path in self.files.values())


def default_cache(environment: Mapping[str, str] = os.environ) -> Path:
    """Where wheels are kept: the user's cache folder."""
    base = environment.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "migrate" / "wheels"


def make(platform: Platform, cache: Path) -> Bundle:
    """The bundle for a platform. Raises DeployFailed if wheels can't be had."""
    with _lock:
        wheels = _dependencies(platform, cache)
        own = cache / "own"
        own.mkdir(parents=True, exist_ok=True)
        data = own_wheel()
        name = (
            f"migrate-{version('migrate')}-{hashlib.sha256(data).hexdigest()[:12]}-py3-none-any.whl"
        )
        path = own / name
        if not path.exists():
            path.with_suffix(".new").write_bytes(data)
            path.with_suffix(".new").replace(path)
        # Ours last: it must not be overwritten by anything.
        files = {**{wheel.name: wheel for wheel in wheels}, name: path}
    sums = {n: hashlib.sha256(file.read_bytes()).hexdigest() for n, file in files.items()}
    digest = hashlib.sha256(msgspec.json.encode([platform, sorted(sums.items())])).hexdigest()
    return Bundle(release=f"{version('migrate')}-{digest[:16]}", files=files, sums=sums)


def requirements() -> list[str]:
    """What an agent needs, as our own metadata has it: always, and by the extra."""
    found = []
    for text in requires("migrate") or ():
        requirement, _, marker = text.partition(";")
        extra = re.fullmatch(r"\s*extra\s*==\s*['\"](\w+)['\"]\s*", marker)
        if not marker.strip() or (extra is not None and extra[1] == EXTRA):
            found.append(requirement.strip())
    return sorted(found)


def _dependencies(platform: Platform, cache: Path) -> list[Path]:
    wanted = requirements()
    key = hashlib.sha256("\n".join(wanted).encode()).hexdigest()[:12]
    folder = cache / f"{platform.name}-{key}"
    if not (folder / ".done").exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input"]
        command += ["--disable-pip-version-check", "--dest", str(folder)]
        done = subprocess.run(
            [*command, *platform.pip_arguments(), *wanted],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise DeployFailed(
                f"pip can't fetch wheels for {platform.name}: {done.stderr.strip()[-600:]}",
                advice="They are fetched on this machine: it needs pip and a package index, once;"
                f" or put them into {folder} and make a file .done there.",
            )
        (folder / ".done").touch()
    return sorted(folder.glob("*.whl"))


def own_wheel() -> bytes:
    """Our packages as they are installed here, also from a checkout. Same code, same bytes."""
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w", zipfile.ZIP_DEFLATED) as wheel:
        for package in PACKAGES:
            spec = find_spec(package)
            assert spec is not None
            assert spec.submodule_search_locations is not None
            top = Path(next(iter(spec.submodule_search_locations)))
            for path in sorted(top.rglob("*")):
                if path.is_file() and "__pycache__" not in path.parts:
                    _add(wheel, f"{package}/{path.relative_to(top)}", path.read_bytes())
        number = version("migrate")
        metadata = f"Metadata-Version: 2.1\nName: migrate\nVersion: {number}\n"
        _add(wheel, f"migrate-{number}.dist-info/METADATA", metadata.encode())
    return memory.getvalue()


def _add(wheel: zipfile.ZipFile, name: str, data: bytes) -> None:
    info = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
    info.compress_type = zipfile.ZIP_DEFLATED
    info.external_attr = 0o644 << 16
    wheel.writestr(info, data)
