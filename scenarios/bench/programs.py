"""Rivals that are programs: rsync, scp, tar | zstd | nc, and CRIU's way over files.

All files lie in one folder in memory (/dev/shm), which is the rivals' gain. CPU seconds are
those of every process that was started, waited for. A program that is missing is left out.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from scenarios.bench.rivals import PIECE, Job, Sample, cpu
from scenarios.ports import free_port

WAIT = 30.0  # seconds for a server to listen
SSHD = "/usr/sbin/sshd"


class Workshop:
    """A folder with the bytes in a file, and the servers' keys and settings."""

    def __init__(self, folder: Path, job: Job) -> None:
        self.folder = folder
        self.job = job
        self.source = folder / "source"
        self.target = folder / "target"
        for path in (self.source, self.target):
            path.mkdir()
        self.file = self.source / "memory"
        _write(self.file, job)

    def ways(self) -> dict[str, Callable[[Job], Sample]]:
        """What can be run here."""
        needed = {
            "rsync": (["rsync"], self.rsync),
            "scp": (["scp", "ssh-keygen", SSHD], self.scp),
            "tar|zstd|nc": (["tar", "zstd", "nc"], self.tar),
            "dump, copy, restore": (["rsync"], self.files),
        }
        return {
            name: self._measured(way)
            for name, (programs, way) in needed.items()
            if all(shutil.which(program) for program in programs)
        }

    def _measured(self, way: Callable[[], None]) -> Callable[[Job], Sample]:
        def run(_: Job) -> Sample:
            self._prepare(removed=way.__name__ == "tar")  # whose end is seen by the size
            before = cpu() + _children()
            with self._serving(way):
                began = time.perf_counter()
                way()
                seconds = time.perf_counter() - began
            if self._ends(self.target / "memory") != self._ends(self.file):
                raise RuntimeError(f"{way.__name__} did not bring the file")
            return Sample(seconds=seconds, cpu=cpu() + _children() - before)

        return run

    def _prepare(self, *, removed: bool) -> None:
        """An old copy, spoilt at both ends and long ago: rsync writes over it.

        So its pages are there before the clock starts, as in everybody's destination.
        """
        copy = self.target / "memory"
        if removed:
            copy.unlink(missing_ok=True)
            return
        if not copy.exists():
            _write(copy, self.job)
        with copy.open("r+b") as file:
            file.write(bytes(PIECE))
            file.seek(-PIECE, os.SEEK_END)
            file.write(bytes(PIECE))
        os.utime(copy, (0, 0))

    def _ends(self, path: Path) -> tuple[int, bytes, bytes]:
        with path.open("rb") as file:
            first = file.read(PIECE)
            file.seek(-PIECE, os.SEEK_END)
            return path.stat().st_size, first, file.read()

    @contextlib.contextmanager
    def _serving(self, way: Callable[[], None]) -> Iterator[None]:
        """The server that a way needs, ended and waited for afterwards."""
        self.port = free_port()
        command = {
            "rsync": self._rsync_daemon,
            "files": self._rsync_daemon,
            "scp": self._ssh_daemon,
            "tar": self._nc_listener,
        }[way.__name__]()
        server = subprocess.Popen(command, process_group=0, stderr=subprocess.DEVNULL)
        try:
            _await_listener(self.port)
            yield
            if way.__name__ == "tar":
                server.wait(WAIT)  # it ends when all is unpacked
        finally:
            if server.poll() is None:
                os.killpg(server.pid, 15)
            server.wait(WAIT)

    # ------------------------------------------------------------ rsync

    def _rsync_daemon(self) -> list[str]:
        config = self.folder / "rsyncd.conf"
        config.write_text(
            f"use chroot = no\n[bench]\npath = {self.target}\nread only = no\n"
            f"uid = {os.getuid()}\ngid = {os.getgid()}\n"
        )
        arguments = ["--daemon", "--no-detach", "--address=127.0.0.1"]
        return ["rsync", *arguments, f"--port={self.port}", f"--config={config}"]

    def rsync(self) -> None:
        """The daemon protocol, whole files, not encrypted."""
        target = f"rsync://127.0.0.1:{self.port}/bench/"
        subprocess.run(["rsync", "--whole-file", "--inplace", self.file, target], check=True)

    # ------------------------------------------------------------ scp

    def _ssh_daemon(self) -> list[str]:
        for name in ("host_key", "user_key"):
            if not (self.folder / name).exists():
                subprocess.run(
                    ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.folder / name],
                    check=True,
                )
        shutil.copy(self.folder / "user_key.pub", self.folder / "authorized")
        config = self.folder / "sshd_config"
        config.write_text(
            f"HostKey {self.folder}/host_key\nAuthorizedKeysFile {self.folder}/authorized\n"
            "ListenAddress 127.0.0.1\nStrictModes no\nUsePAM no\nPidFile none\n"
            "PermitRootLogin prohibit-password\nSubsystem sftp internal-sftp\n"
        )
        if os.getuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)  # privilege separation wants it
        return [SSHD, "-D", "-f", str(config), "-p", str(self.port)]

    def scp(self) -> None:
        """One file, the cipher that both sides like best."""
        options = ["StrictHostKeyChecking=no", f"UserKnownHostsFile={self.folder}/known"]
        flags = [word for option in options for word in ("-o", option)]
        target = f"{getpass.getuser()}@127.0.0.1:{self.target}/memory"
        key = self.folder / "user_key"
        subprocess.run(
            ["scp", "-q", "-i", key, "-P", str(self.port), *flags, self.file, target], check=True
        )

    # ------------------------------------------------------------ tar | zstd | nc

    def _nc_listener(self) -> list[str]:
        script = f"nc -l 127.0.0.1 {self.port} | zstd -dc | tar -xf - -C {self.target}"
        return ["sh", "-c", script]

    def tar(self) -> None:
        """zstd level 1 with as many threads as there are cores."""
        pipe = f"tar -cf - -C {self.source} memory | zstd -1 -T0 -c"
        subprocess.run(["sh", "-c", f"{pipe} | nc -N 127.0.0.1 {self.port}"], check=True)
        deadline = time.monotonic() + 20 * WAIT
        done = self.target / "memory"
        while not (done.exists() and done.stat().st_size == self.job.size):
            if time.monotonic() > deadline:
                raise RuntimeError("tar brought nothing")
            time.sleep(0.002)

    # ------------------------------------------------------------ CRIU's way

    def files(self) -> None:
        """Memory to a file, the file copied by rsync, the copy read into memory."""
        _write(self.file, self.job)
        self.rsync()
        buffer = memoryview(bytearray(PIECE))
        with (self.target / "memory").open("rb", buffering=0) as copy:
            fd = os.memfd_create("restored", os.MFD_CLOEXEC)
            while count := copy.readinto(buffer):
                os.write(fd, buffer[:count])
            os.close(fd)


def _write(path: Path, job: Job) -> None:
    with path.open("wb", buffering=0) as file:
        for offset in range(0, job.size, PIECE):
            file.write(os.pread(job.fd, min(PIECE, job.size - offset), offset))


def _children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _await_listener(port: int) -> None:
    """By /proc/net/tcp: a connection made to see would be taken for the client."""
    wanted = f"0100007F:{port:04X} 00000000:0000 0A"
    deadline = time.monotonic() + WAIT
    while wanted not in Path("/proc/net/tcp").read_text():
        if time.monotonic() > deadline:
            raise RuntimeError(f"nobody listens on port {port}")
        time.sleep(0.01)
