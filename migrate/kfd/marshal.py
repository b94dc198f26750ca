"""An ioctl as a message: what its struct points to and which of its fields are fds.

The table of ``layout`` says for each KFD ioctl where user pointers and file
descriptors hide. This module serves whoever carries an ioctl elsewhere: the simulated node's
client and node, and the executor that runs an ioctl in another process.

    caller:    call = pack(request, arg)      ->  wire, fds by SCM_RIGHTS
    executor:  reply = execute(call, file)    <-  (or the simulated node, by itself)
    caller:    apply(reply, request, arg)

On the wire an fd field holds an index into ``fds`` of the call or reply, or
KFD_INVALID_FD. A call packed with ``remote_fds=True`` is the exception: its incoming
fd fields are numbers that are valid where the ioctl runs, and travel as they are.

Wire format, little-endian. It describes itself, so that an executor in C needs no
table; executors in Python still check it against the table.

    call:  "KFDC" u16 version, u16 flags, u32 request, u32 arg size, u32 regions,
           u32 fd slots, u32 fds,
           regions: u64 pointer, u64 length, u32 offset of the pointer in arg, u32 direction
           slots:   u32 region (0xffffffff: arg), u32 offset, u32 stride, u32 count,
                    u32 direction
           arg, then the bytes of each region whose direction has IN
    reply: "KFDR" u16 version, u16 flags (0), u32 errno, u32 arg size, u32 regions, u32 fds,
           regions: u64 length
           arg, then the bytes of each region

A message does not fit into one packet of a socket in general (and SCM_RIGHTS carries
at most 253 fds): framing is the transport's business.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from typing import Any

from migrate.errors import FrameRejected
from migrate.kfd import uapi
from migrate.kfd.file import KfdFile
from migrate.kfd.layout import ARG, Direction, FdSlot, Layout, layout
from migrate.kfd.usermem import GuardedBuffer, read_memory, write_memory
from migrate.model import Value

# ---------------------------------------------------------------- messages


class Region(Value):
    """Memory of the caller: *data* is empty unless the direction has IN."""

    pointer: int
    length: int
    direction: int
    data: bytes = b""


class Call(Value):
    """An ioctl to be run elsewhere. ``fds`` are numbers of whoever holds this value."""

    request: int
    arg: bytes
    regions: tuple[Region, ...] = ()
    fds: tuple[int, ...] = ()
    remote_fds: bool = False

    def encode(self) -> bytes:
        """The wire form; ``fds`` travel beside it, in their order."""
        plan = layout(self.request, self.arg)
        parts = [
            _CALL.pack(
                b"KFDC",
                VERSION,
                int(self.remote_fds),
                self.request,
                len(self.arg),
                len(plan.regions),
                len(plan.slots),
                len(self.fds),
            )
        ]
        parts += [_REGION.pack(r.pointer, r.length, r.offset, r.direction) for r in plan.regions]
        parts += [_SLOT.pack(*slot) for slot in plan.slots]
        parts.append(self.arg)
        parts += [region.data for region in self.regions]
        return b"".join(parts)

    @classmethod
    def decode(cls, data: bytes, fds: tuple[int, ...] = ()) -> Call:
        """The call in *data*, with the fds that came beside it. Raises FrameRejected."""
        reader = _Reader(data)
        magic, version, flags, request, arg_size, n_regions, n_slots, n_fds = reader.unpack(_CALL)
        if magic != b"KFDC" or version != VERSION or flags > 1:
            raise FrameRejected(f"not a call of version {VERSION}")
        if n_fds != len(fds):
            raise FrameRejected(f"{n_fds} fds were announced, {len(fds)} came")
        reader.need(n_regions * _REGION.size + n_slots * _SLOT.size + arg_size)
        stated_regions = [reader.unpack(_REGION) for _ in range(n_regions)]
        stated_slots = [reader.unpack(_SLOT) for _ in range(n_slots)]
        arg = reader.take(arg_size)
        try:
            plan = layout(request, arg)
        except OSError as error:
            raise FrameRejected(str(error)) from error
        if stated_regions != [
            (r.pointer, r.length, r.offset, r.direction) for r in plan.regions
        ] or stated_slots != list(map(tuple, plan.slots)):
            raise FrameRejected("the call's description is not that of its ioctl")
        regions = tuple(
            Region(
                pointer=r.pointer,
                length=r.length,
                direction=int(r.direction),
                data=reader.take(r.length if r.direction & Direction.IN else 0),
            )
            for r in plan.regions
        )
        reader.end()
        return cls(request=request, arg=arg, regions=regions, fds=fds, remote_fds=bool(flags))


class Reply(Value):
    """What an ioctl answered; ``regions`` has an item per region of the call.

    The item is empty for a region whose direction has no OUT. When ``errno`` is not 0
    there are no regions and fds, unless the ioctl left fds behind and the executor was
    told to keep them. ``fds`` are numbers of whoever holds this value.
    """

    errno: int
    arg: bytes
    regions: tuple[bytes, ...] = ()
    fds: tuple[int, ...] = ()

    def encode(self) -> bytes:
        """The wire form; ``fds`` travel beside it, in their order."""
        head = _REPLY.pack(
            b"KFDR", VERSION, 0, self.errno, len(self.arg), len(self.regions), len(self.fds)
        )
        lengths = [_LENGTH.pack(len(region)) for region in self.regions]
        return b"".join((head, *lengths, self.arg, *self.regions))

    @classmethod
    def decode(cls, data: bytes, fds: tuple[int, ...] = ()) -> Reply:
        """The reply in *data*, with the fds that came beside it. Raises FrameRejected."""
        reader = _Reader(data)
        magic, version, flags, number, arg_size, n_regions, n_fds = reader.unpack(_REPLY)
        if magic != b"KFDR" or version != VERSION or flags:
            raise FrameRejected(f"not a reply of version {VERSION}")
        if n_fds != len(fds):
            raise FrameRejected(f"{n_fds} fds were announced, {len(fds)} came")
        reader.need(n_regions * _LENGTH.size + arg_size)
        lengths = [reader.unpack(_LENGTH)[0] for _ in range(n_regions)]
        arg = reader.take(arg_size)
        regions = tuple(reader.take(length) for length in lengths)
        reader.end()
        return cls(errno=number, arg=arg, regions=regions, fds=fds)


VERSION = 1
_CALL = struct.Struct("<4sHHIIIII")
_REGION = struct.Struct("<QQII")
_SLOT = struct.Struct("<IIIII")
_REPLY = struct.Struct("<4sHHIIII")
_LENGTH = struct.Struct("<Q")


class _Reader:
    """Takes bytes off the front; refuses to run past the end."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def need(self, length: int) -> None:
        if length > len(self._data) - self._at:
            raise FrameRejected("the message is cut short")

    def take(self, length: int) -> bytes:
        self.need(length)
        self._at += length
        return self._data[self._at - length : self._at]

    def unpack(self, form: struct.Struct) -> tuple[Any, ...]:
        return form.unpack(self.take(form.size))

    def end(self) -> None:
        if self._at != len(self._data):
            raise FrameRejected(f"{len(self._data) - self._at} bytes too many")


