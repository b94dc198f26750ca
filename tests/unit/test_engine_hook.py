"""The agent's end of CRIU's hook, against a peer that writes the bytes the C side writes."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator

import pytest

from migrate.engine import hook, wire
from migrate.engine.hook import Hook, HookCall, HookEvent, Stage, Verdict
from migrate.engine.wire import Kind, Message
from migrate.errors import FrameRejected

EVENT = struct.pack("<iiiiQQIIQ", 2, 11, 12, 13, 14, 15, 16, 17, 18)


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    agent, task = socket.socketpair()
    for end in (agent, task):
        end.settimeout(20)
    with agent, task:
        yield agent, task


def say(task: socket.socket, number: int, payload: bytes) -> None:
    wire.send(task, Message(Kind.HOOK, file=number, payload=payload))


def test_an_event_reaches_the_handler_and_its_verdict_the_hook(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    agent, task = ends
    seen: list[HookEvent] = []

    def handler(call: HookCall) -> Verdict:
        seen.append(call.event)
        return Verdict(value=-5, fd=call.open("/dev/dri/renderD128"), new_offset=1 << 40)

    thread = threading.Thread(target=hook.serve, args=(agent, handler))
    thread.start()
    say(task, Hook.UPDATE_VMA_MAP, EVENT + b"/dev/kfd")
    opened = wire.receive(task)
    assert opened is not None
    assert (opened.kind, opened.payload) == (Kind.OPEN, b"/dev/dri/renderD128")
    wire.send(task, Message(Kind.REPLY, opened.sequence, file=77))
    returned = wire.receive(task)
    assert returned is not None
    assert returned.kind is Kind.RETURN
    assert struct.unpack("<iiQ", returned.payload) == (-5, 77, 1 << 40)
    wire.send(task, Message(Kind.REPLY, returned.sequence))
    task.shutdown(socket.SHUT_RDWR)
    thread.join(20)
    assert seen == [
        HookEvent(
            hook=Hook.UPDATE_VMA_MAP,
            stage=Stage.RESTORE,
            task=17,
            pid=11,
            id=12,
            fd=13,
            address=14,
            offset=15,
            mode=16,
            rdev=18,
            path="/dev/kfd",
        )
    ]


@pytest.mark.parametrize(
    ("kind", "number", "payload"),
    [
        (Kind.IOCTL, 11, EVENT),
        (Kind.HOOK, 12, EVENT),
        (Kind.HOOK, 11, EVENT[:-1]),
        (Kind.HOOK, 11, struct.pack("<i", 3) + EVENT[4:]),
    ],
)
def test_what_is_no_hook_is_refused(
    ends: tuple[socket.socket, socket.socket], kind: Kind, number: int, payload: bytes
) -> None:
    agent, task = ends
    wire.send(task, Message(kind, file=number, payload=payload))
    with pytest.raises(FrameRejected):
        hook.serve(agent, lambda call: Verdict())


def test_a_handler_that_fails_ends_the_conversation(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    agent, task = ends

    def handler(call: HookCall) -> Verdict:
        raise RuntimeError(call.event.hook.name)

    say(task, Hook.FINI, EVENT)
    with pytest.raises(RuntimeError, match="FINI"):
        hook.serve(agent, handler)
