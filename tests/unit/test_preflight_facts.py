"""Facts of real processes: each kind of trouble is seen, and what is none is not."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrate.errors import MigrateError, NoSuchProcess
from migrate.model import HostPaths
from migrate.preflight import files, local
from migrate.preflight.collect import restarted, whole_tree
from migrate.preflight.descriptors import Descriptor
from migrate.preflight.facts import Facts
from migrate.preflight.identity import PIECE, PIECES, identity
from migrate.preflight.mappings import of_line

NOWHERE = HostPaths.under("/nonexistent")


@contextlib.contextmanager
def child(code: str, *arguments: str) -> Iterator[int]:
    """A process that ran *code* and waits; its pid."""
    text = f"import os, sys, socket, mmap, tempfile\n{code}\nprint('ready', flush=True)\n"
    command = [sys.executable, "-c", f"{text}sys.stdin.read()", *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == b"ready\n"
            yield process.pid
        finally:
            process.kill()


def facts_of(code: str, *arguments: str, ghost_limit: int = 1 << 20) -> Facts:
    with child(code, *arguments) as pid:
        return whole_tree([pid], NOWHERE, ghost_limit=ghost_limit)


def reasons(facts: Facts) -> list[str]:
    return [blocker.reason for blocker in facts.own.blockers]


@pytest.mark.parametrize(
    "code",
    [
        "pass",
        "s = socket.create_server(('127.0.0.1', 0))",
        "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)",
        "a, b = socket.socketpair()",
        "r, w = os.pipe()",
        "f = os.open('/dev/null', os.O_RDWR)",
        "f = os.memfd_create('x'); os.ftruncate(f, 1 << 24)",
        "e = os.eventfd(1)",
        "import select; e = select.epoll()",
        "f = tempfile.TemporaryFile(); f.truncate(1 << 20)",
        "m = mmap.mmap(-1, 1 << 22)",
        "s = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)",
    ],
)
def test_no_trouble(code: str) -> None:
    assert reasons(facts_of(code)) == []


def test_a_dmabuf_as_a_file() -> None:
    """None can be made without a driver that exports one: what /proc shows of it is given."""
    link = "/dmabuf:drm"
    open_one = Descriptor(
        pid=7,
        number=4,
        link=link,
        mode=0o600,
        device=12,
        size=4096,
        links=1,
        inode=99,
        writable=True,
        gpu=False,
    )
    line = f"7f0000000000-7f0000001000 rw-s 00000000 00:0c 99                         {link}"
    mapping = of_line(7, line, NOWHERE)
    assert mapping is not None
    found = list(local.files([open_one], [mapping], 1 << 20))
    assert [one.reason for one in found] == ["UNSUPPORTED_FILE", "DEVICE_FILE"]
    assert found[0].message == "fd 4 of process 7 is a dmabuf"


def test_large_deleted_files() -> None:
    code = "f = tempfile.TemporaryFile(); f.truncate(5000)"
    assert reasons(facts_of(code, ghost_limit=5000)) == []
    (blocker,) = facts_of(code, ghost_limit=4999).own.blockers
    assert blocker.reason == "DELETED_FILE"
    assert "5000 bytes" in blocker.message


def test_a_deleted_file_that_is_only_mapped() -> None:
    code = (
        "import ctypes; f = tempfile.TemporaryFile(); f.truncate(8192);"
        "ctypes.CDLL(None).mmap(None, 8192, 1, 1, f.fileno(), 0); f.close()"
    )
    (blocker,) = facts_of(code, ghost_limit=4096).own.blockers
    assert blocker.reason == "DELETED_FILE"
    assert "mapped by process" in blocker.message


def test_both_ends_of_a_connection_in_the_tree() -> None:
    """A UNIX socket between parent and child moves; with one of them only it does not."""
    code = (
        "a, b = socket.socketpair(); pid = os.fork()\nif pid == 0: a.close(); b.recv(1)\nb.close()"
    )
    with child(code) as parent:
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        tree = [parent, *map(int, children)]
        assert reasons(whole_tree(tree, NOWHERE)) == []
        assert reasons(whole_tree([parent], NOWHERE)) == ["UNSUPPORTED_SOCKET"]
        os.kill(tree[1], 9)


def test_what_must_be_there(tmp_path: Path) -> None:
    written, read = tmp_path / "written", tmp_path / "read"
    for path in (written, read):
        path.write_text("something")
    code = (
        "w = open(sys.argv[1], 'a'); r = open(sys.argv[2]); os.chdir(os.path.dirname(sys.argv[1]))"
    )
    facts = facts_of(code, str(written), str(read))
    found = {fact.path: fact for fact in facts.files}
    assert found[str(written)].written
    assert found[str(written)].identity == ""
    assert not found[str(read)].written
    assert found[str(read)].identity.startswith("xxh3:")
    assert found[str(tmp_path)].folder
    libc = next(fact for path, fact in found.items() if "/libc.so" in path)
    assert libc.identity.startswith("build-id:")
    assert os.path.realpath(sys.executable) in found


def test_threads_users_and_groups() -> None:
    code = "import threading; t = threading.Thread(target=sys.stdin.read, daemon=True); t.start()"
    facts = facts_of(code)
    assert len(facts.ids) == 2
    assert [user.number for user in facts.users] == [os.getuid()]
    assert os.getgid() in [group.number for group in facts.groups]


def test_files_that_the_engine_sends_are_not_compared(tmp_path: Path) -> None:
    path = tmp_path / "sent"
    path.touch()
    with child("f = open(sys.argv[1])", str(path)) as pid:
        with_it, without = whole_tree([pid], NOWHERE), whole_tree([pid], NOWHERE, moved=[f"{path}"])
    assert {f.path for f in with_it.files} - {f.path for f in without.files} == {str(path)}


def test_of_a_command_that_starts_anew_only_places_count(tmp_path: Path) -> None:
    with child("f = tempfile.TemporaryFile(); f.truncate(1 << 22); os.chdir(sys.argv[1])",
               str(tmp_path)) as pid:  # fmt: skip
        facts = restarted([pid], NOWHERE)
    assert facts.own.blockers == ()
    assert facts.runs_as == os.geteuid()
    assert {f.path for f in facts.files} >= {str(tmp_path), os.path.realpath(sys.executable)}
    assert not any(f.contents for f in facts.files)
    assert any("/libc.so" in f.path for f in facts.alike)


def test_a_process_that_is_gone() -> None:
    with child("pass") as pid:
        pass
    with pytest.raises(NoSuchProcess):
        whole_tree([pid], NOWHERE)
    with pytest.raises(MigrateError):
        restarted([pid], NOWHERE)


# ---------------------------------------------------------------- contents


def test_the_build_id_is_what_readelf_says() -> None:
    """Of the interpreter: its note is found without any tool."""
    path = os.path.realpath("/proc/self/exe")
    (fact,) = files.named([path])
    sections = subprocess.run(["readelf", "-n", path], capture_output=True, text=True, check=False)
    if sections.returncode:
        pytest.skip("no readelf here")
    assert fact.identity.removeprefix("build-id:") in sections.stdout


@pytest.mark.parametrize("size", [0, 1, PIECE, PIECE * PIECES, PIECE * PIECES + 1, 10 << 20])
def test_samples_see_the_first_and_the_last_byte(tmp_path: Path, size: int) -> None:
    path = tmp_path / "data"
    data = bytearray(os.urandom(size))

    def now() -> str:
        path.write_bytes(data)
        with path.open("rb") as file:
            return identity(file.fileno(), size)

    seen = {now()}
    for place in {0, size - 1} if size else ():
        data[place] ^= 1
        seen.add(now())
    assert len(seen) == 1 + len({0, size - 1} if size else ())


def test_small_files_are_read_whole(tmp_path: Path) -> None:
    data = bytearray(PIECE * PIECES)
    for place in range(0, len(data), PIECE // 2):
        (tmp_path / "one").write_bytes(data)
        data[place] ^= 1
        (tmp_path / "two").write_bytes(data)
        one, two = files.named([str(tmp_path / "one"), str(tmp_path / "two")])
        assert one.identity != two.identity