# ---------------------------------------------------------------- fds in buffers


def _places(slot: FdSlot) -> Iterator[int]:
    return iter(range(slot.offset, slot.offset + slot.stride * slot.fields, slot.stride))


def _get(buffer: bytes | bytearray | memoryview, at: int) -> int:
    return int.from_bytes(buffer[at : at + 4], "little")


def _put(buffer: bytearray | memoryview, at: int, value: int) -> None:
    buffer[at : at + 4] = value.to_bytes(4, "little")


def _is_open(fd: int) -> bool:
    if fd >= 1 << 31:
        return False
    try:
        fcntl.fcntl(fd, fcntl.F_GETFD)
    except OSError:
        return False
    return True


def close_all(fds: tuple[int, ...] | list[int]) -> None:
    """Close every fd; one that is closed already is no error."""
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)


# ---------------------------------------------------------------- caller


def pack(request: int, arg: ctypes.Structure, *, remote_fds: bool = False) -> Call:
    """The call that *arg*, a struct in this process's memory, makes.

    Raises OSError: EFAULT for a pointer to memory that can't be read, EINVAL for
    absurd counts. An fd that is not open becomes KFD_INVALID_FD, which the other side
    answers as the kernel answers a bad fd.
    """
    size = uapi._IOC_SIZE(request)
    if ctypes.sizeof(arg) < size:
        raise OSError(errno.EFAULT, f"the struct has {ctypes.sizeof(arg)} bytes, not {size}")
    raw = bytearray(bytes(arg)[:size])
    plan = layout(request, bytes(raw))
    datas = [
        bytearray(read_memory(r.pointer, r.length) if r.direction & Direction.IN else b"")
        for r in plan.regions
    ]
    fds: list[int] = []
    for slot in plan.slots:
        target = raw if slot.region == ARG else datas[slot.region]
        if not target:
            continue
        for at in _places(slot):
            _put(target, at, _outgoing(slot, _get(target, at), fds, remote_fds))
    regions = tuple(
        Region(pointer=r.pointer, length=r.length, direction=int(r.direction), data=bytes(data))
        for r, data in zip(plan.regions, datas, strict=True)
    )
    return Call(
        request=request, arg=bytes(raw), regions=regions, fds=tuple(fds), remote_fds=remote_fds
    )


