"""Runs in a guest: a process with queues on every GPU whose first kernel counts for ever.

``python -m tests.lab.gpu_program FILE`` stores the u64 counter in FILE again and again.
"""

from __future__ import annotations

import os
import sys

from migrate.model import HostPaths
from tests.conformance.kit import Process
from tests.lab.gpu_job import pause


def main(path: str) -> None:
    """Never returns."""
    process = Process(HostPaths())
    process.prepare_queues()
    process.create_event()
    queues = [process.create_queue(gpu, number) for number, gpu in enumerate(process.gpu_ids)]
    buffer = process.start_counter(queues[0], process.gpu_ids[0])
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    while True:
        os.pwrite(file, buffer.word(0).to_bytes(8, "little"), 0)
        pause(0.005)


if __name__ == "__main__":
    main(sys.argv[1])
