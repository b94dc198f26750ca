"""The host a conformance test runs against: a simulated node, or this machine's /dev/kfd.

MIGRATE_CONFORMANCE=kernel chooses the latter, together with ``-m "not simulated"``, which
leaves out the tests that need the node's own switches. Test bodies that are KFD processes run in
children of their own (``Host.spawn``), since a process's KFD state lives as long as
the process does.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import select
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from migrate.kfd.sim.faults import Fault, arm
from migrate.model import HostPaths
from tests.conformance import kit

KERNEL = os.environ.get("MIGRATE_CONFORMANCE") == "kernel"
PARTS = ("dump", "product", "restore", "sharing", "surprises", "work")
DEADLINE = 60.0  # seconds; a condition that is not met by then never will be
PR_SET_PTRACER = 0x59616D61
PR_SET_PTRACER_ANY = ctypes.c_ulong(-1).value

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "migrate.kfd.sim.client",
        *(f"tests.conformance.test_{part}" for part in PARTS),
        "tests.unit.test_sim_node",
        "tests.unit.test_sim_svm",
    ]
)


class Link:
    """A child's end of the conversation with its test."""

    def __init__(self, paths: HostPaths, connection: Connection) -> None:
        self.paths = paths
        self._connection = connection

    def say(self, value: object = None) -> None:
        self._connection.send(("value", value))

    def hear(self) -> Any:
        return self._connection.recv()


class Child:
    """A process that runs *body(link, \\*args)*."""

    def __init__(
        self, paths: HostPaths, body: Callable[..., object], args: tuple[Any, ...]
    ) -> None:
        self._mine, theirs = _context.Pipe()
        self.process = _context.Process(target=_main, args=(paths, theirs, body, args))
        self.process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def say(self, value: object = None) -> None:
        self._mine.send(value)

    def hear(self) -> Any:
        """The next value the child says; its exception is raised here."""
        if not self._mine.poll(DEADLINE):
            raise TimeoutError("the child says nothing")
        try:
            kind, value = self._mine.recv()
        except EOFError:
            self.process.join(DEADLINE)
            raise ChildDied(self.process.exitcode) from None
        if kind == "error":
            pytest.fail(f"in the child:\n{value}")
        return value

    def ask(self, value: object = None) -> Any:
        self.say(value)
        return self.hear()

    def join(self) -> int | None:
        self.process.join(DEADLINE)
        return self.process.exitcode

    def kill(self) -> None:
        self.process.kill()
        self.process.join(DEADLINE)

    def close(self) -> None:
        if self.process.is_alive():
            self.kill()
        self._mine.close()
        self.process.join(DEADLINE)
        self.process.close()


class ChildDied(Exception):
    """The child ended without a word; the exit code is the argument."""


def _main(
    paths: HostPaths, connection: Connection, body: Callable[..., object], args: tuple[Any, ...]
) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY, 0, 0, 0)
    link = Link(paths, connection)
    try:
        value = body(link, *args)
        connection.send(("value", value))
    except (EOFError, BrokenPipeError):
        pass
    except BaseException:
        connection.send(("error", traceback.format_exc()))


class Host:
    """A host with its paths; ``simulated`` ones also have faults and a log."""

    def __init__(self, paths: HostPaths, root: Path | None) -> None:
        self.paths = paths
        self.root = root
        self.images: dict[str, Any] = {}  # of targets, kept for later tests
        self._children: list[Child] = []

    @property
    def simulated(self) -> bool:
        return self.root is not None

    @property
    def gpu_ids(self) -> list[int]:
        return list(kit.gpu_nodes(self.paths))

    def need_gpus(self, count: int) -> None:
        if len(self.gpu_ids) < count:
            pytest.skip(f"needs {count} GPUs, the host has {len(self.gpu_ids)}")

    def spawn(self, body: Callable[..., object], *args: Any) -> Child:
        child = Child(self.paths, body, args)
        self._children.append(child)
        return child

    def run(self, body: Callable[..., object], *args: Any) -> Any:
        """Run *body* to its end in a child; what it returns."""
        child = self.spawn(body, *args)
        try:
            return child.hear()
        finally:
            child.join()

    def arm(self, fault: Fault, value: float = 1) -> None:
        """Make the host fail. Only a simulated one can."""
        assert self.root is not None, "a test that arms faults is marked 'simulated'"
        arm(self.root, fault, value)

    @property
    def kernel_log(self) -> str:
        assert self.root is not None
        return (self.root / "run" / "kernel.log").read_text()

    def end_children(self) -> None:
        for child in self._children:
            with suppress(ValueError):  # closed already
                child.close()
        self._children.clear()


@contextmanager
def simulated_host(*options: str, profile: str = "mi210x2") -> Iterator[Host]:
    """A node of its own, ended afterwards."""
    root = Path(tempfile.mkdtemp(prefix="kfd-"))
    node = subprocess.Popen(
        [sys.executable, "-m", "migrate.kfd.sim", "--root", root, "--profile", profile, *options],
        stdout=subprocess.PIPE,
    )
    host = Host(HostPaths.under(root), root)
    try:
        assert node.stdout is not None
        ready, _, _ = select.select([node.stdout], [], [], DEADLINE)
        assert ready
        assert node.stdout.readline() == b"READY\n"
        yield host
    finally:
        host.end_children()
        node.terminate()
        node.wait(DEADLINE)
        assert node.stdout is not None
        node.stdout.close()
        shutil.rmtree(root)


@contextmanager
def any_host(*options: str, profile: str = "mi210x2") -> Iterator[Host]:
    """The host under test; *options* and *profile* count for a simulated one only."""
    if not KERNEL:
        with simulated_host(*options, profile=profile) as host:
            yield host
        return
    host = Host(HostPaths(), None)
    try:
        yield host
    finally:
        host.end_children()
