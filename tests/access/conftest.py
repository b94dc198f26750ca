"""A process with buffers on a GPU, and access to them from outside by each side of the seam.

On a simulated node there is ``mmap``; with MIGRATE_CONFORMANCE=kernel (the lab, a real card)
``sdma`` as well, and then it must be there: a card without it fails the suite.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import pytest

from migrate.dataplane.access import MemoryAccess
from migrate.dataplane.memory import MmapAccess
from migrate.dataplane.sdma.access import SdmaAccess
from migrate.dataplane.sdma.card import Card, Cards
from migrate.kfd import uapi
from tests.conformance import image as raw
from tests.conformance.conftest import _host  # noqa: F401
from tests.conformance.hosts import KERNEL, Child, Host, Link
from tests.conformance.image import INVALID, Buffers
from tests.conformance.kit import GTT, VRAM, WRITABLE, Process, gpu_nodes
from tests.conformance.tracer import held


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The simulated node has no DMA engine: `make lab` runs what needs one."""
    if KERNEL:
        return
    dma = [i for i in items if "tests/access/" in i.nodeid and _needs_dma(i)]
    items[:] = [item for item in items if item not in dma]
    config.hook.pytest_deselected(items=dma)


def _needs_dma(item: pytest.Item) -> bool:
    return "test_sdma.py" in item.nodeid or "sdma" in item.name


SLOT = 32 << 10  # small, for emulated hosts: what counts is where the pieces end
SIZE = 11 * SLOT + 3 * 4096  # more than fits in flight
KINDS = {"vram": VRAM, "gtt": GTT}


def owner(link: Link, size: int, flags: int) -> None:
    """A process with one buffer; does what it is told."""
    process = Process(link.paths)
    buffer = process.alloc(process.gpu_ids[0], size, flags | WRITABLE)
    link.say(buffer.size)
    while True:
        what, *arguments = link.hear()
        found = attrgetter(what)(buffer)
        link.say(found(*arguments) if arguments else found)


@dataclass
class Owned:
    """The buffer of a process, as a checkpoint gives it."""

    child: Child
    node: str  # render node of its GPU
    fd: int
    size: int

    def write(self, offset: int, data: bytes) -> None:
        """By the process itself."""
        self.child.ask(("write", offset, data))

    def read(self, offset: int, length: int) -> bytes:
        """By the process itself."""
        data: bytes = self.child.ask(("read", offset, length))
        return data

    @property
    def address(self) -> int:
        """Where the process has it mapped."""
        found: int = self.child.ask(("memory.address",))
        return found


def own(host: Host, size: int, flags: int) -> Owned:
    """Start a process with a buffer and take its dmabuf."""
    child = host.spawn(owner, size, flags)
    assert child.hear() == size
    with held(child.pid, host.paths) as file:
        counts = raw.process_info(file)
        try:
            buffers = Buffers(counts)
            raw.criu(file, uapi.KFD_CRIU_OP_CHECKPOINT, **buffers.fields)
        finally:
            raw.unpause(file)
    (bucket,) = [b for b in buffers.bos if b.dmabuf_fd != INVALID and b.size == size]
    fd = os.dup(bucket.dmabuf_fd)
    buffers.close()
    minor = next(iter(gpu_nodes(host.paths).values()))
    return Owned(child, f"{host.paths.dri}/renderD{minor}", fd, size)


@pytest.fixture(scope="session")
def cards() -> Iterator[Cards]:
    found = Cards(SLOT)
    yield found
    found.close()


@pytest.fixture(scope="module", params=sorted(KINDS))
def owned(request: pytest.FixtureRequest, _host: Host) -> Iterator[Owned]:  # noqa: F811
    """A buffer of a process, one a module and kind."""
    found = own(_host, SIZE, KINDS[request.param])
    yield found
    os.close(found.fd)
    found.child.close()


@pytest.fixture
def card(cards: Cards, owned: Owned) -> Card:
    """The card of the buffer."""
    return cards.open(owned.node)


@pytest.fixture(params=["mmap", "sdma"])
def access(request: pytest.FixtureRequest, owned: Owned) -> Iterator[MemoryAccess]:
    made: Any
    if request.param == "mmap":
        made = MmapAccess(owned.fd, owned.size, own=False)
    else:
        made = SdmaAccess(request.getfixturevalue("card"), owned.fd, owned.size)
    yield made
    made.close()
