"""How many files an agent may have open, and what its restored processes get.

A thousand strangers that connect and say nothing must not keep a migration's streams out, so
an agent raises its soft limit. A process that is built anew gets the one from before.
"""

from __future__ import annotations

import contextlib
import resource

OPEN_FILES = 65_536

_before = resource.getrlimit(resource.RLIMIT_NOFILE)


def raise_open_files() -> None:
    """Raise the soft limit of this process, as far as the hard one allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def give_back(pid: int) -> None:
    """Set the limit of our child *pid* to what ours was before it was raised."""
    with contextlib.suppress(ProcessLookupError):
        resource.prlimit(pid, resource.RLIMIT_NOFILE, _before)
