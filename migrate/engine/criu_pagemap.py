"""CRIU's page maps (its images/pagemap.proto): where in a page file each page of a task is.

A page file has the pages of its map's runs one after another, without any address. In the
map of a dump with a parent some runs are only in the parent's page file. ``merge`` makes one
map and one page file of the two, so that a restore needs no parent: CRIU reads pages of a
parent without giving back on the way what it has read.

Pure. Raises FrameRejected for what CRIU would not have written.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator

from migrate.criu import protobuf
from migrate.errors import FrameRejected
from migrate.model import Value

PAGE = 4096  # bytes
NAME = re.compile(r"pagemap-(?:shmem-)?([0-9]+)\.img")
_MAGIC = 8  # bytes
_IN_PARENT, _PRESENT = 1, 4  # PE_PARENT, PE_PRESENT of criu/include/pagemap.h
_U64 = (1 << 64) - 1


class Run(Value):
    """*pages* pages from *address*, at *offset* of the page file if they are ``present``."""

    address: int
    pages: int
    flags: int
    offset: int

    @property
    def present(self) -> bool:
        """Whether the page file has them; else the parent's has."""
        return bool(self.flags & _PRESENT)

    @property
    def size(self) -> int:
        """Bytes."""
        return self.pages * PAGE


class PageMap(Value):
    """A file ``pagemap-*.img``: by *number* its page file is ``pages-NUMBER.img``."""

    number: int
    runs: tuple[Run, ...]  # by address
    magic: bytes

    @property
    def size(self) -> int:
        """Bytes of the page file."""
        return sum(run.size for run in self.runs if run.present)


class Extent(Value):
    """*length* bytes from *start* of a page file as it came belong to *to* of the merged one."""

    start: int
    length: int
    to: int


class Merged(Value):
    """One map, and where the bytes of the two page files belong in its page file.

    What of the parent's is outdated comes behind all pages of the map.
    """

    pagemap: PageMap
    final: tuple[Extent, ...]
    parent: tuple[Extent, ...]
    outdated: tuple[Extent, ...]

    @property
    def size(self) -> int:
        """Bytes of the merged page file, with what is outdated."""
        return self.pagemap.size + sum(extent.length for extent in self.outdated)


def decode(data: bytes) -> PageMap:
    """A file's contents. Raises FrameRejected."""
    try:
        head, *entries = map(protobuf.decode, _records(data))
        runs, offset, end = [], 0, 0
        for entry in entries:
            pages = entry.integer(5) or entry.integer(2)
            address = entry.integer(1) & _U64
            if pages < 1 or address % PAGE or address < end:
                raise FrameRejected(f"a page map has {pages} pages at {address:#x}")
            default = _IN_PARENT if entry.integer(3) else _PRESENT  # of older CRIUs
            run = Run(
                address=address, pages=pages, flags=entry.integer(4) or default, offset=offset
            )
            runs.append(run)
            offset += run.size if run.present else 0
            end = address + run.size
        return PageMap(number=head.integer(1), runs=tuple(runs), magic=data[:_MAGIC])
    except ValueError as error:
        raise FrameRejected(f"a page map can't be read: {error}") from error


def _records(data: bytes) -> Iterator[bytes]:
    at = _MAGIC
    while at < len(data) or at == _MAGIC:
        end = at + 4 + int.from_bytes(data[at : at + 4], "little")
        if end > len(data):
            raise ValueError("it is cut short")
        yield data[at + 4 : end]
        at = end


def encode(pagemap: PageMap) -> bytes:
    """What ``decode`` reads."""
    out = [pagemap.magic]
    messages = [protobuf.encode({1: pagemap.number})]
    messages += (
        protobuf.encode({1: run.address, 2: run.pages & 0xFFFFFFFF, 4: run.flags, 5: run.pages})
        for run in pagemap.runs
    )
    for message in messages:
        out += (len(message).to_bytes(4, "little"), message)
    return b"".join(out)


def merge(final: PageMap, parent: PageMap) -> Merged:
    """Both as one. Raises FrameRejected if the parent lacks a page."""
    runs, from_final, from_parent, at = [], [], [], 0
    for run in final.runs:
        flags, begin = run.flags, at
        if run.present:
            from_final.append(Extent(start=run.offset, length=run.size, to=at))
            at += run.size
        elif flags & _IN_PARENT:
            for start, length in _find(parent, run):
                from_parent.append(Extent(start=start, length=length, to=at))
                at += length
            flags = _PRESENT
        runs.append(Run(address=run.address, pages=run.pages, flags=flags, offset=begin))
    outdated, done = [], 0
    for extent in [*from_parent, Extent(start=parent.size, length=0, to=0)]:
        if extent.start > done:
            outdated.append(Extent(start=done, length=extent.start - done, to=at))
            at += extent.start - done
        done = extent.start + extent.length
    return Merged(
        pagemap=PageMap(number=final.number, runs=tuple(runs), magic=final.magic),
        final=tuple(from_final),
        parent=tuple(from_parent),
        outdated=tuple(outdated),
    )


def _find(parent: PageMap, wanted: Run) -> Iterator[tuple[int, int]]:
    """(offset, length) of the parent's page file, in order."""
    at, end = wanted.address, wanted.address + wanted.size
    index = bisect_right(parent.runs, at, key=lambda run: run.address) - 1
    while at < end:
        run = parent.runs[index] if 0 <= index < len(parent.runs) else None
        if run is None or not run.present or not run.address <= at < run.address + run.size:
            raise FrameRejected(f"the page at {at:#x} was not sent before")
        length = min(end, run.address + run.size) - at
        yield run.offset + at - run.address, length
        at += length
        index += 1
