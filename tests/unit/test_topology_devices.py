"""The device filter: its program by an interpreter here, and in a real cgroup as root."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from migrate.errors import MissingCapability
from migrate.topology.devices import DeviceFilter, device_filter, hidden_nodes
from migrate.topology.match import match
from tests.unit.topology_kit import gpu, machine

CHAR, BLOCK = 2, 1


def allowed(code: bytes, type_: int, major: int, minor: int, access: int = 6) -> bool:
    """Run the program as the kernel would."""
    context = struct.pack("=III", access << 16 | type_, major, minor)
    registers = [0] * 11
    at = 0
    while True:
        opcode, both, offset, value = struct.unpack_from("=BBhi", code, 8 * at)
        target = both & 15
        at += 1
        if opcode == 0x61:
            assert both >> 4 == 1
            (registers[target],) = struct.unpack_from("=I", context, offset)
        elif opcode == 0x57:
            registers[target] &= value
        elif opcode == 0x55:
            at += offset if registers[target] != value else 0
        elif opcode == 0x15:
            at += offset if registers[target] == value else 0
        elif opcode == 0xB7:
            registers[target] = value
        else:
            assert opcode == 0x95
            return registers[0] == 1


def test_the_gpus_that_are_not_mapped_are_hidden() -> None:
    pair = machine([gpu(1), gpu(2)], hives=[[1, 2]])
    four = machine([gpu(g) for g in (5, 6, 7, 8)], hives=[[5, 6], [7, 8]])
    result = match(pair, four, busy={5})
    assert result.show == (7, 8)
    hidden = hidden_nodes(four, result.show)
    assert hidden == ((226, 133), (226, 134))
    code = device_filter(hidden)
    for minor in range(256):
        assert allowed(code, CHAR, 226, minor) == (minor not in (133, 134))
        assert allowed(code, BLOCK, 226, minor)
        assert allowed(code, CHAR, 227, minor)


@pytest.mark.parametrize("hidden", [[], [(1, 5)], [(226, n) for n in range(128, 192)]])
def test_just_those_devices_are_denied(hidden: list[tuple[int, int]]) -> None:
    code = device_filter(hidden)
    for major in (1, 5, 226):
        for minor in (1, 3, 5, 127, 128, 160, 191, 192):
            assert allowed(code, CHAR, major, minor) == ((major, minor) not in hidden)


def test_too_many_devices() -> None:
    with pytest.raises(ValueError, match="at most"):
        device_filter([(226, n) for n in range(2000)])


def unified() -> Path | None:
    """Where cgroup v2 is mounted."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, where, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(where)
    return None


@contextmanager
def cgroup() -> Iterator[Path]:
    base = unified()
    if base is None:
        pytest.skip("no cgroup v2 here")
    folder = base / f"migrate-test-{uuid.uuid4().hex[:12]}"
    folder.mkdir()
    try:
        yield folder
    finally:
        folder.rmdir()


INSIDE = """
import os, sys
with open(sys.argv[1] + "/cgroup.procs", "w") as procs:
    procs.write(str(os.getpid()))
for path in ("/dev/null", "/dev/zero"):
    try:
        os.close(os.open(path, os.O_RDWR))
        print("opened")
    except OSError as error:
        print(error.strerror)
"""


def inside(folder: Path) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", INSIDE, str(folder)], capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


def test_a_device_is_hidden_from_the_members_of_a_cgroup() -> None:
    """/dev/zero (1:5) stands for a render node: the kernel asks the same question of both.

    Without root: that it is said what is missing.
    """
    if os.geteuid() != 0:
        with pytest.raises(MissingCapability, match="CAP_BPF"):
            DeviceFilter([(1, 5)])
        return
    DeviceFilter([]).close()  # no GPU to hide: the kernel takes that program, too
    with cgroup() as folder, DeviceFilter([(1, 5)]) as loaded:
        assert inside(folder) == ["opened", "opened"]
        loaded.attach(folder)
        assert inside(folder) == ["opened", "Operation not permitted"]
        os.close(os.open("/dev/zero", os.O_RDWR))  # outside nothing changed
        loaded.detach(folder)
        assert inside(folder) == ["opened", "opened"]
