"""Sockets: of which kind each is, and whether its other end is left behind.

A duplicate of the socket (pidfd_getfd) is asked what it is; that neither reads from it nor
changes it. Which UNIX sockets are connected to which only sock_diag(7) tells.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import stat
import struct
import time
from collections.abc import Iterator, Sequence

from migrate.errors import MigrateError, TcpEstablished, UnsupportedSocket
from migrate.kfd.file import steal_fd
from migrate.preflight.descriptors import Descriptor
from migrate.preflight.findings import TCP_CLOSE, Finding

AGAIN = 0.05  # seconds
_INTERNET = frozenset({socket.AF_INET, socket.AF_INET6})
_UDPLITE = 136  # IPPROTO_UDPLITE
_DATAGRAMS = frozenset({socket.IPPROTO_UDP, socket.IPPROTO_ICMP, socket.IPPROTO_ICMPV6, _UDPLITE})
_TCP_CLOSE, _TCP_LISTEN = 7, 10  # net/tcp_states.h


def sockets(found: Sequence[Descriptor]) -> list[Finding]:
    """What speaks against moving the sockets among *found*, which is all of the tree's fds.

    One that is gone AGAIN seconds later was a request under way, and is not told of.
    """
    suspects = list(_suspects(found))
    if suspects:
        time.sleep(AGAIN)
    return [finding for descriptor, finding in suspects if _is_there(descriptor)]


def _is_there(descriptor: Descriptor) -> bool:
    try:
        return os.stat(descriptor.path).st_ino == descriptor.inode
    except OSError:
        return False


def _suspects(found: Sequence[Descriptor]) -> Iterator[tuple[Descriptor, Finding]]:
    ours = {d.inode for d in found if stat.S_ISSOCK(d.mode)}
    peers: dict[int, int] | None = None
    seen: set[int] = set()
    for descriptor in found:
        if not stat.S_ISSOCK(descriptor.mode) or descriptor.gpu or descriptor.inode in seen:
            continue
        seen.add(descriptor.inode)  # one that two processes have is one socket
        with contextlib.suppress(OSError), _duplicate(descriptor) as asked:
            if asked.family == socket.AF_UNIX:
                peers = unix_peers() if peers is None else peers
                peer = peers.get(descriptor.inode)
                if peer and peer not in ours:
                    kind = socket.SocketKind(asked.type).name
                    text = f"is a {kind} connected to a process that is not moved with it"
                    error = UnsupportedSocket(f"{descriptor.name} {text}")
                    yield descriptor, Finding.of(error)
                continue
            found_wrong = _unsupported(descriptor.name, asked)
            if isinstance(found_wrong, TcpEstablished):
                yield descriptor, Finding.of(found_wrong, TCP_CLOSE)
            elif found_wrong is not None:
                yield descriptor, Finding.of(found_wrong)


def _duplicate(descriptor: Descriptor) -> socket.socket:
    return socket.socket(fileno=steal_fd(descriptor.pid, descriptor.number))


def _unsupported(name: str, asked: socket.socket) -> MigrateError | None:
    family, kind, protocol = asked.family, asked.type, asked.proto
    if family in _INTERNET:
        if kind == socket.SOCK_STREAM and protocol == socket.IPPROTO_TCP:
            return _connected(name, asked)
        if kind == socket.SOCK_RAW or (kind == socket.SOCK_DGRAM and protocol in _DATAGRAMS):
            return None
        return UnsupportedSocket(f"{name} is an internet socket of protocol {protocol}")
    if family == socket.AF_NETLINK:
        if _readable(asked):
            return UnsupportedSocket(f"{name} is a netlink socket with unread messages")
        return None
    return UnsupportedSocket(f"{name} is a socket of the family {_family(family)}")


def _connected(name: str, asked: socket.socket) -> MigrateError | None:
    state = asked.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
    if state in (_TCP_CLOSE, _TCP_LISTEN):
        return None
    peer = ""
    with contextlib.suppress(OSError):
        address = asked.getpeername()
        peer = f" to {address[0]} port {address[1]}"
    return TcpEstablished(f"{name} is an open TCP connection{peer}")


def _readable(asked: socket.socket) -> bool:
    poll = select.poll()
    poll.register(asked, select.POLLIN)
    return bool(poll.poll(0))


def _family(number: int) -> str:
    try:
        return socket.AddressFamily(number).name
    except ValueError:
        return str(number)


# ---------------------------------------------------------------- sock_diag

_SOCK_DIAG_BY_FAMILY = 20  # linux/sock_diag.h
_NETLINK_SOCK_DIAG, _NLM_F_REQUEST, _NLM_F_DUMP, _NLMSG_DONE, _NLMSG_ERROR = 4, 1, 0x300, 3, 2
_UDIAG_SHOW_PEER, _UNIX_DIAG_PEER = 4, 2  # linux/unix_diag.h
_HEADER = struct.Struct("=IHHII")  # nlmsghdr
_REQUEST = struct.Struct("=BBHIIIII")  # unix_diag_req
_MESSAGE = struct.Struct("=BBBBIII")  # unix_diag_msg
_ATTRIBUTE = struct.Struct("=HH")


def unix_peers() -> dict[int, int]:
    """Inode of the other end by inode, of connected UNIX sockets of our network namespace.

    Empty where the kernel has no unix_diag: then nothing is known of them.
    """
    found: dict[int, int] = {}
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as diag:
        body = _REQUEST.pack(socket.AF_UNIX, 0, 0, 0xFFFFFFFF, 0, _UDIAG_SHOW_PEER, 0, 0)
        flags = _NLM_F_REQUEST | _NLM_F_DUMP
        head = _HEADER.pack(_HEADER.size + len(body), _SOCK_DIAG_BY_FAMILY, flags, 1, 0)
        diag.settimeout(1.0)
        try:
            diag.send(head + body)
            while _collect(diag.recv(1 << 16), found):
                continue
        except OSError:
            return {}
    return found


def _collect(data: bytes, found: dict[int, int]) -> bool:
    """False once the dump is over."""
    at = 0
    while at + _HEADER.size <= len(data):
        length, kind, *_ = _HEADER.unpack_from(data, at)
        if kind in (_NLMSG_DONE, _NLMSG_ERROR):
            return False
        inode = _MESSAGE.unpack_from(data, at + _HEADER.size)[4]
        attribute = at + _HEADER.size + _MESSAGE.size
        while attribute + _ATTRIBUTE.size <= at + length:
            size, name = _ATTRIBUTE.unpack_from(data, attribute)
            if name == _UNIX_DIAG_PEER:
                (found[inode],) = struct.unpack_from("=I", data, attribute + _ATTRIBUTE.size)
            attribute += max(_ATTRIBUTE.size, (size + 3) & ~3)
        at += (length + 3) & ~3
    return True
