"""The hook inside CRIU: its source, and how it is compiled for the CRIU that is here."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path

from migrate.criu.rpc import criu_version
from migrate.errors import UsageError

SOURCE = Path(__file__).with_name("hook.c")
NAME = "migrate_kfd.so"
HEADER = "criu/criu-plugin.h"
FLAGS = ("-std=gnu11", "-O2", "-Wall", "-fPIC", "-shared")


def ensure_hook(folder: Path, *, criu: str = "criu", include: Path = Path("/usr/include")) -> Path:
    """The hook in *folder*, compiled now unless it is there for this CRIU and this source.

    *include*: see ``build_hook``.
    Raises UsageError, CriuUnusable.
    """
    version = ".".join(map(str, criu_version(criu)))
    key = f"{version} {hashlib.sha256(SOURCE.read_bytes()).hexdigest()}\n"
    stamp, target = folder / "built-for", folder / NAME
    if target.exists() and stamp.exists() and stamp.read_text() == key:
        return target
    target = build_hook(folder, include=include)
    stamp.write_text(key)
    return target


def build_hook(folder: Path, *, include: Path = Path("/usr/include"), compiler: str = "cc") -> Path:
    """Compile the hook into *folder*, which is then CRIU's ``--libdir``; its path.

    *include* holds ``criu/criu-plugin.h`` of the very CRIU that shall load it: a plugin
    that knows more hooks than its CRIU is rejected. Raises UsageError.
    """
    if not (include / HEADER).exists():
        raise UsageError(
            f"{include / HEADER} is missing",
            advice="Install CRIU's development files (Debian: libcriu-dev), same version.",
        )
    if shutil.which(compiler) is None:
        raise UsageError(f"there is no C compiler {compiler!r}", advice="apt install gcc libc6-dev")
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / NAME
    result = subprocess.run(
        [compiler, *FLAGS, f"-I{include}", "-o", str(target), str(SOURCE)],
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        raise UsageError(f"the hook does not compile:\n{result.stderr}", advice="See above.")
    return target
