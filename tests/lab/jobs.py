"""Jobs on the virtual hosts, seen from outside: how they are started, asked and judged.

A job's digest is a function of its seed and of the number of steps alone, which is computed
here without a GPU: work that was lost, repeated or done on wrong memory shows.
"""

from __future__ import annotations

import itertools
import json
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any

from scenarios.lab import conformance
from scenarios.lab.host import Host
from scenarios.lab.layout import LabError
from tests.lab.gpu_job import chain

PATIENCE = 600.0  # seconds; the guests are emulated
ROCR = "/root/rocr_job"
FIRST_PID = {"a": 10000, "b": 20000}
WORD = 2**64


def prepare(host: Host) -> None:
    """Make a host ready for an agent whose processes move to another host of the lab."""
    conformance.install_hooks(host)
    # A copy keeps its pid, and hosts that boot alike use the same ones.
    host.ssh(f"echo {FIRST_PID[host.name]} > /proc/sys/kernel/ns_last_pid")


def wait_for(condition: Callable[[], bool], what: str) -> None:
    """Raise AssertionError if *condition* does not come true."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"in {PATIENCE:.0f} s: {what}"
        time.sleep(0.2)


def exists(host: Host, pid: int) -> bool:
    """Whether a host has the process."""
    return host.ssh(f"test -e /proc/{pid} && echo yes || true") != ""


class GpuJob:
    """A ``tests.lab.gpu_job``, wherever it is now. Tell *host* when it has moved."""

    def __init__(self, host: Host, port: int, arguments: str = "", *, gpus: int = 2) -> None:
        self.host = host
        self.port = port
        self.gpus = gpus
        self.command = f"python3 -m tests.lab.gpu_job --port {port} --gpus {gpus} {arguments}"
        self.log = "/root/log" if "--log" in arguments else ""

    def ask(self, request: str = "status", *, child: bool = False) -> dict[str, Any]:
        """The job's answer; its digest is checked here, and that it has met no error."""
        port = self.port + child
        status: dict[str, Any] = json.loads(self.host.ask(port, f"{request}\n".encode()))
        assert status["error"] == "", status["error"]
        expected = next(itertools.islice(chain(status["seed"], self.gpus), status["step"], None))
        assert status["digest"] == expected, f"step {status['step']}"
        return status

    def started(self) -> dict[str, Any]:
        """Wait until it works; its status then."""
        wait_for(self.listens, "the job does not listen")
        return self.after(3)

    def listens(self) -> bool:
        """Whether it has all it allocates."""
        found = self.host.ssh(f"grep -c ':{self.port:04X} .* 0A ' /proc/net/tcp || true")
        return found.strip() != "0"

    def after(self, steps: int) -> dict[str, Any]:
        """Its status once it has done so many steps at least."""
        found: list[dict[str, Any]] = []

        def reached() -> bool:
            found[:] = [self.ask()]
            return bool(found[0]["step"] >= steps)

        wait_for(reached, f"{steps} steps")
        return found[0]

    def finish(self) -> dict[str, Any]:
        """Have it verify all its memory and end; the log is looked at."""
        status = self.ask("finish")
        if self.log:
            self._check_log(self.host.ssh(f"cat {self.log}"), status)
        wait_for(lambda: not self._runs(status["pid"]), "the job does not end")
        return status

    def _runs(self, pid: int) -> bool:
        return bool(self.host.ssh(f"grep -s '^State:.[^Z]' /proc/{pid}/status || true").strip())

    def _check_log(self, text: str, status: dict[str, Any]) -> None:
        """Each step stands there once and in order, none is missing."""
        lines = text.splitlines()
        digests = chain(status["seed"], self.gpus)
        next(digests)
        assert lines == [f"{step} {next(digests)}" for step in range(status["step"])]


class SharingJob:
    """A ``tests.lab.sharing_job``, wherever it is now. Tell *host* when it has moved."""

    def __init__(self, host: Host, port: int) -> None:
        self.host = host
        self.port = port
        self.command = f"python3 -m tests.lab.sharing_job --port {port}"

    def ask(self, request: str = "status") -> dict[str, Any]:
        """The job's answer; neither process has met an error."""
        try:
            said = self.host.ask(self.port, f"{request}\n".encode())
        except LabError:  # it does not listen yet
            return {"child_seen": 0, "seen": 0}
        status: dict[str, Any] = json.loads(said)
        assert not status.get("error"), status
        return status

    def after(self, steps: int) -> dict[str, Any]:
        """Its status once each has seen so many steps of the other in the buffer."""
        found: list[dict[str, Any]] = []

        def reached() -> bool:
            found[:] = [self.ask()]
            return bool(min(found[0]["seen"], found[0]["child_seen"]) >= steps)

        wait_for(reached, f"{steps} steps seen")
        return found[0]


def rocr_chain() -> Iterator[int]:
    """The digest of ``rocr_job.c`` after 0, 1, 2 ... steps."""
    digest, word = mix(0), 0
    while True:
        yield digest
        word = (word + 3 * mix(digest ^ 1)) % WORD
        digest = mix(digest ^ word ^ word << 1 & (WORD - 1))


def mix(value: int) -> int:
    """splitmix64."""
    value = (value + 0x9E3779B97F4A7C15) % WORD
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % WORD
    value = (value ^ value >> 27) * 0x94D049BB133111EB % WORD
    return value ^ value >> 31


class RocrJob:
    """``rocr_job.c``, compiled on the hosts: a program on the distribution's ROCr."""

    command = ROCR

    def __init__(self, host: Host, pid: int) -> None:
        self.host = host
        self.pid = pid
        self.status = f"/proc/{pid}/fd/3"

    @staticmethod
    def build(host: Host) -> None:
        """Compile it; the same compiler makes the same bytes of it for each host."""
        source = "tests/lab/rocr_job.c"
        line = f"cc -O1 -Wall -Wextra -Werror -o rocr_job {source} -lhsa-runtime64"
        conformance.build_for(host, line, "rocr_job")

    def look(self) -> dict[str, int]:
        """Where it is; digest and step are checked against the chain."""
        raw = self.host.ssh(f"od -A n -t x8 -v -N 40 {self.status}")
        step, digest, counter, state, _ = (int(word, 16) for word in raw.split())
        # It stores the digest just before the step.
        assert digest in itertools.islice(rocr_chain(), step, step + 2), f"step {step}"
        return {"step": step, "digest": digest, "counter": counter, "state": state}

    def after(self, steps: int) -> dict[str, int]:
        """Where it is once it has done so many steps."""
        wait_for(lambda: self._exists() and self.look()["step"] >= steps, f"{steps} steps")
        return self.look()

    def _exists(self) -> bool:
        """Whether the program has begun."""
        said = self.host.ssh(f"od -A n -t x8 -j 24 -N 8 {self.status} 2>/dev/null || true")
        return bool(said.strip()) and int(said, 16) > 0

    def finish(self) -> dict[str, int]:
        """Have it stop its persistent kernel and compare all of its VRAM."""
        one = struct.pack("<Q", 1).hex()
        escaped = "".join(f"\\x{one[n : n + 2]}" for n in range(0, 16, 2))
        self.host.ssh(
            f"printf '{escaped}' | dd of={self.status} bs=1 seek=32 conv=notrunc status=none"
        )
        wait_for(lambda: self.look()["state"] != 1, "it does not end")
        found = self.look()
        assert found["state"] == 2, "the counter or the buffer is not what it must be"
        self.host.ssh(f"kill {self.pid}")
        return found
