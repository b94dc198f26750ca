"""The conformance suite, unchanged, inside a host: the real driver judges the tests."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from scenarios.lab import debian
from scenarios.lab.host import Host
from scenarios.lab.layout import PROJECT, LabError

PARTS = ("migrate", "agents", "scenarios", "tests", "pyproject.toml")
TARGET = "/opt/project"
# The kernel itself is at fault, or our module. What amdkfd says about bad arguments is not.
TROUBLE = re.compile(r"WARNING:|BUG:|Oops|Call Trace|general protection|hung task|blocked for more")


def install_project(host: Host) -> None:
    """Copy the project, as it is in the work tree, into *host*.

    Compiled by the guests' Python outside of them, where it is not emulated.
    """
    layout = host.layout
    with tempfile.TemporaryDirectory(dir=layout.guest_root / "tmp") as name:
        stage = Path(name)
        for part in PARTS:
            if (PROJECT / part).is_dir():
                ignored = shutil.ignore_patterns("__pycache__")
                shutil.copytree(PROJECT / part, stage / part, ignore=ignored)
            else:
                shutil.copy2(PROJECT / part, stage / part)
        inside = f"/tmp/{stage.name}"  # noqa: S108 - the guests' own
        compiler = ("python3", "-m", "compileall", "-q", "-s", inside, "-p", TARGET, inside)
        debian.in_root(layout, layout.guest_root, *compiler)
        host.ssh(f"rm -rf {TARGET}/*")
        host.copy(".", source=stage, target=TARGET)


def run(host: Host, arguments: Sequence[str], report: Callable[[str], None]) -> int:
    """Run tests/conformance on *host*; how many passed. Each line of pytest is reported.

    Raises LabError if a test fails, none ran, or the kernel complained.
    """
    install_project(host)
    line = (
        f"cd {TARGET} && MIGRATE_CONFORMANCE=kernel python3 -m pytest -p no:cacheprovider"
        f" --timeout=300 -m 'not simulated' tests/conformance {' '.join(arguments)}"
    )
    process = subprocess.Popen(
        host.ssh_command(line), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
    )
    last = ""
    assert process.stdout is not None
    with process.stdout as lines:
        for text in lines:
            report(text.rstrip("\n"))
            last = text if re.search(r"\d+ (passed|failed|error)", text) else last
    status = process.wait()
    check_kernel(host)
    found = re.search(r"(\d+) passed", last)
    if status or found is None:
        raise LabError(f"conformance on host {host.name}: {last.strip() or 'no test ran'}")
    return int(found[1])


def check_kernel(host: Host) -> None:
    """Raise LabError if the kernel log of *host* has a warning, an oops or a hung task."""
    if host.running is None:
        raise LabError(f"host {host.name} went down:\n{host.last_words()}")
    lines = host.kernel_log().splitlines()
    for number, text in enumerate(lines):
        if TROUBLE.search(text):
            excerpt = "\n".join(lines[number : number + 30])
            raise LabError(f"the kernel of host {host.name} complains:\n{excerpt}")
