"""Memory that was sent before the freeze: two page maps become one, and the bytes follow."""

from __future__ import annotations

import mmap
import os
import random
from pathlib import Path

import msgspec
import pytest

from migrate.criu import protobuf
from migrate.dataplane.chunks import address_of
from migrate.engine import criu_pagemap, criu_predump
from migrate.engine.criu_images import Images
from migrate.engine.criu_pagemap import PAGE, PageMap, Run
from migrate.engine.criu_pages import PIECE, PagePipes
from migrate.engine.criu_predump import OUTDATED, PREFIX, worthless
from migrate.engine.seam import Blob, CpuRange, Piece
from migrate.errors import FrameRejected
from migrate.kfd.privdata import encode
from migrate.orchestrator.objects import lent
from tests.property.test_peer_checks import CHECKPOINT, PRIVATE

MAGIC = bytes(range(8))
PARENT, PRESENT = 1, 4
Pages = dict[int, bytes]  # by number


def page(number: int, version: int) -> bytes:
    return random.Random(number * 1000 + version).randbytes(PAGE)


def pagemap(number: int, pages: list[tuple[int, int]]) -> PageMap:
    """Of (page, flags), by page; neighbours with the same flags are one run."""
    runs: list[Run] = []
    offset = 0
    for at, flags in pages:
        last = runs[-1] if runs else None
        if last and last.flags == flags and last.address + last.size == at * PAGE:
            runs[-1] = msgspec.structs.replace(last, pages=last.pages + 1)
        else:
            runs.append(Run(address=at * PAGE, pages=1, flags=flags, offset=offset))
        offset += PAGE if flags & PRESENT else 0
    return PageMap(number=number, runs=tuple(runs), magic=MAGIC)


def written(pages: Pages, numbers: list[int]) -> bytes:
    return b"".join(pages[number] for number in numbers)


