"""The part of the reexec engine that is linked into a program.

A program that uses it can be frozen at any instant, between any two bytecodes of its
main thread: in the middle of writing a packet, between ring and doorbell, while other
threads sit in WAIT_EVENTS. What makes that right is the shape of the program, not
the choice of the moment:

* Its CPU state is one immutable record, replaced by ``commit`` (one store of one
  reference). A freeze takes the record that was committed last, so after a restart the
  program repeats the one operation that was under way, from its beginning.
* Every operation can therefore be repeated, however much of it was done: what it
  writes outside is keyed by indexes of the record. A packet is written at the ring's
  write index, which the record has, and the write pointer in ring memory says whether
  that was done before (then only the doorbell is rung again, which is harmless); a
  line of a log is written at the record's file offset. This is a redo log: the record
  is the log's last entry, the operation its replay.
* What can't be repeated, because the kernel would make a second object, goes into
  ``indivisible``: the freeze waits until the object is in the record. That is one ioctl
  long, as short as the kernel's own sections that can't be interrupted.
* Other threads own no state. They may wait and tell; what they were told is asked
  again after a restart.

The main thread must come by the interpreter's signal check: locks, sleep and I/O of
Python are interrupted, but a long call into C delays the freeze.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self, TypeVar

import msgspec

from migrate.decode import from_msgpack
from migrate.engine.document import KFD, Arena, Document, FileMapping, Finish, moved, with_gpu
from migrate.engine.marker import Marker
from migrate.engine.trampoline import EXECUTOR_FD, Trampoline, map_private
from migrate.errors import UsageError
from migrate.kfd.file import KfdFile, MappedMemory, open_device
from migrate.model import HostPaths

HOST_ROOT = "MIGRATE_HOST_ROOT"  # folder of the simulated host; not set: the real /dev/kfd
PTRACER = "MIGRATE_PTRACER"  # pid whose descendants may trace this process, or "any"
SIGNAL = signal.SIGRTMIN + 10

# Programs, libraries, heap and stacks are far from here, whatever ASLR does (x86-64: they
# lie at 0x55... and 0x7f...), and it is inside the 47 bits that a GPU can address.
FIRST_ADDRESS = 0x1000_0000_0000
_ALIGNMENT = 2 << 20

_PR_SET_PTRACER = 0x59616D61
_PR_SET_PTRACER_ANY = 2**64 - 1

T = TypeVar("T")
R = TypeVar("R")


class Runtime:
    """One a process; made by ``start`` in the main thread before anything else."""

    def __init__(self, paths: HostPaths) -> None:
        self.paths = paths
        self.restored = False
        self._marker: Marker
        self._kfd: KfdFile | None = None
        self._nodes: dict[int, KfdFile] = {}
        self._mappings: tuple[FileMapping, ...] = ()
        self._arenas: tuple[Arena, ...] = ()
        self._next_address = FIRST_ADDRESS
        self._actual_ids: dict[int, int] = {}  # by the gpu_ids that the process knows
        self._pids: dict[int, int] = {}  # by the pids that the process knows
        self._state: object = None
        self._encoded = b""
        self._indivisible = 0
        self._signalled = False
        self._handing_over = False
        self._environment = dict(os.environ)

    @classmethod
    def start(cls) -> Self:
        """Make this process movable, or finish moving it.

        In a process that is being rebuilt this serves the agent, stops, and returns once
        the process is released, with ``restored`` set.
        """
        _name_tracer()
        executor = os.environ.pop(EXECUTOR_FD, None)
        root = os.environ.get(HOST_ROOT)
        self = cls(HostPaths.under(root) if root else HostPaths())
        with self.indivisible():  # whoever sees the marker may send the signal
            signal.signal(SIGNAL, self._on_signal)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {SIGNAL})
            self._marker = Marker.create(SIGNAL)
        os.register_at_fork(after_in_child=self._marker.close)  # a child is another process
        if executor is not None:
            self._become(socket.socket(fileno=int(executor)))
        return self

    # ------------------------------------------------------------ state

    def state(self, kind: type[T]) -> T | None:
        """The record that was committed last, by this process or its predecessor."""
        if self._state is None and self._encoded:
            self._state = from_msgpack(self._encoded, kind)
        if self._state is not None and not isinstance(self._state, kind):
            raise TypeError(f"the record is a {type(self._state).__name__}")
        return self._state

    def commit(self, state: object) -> None:
        """Replace the record: an immutable value that msgspec can encode."""
        self._state = state

    def drive(self, record: R, advance: Callable[[R], R | None]) -> None:
        """Commit each record that *advance* makes of the one before, until it makes none."""
        while (after := advance(record)) is not None:
            record = after
            self.commit(record)

    @contextlib.contextmanager
    def indivisible(self) -> Iterator[None]:
        """Keep a freeze out until the end of the block. For one ioctl and its commit."""
        self._indivisible += 1
        try:
            yield
        finally:
            self._indivisible -= 1
            if self._signalled and not self._indivisible:
                self._signalled = False
                self._hand_over()

    def pid_now(self, pid: int) -> int:
        """The pid that a process of this one's tree, once known as *pid*, has by now."""
        return self._pids.get(pid, pid)

    # ------------------------------------------------------------ files and memory

    @property
    def kfd(self) -> KfdFile:
        """This process's /dev/kfd, opened when first asked for. Raises KfdUnavailable."""
        if self._kfd is None:
            with self.indivisible():
                self._kfd = open_device(self.paths.kfd)
        return self._kfd

    def open_render_node(self, gpu_id: int, path: str) -> KfdFile:
        """Open a GPU's render node; once open it is found by ``render_node``."""
        with self.indivisible():
            self._nodes[gpu_id] = open_device(path)
        return self._nodes[gpu_id]

    def render_node(self, gpu_id: int) -> KfdFile:
        """The open render node of a GPU, by the id this process knows. Raises KeyError."""
        return self._nodes[gpu_id]

    def reserve(self, length: int) -> int:
        """An address for *length* bytes that is free here and will be elsewhere."""
        with self.indivisible():
            address = self._next_address
            self._next_address += -(-length // _ALIGNMENT) * _ALIGNMENT + _ALIGNMENT
        return address

    def map(self, gpu_id: int, offset: int, length: int, address: int) -> None:
        """Map device memory: of a GPU's render node, or of /dev/kfd (gpu_id 0).

        CREATE_QUEUE gives the offset of doorbells with the id the process knows, mmap
        wants the actual one (kfd_chardev.c of 6.1): after a move they differ.
        """
        if gpu_id == KFD:
            offset = with_gpu(offset, self._actual_ids)
        mapping = FileMapping(gpu_id=gpu_id, offset=offset, address=address, length=length)
        with self.indivisible():
            self._map(mapping)
            self._mappings = (*self._mappings, mapping)

    def _map(self, mapping: FileMapping) -> None:
        file = self.kfd if mapping.gpu_id == KFD else self._nodes[mapping.gpu_id]
        file.mmap(mapping.offset, mapping.length, mapping.address)

    def unmap(self, address: int) -> None:
        """Unmap device memory that was mapped at *address*; nothing there is no error."""
        with self.indivisible():
            for mapping in self._mappings:
                if mapping.address == address:
                    MappedMemory(address, mapping.length).close()
            self._mappings = tuple(m for m in self._mappings if m.address != address)

    def is_mapped(self, address: int) -> bool:
        """Whether device memory is mapped at *address*."""
        return any(mapping.address == address for mapping in self._mappings)

    def arena(self, length: int, address: int) -> None:
        """Private memory at *address*, whose contents move with the process."""
        with self.indivisible():
            if not any(arena.address == address for arena in self._arenas):
                map_private(address, length)
                self._arenas = (*self._arenas, Arena(address=address, length=length))

    # ------------------------------------------------------------ freezing

    def _on_signal(self, *_: object) -> None:
        if self._indivisible:
            self._signalled = True
        else:
            self._hand_over()

    def _hand_over(self) -> None:
        """Hand the document over and stay stopped as long as the agent wants it."""
        if self._handing_over:
            return
        self._handing_over = True
        try:
            self._marker.enter()
            number = 0
            while (wanted := self._marker.requested) != 0:
                if wanted != number:
                    document = msgspec.msgpack.encode(self._document())
                    self._marker.hand(wanted, document)
                    number = wanted
                os.kill(os.getpid(), signal.SIGSTOP)
            self._marker.leave()
        finally:
            self._handing_over = False

    def _document(self) -> Document:
        state = self._encoded
        if self._state is not None:
            state = msgspec.msgpack.encode(self._state)
        umask = os.umask(0o077)
        os.umask(umask)
        return Document(
            executable=sys.executable,
            arguments=tuple(sys.orig_argv),
            directory=os.getcwd(),
            environment=self._environment,
            umask=umask,
            output=(_regular(1), _regular(2)),
            mappings=self._mappings,
            arenas=self._arenas,
            next_address=self._next_address,
            state=state,
            pids=self._pids,
        )

    # ------------------------------------------------------------ being rebuilt

    def _become(self, channel: socket.socket) -> None:
        """Serve the agent until this is the process that was frozen, then stop."""
        with channel:
            channel.set_inheritable(False)
            trampoline = Trampoline()
            finish = trampoline.run(channel, self._build)
        del trampoline
        self._marker.enter()
        self._marker.request(finish.number)
        self._hand_over()

    def _build(self, trampoline: Trampoline, finish: Finish) -> None:
        document = finish.document
        self._kfd = trampoline.kfd
        self._pids = {
            **finish.pids,
            **{known: finish.pids.get(now, now) for known, now in document.pids.items()},
        }
        self._nodes = {gpu.user_gpu_id: trampoline.nodes[gpu.drm_fd] for gpu in finish.gpus}
        self._actual_ids = {gpu.user_gpu_id: gpu.gpu_id for gpu in finish.gpus}
        self._mappings = tuple(moved(m, finish.gpus, finish.bos) for m in document.mappings)
        self._arenas = document.arenas
        self._next_address = document.next_address
        self._encoded = document.state
        self._environment = {**document.environment, **_kept(os.environ)}
        os.umask(document.umask)
        for mapping in self._mappings:
            self._map(mapping)
        self.restored = True


def _kept(environment: os._Environ[str]) -> dict[str, str]:
    """What the new host says and the old one must not override."""
    return {name: environment[name] for name in (HOST_ROOT, PTRACER) if name in environment}


def _regular(fd: int) -> str:
    try:
        if stat.S_ISREG(os.fstat(fd).st_mode):
            return str(Path(f"/proc/self/fd/{fd}").readlink())
    except OSError:
        pass
    return ""


def _name_tracer() -> None:
    """Let the agent's helper trace this process where Yama would forbid it."""
    wanted = os.environ.get(PTRACER)
    if wanted:
        if wanted != "any" and not wanted.isdecimal():
            raise UsageError(f"{PTRACER}={wanted}: neither a pid nor `any`")
        number = _PR_SET_PTRACER_ANY if wanted == "any" else int(wanted)
        # Without Yama the kernel answers EINVAL and needs no permission.
        ctypes.CDLL(None).prctl(_PR_SET_PTRACER, ctypes.c_ulong(number), 0, 0, 0)


def view(address: int, length: int) -> memoryview:
    """The *length* bytes of this process's memory at *address*, which must be mapped."""
    return memoryview((ctypes.c_ubyte * length).from_address(address)).cast("B")