def _outgoing(slot: FdSlot, number: int, fds: list[int], remote_fds: bool) -> int:
    """What the field says on the wire; an open fd is added to *fds*."""
    if slot.direction is Direction.OUT:
        return uapi.KFD_INVALID_FD
    if remote_fds:
        return number
    if not _is_open(number):
        return uapi.KFD_INVALID_FD
    fds.append(number)
    return len(fds) - 1


def apply(
    reply: Reply, request: int, arg: ctypes.Structure, *, keep_leftovers: bool = False
) -> None:
    """Write a reply's results into *arg* and through its pointers; fds become numbers.

    ``reply.fds`` belong to *arg* afterwards; if this raises they are closed. Raises
    OSError: the ioctl's own errno, EFAULT for a pointer that can't be written, EPROTO
    if the reply does not fit the call.

    *keep_leftovers* is for the simulated node's client: fds that a failed ioctl left
    behind stay open in *arg*'s buffers, as the kernel leaves them.
    """
    used: set[int] = set()
    has_results = reply.errno == 0 or (keep_leftovers and bool(reply.fds))
    try:
        _apply(reply, request, arg, used, has_results=has_results)
    except BaseException:
        close_all(reply.fds)
        raise
    close_all([fd for index, fd in enumerate(reply.fds) if index not in used])
    if reply.errno:
        raise OSError(reply.errno, os.strerror(reply.errno))


def _apply(
    reply: Reply, request: int, arg: ctypes.Structure, used: set[int], *, has_results: bool
) -> None:
    size = uapi._IOC_SIZE(request)
    before = bytes(arg)[:size]
    plan = layout(request, before)
    if len(reply.arg) != size or (has_results and not _fits(reply, plan)):
        raise OSError(errno.EPROTO, "the reply does not fit the ioctl")
    raw = bytearray(reply.arg)
    datas = [bytearray(region) for region in reply.regions]
    for region in plan.regions:
        raw[region.offset : region.offset + 8] = before[region.offset : region.offset + 8]
    for slot in plan.slots:
        if slot.direction is Direction.IN:
            if slot.region == ARG:
                raw[slot.offset : slot.offset + 4] = before[slot.offset : slot.offset + 4]
        elif has_results:
            _install(slot, raw if slot.region == ARG else datas[slot.region], reply.fds, used)
        elif slot.region == ARG:
            _put(raw, slot.offset, uapi.KFD_INVALID_FD)
    ctypes.memmove(ctypes.addressof(arg), bytes(raw), size)
    for region, data in zip(plan.regions if has_results else (), datas, strict=False):
        if region.direction & Direction.OUT:
            write_memory(region.pointer, bytes(data))


def _fits(reply: Reply, plan: Layout) -> bool:
    wanted = [r.length if r.direction & Direction.OUT else 0 for r in plan.regions]
    return wanted == [len(region) for region in reply.regions]


def _install(slot: FdSlot, target: bytearray, fds: tuple[int, ...], used: set[int]) -> None:
    for at in _places(slot):
        index = _get(target, at)
        if index == uapi.KFD_INVALID_FD:
            continue
        if index >= len(fds) or index in used:
            raise OSError(errno.EPROTO, f"the reply names fd {index} of {len(fds)}")
        used.add(index)
        _put(target, at, fds[index])


