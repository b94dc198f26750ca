"""Programs that can't be moved, each for its own reason.

    python -m tests.integration.troubled KIND [ARGUMENTS of the training workload]

It makes the trouble, and then trains, or waits where the trouble is in the GPU's state. The
line "ready" on stdout says that the trouble is there.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from migrate.model import HostPaths
from migrate.preflight.local import GHOST_LIMIT
from scenarios.workloads import train

kept: list[Any] = []  # what must not be closed
_libc = ctypes.CDLL(None, use_errno=True)
_SYS_IO_URING_SETUP, _SYS_LANDLOCK_CREATE_RULESET = 425, 444
_PTRACE_SEIZE = 0x4206
_PR_SET_PDEATHSIG = 1
_CLONE_NEWNS = 0x20000


def _syscall(number: int, *arguments: object) -> int:
    result: int = _libc.syscall(number, *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def io_uring() -> None:
    kept.append(_syscall(_SYS_IO_URING_SETUP, 1, (ctypes.c_ubyte * 120)()))


def landlock() -> None:
    """A descriptor of a kind that CRIU does not know; anybody may make one."""
    rules = ctypes.c_uint64(1)
    kept.append(_syscall(_SYS_LANDLOCK_CREATE_RULESET, ctypes.byref(rules), 8, 0))


def tcp() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    kept.extend((listener, socket.create_connection(listener.getsockname()), listener.accept()))


def listening() -> None:
    """No trouble: CRIU moves it."""
    kept.append(socket.create_server(("127.0.0.1", 0)))


def packet() -> None:
    kept.append(socket.socket(socket.AF_PACKET, socket.SOCK_RAW))


def netlink() -> None:
    """A dump of all links that is asked for and not read."""
    link = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
    link.send(ctypes.string_at(_LINKS, len(_LINKS)))
    kept.append(link)


_LINKS = bytes([32, 0, 0, 0, 18, 0, 1, 3, 1, 0, 0, 0, 0, 0, 0, 0] + [0] * 16)  # RTM_GETLINK


def unix_outside() -> None:
    """Connected to a child that leaves our tree: its parent ends."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind("")
    listener.listen()
    address = listener.getsockname()
    if os.fork() == 0:
        if os.fork() == 0:
            os.setsid()
            connected = socket.socket(socket.AF_UNIX)
            connected.connect(address)
            listener.close()
            connected.recv(1)  # until we end
        os._exit(0)
    kept.append(listener.accept())
    listener.close()


def namespace() -> None:
    """A mount namespace of its own."""
    if _libc.unshare(_CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def device() -> None:
    kept.append(os.open("/dev/fuse", os.O_RDWR))


def deleted() -> None:
    file = tempfile.TemporaryFile()  # noqa: SIM115 - that is the trouble
    file.truncate(GHOST_LIMIT + 1)
    kept.append(file)


def svm() -> None:
    """SVM ranges; no runtime of ours."""
    from tests.conformance.kit import Process  # noqa: PLC0415 - the node may have no such GPUs
    from tests.unit.test_sim_svm import FIRST, PAGES, map_pages, set_range  # noqa: PLC0415

    p = Process(HostPaths.under(os.environ["MIGRATE_HOST_ROOT"]))
    kept.append(p)
    map_pages()
    assert set_range(p, FIRST, PAGES, 0) == 0


def no_vm() -> None:
    """/dev/kfd is open, and no GPU's VM is acquired; no runtime of ours."""
    from migrate.kfd.file import open_device  # noqa: PLC0415

    kept.append(open_device(HostPaths.under(os.environ["MIGRATE_HOST_ROOT"]).kfd))


def shared() -> None:
    """Parent and child have one buffer as their event page, which no import can be at RESTORE."""
    from migrate.engine.runtime import Runtime  # noqa: PLC0415 - the GPU's state, as above
    from migrate.kfd import uapi  # noqa: PLC0415
    from migrate.kfd.ioctl import import_dmabuf  # noqa: PLC0415
    from tests.conformance import image as raw  # noqa: PLC0415
    from tests.conformance.image import Buffers  # noqa: PLC0415
    from tests.conformance.kit import Process  # noqa: PLC0415
    from tests.conformance.tracer import held  # noqa: PLC0415

    paths = HostPaths.under(os.environ["MIGRATE_HOST_ROOT"])
    reader, writer = os.pipe()
    owner = os.fork()
    if owner == 0:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    kept.append(Runtime.start())
    process = Process(paths)
    kept.append(process)
    process.prepare_queues()
    if owner == 0:
        process.create_event()
        os.write(writer, b"!")
        while True:
            time.sleep(60)
    os.read(reader, 1)
    with held(owner, paths) as file:
        found = Buffers(raw.process_info(file))
        raw.criu(file, uapi.KFD_CRIU_OP_CHECKPOINT, **found.fields)
        raw.unpause(file)
    (page,) = [b for b in found.bos if b.addr == process.event_page.address]
    process.event_page.handle = import_dmabuf(
        process.kfd, process.gpu_ids[0], 0x700000000, page.dmabuf_fd
    )
    process.create_event()
    found.close()


def tracer(pid: int) -> None:
    """A debugger of process *pid*."""
    if _libc.ptrace(_PTRACE_SEIZE, pid, None, None) == -1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


TRAINING: dict[str, Callable[[], None]] = {
    made.__name__: made
    for made in (
        io_uring,
        landlock,
        tcp,
        listening,
        packet,
        netlink,
        unix_outside,
        namespace,
        device,
        deleted,
    )
}
WAITING: dict[str, Callable[[], None]] = {made.__name__: made for made in (svm, no_vm, shared)}


def main() -> None:
    kind = sys.argv[1]
    if kind == "tracer":
        tracer(int(sys.argv[2]))
    elif kind in WAITING:
        WAITING[kind]()
    else:
        try:
            TRAINING[kind]()
        except OSError as error:
            print(f"impossible: {error}", flush=True)
            return
    print("ready", flush=True)
    if kind in TRAINING:
        train.main(sys.argv[2:])
    while True:
        time.sleep(60)


if __name__ == "__main__":
    main()
