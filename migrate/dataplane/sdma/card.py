"""One card's DMA engine: its device, a bounded bounce buffer, copies in flight."""

from __future__ import annotations

import ctypes
import errno
import os
import queue
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from ctypes import byref, c_uint32, c_uint64, c_void_p
from typing import NamedTuple

from migrate.dataplane.sdma import libdrm
from migrate.dataplane.sdma.packets import GENERATIONS, Generation, copy_commands

SLOT = 2 << 20  # bytes of bounce memory that one copy goes through
SLOTS = 8  # copies in flight; with their commands that is all the GTT memory a card costs us
COMMANDS = 4096  # bytes of commands of a slot: far more than its packets take
PAGE = 4096
FENCE_SECONDS = 30  # a copy of 2 MiB that takes longer hangs

_RIGHTS = libdrm.VM_PAGE_READABLE | libdrm.VM_PAGE_WRITEABLE | libdrm.VM_PAGE_EXECUTABLE


class Buffer:
    """A BO mapped into the card's address space. Frees everything in ``close``."""

    def __init__(self, card: Card, handle: int, size: int) -> None:
        self.size = -(-size // PAGE) * PAGE
        self.handle = handle
        library = card.library
        with ExitStack() as stack:
            stack.callback(library.call, "amdgpu_bo_free", handle)
            kms = c_uint32()
            library.call("amdgpu_bo_export", handle, libdrm.HANDLE_KMS, byref(kms))
            self.kms = kms.value
            address = c_uint64()
            range_handle = c_void_p()
            library.call(
                *("amdgpu_va_range_alloc", card.device, libdrm.VA_RANGE_GENERAL, self.size),
                *(PAGE, 0, byref(address), byref(range_handle), libdrm.VA_RANGE_HIGH),
            )
            stack.callback(library.call, "amdgpu_va_range_free", range_handle)
            self.address = address.value
            va_op = ("amdgpu_bo_va_op_raw", card.device, handle, 0, self.size, self.address)
            library.call(*va_op, _RIGHTS, libdrm.VA_OP_MAP)
            stack.callback(library.call, *va_op, 0, libdrm.VA_OP_UNMAP)
            self._stack = stack.pop_all()

    def close(self) -> None:
        """Unmap and free. Idempotent."""
        self._stack.close()


class Slot:
    """A piece of the bounce buffer: its GPU and CPU addresses, and those of its commands."""

    def __init__(self, buffer: Buffer, pointer: int, index: int, size: int) -> None:
        offset = index * (size + COMMANDS)
        self.address = buffer.address + offset
        self.pointer = pointer + offset
        self.commands = self.address + size
        self.commands_pointer = self.pointer + size


class Fence(NamedTuple):
    """A copy under way: the context it was submitted in, and its number there."""

    context: int
    number: int


class Card:
    """The DMA engine behind one render node. Thread-safe. *slot* is bytes of a copy.

    Raises OSError where the library, the node or the engine can't do it.
    """

    def __init__(self, node: str, slot: int = SLOT) -> None:
        self.library = libdrm.Library()
        self.node = node
        self.slot = slot
        with ExitStack() as stack:
            fd = os.open(node, os.O_RDWR | os.O_CLOEXEC)
            stack.callback(os.close, fd)
            major, minor = c_uint32(), c_uint32()
            self.device = self.library.make(
                "amdgpu_device_initialize", fd, byref(major), byref(minor)
            )
            stack.callback(self.library.call, "amdgpu_device_deinitialize", self.device)
            self.generation = self._generation()
            self._lock = threading.Lock()
            self._context = self._new_context(stack)
            self.bounce = self._bounce(stack)
            self._stack = stack.pop_all()

    def _generation(self) -> Generation:
        info = libdrm.InfoHwIp()
        self.library.call("amdgpu_query_hw_ip_info", self.device, libdrm.HW_IP_DMA, 0, byref(info))
        if not info.available_rings & 1:
            raise OSError(errno.ENODEV, f"{self.node} has no SDMA ring for us")
        found = GENERATIONS.get(info.hw_ip_version_major)
        if found is None:
            raise OSError(
                errno.EOPNOTSUPP,
                f"{self.node} has SDMA {info.hw_ip_version_major}, whose packets we don't know",
            )
        return found

    def _new_context(self, stack: ExitStack) -> int:
        context = self.library.make("amdgpu_cs_ctx_create", self.device)
        stack.callback(self.library.call, "amdgpu_cs_ctx_free", context)
        return context

    def _bounce(self, stack: ExitStack) -> Buffer:
        size = SLOTS * (self.slot + COMMANDS)
        request = libdrm.BoAllocRequest(size, PAGE, libdrm.GEM_DOMAIN_GTT, 0)
        handle = self.library.make("amdgpu_bo_alloc", self.device, byref(request))
        buffer = Buffer(self, handle, size)
        stack.callback(buffer.close)
        pointer = self.library.make("amdgpu_bo_cpu_map", handle)
        stack.callback(self.library.call, "amdgpu_bo_cpu_unmap", handle)
        self._free: queue.SimpleQueue[Slot] = queue.SimpleQueue()
        for index in range(SLOTS):
            self._free.put(Slot(buffer, pointer, index, self.slot))
        return buffer

    def close(self) -> None:
        """Give back everything. No copies may be under way."""
        self._stack.close()

    def import_dmabuf(self, fd: int) -> Buffer:
        """The BO of a dmabuf, mapped. Raises OSError."""
        result = libdrm.BoImportResult()
        self.library.call(
            "amdgpu_bo_import", self.device, libdrm.HANDLE_DMA_BUF_FD, fd, byref(result)
        )
        return Buffer(self, result.buf_handle, result.alloc_size)

    @contextmanager
    def listed(self, buffer: Buffer) -> Iterator[int]:
        """A list of the BOs that copies to and from *buffer* touch; its number."""
        entry = libdrm.BoListEntry
        entries = (entry * 2)(entry(buffer.kms, 0), entry(self.bounce.kms, 0))
        number = c_uint32()
        self.library.call("amdgpu_bo_list_create_raw", self.device, 2, entries, byref(number))
        try:
            yield number.value
        finally:
            self.library.call("amdgpu_bo_list_destroy_raw", self.device, number)

    def take_slot(self, *, wait: bool) -> Slot | None:
        """A free slot; None if there is none and *wait* is false. ETIME if none comes free."""
        try:
            return self._free.get(block=wait, timeout=FENCE_SECONDS if wait else None)
        except queue.Empty:
            if not wait:
                return None
            raise OSError(errno.ETIME, f"all copies of {self.node} hang") from None

    def give_slot(self, slot: Slot) -> None:
        """The slot is free again."""
        self._free.put(slot)

    def submit(self, bo_list: int, slot: Slot, source: int, destination: int, length: int) -> Fence:
        """Begin a copy whose commands go into *slot*. Raises OSError."""
        commands = copy_commands(self.generation, source, destination, length)
        return self.submit_commands(bo_list, slot, commands)

    def submit_commands(self, bo_list: int, slot: Slot, commands: bytes) -> Fence:
        """Begin what *commands* say, at most COMMANDS bytes. Raises OSError."""
        ctypes.memmove(slot.commands_pointer, commands, len(commands))
        ib = libdrm.CsChunkIb(0, 0, slot.commands, len(commands), libdrm.HW_IP_DMA, 0, 0)
        chunk = libdrm.CsChunk(libdrm.CHUNK_ID_IB, ctypes.sizeof(ib) // 4, ctypes.addressof(ib))
        number = c_uint64()
        context = self._context
        try:
            self.library.call(
                *("amdgpu_cs_submit_raw2", self.device, context, bo_list, 1),
                *(byref(chunk), byref(number)),
            )
        except OSError as error:
            self._renew(context, error)
            raise
        return Fence(context, number.value)

    def wait(self, fence: Fence) -> None:
        """Until the copy is done. Raises OSError if the engine failed or hangs."""
        status = libdrm.CsFence(fence.context, libdrm.HW_IP_DMA, 0, 0, fence.number)
        expired = c_uint32()
        try:
            self.library.call(
                *("amdgpu_cs_query_fence_status", byref(status)),
                *(FENCE_SECONDS * 10**9, 0, byref(expired)),
            )
        except OSError as error:
            self._renew(fence.context, error)
            raise
        if not expired.value:
            raise OSError(errno.ETIME, f"SDMA copy {fence.number} of {self.node} does not end")

    def _renew(self, context: int, error: OSError) -> None:
        """The kernel takes no more jobs of a context that made the engine fail."""
        with self._lock:
            if error.errno in (errno.ECANCELED, errno.ETIME) and context == self._context:
                self._context = self._new_context(self._stack)


class Cards:
    """The cards of a host, each opened at its first use and kept."""

    def __init__(self, slot: int = SLOT) -> None:
        self._slot = slot
        self._lock = threading.Lock()
        self._cards: dict[str, Card] = {}

    def open(self, node: str) -> Card:
        """The card of a render node. Raises OSError, each time anew."""
        with self._lock:
            card = self._cards.get(node)
            if card is None:
                card = self._cards[node] = Card(node, self._slot)
            return card

    def close(self) -> None:
        """Give all back."""
        with self._lock:
            for card in self._cards.values():
                card.close()
            self._cards.clear()
