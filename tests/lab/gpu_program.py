"""Runs in a guest: a process with queues on every GPU whose first kernel counts for ever.

``python -m tests.lab.gpu_program FILE`` stores the u64 counter in FILE again and again.
"""

from __future__ import annotations

import os
import sys
import time

from migrate.model import HostPaths
from tests.conformance.kit import Process
from tests.conformance.target import Target


def main(path: str) -> None:
    """Never returns."""
    target = Target(Process(HostPaths()))
    target.build()
    target.start_counter()
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    while True:
        os.pwrite(file, target.counter().to_bytes(8, "little"), 0)
        time.sleep(0.005)


if __name__ == "__main__":
    main(sys.argv[1])
