"""The marker: a memfd by which a process with the runtime and the agent agree.

It is part of the process: found in /proc/PID/fd by its name, gone with the process,
and as long-lived as it, so that an agent that comes back after kill -9 finds all it
needs. 64-bit words, little-endian, each written by one side only:

    0  magic        8  version     16  pid          24  start time
    32 signal       40 requested   48  entered      56  handed       64  length

``requested`` is the agent's: the number of the freeze it wants, 0 for none; it is also
what keeps the process stopped. The rest is the process's. Its handler sets
``entered``, looks at ``requested``, writes the document (at 4096) and its ``length``, sets
``handed`` to the number it answers, and stops the process as long as ``requested``
is not 0: somebody else's SIGCONT does not thaw it.
"""

from __future__ import annotations

import os
import struct
from typing import Self

from migrate.engine import procfs
from migrate.errors import EngineUnsupported, ForeignProcess, NoSuchProcess
from migrate.model import ProcessRef

NAME = "migrate-runtime"
_LINK = f"/memfd:{NAME}"
MAGIC = int.from_bytes(b"MIGRATE\0", "little")
VERSION = 1
_HEAD = struct.Struct("<9Q")
_WORD = struct.Struct("<Q")
_SIGNAL, _REQUESTED, _ENTERED, _HANDED, _LENGTH = 32, 40, 48, 56, 64
_DOCUMENT = 4096
_MAX_DOCUMENT = 256 << 20


class Marker:
    """One end's view of it. Owns *fd*."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    @classmethod
    def create(cls, signal: int) -> Self:
        """Make this process's own."""
        fd = os.memfd_create(NAME, os.MFD_CLOEXEC)
        pid = os.getpid()
        head = (MAGIC, VERSION, pid, procfs.start_time(pid), signal, 0, 0, 0, 0)
        os.pwrite(fd, _HEAD.pack(*head), 0)
        return cls(fd)

    @classmethod
    def of(cls, process: ProcessRef) -> Self:
        """Open a process's marker. Raises NoSuchProcess, ForeignProcess, EngineUnsupported."""
        pid = process.pid
        try:
            number = _find(pid)
            if number is None and not os.listdir(f"/proc/{pid}/fd"):
                # Killed and not yet gone: its files are closed first.
                raise NoSuchProcess(f"process {pid} is ending")
            if number is None:
                raise EngineUnsupported(f"process {pid} does not use the reexec engine's runtime")
            found = cls(os.open(f"/proc/{pid}/fd/{number}", os.O_RDWR | os.O_CLOEXEC))
        except PermissionError as error:
            raise ForeignProcess(f"process {pid}: its files can't be looked at") from error
        except OSError as error:
            raise NoSuchProcess(f"process {pid} has ended") from error
        try:
            found._check(process)
        except BaseException:
            found.close()
            raise
        return found

    def _check(self, process: ProcessRef) -> None:
        head = os.pread(self._fd, _HEAD.size, 0)
        if len(head) < _HEAD.size:
            raise EngineUnsupported(f"process {process.pid}: its marker is cut short")
        magic, version, pid, start_time = _HEAD.unpack(head)[:4]
        if magic != MAGIC or version != VERSION:
            raise EngineUnsupported(f"process {process.pid} has another version's runtime")
        if (pid, start_time) != (process.pid, process.start_time):
            raise EngineUnsupported(f"process {process.pid} inherited its marker from {pid}")

    def _get(self, offset: int) -> int:
        value: int = _WORD.unpack(os.pread(self._fd, 8, offset))[0]
        return value

    def _set(self, offset: int, value: int) -> None:
        os.pwrite(self._fd, _WORD.pack(value), offset)

    # ------------------------------------------------------------ the agent's side

    @property
    def signal(self) -> int:
        """Number of the signal that the process answers by handing over."""
        return self._get(_SIGNAL)

    def request(self, number: int) -> None:
        """Ask for freeze *number*; 0: let the process go on once it is continued."""
        self._set(_REQUESTED, number)

    @property
    def handed(self) -> int:
        """Number of the freeze whose document is there, 0 if there is none."""
        return self._get(_HANDED)

    @property
    def entered(self) -> bool:
        """Whether the process's handler is at work or stopped in it."""
        return bool(self._get(_ENTERED))

    def document(self) -> bytes:
        """What the process handed over. Raises EngineUnsupported if it is damaged."""
        length = self._get(_LENGTH)
        data = os.pread(self._fd, length, _DOCUMENT) if length <= _MAX_DOCUMENT else b""
        if len(data) != length:
            raise EngineUnsupported("the process's runtime handed over a damaged document")
        return data

    # ------------------------------------------------------------ the process's side

    @property
    def requested(self) -> int:
        """Number of the freeze that is wanted, 0 for none."""
        return self._get(_REQUESTED)

    def enter(self) -> None:
        """The handler begins: a request withdrawn from now on waits for it to leave."""
        self._set(_ENTERED, 1)

    def hand(self, number: int, document: bytes) -> None:
        """The document of freeze *number*."""
        self._set(_HANDED, 0)
        os.pwrite(self._fd, document, _DOCUMENT)
        self._set(_LENGTH, len(document))
        self._set(_HANDED, number)

    def leave(self) -> None:
        """The handler is over: nothing is handed over any more."""
        self._set(_HANDED, 0)
        self._set(_LENGTH, 0)
        os.ftruncate(self._fd, _DOCUMENT)
        self._set(_ENTERED, 0)

    def close(self) -> None:
        """Close the fd."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _find(pid: int) -> int | None:
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            if os.readlink(f"/proc/{pid}/fd/{name}").startswith(_LINK):
                return int(name)
        except FileNotFoundError:
            continue
    return None
