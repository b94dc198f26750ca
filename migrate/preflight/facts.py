"""What a process needs of its host and an engine does not move: the document that travels."""

from __future__ import annotations

from fnmatch import fnmatchcase

from migrate.model import Value
from migrate.preflight.findings import Findings


class FileFact(Value):
    """A regular file that is open or mapped, or a folder (``size`` 0).

    ``identity``: "build-id:HEX" of an ELF file, "xxh3:HEX" of samples of another one's
    bytes, empty if the contents do not count (it is being written, or can't be read).
    ``contents`` False: it only has to exist. ``storage``, of a written one: its file system,
    as both hosts would name it if they share it.
    """

    path: str
    size: int
    inode: int = 0
    storage: str = ""
    identity: str = ""
    folder: bool = False
    contents: bool = True
    written: bool = False  # open for writing, or mapped shared and writable

    def copied_by(self, globs: tuple[str, ...]) -> bool:
        """Whether a user wants it sent with the process. A ``*`` stands for slashes, too."""
        return not self.folder and any(fnmatchcase(self.path, glob) for glob in globs)


class Account(Value):
    """A user or group id; ``name`` is empty where the host has none for it."""

    number: int
    name: str


class Cpu(Value):
    """Instruction sets that programs may use, as /proc/cpuinfo names them.

    ``xsave_size``: bytes of a signal frame (AT_MINSIGSTKSZ), which the kernel derives from
    the size of the XSAVE area; 0 where it does not tell.
    """

    architecture: str
    flags: tuple[str, ...]
    xsave_size: int


class Facts(Value):
    """All of it. An engine leaves out what it moves or does without.

    ``own``: what speaks against moving the process, wherever to.
    ``files`` must be there, ``alike`` should be the same ones. ``ids``: pids and tids of
    the tree that must be free. ``runs_as``: the user that the copy must run as where the
    agent there does not choose it. ``labels``: of the LSM. ``cgroups``: paths in cgroup v2.
    ``monotonic``: CLOCK_MONOTONIC as the process sees it, seconds; 0 if it does not go with it.
    """

    own: Findings = Findings()
    files: tuple[FileFact, ...] = ()
    alike: tuple[FileFact, ...] = ()
    ids: tuple[int, ...] = ()
    users: tuple[Account, ...] = ()
    groups: tuple[Account, ...] = ()
    runs_as: int | None = None
    labels: tuple[str, ...] = ()
    cgroups: tuple[str, ...] = ()
    cpu: Cpu | None = None
    monotonic: float = 0.0
