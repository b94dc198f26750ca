"""The process engines by name, and what each needs before an agent can use it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from agents.hook import ensure_hook
from migrate.engine.criu import HOOK, CriuEngine
from migrate.engine.reexec import ReexecEngine
from migrate.engine.seam import ProcessEngine
from migrate.errors import UsageError
from migrate.model import HostPaths

ENGINES: dict[str, Callable[[HostPaths], ProcessEngine]] = {
    "criu": CriuEngine,
    "reexec": ReexecEngine,
}


def make_engine(name: str, paths: HostPaths) -> ProcessEngine:
    """An engine that can end what another one began. Raises UsageError."""
    if name not in ENGINES:
        raise UsageError(f"engine: {name!r} is not one of: {', '.join(sorted(ENGINES))}")
    return ENGINES[name](paths)


def ready_engine(name: str, paths: HostPaths) -> ProcessEngine:
    """As ``make_engine``, with all that a migration needs. Raises UsageError, CriuUnusable."""
    engine = make_engine(name, paths)
    if name == "criu":
        ensure_hook(Path(paths.run) / HOOK)
    return engine
