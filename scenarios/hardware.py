"""``make hardware``: what a machine with real cards can prove, as one file to send.

``python -m scenarios.hardware [FILE]`` examines the host, then runs the parts of the test
suites that need no program for the GPU, and a migration from this machine to itself: the
software GPUs of the lab execute opcodes of their own where a card executes shaders, so what
submits work is left out. Ends with 0 if everything passed, 1 if something failed, 22
(HOST_UNFIT) if this machine can't take part; it says why.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

import msgspec

from agents.doctor.examine import examine
from agents.doctor.finding import UNSEEN_ERRORS, Patient, Report
from migrate.dataplane.sdma.libdrm import Library
from migrate.errors import HostUnfit
from migrate.kfd.sysfs import read_topology
from migrate.model import HostPaths, Value

SCHEMA = "migrate.hardware/1"
SECONDS = 1800  # of one suite
# Dumps of processes with buffers, queues and events, none of which runs a packet.
SUITES = {
    "access": ("tests/access",),
    "conformance": ("tests/conformance/test_dump.py", "-m", "not simulated"),
}


class Suite(Value):
    """How one suite ended: the last line of pytest, and the tests that did not pass."""

    passed: bool
    summary: str
    failures: tuple[str, ...] = ()


class Result(Value):
    """What is sent."""

    schema: str
    doctor: Report
    missing: tuple[str, ...]
    suites: dict[str, Suite]
    loop_back: Suite | None
    complete: bool


def missing(paths: HostPaths) -> tuple[str, ...]:
    """What keeps this machine from taking part, a sentence each."""
    found = []
    if not Path(paths.kfd).is_char_device():
        found.append(f"{paths.kfd} is not there: no AMD GPU, or amdgpu is not loaded")
    else:
        try:
            gpus = len(read_topology(paths.topology).gpus)
        except UNSEEN_ERRORS as error:
            found.append(f"the topology can't be read: {error}")
        else:
            if not gpus:
                found.append("KFD shows no GPU")
    if os.geteuid():
        found.append("root is needed: checkpoints take CAP_CHECKPOINT_RESTORE and ptrace")
    try:
        Library()
    except OSError as error:
        found.append(f"libdrm_amdgpu is missing ({error}): install libdrm-amdgpu1")
    return tuple(found)


def run_suite(arguments: Sequence[str]) -> Suite:
    """Run pytest against this machine's kernel."""
    command = [sys.executable, "-m", "pytest", "-q", "-rfE", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "--timeout=300", *arguments],
        env={**os.environ, "MIGRATE_CONFORMANCE": "kernel"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    lines = done.stdout.splitlines()
    summary = next((line for line in reversed(lines) if re.search(r"\d+ \w+", line)), "no test ran")
    failures = tuple(line for line in lines if line.startswith(("FAILED", "ERROR")))
    return Suite(passed=done.returncode == 0, summary=summary, failures=failures)


def loop_back() -> Suite:
    """Move a program from this machine to itself, VRAM by SDMA."""
    done = subprocess.run(
        [sys.executable, "-m", "scenarios.loopback"],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    if done.returncode:
        failures = tuple((done.stdout + done.stderr).splitlines()[-40:])
        return Suite(passed=False, summary="did not arrive, or lost memory", failures=failures)
    return Suite(passed=True, summary="arrived with all its memory, VRAM by SDMA")


def main(arguments: Sequence[str], out: TextIO) -> int:
    """Examine, run, write the file; its exit code."""
    paths = HostPaths()
    report = examine(Patient(paths=paths))
    lacking = missing(paths)
    for finding in report.findings:
        print(f"{finding.status:6} {finding.name}: {finding.found}", file=out)
    for sentence in lacking:
        print(f"MISSING {sentence}", file=out)
    suites = {}
    for name, what in SUITES.items() if not lacking else ():
        print(f"{name} ...", file=out, flush=True)
        suites[name] = run_suite(what)
        print(f"{name}: {suites[name].summary}", file=out)
    there_and_back = None if lacking else loop_back()
    if there_and_back is not None:
        print(f"loop-back migration: {there_and_back.summary}", file=out)
    result = Result(
        schema=SCHEMA,
        doctor=report,
        missing=lacking,
        suites=suites,
        loop_back=there_and_back,
        complete=there_and_back is not None
        and all(suite.passed for suite in (*suites.values(), there_and_back)),
    )
    file = Path(arguments[0] if arguments else "hardware.json")
    file.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")
    print(f"written to {file}: send it as docs/compatibility.md says", file=out)
    if lacking:
        return HostUnfit.exit_code
    return 0 if result.complete else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], sys.stdout))