def restored(data: bytes, file: bytes) -> Pages:
    """What CRIU would restore."""
    found: Pages = {}
    for run in criu_pagemap.decode(data).runs:
        assert run.flags == PRESENT
        for index in range(run.pages):
            at = run.offset + index * PAGE
            found[run.address // PAGE + index] = file[at : at + PAGE]
    return found


class Sent:
    """A process of random pages: some were written again, some are gone, some are new."""

    def __init__(self, seed: int) -> None:
        chance = random.Random(seed)
        numbers = sorted(chance.sample(range(1, 400), 200))
        first = numbers[:150]
        self.before = {number: page(number, 1) for number in first}
        self.now = {n: page(n, 1) for n in numbers if n in self.before and chance.random() < 0.8}
        fresh = [n for n in numbers if n not in self.before or chance.random() < 0.3]
        self.now |= {number: page(number, 2) for number in fresh}
        kept = [n for n in sorted(self.now) if self.now[n] == self.before.get(n)]
        self.parent_map = pagemap(3, [(number, PRESENT) for number in first])
        self.final_map = pagemap(
            1, [(n, PARENT if n in kept else PRESENT) for n in sorted(self.now)]
        )
        self.files = {
            f"{PREFIX}pagemap-7.img": criu_pagemap.encode(self.parent_map),
            "pagemap-7.img": criu_pagemap.encode(self.final_map),
            f"{PREFIX}pages-3.img": written(self.before, first),
            "pages-1.img": written(self.now, [n for n in sorted(self.now) if n not in kept]),
        }

    def place(self, images: Images, name: str, first: int = 0) -> None:
        """From page *first* on, in parts as the data plane does: written, then read back."""
        data = self.files[name]
        sparse = name == f"{PREFIX}pages-3.img"
        file = images.open(Blob(name=name, size=len(data), sparse=sparse))
        for at in range(first * PAGE, len(data), 7 * PAGE):
            part = data[at : at + 7 * PAGE]
            file.write(at, memoryview(part))
            back = bytearray(len(part))
            file.read(at, memoryview(back))
            assert bytes(back) == part
        file.close()


@pytest.mark.parametrize("seed", range(10))
def test_what_criu_finds_is_the_process_as_it_was_in_the_freeze(tmp_path: Path, seed: int) -> None:
    sent, images = Sent(seed), Images(tmp_path / "images")
    for name in sent.files:
        sent.place(images, name)
    images.finish()
    names = {path.name for path in images.folder.iterdir()}
    assert names == {"pagemap-7.img", "pages-1.img"}, "CRIU would look for a parent"
    found = {name: (images.folder / name).read_bytes() for name in names}
    assert restored(found["pagemap-7.img"], found["pages-1.img"]) == sent.now
    images.close()


def test_pages_before_their_maps_are_refused(tmp_path: Path) -> None:
    sent, images = Sent(1), Images(tmp_path / "images")
    sent.place(images, "pagemap-7.img")
    with pytest.raises(FrameRejected, match="no page map"):
        sent.place(images, f"{PREFIX}pages-3.img")
    images.close()


def test_needed_pages_that_did_not_come_are_noticed(tmp_path: Path) -> None:
    sent, images = Sent(1), Images(tmp_path / "images")
    for name in sent.files:
        sent.place(images, name, first=100 if name.startswith(f"{PREFIX}pages") else 0)
    with pytest.raises(FrameRejected, match="were not sent"):
        images.finish()
    images.close()


@pytest.mark.parametrize("name", ["pages-1.img", "pre-dump.pages-3.img", "pre-dump.pages-9.img"])
def test_a_page_file_of_another_size_than_its_map_says(tmp_path: Path, name: str) -> None:
    sent, images = Sent(1), Images(tmp_path / "images")
    for pages in (f"{PREFIX}pagemap-7.img", "pagemap-7.img"):
        sent.place(images, pages)
    with pytest.raises(FrameRejected):
        images.open(Blob(name=name, size=PAGE, sparse=True))
    images.close()


def test_a_task_that_ended_since_leaves_nothing(tmp_path: Path) -> None:
    sent, images = Sent(1), Images(tmp_path / "images")
    for name in (f"{PREFIX}pagemap-7.img", f"{PREFIX}pages-3.img"):
        sent.place(images, name)
    images.finish()
    assert not list(images.folder.iterdir())
    images.close()


def test_a_page_that_only_the_parent_could_have(tmp_path: Path) -> None:
    sent = Sent(1)
    fewer = msgspec.structs.replace(sent.parent_map, runs=sent.parent_map.runs[1:])
    with pytest.raises(FrameRejected, match="was not sent before"):
        criu_pagemap.merge(sent.final_map, fewer)


@pytest.mark.parametrize(
    "entry",
    [
        {1: PAGE + 1, 2: 1, 4: PRESENT},
        {1: PAGE, 2: 0, 4: PRESENT},
        {1: 0, 2: 1, 4: PRESENT},
        {1: b"", 2: 1},
    ],
)
def test_a_page_map_that_criu_never_wrote(entry: dict[int, int]) -> None:
    data = criu_pagemap.encode(pagemap(1, [(2, PRESENT)]))
    message = protobuf.encode(entry)
    with pytest.raises(FrameRejected):
        criu_pagemap.decode(data + len(message).to_bytes(4, "little") + message)
    with pytest.raises(FrameRejected):
        criu_pagemap.decode(data[:-1])
    with pytest.raises(FrameRejected):
        criu_pagemap.decode(data[:8])


def test_touching_changes_nothing() -> None:
    memory = bytearray(os.urandom(4 * PAGE))
    before = bytes(memory)
    address = address_of(memoryview(memory)) // PAGE * PAGE
    criu_predump.touch(os.getpid(), range(address, address + 4 * PAGE, PAGE))
    criu_predump.touch(os.getpid(), [PAGE])  # nothing is there
    assert bytes(memory) == before


def test_pieces_are_given_up_until_little_is_there_for_nothing() -> None:
    chance = random.Random(1)
    for _ in range(200):
        pieces = []
        for number in range(chance.randrange(1, 40)):
            piece = Piece(name="p", offset=number * PIECE, size=chance.choice([PIECE, PAGE]))
            waste = chance.choice([0, piece.size, chance.randrange(piece.size + 1)])
            pieces.append((piece, waste))
        gone = worthless(pieces)
        kept = [(piece, waste) for piece, waste in pieces if piece not in gone]
        assert all(waste < piece.size for piece, waste in kept)
        assert sum(waste for _, waste in kept) <= OUTDATED
        needed = [w for p, w in pieces if p in gone and w < p.size]
        if needed:  # not one more than it takes
            assert sum(waste for _, waste in kept) + min(needed) > OUTDATED
        assert not needed or min(needed) >= max((waste for _, waste in kept), default=0)


def test_shared_memory_that_no_file_has_is_counted() -> None:
    before = criu_predump.shared_memory(os.getpid())
    with mmap.mmap(-1, 5 * PAGE):  # a shared one
        assert criu_predump.shared_memory(os.getpid()) == before + 5 * PAGE
    assert criu_predump.shared_memory(os.getpid()) == before


def test_whole_pages_of_what_is_lent_to_gpus_come_again() -> None:
    (lent_range,) = lent(CHECKPOINT)
    assert lent_range == CpuRange(pid=CHECKPOINT.pid, address=0x30000, length=8 * PAGE)
    bos = (*PRIVATE.bos[:2], msgspec.structs.replace(PRIVATE.bos[2], user_addr=0x30010))
    private = encode(msgspec.structs.replace(PRIVATE, bos=bos))
    (lent_range,) = lent(msgspec.structs.replace(CHECKPOINT, priv_data=private))
    assert lent_range == CpuRange(pid=CHECKPOINT.pid, address=0x30000, length=9 * PAGE)


def test_pipes_that_are_closed_let_criu_go_though_a_piece_is_still_out(tmp_path: Path) -> None:
    pipes = PagePipes(tmp_path, 2)
    writers = [os.open(tmp_path / f"pages-{number}.img", os.O_WRONLY) for number in (1, 2)]
    for writer in writers:
        os.write(writer, bytes(PAGE))
    coming = pipes.pieces()
    piece, access = next(coming)
    assert (piece.name, piece.size) == ("pages-1.img", PAGE)
    pipes.close()
    for writer in writers:
        with pytest.raises(BrokenPipeError):
            os.write(writer, bytes(PAGE))
        os.close(writer)
    access.close()
    assert list(coming) == []
