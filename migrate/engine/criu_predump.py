"""Memory of a running tree, sent before the freeze: CRIU's pre-dump.

CRIU stops the tasks for a moment, takes references to their pages into pipes, resets the
kernel's soft-dirty bits and lets go; then it writes the pages while the tasks run. The dump in
the freeze has it as its parent and writes what has a soft-dirty bit since. No bit tells what a
GPU wrote: such ranges are touched in the freeze (``outdated``), so that they are written whole.
What the tasks give back of it meanwhile is held until it is written.

What is written again is at the destination twice, so pieces with much of that are given up in
the freeze: at most OUTDATED bytes of what was sent stay there for nothing.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from migrate.criu.rpc import CriuOptions, RequestType, tracks_memory
from migrate.engine import criu_pagemap, criu_tree
from migrate.engine.criu_devices import DeviceFiles
from migrate.engine.criu_hooks import HookedCriu
from migrate.engine.criu_pagemap import PAGE, PageMap
from migrate.engine.criu_pages import SHARED, PagePipes, PieceAccess
from migrate.engine.hook import UNSUPPORTED, Hook, HookCall, Verdict
from migrate.engine.seam import Blob, CpuRange, Piece
from migrate.errors import CheckpointFailed, EngineUnsupported, MigrateError
from migrate.model import HostPaths, ProcessRef

FOLDER = "pre-dump"  # beside the images of the dump
LOG = f"{FOLDER}.log"
PREFIX = f"{FOLDER}."  # of its files' names on the way
OUTDATED = 64 << 20  # bytes
SHARED_MEMORY = 64 << 20  # bytes: CRIU writes shared memory while the tasks stand
_SOFT_DIRTY, _THERE = 1 << 55, 3 << 62  # /proc/PID/pagemap; the latter: present or swapped
_SHARED_MAPPING = re.compile(r"(\w+)-(\w+) ...s .* /(?:dev/zero|SYSV\w+) \(deleted\)")
_Words = npt.NDArray[np.uint64]
_Flags = npt.NDArray[np.bool_]


class PreDump:
    """One of them. ``pieces`` to the end, then ``outdated``, ``blobs``; ``give_up`` any time."""

    def __init__(
        self, criu: str, hooks: Path, paths: HostPaths, process: ProcessRef, folder: Path
    ) -> None:
        """Start it. Raises EngineUnsupported, CriuUnusable, OSError."""
        pids = criu_tree.tree(process.pid)
        if not tracks_memory(criu):
            raise EngineUnsupported("the kernel has no soft-dirty bits (CONFIG_MEM_SOFT_DIRTY)")
        shared = sum(map(shared_memory, pids))
        if shared > SHARED_MEMORY:
            raise EngineUnsupported(f"the process would stand while {shared} shared bytes are sent")
        self.complete = False
        self.images = folder / FOLDER
        self._folder = folder
        self._process = process
        self._devices = DeviceFiles(process, paths)
        self._failed: MigrateError | None = None
        self._maps: dict[Path, PageMap] = {}
        self._sent: list[Piece] = []
        shutil.rmtree(folder, ignore_errors=True)
        self.images.mkdir(parents=True, mode=0o700)
        self._pages = PagePipes(self.images, len(pids) + SHARED, PREFIX)
        self._criu = HookedCriu(criu, hooks, folder, LOG, self._answer)
        self._thread = threading.Thread(target=self._run, name="criu-pre-dump", daemon=True)
        self._thread.start()

    @property
    def criu_pid(self) -> int:
        """Pid of CRIU."""
        return self._criu.pid

    def pieces(self) -> Iterator[tuple[Piece, PieceAccess]]:
        """Of the page files, while CRIU writes them. Raises CheckpointFailed at the end."""
        for piece, access in self._pages.pieces():
            self._sent.append(piece)
            yield piece, access
        self._thread.join()
        self._close()
        if self._failed is not None:
            raise self._failed
        self._settle()
        self.complete = True

    def _settle(self) -> None:
        """A dump looks for the parent's page files, and never into them."""
        for path in self.images.glob("pages-*.img"):
            if not path.is_symlink():
                raise CheckpointFailed("criu wrote more page files than were expected")
            path.unlink()
            path.touch(0o600)
        for path in self.images.glob("pagemap-*.img"):
            self._maps[path] = criu_pagemap.decode(path.read_bytes())

    def blobs(self) -> list[Blob]:
        """Its files, as far as the destination needs them."""
        found = []
        for path, pagemap in self._maps.items():
            pages = f"{PREFIX}pages-{pagemap.number}.img"
            found.append(Blob(name=PREFIX + path.name, size=path.stat().st_size))
            if pagemap.size:
                found.append(Blob(name=pages, size=pagemap.size, sparse=True))
        return found

    def outdated(self, written: Iterable[CpuRange]) -> list[Piece]:
        """In the freeze, before the dump looks: which pieces nobody needs any more.

        *written* is memory that may have been written with no bit to tell. Raises OSError.
        """
        for item in written:
            touch(item.pid, range(item.address, item.address + item.length, PAGE))
        of: dict[str, tuple[int, PageMap, _Flags]] = {}
        for path, pagemap in self._maps.items():
            # Not of shared memory, which is limited.
            if match := re.fullmatch(r"pagemap-([0-9]+)\.img", path.name):
                pid, name = int(match[1]), f"{PREFIX}pages-{pagemap.number}.img"
                of[name] = pid, pagemap, _needed(pid, pagemap)
        found = []
        for piece in self._sent:
            if piece.name in of:
                needed = of[piece.name][2]
                kept = needed[piece.offset // PAGE : (piece.offset + piece.size) // PAGE]
                found.append((piece, piece.size - PAGE * int(kept.sum())))
        gone = worthless(found)
        for piece in gone:
            pid, pagemap, needed = of[piece.name]
            touch(pid, _addresses(pagemap, needed, piece))
        return gone

    def give_up(self) -> None:
        """End CRIU, whatever it does; the tasks run. Idempotent."""
        self._failed = self._failed or CheckpointFailed("the pre-dump was given up")
        self._close()
        self._thread.join()

    def _close(self) -> None:
        # The child that writes ends by its pipes, CRIU by its child's end.
        self._pages.close()
        self._criu.close()

    def _run(self) -> None:
        options = CriuOptions(
            images=str(self.images),
            work=str(self._folder),
            log=LOG,
            pid=self._process.pid,
            track_memory=True,
        )
        error = None
        try:
            if not self._criu.swrk.request(RequestType.SINGLE_PRE_DUMP, options).success:
                error = CheckpointFailed(f"criu pre-dump failed: {self._criu.why()}")
        except MigrateError as failure:
            error = CheckpointFailed(f"criu pre-dump: {failure.message}; {self._criu.why()}")
        self._failed = self._failed or error
        self._pages.written()

    def _answer(self, call: HookCall) -> Verdict:
        if call.event.hook is Hook.HANDLE_DEVICE_VMA and self._devices.gpu_of(call) is None:
            return UNSUPPORTED
        return Verdict()


def worthless(pieces: Iterable[tuple[Piece, int]]) -> list[Piece]:
    """Which to give up, each with the bytes of it that are outdated: those with most of it first.

    All that are outdated as a whole; then until OUTDATED bytes are left at most.
    """
    by_waste = sorted(pieces, key=lambda one: one[1], reverse=True)
    left, found = sum(waste for _, waste in by_waste), []
    for piece, waste in by_waste:
        if waste == piece.size or left > OUTDATED:
            found.append(piece)
            left -= waste
    return found


def _needed(pid: int, pagemap: PageMap) -> _Flags:
    """For each page of the page file: whether it is as it was when it was sent."""
    found = np.zeros(pagemap.size // PAGE, dtype=np.bool_)
    with contextlib.suppress(FileNotFoundError), open(f"/proc/{pid}/pagemap", "rb") as file:
        for run in pagemap.runs:
            raw = os.pread(file.fileno(), run.pages * 8, run.address // PAGE * 8)
            words: _Words = np.frombuffer(raw, dtype=np.uint64)
            first = run.offset // PAGE
            is_needed = (words & np.uint64(_THERE) != 0) & (words & np.uint64(_SOFT_DIRTY) == 0)
            found[first : first + len(words)] = is_needed
    return found


def _addresses(pagemap: PageMap, needed: _Flags, piece: Piece) -> Iterator[int]:
    """Of the needed pages in *piece*."""
    end = piece.offset + piece.size
    for run in pagemap.runs:
        first, last = max(run.offset, piece.offset), min(run.offset + run.size, end)
        for offset in range(first, last, PAGE):
            if needed[offset // PAGE]:
                yield run.address + offset - run.offset


def touch(pid: int, pages: Iterable[int]) -> None:
    """Write a byte of each page back to where it is, in a process that stands: it is dirty then.

    /proc/PID/mem also writes what the process itself may only read. A page that is not there
    needs none.
    """
    memory = os.open(f"/proc/{pid}/mem", os.O_RDWR | os.O_CLOEXEC)
    try:
        for address in pages:
            with contextlib.suppress(OSError):
                os.pwrite(memory, os.pread(memory, 1, address), address)
    finally:
        os.close(memory)


def shared_memory(pid: int) -> int:
    """Bytes of shared memory without a file that it has mapped."""
    total = 0
    with contextlib.suppress(OSError), open(f"/proc/{pid}/maps") as maps:
        for line in maps:
            if match := _SHARED_MAPPING.match(line):
                total += int(match[2], 16) - int(match[1], 16)
    return total
