"""Runs in a guest: CRIU with our hook dumps a process, and the agent behaves as told.

``python -m tests.lab.hook_drill WHAT --hook FOLDER [--criu PROGRAM]`` prints lines of what came
of it. FOLDER has the hook, and CRIU is the one it was built for. WHAT is

* ``dump``: the agent answers everything.
* ``gone``: the agent hangs up after PROCESS_INFO, before HOLD.
* ``gone-in-hold``: it says HOLD and hangs up then, and CRIU's last gate refuses.
* ``refuse``: it lets the last gate refuse, and unpauses at fini.
* ``build``: none; the hook is built into FOLDER, for the headers in ``--include``; with
  ``--no-unpause`` the hook's UNPAUSE is taken out of its source, to see that it is missed.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import shutil
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

from agents.hook import FLAGS, SOURCE, build_hook
from migrate.engine.hook import SOCKET_VARIABLE, Hook, HookCall, Verdict, serve
from migrate.kfd.file import find_kfd_fds
from migrate.kfd.process import KfdProcess
from migrate.model import HostPaths

FOLDER = Path("/run/drill")
COUNTER = FOLDER / "counter"
IMAGES = FOLDER / "images"
ADDRESS = FOLDER / "agent"
DRM_MAJOR = 226
UNSUPPORTED = Verdict(value=-errno.ENOTSUP)


class HangUp(Exception):
    """The agent dies here."""


class Agent:
    """Stands in for the agent: one migration's half that talks to the hook."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.seen: list[str] = []
        self._process: KfdProcess | None = None
        self._kfd_rdev = os.stat("/dev/kfd").st_rdev

    def __call__(self, call: HookCall) -> Verdict:
        self.seen.append(call.event.hook.name)
        match call.event.hook:
            case Hook.CHECKPOINT_DEVICES:
                self._pause(call)
            case Hook.DUMP_EXT_FILE:
                return self._dump(call)
            case Hook.HANDLE_DEVICE_VMA:
                return Verdict() if self._is_gpu(call.event.rdev) else UNSUPPORTED
            case Hook.FINI if self.what == "refuse" and self._process is not None:
                self._process.unpause()
        return Verdict()

    def _is_gpu(self, rdev: int) -> bool:
        return rdev == self._kfd_rdev or os.major(rdev) == DRM_MAJOR

    def _pause(self, call: HookCall) -> None:
        pid = call.event.pid
        taken = call.take_fd(pid, find_kfd_fds(pid, HostPaths())[0])
        self._process = KfdProcess(call.file(taken), pid)
        counts = self._process.process_info()
        print("paused with", counts.num_bos, "BOs", flush=True)
        if self.what == "gone":
            raise HangUp

    def _dump(self, call: HookCall) -> Verdict:
        if not stat.S_ISCHR(call.event.mode) or not self._is_gpu(call.event.rdev):
            return UNSUPPORTED
        if call.event.rdev == self._kfd_rdev and self._process is not None:
            with self._process.checkpoint() as found:
                held = sum(fd is not None for fd in found.dmabufs)
                print("checkpoint with", held, "dmabufs", flush=True)
            if self.what == "refuse":
                return Verdict(value=-errno.ECANCELED)
            if self.what == "gone-in-hold":
                call.hold()
                raise HangUp
        return Verdict()


def listen(agent: Agent) -> None:
    """Serve every connection of the hook in a thread of its own."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(ADDRESS))
    listener.listen()

    def talk(channel: socket.socket) -> None:
        with channel, contextlib.suppress(HangUp, ConnectionResetError):
            serve(channel, agent)

    def accept() -> None:
        while True:
            channel, _ = listener.accept()
            threading.Thread(target=talk, args=(channel,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()


def start_program() -> int:
    """The program, in a session of its own, counting; its pid."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.lab.gpu_program", str(COUNTER)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    if not wait_until(lambda: counter() > 0, 240):
        raise SystemExit("the program does not count")
    return process.pid


def counter() -> int:
    """What the program last said."""
    return int.from_bytes(COUNTER.read_bytes()[:8], "little") if COUNTER.exists() else 0


def wait_until(condition: object, seconds: float = 60.0) -> bool:
    """Whether *condition()* came true in time."""
    assert callable(condition)
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def alive(pid: int) -> bool:
    """Whether the program runs and is no zombie."""
    done, _ = os.waitpid(pid, os.WNOHANG)
    return done == 0


def gate() -> tuple[str, str]:
    """Options of CRIU: its post-dump gate refuses."""
    script = FOLDER / "gate"
    script.write_text('#!/bin/sh\n[ "$CRTOOLS_SCRIPT_ACTION" != post-dump ]\n')
    script.chmod(0o755)
    return "--action-script", str(script)


def build(folder: Path, include: Path, *, no_unpause: bool) -> None:
    """The hook, or one that forgets to UNPAUSE when its agent is gone."""
    if not no_unpause:
        build_hook(folder, include=include)
        return
    call = "\tunpause_all();\n"
    text = SOURCE.read_text()
    if text.count(call) != 1:
        raise SystemExit("hook.c calls unpause_all() not once: this drill needs another look")
    folder.mkdir()
    broken = folder / "broken.c"
    broken.write_text(text.replace(call, ""))
    flags = [flag for flag in FLAGS if flag != "-Wall"]  # the function is not used
    target = folder / "migrate_kfd.so"
    subprocess.run(["cc", *flags, f"-I{include}", "-o", target, broken], check=True)
    broken.unlink()


def main(what: str, criu: str, hook: Path) -> None:
    """One drill, from nothing."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    IMAGES.mkdir(parents=True)
    agent = Agent(what)
    listen(agent)
    pid = start_program()
    result = subprocess.run(
        [
            *(criu, "dump", "-t", str(pid), "-D", str(IMAGES), "-L", str(hook)),
            *("-v4", "-o", "dump.log", "--link-remap"),
            *(gate() if what == "gone-in-hold" else ()),
        ],
        env={**os.environ, SOCKET_VARIABLE: str(ADDRESS)},
        check=False,
    )
    print("criu", "succeeded" if result.returncode == 0 else "failed")
    if result.returncode:
        lines = (IMAGES / "dump.log").read_text(errors="replace").splitlines()
        print(*[f"log: {line}" for line in lines if "Error" in line], sep="\n")
    print("hooks", " ".join(dict.fromkeys(agent.seen)))
    lives = alive(pid)
    print("program", "lives" if lives else "is gone")
    if lives:
        before = counter()
        moves = wait_until(lambda: counter() > before, 10.0)
        print("counter", "moves" if moves else "stands still")
        os.kill(pid, 9)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["dump", "gone", "gone-in-hold", "refuse", "build"])
    parser.add_argument("--hook", type=Path, required=True)
    parser.add_argument("--criu", default="criu")
    parser.add_argument("--include", type=Path, default=Path("/usr/include"))
    parser.add_argument("--no-unpause", action="store_true")
    chosen = parser.parse_args()
    if chosen.what == "build":
        build(chosen.hook, chosen.include, no_unpause=chosen.no_unpause)
    else:
        main(chosen.what, chosen.criu, chosen.hook)
