"""One suite that both channels pass, and what only TCP can do wrong."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from migrate.dataplane.channel import (
    Channel,
    Listener,
    MemoryListener,
    TcpListener,
    Truncated,
    connect_tcp,
)
from migrate.dataplane.pacer import Pacer
from migrate.dataplane.wire import deadline
from migrate.errors import AgentUnreachable

Pair = tuple[Channel, Channel]


@pytest.fixture(params=["tcp", "memory"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    listener: Listener
    if request.param == "tcp":
        tcp = listener = TcpListener("127.0.0.1")
        near: Channel = connect_tcp("127.0.0.1", tcp.port)
    else:
        memory = listener = MemoryListener()
        near = memory.connect()
    far = listener.accept()
    yield near, far
    near.close()
    far.close()
    listener.close()


def receive(channel: Channel, length: int) -> bytes:
    data = bytearray(length)
    channel.receive_into(memoryview(data))
    return bytes(data)


def send_for_ever(channel: Channel) -> None:
    while True:
        channel.send([bytes(1 << 20)])


def act(channel: Channel, direction: str) -> None:
    if direction == "send":
        send_for_ever(channel)
    receive(channel, 1)


def in_thread(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def test_bytes_come_whole_and_in_order(pair: Pair) -> None:
    near, far = pair
    data = os.urandom(9 << 20)
    parts: list[bytes | memoryview] = [b"", data[:10], memoryview(data)[10:11], b"", data[11:]]
    sending = in_thread(lambda: near.send(parts))
    assert receive(far, 5) + receive(far, len(data) - 5) == data
    sending.join(30)
    far.send([b"back"])
    assert receive(near, 4) == b"back"


def test_an_end_between_messages_and_one_in_the_middle(pair: Pair) -> None:
    near, far = pair
    near.send([b"abc"])
    near.close()
    assert receive(far, 2) == b"ab"
    with pytest.raises(Truncated, match="after 1 of 5"):
        receive(far, 5)
    with pytest.raises(EOFError):
        receive(far, 5)


def test_sending_to_a_peer_that_is_gone_fails(pair: Pair) -> None:
    near, far = pair
    far.close()
    with pytest.raises(OSError, match=r"pipe|reset|closed|ended"):
        send_for_ever(near)


@pytest.mark.parametrize("direction", ["send", "receive"])
def test_abort_wakes_a_call_that_waits(pair: Pair, direction: str) -> None:
    near, _ = pair
    caught: list[BaseException] = []

    def wait() -> None:
        try:
            act(near, direction)
        except (OSError, EOFError) as error:
            caught.append(error)

    waiting = in_thread(wait)
    near.abort()
    waiting.join(30)
    assert len(caught) == 1


@pytest.mark.parametrize("direction", ["send", "receive"])
def test_a_check_ends_a_wait(pair: Pair, direction: str) -> None:
    near, _ = pair
    with pytest.raises(TimeoutError, match="stopped in the middle"), deadline(near, 0.0):
        act(near, direction)


def test_a_check_is_asked_though_bytes_trickle_in(pair: Pair) -> None:
    near, far = pair
    stop = threading.Event()

    def trickle() -> None:
        while not stop.wait(0.02):
            far.send([b"x"])

    sending = in_thread(trickle)
    with pytest.raises(TimeoutError), deadline(near, 0.3):
        receive(near, 1 << 20)
    stop.set()
    sending.join(30)


def test_a_peer_that_ended_its_direction_and_does_not_read_is_noticed() -> None:
    listener = TcpListener("127.0.0.1")
    near = connect_tcp("127.0.0.1", listener.port)
    far = listener.accept()
    far._sock.shutdown(socket.SHUT_WR)
    # Not by TCP_USER_TIMEOUT, which would take 20 s and raises another error.
    with pytest.raises(BrokenPipeError, match="ended the stream"):
        send_for_ever(near)
    for closing in (near, far, listener):
        closing.close()


def refused(listener: Listener) -> None:
    with contextlib.suppress(OSError):
        listener.accept()
        raise AssertionError("a closed listener accepted")


def test_a_closed_listener_accepts_nobody() -> None:
    for listener in (TcpListener("127.0.0.1"), MemoryListener()):
        waiting = in_thread(partial(refused, listener))
        listener.close()
        waiting.join(30)
        assert not waiting.is_alive()


def test_an_address_that_is_taken_says_so() -> None:
    listener = TcpListener("127.0.0.1")
    with pytest.raises(AgentUnreachable, match="can't listen"):
        TcpListener("127.0.0.1", listener.port)
    listener.close()


def test_the_pacer_holds_its_rate_without_a_clock_of_its_own() -> None:
    now = 0.0
    waited = 0.0

    def clock() -> float:
        return now

    def wait(seconds: float) -> None:
        nonlocal now, waited
        now += seconds
        waited += seconds

    pacer = Pacer(1000.0, clock=clock)
    for _ in range(50):
        pacer.take(100, wait)
    assert waited == pytest.approx(5.0, rel=0.02)
    now += 100.0  # a pause saves up a burst of 50 ms, no more
    pacer.take(1000, wait)
    assert waited == pytest.approx(5.95, rel=0.02)
    Pacer(None).take(10**12, wait)
    with pytest.raises(ValueError, match="positive"):
        Pacer(0)
