"""What an agent sets for its own process: how many files, and where its buffers lie.

A thousand strangers that connect and say nothing must not keep a migration's streams out, so
an agent raises its soft limit. A process that is built anew gets the one from before.

Each migration has threads and buffers of a few MiB of its own. glibc takes a freed buffer as a
sign that such sizes come again, and puts the next one into its arenas, which keep the memory:
measured, an agent grew by 5 MB with each migration. With a fixed threshold (mallopt(3),
M_MMAP_THRESHOLD) large buffers are mappings, gone when they are freed, and it stays as it is.
"""

from __future__ import annotations

import contextlib
import ctypes
import resource

OPEN_FILES = 65_536
LARGE_BUFFER = 1 << 20  # bytes
_M_MMAP_THRESHOLD = -3  # malloc.h

_before = resource.getrlimit(resource.RLIMIT_NOFILE)


def raise_open_files() -> None:
    """Raise the soft limit of this process, as far as the hard one allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def keep_buffers_apart() -> None:
    """Let what is larger than LARGE_BUFFER be given back to the system when it is freed.

    A hint: another C library than glibc may not know it.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, LARGE_BUFFER)


def give_back(pid: int) -> None:
    """Set the limit of our child *pid* to what ours was before it was raised."""
    with contextlib.suppress(ProcessLookupError):
        resource.prlimit(pid, resource.RLIMIT_NOFILE, _before)
