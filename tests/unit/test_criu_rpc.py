"""CRIU's RPC against a stand-in at the other end of the socket; its messages are protobuf."""

from __future__ import annotations

import stat
import sys
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from hypothesis import given
from hypothesis import strategies as st

from migrate.criu import protobuf
from migrate.criu.rpc import (
    CriuOptions,
    Notification,
    RequestType,
    Swrk,
    criu_version,
    last_errors,
)
from migrate.errors import CriuUnusable

CRIU = """#!{python}
import socket, sys
sys.path[:0] = {path!r}
from migrate.criu.protobuf import decode, encode
channel = socket.socket(fileno=int(sys.argv[2]))
{body}
"""


def criu(folder: Path, body: str) -> str:
    program = folder / "criu"
    program.write_text(CRIU.format(python=sys.executable, path=sys.path, body=body))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return str(program)


def options(folder: Path) -> CriuOptions:
    return CriuOptions(images=str(folder), work=str(folder), log="log", pid=7)


def test_notifications_are_answered_and_the_response_comes_last(tmp_path: Path) -> None:
    body = """
request = decode(channel.recv(65536))
assert request.integer(1) == 1 and request.message(2).integer(2) == 7
for script in ("post-dump", "post-resume"):
    channel.send(encode({1: 6, 2: True, 5: encode({1: script, 2: 42})}))
    answer = decode(channel.recv(65536))
    assert answer.integer(1) == 6
    if not answer.integer(3):
        break
channel.send(encode({1: 1, 2: script == "post-resume", 7: 3, 9: "told " + script}))
"""
    seen: list[Notification] = []

    def note(notification: Notification) -> bool:
        seen.append(notification)
        return True

    swrk = Swrk(criu(tmp_path, body), {})
    response = swrk.request(RequestType.DUMP, options(tmp_path), note)
    swrk.close()
    assert [n.script for n in seen] == ["post-dump", "post-resume"]
    assert seen[0].pid == 42
    assert response.success
    assert (response.errno, response.message) == (3, "told post-resume")

    swrk = Swrk(criu(tmp_path, body), {})
    assert not swrk.request(RequestType.DUMP, options(tmp_path), lambda _: False).success
    swrk.close()


def test_a_criu_that_dies_is_an_error_not_a_success(tmp_path: Path) -> None:
    swrk = Swrk(criu(tmp_path, "channel.recv(65536)"), {})
    with pytest.raises(CriuUnusable, match="in the middle of a request"):
        swrk.request(RequestType.DUMP, options(tmp_path))
    swrk.close()
    swrk.close()


def test_a_criu_that_talks_nonsense_is_refused(tmp_path: Path) -> None:
    swrk = Swrk(criu(tmp_path, "channel.recv(65536); channel.send(b'\\xff')"), {})
    with pytest.raises(CriuUnusable, match="can't be read"):
        swrk.request(RequestType.CHECK)
    swrk.close()


def test_no_criu_at_all(tmp_path: Path) -> None:
    with pytest.raises(CriuUnusable, match="does not start"):
        criu_version(str(tmp_path / "none"))


def test_version(tmp_path: Path) -> None:
    body = "channel.recv(65536); channel.send(encode({1: 10, 2: 1, 10: encode({1: 4, 2: 2})}))"
    assert criu_version(criu(tmp_path, body)) == (4, 2, 0)


def test_last_errors(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(
        "(0.1) fine\n(0.2) Warn  (criu/a.c:1): hm\n"
        "(0.3)    359: Error (criu/b.c:2): first\n(0.4) Error (criu/c.c:3): second\n"
    )
    assert last_errors(log) == "(criu/b.c:2): first; (criu/c.c:3): second"
    assert last_errors(log, 1) == "(criu/c.c:3): second"
    assert last_errors(tmp_path / "none") == ""


def test_messages_are_protobuf() -> None:
    file = descriptor_pb2.FileDescriptorProto(name="t.proto", package="t", syntax="proto2")
    message = file.message_type.add(name="M")
    field = descriptor_pb2.FieldDescriptorProto
    for number, type_, label in (
        (1, field.TYPE_INT32, field.LABEL_OPTIONAL),
        (20, field.TYPE_BOOL, field.LABEL_OPTIONAL),
        (68, field.TYPE_STRING, field.LABEL_OPTIONAL),
        (25, field.TYPE_BYTES, field.LABEL_REPEATED),
    ):
        message.field.add(name=f"f{number}", number=number, type=type_, label=label)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    kind: Any = message_factory.GetMessageClass(pool.FindMessageTypeByName("t.M"))
    ours = protobuf.encode({1: -1, 20: True, 68: "/run/ä", 25: [b"a", b"b" * 300]})
    theirs = kind.FromString(ours)
    assert (theirs.f1, theirs.f20, theirs.f68) == (-1, True, "/run/ä")
    assert list(theirs.f25) == [b"a", b"b" * 300]
    back = protobuf.decode(theirs.SerializeToString())
    assert (back.integer(1), back.integer(20), back.text(68)) == (-1, 1, "/run/ä")


@given(st.binary(max_size=200))
def test_decode_answers_or_refuses(data: bytes) -> None:
    try:
        message = protobuf.decode(data)
        message.integer(1)
    except ValueError:
        return


@given(
    st.dictionaries(
        st.integers(1, 1000), st.integers(-(1 << 63), (1 << 63) - 1) | st.binary(max_size=400)
    )
)
def test_what_is_encoded_is_decoded(fields: dict[int, int | bytes]) -> None:
    message = protobuf.decode(protobuf.encode(fields))
    for number, value in fields.items():
        found = message.integer(number) if isinstance(value, int) else message.data(number)
        assert found == value
