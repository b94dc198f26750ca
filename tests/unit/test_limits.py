"""What an agent sets for its own process."""

from __future__ import annotations

import subprocess
import sys

# A buffer was freed before: glibc expects more of that size, and puts them on its heap.
_LATER_BUFFER = """
import ctypes
from migrate.engine.limits import LARGE_BUFFER, keep_buffers_apart

if {apart}:
    keep_buffers_apart()
first = bytearray(4 * LARGE_BUFFER)
del first
buffer = bytearray(2 * LARGE_BUFFER)
at = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
for line in open("/proc/self/maps"):
    start, end = (int(part, 16) for part in line.split()[0].split("-"))
    if start <= at < end:
        print("heap" if "[heap]" in line else "apart")
"""


def _where_a_buffer_lies(*, apart: bool) -> str:
    script = _LATER_BUFFER.format(apart=apart)
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, check=True, text=True)
    return done.stdout.strip()


def test_large_buffers_are_given_back_when_they_are_freed() -> None:
    assert _where_a_buffer_lies(apart=False) == "heap", "the test sees no difference"
    assert _where_a_buffer_lies(apart=True) == "apart"
