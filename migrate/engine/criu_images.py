"""CRIU's files at the destination: in memory, without a place on a disk.

CRIU finds them by links in its folder. It gives back what it has read (auto-dedup), so that
the bytes are in memory once: in staging, in these files, or in the process.

What was sent before the freeze (criu_predump) has page maps and page files of its own. The
bytes of both page files are put where they belong in one, so the page maps have to come first.
"""

from __future__ import annotations

import os
import re
import shutil
import threading
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path

from migrate.engine import criu_pagemap
from migrate.engine.criu_pagemap import PAGE, Extent, PageMap
from migrate.engine.criu_predump import PREFIX
from migrate.engine.image_file import ImageFile
from migrate.engine.seam import Blob
from migrate.errors import FrameRejected
from migrate.model import Value

_PAGES = re.compile(r"pages-([0-9]+)\.img")


class Spread(Value):
    """Where a page file belongs: *extents*, by their start, of the file *target* of *size* bytes.

    ``came``: of each page, whether it was placed; those of ``wanted`` have to be.
    """

    target: str
    size: int
    extents: tuple[Extent, ...]
    wanted: tuple[Extent, ...]
    came: bytearray


class Images:
    """The files of one restore, in *folder*, as long as CRIU needs them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._files: dict[str, int] = {}  # fd by name
        self._maps: dict[str, PageMap] | None = None  # those of merged files, by their name
        self._spread: dict[str, Spread] = {}  # by name

    def open(self, blob: Blob) -> ImageFile:
        """The file, made when first asked for. *blob*'s name is a file's name.

        Raises OSError, FrameRejected.
        """
        with self._lock:
            if _PAGES.fullmatch(blob.name.removeprefix(PREFIX)):
                self._merge()
            spread = self._spread.get(blob.name)
            if blob.sparse and spread is None:
                raise FrameRejected(f"{blob.name} has no page map, and was not sent whole")
            if spread is None:
                return ImageFile(os.dup(self._file(blob.name, blob.size)), blob.size)
            if blob.size != len(spread.came) * PAGE:
                raise FrameRejected(f"{blob.name} and its page map are of different sizes")
            fd = os.dup(self._file(spread.target, spread.size))
            return SpreadFile(fd, blob.size, spread.extents, spread.came)

    def _file(self, name: str, size: int) -> int:
        fd = self._files.get(name)
        if fd is None:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            fd = os.memfd_create(f"criu {name}")
            try:
                os.ftruncate(fd, size)
                if not name.startswith(PREFIX):
                    (self.folder / name).symlink_to(f"/proc/{os.getpid()}/fd/{fd}")
            except OSError:
                os.close(fd)
                raise
            self._files[name] = fd
        return fd

    def _merge(self) -> None:
        """By all page maps that came before the first page file: where pages belong."""
        if self._maps is not None:
            return
        self._maps = {}
        for name in [name for name in self._files if name.startswith(PREFIX)]:
            own = name.removeprefix(PREFIX)
            if not criu_pagemap.NAME.fullmatch(own):
                raise FrameRejected(f"{name} is no file that is sent before")
            parent = self._read_map(name)
            pages, target = f"{PREFIX}pages-{parent.number}.img", f"{PREFIX}outdated-{own}"
            final = PageMap(number=0, runs=(), magic=b"")  # of a task that has ended since
            if own in self._files:
                final = self._read_map(own)
                target = f"pages-{final.number}.img"
            merged = criu_pagemap.merge(final, parent)
            if own in self._files:
                self._maps[own] = merged.pagemap
                self._add(target, target, merged.size, final, merged.final, ())
            self._add(pages, target, merged.size, parent, merged.parent, merged.outdated)

    def _add(
        self,
        name: str,
        target: str,
        size: int,
        pagemap: PageMap,
        wanted: tuple[Extent, ...],
        others: tuple[Extent, ...],
    ) -> None:
        if name in self._spread:
            raise FrameRejected(f"two page maps of {name}")
        self._spread[name] = Spread(
            target=target,
            size=size,
            extents=tuple(sorted((*wanted, *others), key=lambda extent: extent.start)),
            wanted=wanted,
            came=bytearray(pagemap.size // PAGE),
        )

    def finish(self) -> None:
        """All that was sent is placed: CRIU finds merged page maps. Raises FrameRejected."""
        with self._lock:
            for name, spread in self._spread.items():
                for extent in spread.wanted:
                    first, last = extent.start // PAGE, (extent.start + extent.length) // PAGE
                    if not all(spread.came[first:last]):
                        raise FrameRejected(f"pages of {name} that are needed were not sent")
            for name, pagemap in (self._maps or {}).items():
                data = criu_pagemap.encode(pagemap)
                os.truncate(self._files[name], 0)
                os.pwrite(self._files[name], data, 0)

    def _read_map(self, name: str) -> PageMap:
        fd = self._files[name]
        return criu_pagemap.decode(os.pread(fd, os.fstat(fd).st_size, 0))

    def close(self) -> None:
        """Free the memory, remove the folder. Idempotent."""
        with self._lock:
            files, self._files = self._files, {}
        for fd in files.values():
            os.close(fd)
        shutil.rmtree(self.folder, ignore_errors=True)


class SpreadFile(ImageFile):
    """A page file whose bytes are in *extents* of the file that *fd* is open on."""

    def __init__(self, fd: int, size: int, extents: Sequence[Extent], came: bytearray) -> None:
        super().__init__(fd, size)
        self._extents = extents
        self._came = came

    def read(self, offset: int, into: memoryview) -> None:
        """See MemoryAccess. Whoever placed bytes reads them back: these came."""
        for at, part in self._parts(offset, into):
            self._read(at, part)
        first, last = -(-offset // PAGE), (offset + len(into)) // PAGE
        self._came[first:last] = b"\1" * (last - first)

    def write(self, offset: int, data: memoryview) -> None:
        """See MemoryAccess."""
        for at, part in self._parts(offset, data):
            self._write(at, part)

    def _parts(self, offset: int, data: memoryview) -> Iterator[tuple[int, memoryview]]:
        """Where each part of *data*, from *offset* of the page file, is."""
        self._check(offset, len(data))
        index = bisect_right(self._extents, offset, key=lambda extent: extent.start) - 1
        done = 0
        while done < len(data):
            extent = self._extents[index]
            skip = offset + done - extent.start
            length = min(extent.length - skip, len(data) - done)
            yield extent.to + skip, data[done : done + length]
            done += length
            index += 1
