"""The conformance suite, unchanged, inside a host: the real driver judges the tests."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from scenarios.lab import debian
from scenarios.lab.host import Host, Running, pack
from scenarios.lab.image import NEXT_CRIU, SITE
from scenarios.lab.layout import PROJECT, LabError, Layout

PARTS = ("migrate", "agents", "scenarios", "tests", "pyproject.toml")
TARGET = "/opt/project"
NEXT_HOOK = "/root/hook-next"
_ENSURE_HOOKS = f"""
from pathlib import Path
from agents.hook import ensure_hook
ensure_hook(Path("hook"))
ensure_hook(Path("hook-next"), criu="/{NEXT_CRIU}/criu", include=Path("/{NEXT_CRIU}/usr/include"))
"""
# The kernel itself is at fault, or our module. What amdkfd says about bad arguments is not.
TROUBLE = re.compile(r"WARNING:|BUG:|Oops|Call Trace|general protection|hung task|blocked for more")


@contextmanager
def staged(layout: Layout) -> Iterator[tuple[Path, str]]:
    """The project, as it is in the work tree, inside the guests' root file system here.

    Its folder, and the same as ``debian.in_root`` sees it: what is compiled there is not
    emulated.
    """
    with tempfile.TemporaryDirectory(dir=layout.guest_root / "tmp") as name:
        stage = Path(name)
        for part in PARTS:
            if (PROJECT / part).is_dir():
                ignored = shutil.ignore_patterns("__pycache__")
                shutil.copytree(PROJECT / part, stage / part, ignore=ignored)
            else:
                shutil.copy2(PROJECT / part, stage / part)
        yield stage, f"/tmp/{stage.name}"  # noqa: S108 - the guests' own


def install_project(host: Host) -> None:
    """Copy the project into *host*, its Python compiled, once in this process.

    As it was in the work tree when this process did it for the first time.
    """
    running = host.running
    if running is None or running not in _installed:
        host.ssh(f"rm -rf {TARGET}/*")
        host.unpack(_packed(host.layout), TARGET)
        _installed.append(running)


_installed: list[Running | None] = []


@lru_cache
def _packed(layout: Layout) -> bytes:
    with staged(layout) as (stage, inside):
        compiler = ("python3", "-m", "compileall", "-q", "-s", inside, "-p", TARGET, inside)
        debian.in_root(layout, layout.guest_root, *compiler)
        return pack(stage, ".")


def build_for(host: Host, script: str, *results: str) -> None:
    """Run a shell line in the project's folder, outside of *host*; *results* go to its /root."""
    layout = host.layout
    with staged(layout) as (stage, inside):
        line = f"cd {inside} && PYTHONPATH=.:/{SITE} && export PYTHONPATH && {script}"
        debian.in_root(layout, layout.guest_root, "sh", "-c", line)
        host.copy(*results, source=stage, target="/root")


def install_hooks(host: Host) -> None:
    """Compile the agents' hook outside of *host*, which would take a minute or more over it.

    That for the newer CRIU beside the guests' own is left in NEXT_HOOK.
    """
    build_for(host, f"python3 -c '{_ENSURE_HOOKS}'", "hook", "hook-next")
    host.ssh("mkdir -p /run/migrate && rm -rf /run/migrate/hook && cp -r /root/hook /run/migrate/")


def run(host: Host, arguments: Sequence[str], report: Callable[[str], None]) -> frozenset[str]:
    """Run tests/conformance on *host*; the names of those that passed.

    Each line of pytest is reported. Raises LabError if a test fails, none ran, or the kernel
    complained.
    """
    install_project(host)
    line = f"cd {TARGET} && MIGRATE_CONFORMANCE=kernel {shlex.join(_command('python3', arguments))}"
    passed = _run(f"conformance on host {host.name}", host.ssh_command(line), report)
    check_kernel(host)
    return passed


def run_simulated(report: Callable[[str], None]) -> frozenset[str]:
    """The same tests here, on a simulated node; the names of those that passed."""
    return _run("conformance on a simulated node", _command(sys.executable, ()), report)


def _command(python: str, arguments: Sequence[str]) -> list[str]:
    """The command line of the suite, that leaves out what is about the simulated node alone."""
    return [
        *(python, "-m", "pytest", "-q", "-rp", "-p", "no:cacheprovider", "--timeout=300"),
        *("-m", "not simulated", "tests/conformance", *arguments),
    ]


def _run(what: str, line: Sequence[str], report: Callable[[str], None]) -> frozenset[str]:
    process = subprocess.Popen(
        line, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, cwd=PROJECT
    )
    passed = set()
    last = ""
    assert process.stdout is not None
    with process.stdout as lines:
        for text in lines:
            word, _, name = text.rstrip("\n").partition(" ")
            if word == "PASSED":
                passed.add(name)
            else:
                report(text.rstrip("\n"))
            last = text if re.search(r"\d+ (passed|failed|error)", text) else last
    if process.wait() or not passed:
        raise LabError(f"{what}: {last.strip() or 'no test ran'}")
    return frozenset(passed)


def check_kernel(host: Host) -> None:
    """Raise LabError if the kernel log of *host* has a warning, an oops or a hung task."""
    if host.running is None:
        raise LabError(f"host {host.name} went down:\n{host.last_words()}")
    lines = host.kernel_log().splitlines()
    for number, text in enumerate(lines):
        if TROUBLE.search(text):
            excerpt = "\n".join(lines[number : number + 30])
            raise LabError(f"the kernel of host {host.name} complains:\n{excerpt}")