# ---------------------------------------------------------------- executor


def execute(
    call: Call, file: KfdFile, *, remote_fds: bool = False, keep_leftovers: bool = False
) -> Reply:
    """Run *call* on *file* in this process and collect what came of it.

    *remote_fds* lets the caller name fds of this process by number: for executors that
    act for their own parent, never for a server.

    fds that a failed ioctl left behind (RESTORE installs the BOs' fds before it restores
    queues and events, and leaves them installed if those fail: kfd_chardev.c,
    criu_restore) are closed here, since nobody else knows them: an executor leaks nothing
    into its process. *keep_leftovers* is for the simulated node, which is the kernel to
    its client: they are in the reply, with the regions.

    ``call.fds`` stay the caller's to close, as do ``reply.fds`` once they are sent. An
    OSError of the ioctl is in the reply, not raised. Raises FrameRejected for a call
    whose regions are not those of its ioctl, or whose fds it may not name.
    """
    if call.remote_fds and not remote_fds:
        raise FrameRejected("the call names fds of this process")
    try:
        plan = layout(call.request, call.arg)
    except OSError as error:
        raise FrameRejected(str(error)) from error
    if [(r.pointer, r.length, r.direction) for r in plan.regions] != [
        (r.pointer, r.length, r.direction) for r in call.regions
    ]:
        raise FrameRejected("the call's regions are not those of its ioctl")
    size = uapi._IOC_SIZE(call.request)
    if len(call.arg) != size:
        raise FrameRejected(f"the argument has {len(call.arg)} bytes, the request says {size}")
    if any(len(r.data) != (r.length if r.direction & Direction.IN else 0) for r in call.regions):
        raise FrameRejected("a region's data is not as long as the region")
    with contextlib.ExitStack() as stack:
        buffers = [stack.enter_context(GuardedBuffer(r.length)) for r in call.regions]
        return _run(call, plan, buffers, file, keep_leftovers)


def _run(
    call: Call, plan: Layout, buffers: list[GuardedBuffer], file: KfdFile, keep_leftovers: bool
) -> Reply:
    size = len(call.arg)
    arg = _argument(size)
    ctypes.memmove(ctypes.addressof(arg), call.arg, size)
    raw = memoryview(arg).cast("B")
    views = [buffer.view for buffer in buffers]
    for spec, region, buffer in zip(plan.regions, call.regions, buffers, strict=True):
        buffer.view[: len(region.data)] = region.data
        raw[spec.offset : spec.offset + 8] = buffer.address.to_bytes(8, "little")
    for slot in plan.slots:
        _incoming(slot, raw if slot.region == ARG else views[slot.region], call)
    failed = 0
    try:
        file.ioctl(call.request, arg)
    except OSError as error:
        failed = error.errno or errno.EIO
    fds = _collect_fds(plan, raw, views)
    if failed and not (keep_leftovers and fds):
        close_all(fds)
        return Reply(errno=failed, arg=bytes(raw))
    regions = tuple(
        bytes(view) if r.direction & Direction.OUT else b""
        for r, view in zip(plan.regions, views, strict=True)
    )
    return Reply(errno=failed, arg=bytes(raw), regions=regions, fds=tuple(fds))


def _argument(size: int) -> ctypes.Structure:
    class Argument(ctypes.Structure):
        _fields_ = (("bytes", ctypes.c_uint8 * size),)

    return Argument()


def _incoming(slot: FdSlot, target: memoryview, call: Call) -> None:
    for at in _places(slot):
        if slot.direction is Direction.OUT:
            _put(target, at, uapi.KFD_INVALID_FD)
        elif not call.remote_fds:
            index = _get(target, at)
            number = call.fds[index] if index < len(call.fds) else uapi.KFD_INVALID_FD
            _put(target, at, number)


def _collect_fds(plan: Layout, raw: memoryview, views: list[memoryview]) -> list[int]:
    """The new fds; their fields become indexes into the list."""
    fds: list[int] = []
    for slot in plan.slots:
        if slot.direction is not Direction.OUT:
            continue
        target = raw if slot.region == ARG else views[slot.region]
        for at in _places(slot):
            number = _get(target, at)
            if number != uapi.KFD_INVALID_FD:
                fds.append(number)
                _put(target, at, len(fds) - 1)
    return fds
