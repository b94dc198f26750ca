"""Threads that decode to a type for the first time, all at once."""

from __future__ import annotations

import subprocess
import sys

STORY = """
from __future__ import annotations
import sys, threading, msgspec
from migrate.decode import from_json
sys.setswitchinterval(1e-6)
TYPES = '''
class A(msgspec.Struct):
    x: int
    y: tuple[int, ...] = ()
    z: dict[str, str | int] | None = None
class B(msgspec.Struct):
    a: A
    many: tuple[A, ...]
    other: list[tuple[str, A]] | None = None
class C(msgspec.Struct):
    b: B
    more: tuple[B, ...]
'''
DATA = b'{"b":{"a":{"x":1},"many":[{"x":2,"y":[1]}]},"more":[{"a":{"x":1,"z":{"a":1}},"many":[]}]}'
for number in range(150):
    exec(TYPES)
    C = globals()["C"]
    start, found = threading.Barrier(4), []
    def work():
        start.wait()
        found.append(from_json(DATA, C))
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert len(found) == 4 and all(one == found[0] for one in found)
"""


def test_threads_that_decode_to_a_type_for_the_first_time_all_get_their_values() -> None:
    """Asked directly (``msgspec.json.decode``), msgspec 0.22 ends this process by SIGSEGV."""
    done = subprocess.run(
        [sys.executable, "-c", STORY], capture_output=True, text=True, timeout=100, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
