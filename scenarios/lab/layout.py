"""Where the lab keeps what it builds, and the tools every step uses."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from migrate.errors import MigrateError

PACKAGE = Path(__file__).resolve().parent
PROJECT = PACKAGE.parent.parent


class LabError(MigrateError):
    """The lab can't be built or a host of it does not do what it should."""

    reason = "LAB"
    exit_code = 19
    advice = "See the log files in the lab's folder (MIGRATE_LAB_DIR, ~/.cache/migrate-lab)."


class Layout:
    """Files of one lab. Everything is under *root*, which is outside the source tree.

    ``step`` names are those of the files in ``stamps``; what a step makes is in the
    attribute of the same meaning.
    """

    def __init__(self, root: Path) -> None:
        root = self.root = root.absolute()
        self.kernel_root = root / "kernel-root"  # Debian 12: kernel, its headers and source
        self.kernel = root / "vmlinuz"
        self.modules = root / "modules"  # lib/modules of the kernel, with our own in it
        self.module_build = self.kernel_root / "build"
        self.guest_root = root / "guest-root"
        self.initrd = root / "initrd.img"
        self.disk = root / "guest.qcow2"
        self.key = root / "ssh-key"
        self.hosts = root / "hosts"
        self.stamps = root / "stamps"
        self.logs = root / "logs"

    @classmethod
    def default(cls) -> Layout:
        """``$MIGRATE_LAB_DIR``, or ``~/.cache/migrate-lab``."""
        chosen = os.environ.get("MIGRATE_LAB_DIR")
        return cls(Path(chosen) if chosen else Path.home() / ".cache" / "migrate-lab")

    def prepare(self) -> None:
        """Create the folders that steps write into."""
        for folder in (self.root, self.hosts, self.stamps, self.logs):
            folder.mkdir(parents=True, exist_ok=True)

    def done(self, step: str, key: str) -> bool:
        """Whether *step* has been finished with the same *key* (a digest of its inputs)."""
        stamp = self.stamps / step
        return stamp.exists() and stamp.read_text() == key

    def mark(self, step: str, key: str) -> None:
        """Remember that *step* is finished for *key*."""
        (self.stamps / step).write_text(key)


def digest(*parts: str | bytes | Path) -> str:
    """Hex digest of texts and of the contents of files and folders, in order."""
    state = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            files = [part] if part.is_file() else sorted(p for p in part.rglob("*") if p.is_file())
            for file in files:
                state.update(f"{file.relative_to(part.parent)}\0".encode() + file.read_bytes())
        else:
            state.update(part.encode() if isinstance(part, str) else part)
        state.update(b"\1")
    return state.hexdigest()


def run(
    *command: str | Path,
    log: Path,
    environment: dict[str, str] | None = None,
    directory: Path | None = None,
) -> None:
    """Run *command* with its output appended to *log*; raises LabError with its last lines."""
    argv = [str(part) for part in command]
    with log.open("a") as out:
        out.write(f"\n$ {' '.join(argv)}\n")
        out.flush()
        result = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
            cwd=directory,
            check=False,
        )
    if result.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise LabError(f"{argv[0]} ended with status {result.returncode}; end of {log}:\n{tail}")


def output(command: Sequence[str | Path]) -> str:
    """What *command* prints; raises LabError if it fails."""
    argv = [str(part) for part in command]
    result = subprocess.run(argv, capture_output=True, text=True, check=False)
    if result.returncode:
        raise LabError(f"{' '.join(argv)} ended with {result.returncode}: {result.stderr.strip()}")
    return result.stdout


def replace_tree(path: Path) -> None:
    """Remove *path* if it is there, never what an interrupted step left mounted in it."""
    for line in reversed(Path("/proc/self/mounts").read_text().splitlines()):
        mounted = Path(line.split()[1])
        if path in mounted.parents:
            output(["umount", mounted])
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)
