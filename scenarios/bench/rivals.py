"""Ways to bring the same bytes over two streams, each with its receiver in a process of its own.

Every receiver puts what comes into memory of the full size, touched before the clock starts,
because that is what a copy of VRAM has to do; none of the rivals verifies anything.
"""

from __future__ import annotations

import contextlib
import mmap
import multiprocessing
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc

from migrate.model import Value

STREAMS = 2
PIECE = 1 << 20
_SPAWN = multiprocessing.get_context("spawn")


class Sample(Value):
    """One copy: wall seconds, and CPU seconds of both sides together."""

    seconds: float
    cpu: float


class Job(Value):
    """What is to be copied: *size* bytes of the memfd *fd*; *certs* holds the PEM files."""

    fd: int
    size: int
    certs: str


@contextlib.contextmanager
def receiver(target: Callable[..., None], *arguments: object) -> Iterator[Connection]:
    """Run ``target(pipe, *arguments)`` in a new process; it says its port first."""
    mine, theirs = _SPAWN.Pipe()
    process = _SPAWN.Process(target=target, args=(theirs, *arguments))
    process.start()
    try:
        yield mine
    finally:
        mine.close()
        process.join(30)
        if process.is_alive():
            process.kill()


def cpu() -> float:
    """CPU seconds of this process so far."""
    return time.process_time()


def mapped(fd: int, size: int) -> memoryview:
    """The source's bytes, pages mapped."""
    view = memoryview(mmap.mmap(fd, size, prot=mmap.PROT_READ))
    sum(view[::4096])
    return view


def touched(size: int) -> memoryview:
    """Destination memory of the full size, huge pages where there are any."""
    block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    block.madvise(mmap.MADV_HUGEPAGE)
    view = memoryview(block)
    for offset in range(0, size, 4096):
        view[offset] = 0
    return view


def share(size: int, stream: int) -> tuple[int, int]:
    """The part of a stream: first byte and the one after the last."""
    part = -(-size // STREAMS // PIECE) * PIECE
    return min(size, stream * part), min(size, (stream + 1) * part)


def in_threads(work: Callable[[int], None]) -> None:
    """``work(stream)`` for each stream at once."""
    with ThreadPoolExecutor(STREAMS) as pool:
        for _ in pool.map(work, range(STREAMS)):
            pass


# ---------------------------------------------------------------- sockets, bare or with TLS


def tls(job_certs: str, side: ssl.Purpose) -> ssl.SSLContext:
    """A context that demands the peer's certificate, on both sides."""
    folder = Path(job_certs)
    context = ssl.create_default_context(side, cafile=folder / "ca.pem")
    context.load_cert_chain(folder / "host.pem", folder / "host.key")
    context.verify_mode = ssl.CERT_REQUIRED
    return context


def _socket_receiver(pipe: Connection, size: int, certs: str | None) -> None:
    memory = touched(size)
    server = socket.create_server(("127.0.0.1", 0))
    context = tls(certs, ssl.Purpose.CLIENT_AUTH) if certs else None
    pipe.send(server.getsockname()[1])
    accepted = [server.accept()[0] for _ in range(STREAMS)]

    def receive(index: int) -> None:
        raw = accepted[index]
        conn = context.wrap_socket(raw, server_side=True) if context else raw
        stream = conn.recv(1)[0]
        at, end = share(size, stream)
        while at < end:
            at += conn.recv_into(memory[at : min(end, at + PIECE)])
        conn.sendall(b"k")
        conn.close()

    began = cpu()
    in_threads(receive)
    pipe.send(cpu() - began)


def over_sockets(job: Job, *, encrypted: bool) -> Sample:
    """A bare TCP copy, or the same through ``ssl``."""
    source = mapped(job.fd, job.size)
    certs = job.certs if encrypted else None
    with receiver(_socket_receiver, job.size, certs) as pipe:
        port = pipe.recv()
        context = tls(job.certs, ssl.Purpose.SERVER_AUTH) if encrypted else None

        def send(stream: int) -> None:
            raw = socket.create_connection(("127.0.0.1", port))
            conn = context.wrap_socket(raw, server_hostname="localhost") if context else raw
            conn.sendall(bytes([stream]))
            at, end = share(job.size, stream)
            for offset in range(at, end, PIECE):
                conn.sendall(source[offset : min(end, offset + PIECE)])
            conn.recv(1)
            conn.close()

        began, spent = time.perf_counter(), cpu()
        in_threads(send)
        seconds = time.perf_counter() - began
        return Sample(seconds=seconds, cpu=cpu() - spent + pipe.recv())


# ---------------------------------------------------------------- gRPC


def _grpc_receiver(pipe: Connection, size: int, certs: str) -> None:
    memory = touched(size)
    folder = Path(certs)

    def take(requests: Iterator[bytes], _: Any) -> bytes:
        at, _end = share(size, next(requests)[0])
        for data in requests:
            memory[at : at + len(data)] = data
            at += len(data)
        return b"k"

    server = grpc.server(
        ThreadPoolExecutor(STREAMS), options=[("grpc.max_receive_message_length", 2 * PIECE)]
    )
    method: Any = grpc.stream_unary_rpc_method_handler(take)
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("bench.Copy", {"Take": method}),)
    )
    credentials = grpc.ssl_server_credentials(
        [((folder / "host.key").read_bytes(), (folder / "host.pem").read_bytes())],
        (folder / "ca.pem").read_bytes(),
        require_client_auth=True,
    )
    port = server.add_secure_port("localhost:0", credentials)
    server.start()
    began = cpu()
    pipe.send(port)
    pipe.recv()
    pipe.send(cpu() - began)
    server.stop(None).wait()


def over_grpc(job: Job) -> Sample:
    """A client-streaming call a stream, mutual TLS, messages of 1 MiB."""
    source = mapped(job.fd, job.size)
    folder = Path(job.certs)
    with receiver(_grpc_receiver, job.size, job.certs) as pipe:
        port = pipe.recv()
        credentials = grpc.ssl_channel_credentials(
            (folder / "ca.pem").read_bytes(),
            (folder / "host.key").read_bytes(),
            (folder / "host.pem").read_bytes(),
        )

        def messages(stream: int) -> Iterator[bytes]:
            yield bytes([stream])
            at, end = share(job.size, stream)
            for offset in range(at, end, PIECE):
                yield bytes(source[offset : min(end, offset + PIECE)])

        def send(stream: int) -> None:
            options = [("grpc.use_local_subchannel_pool", 1)]
            with grpc.secure_channel(f"localhost:{port}", credentials, options) as channel:
                call: Any = channel.stream_unary("/bench.Copy/Take")
                call(messages(stream))

        began, spent = time.perf_counter(), cpu()
        in_threads(send)
        seconds, mine = time.perf_counter() - began, cpu() - spent
        pipe.send("done")
        return Sample(seconds=seconds, cpu=mine + pipe.recv())
