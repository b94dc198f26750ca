"""One virtual GPU host: a QEMU process, reached by ssh on 127.0.0.1."""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from migrate.model import Value
from scenarios.lab.layout import LabError, Layout, output
from scenarios.ports import free_port

BOOT_SECONDS = 600.0  # emulated and on a busy machine; usually 10
# PCI slots of the first GPU: the slot goes into a gpu_id, so hosts have different ids.
FIRST_SLOT = {"a": 0x08, "b": 0x10}
AGENT_PORT = 7601  # of the control channel, inside the guest
DOORBELL_BYTES = "2M"  # size of the BAR that is a GPU's doorbell aperture
MAX_GPUS = 8
# Pages come at first touch: a large GPU costs nothing until somebody fills it.
MAX_VRAM_MB = 4096


class HostSpec(Value):
    """What a host is made of. *vram_mb* is MiB a GPU, *memory_mb* MiB of the guest.

    With *systemd* it has a service manager, which takes longer to be up than ssh.
    """

    name: str
    gpus: int = 2
    vram_mb: int = 256
    memory_mb: int = 1536
    cpus: int = 2
    systemd: bool = False

    @property
    def address(self) -> str:
        """On the network between the hosts."""
        return f"10.99.0.{list(FIRST_SLOT).index(self.name) + 1}"


class Running(Value):
    """A started host, as kept in its folder: process, its start time, ports on 127.0.0.1.

    *port* leads to its ssh, *agent_port* to AGENT_PORT, where its agent may listen.
    """

    spec: HostSpec
    pid: int
    start_time: int
    port: int
    agent_port: int = 0


class Host:
    """A host of the lab, by name (``a`` or ``b``). Methods raise LabError."""

    def __init__(self, layout: Layout, name: str) -> None:
        if name not in FIRST_SLOT:
            raise LabError(f"no host {name!r} in the lab", advice="Its hosts are a and b.")
        self.layout = layout
        self.name = name
        self.folder = layout.hosts / name
        self.console = self.folder / "console.log"

    @property
    def running(self) -> Running | None:
        """The running QEMU, or None."""
        try:
            state = json.loads((self.folder / "state.json").read_text())
        except (OSError, ValueError):
            return None
        found = Running(**{**state, "spec": HostSpec(**state["spec"])})
        return found if _start_time(found.pid) == found.start_time else None

    def start(self, spec: HostSpec) -> None:
        """Boot from a fresh disk and wait until ssh answers."""
        self.launch(spec)
        self.wait_ready()

    def launch(self, spec: HostSpec) -> None:
        """Switch it on, with a fresh disk: several hosts boot at once."""
        if self.running:
            raise LabError(f"host {self.name} is up", advice="Use `down` first.")
        if not 0 <= spec.gpus <= MAX_GPUS or not 16 <= spec.vram_mb <= MAX_VRAM_MB:
            raise LabError(f"a host has 0 to 8 GPUs of 16 to {MAX_VRAM_MB} MiB")
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in ("console.log", "qmp", "net", "pid"):
            (self.folder / name).unlink(missing_ok=True)
        disk = self.folder / "disk.qcow2"
        disk.unlink(missing_ok=True)
        output(
            [
                *("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2"),
                *("-b", self.layout.disk, disk),
            ]
        )
        port, agent_port = free_port(), free_port()
        with (self.folder / "qemu.log").open("w") as log:
            started = subprocess.run(
                self._command(spec, port, agent_port),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                check=False,
            )
        if started.returncode:
            raise LabError(f"QEMU does not start:\n{self.last_words()}")
        pid = int((self.folder / "pid").read_text())
        state = {
            "spec": {name: getattr(spec, name) for name in HostSpec.__struct_fields__},
            "pid": pid,
            "start_time": _start_time(pid),
            "port": port,
            "agent_port": agent_port,
        }
        (self.folder / "state.json").write_text(json.dumps(state))

    def _command(self, spec: HostSpec, port: int, agent_port: int) -> list[str]:
        peers = ",".join(f"{name}@10.99.0.{index}" for index, name in enumerate(FIRST_SLOT, 1))
        peer = next(name for name in FIRST_SLOT if name != self.name)
        mine, theirs = self.folder / "net", self.layout.hosts / peer / "net"
        theirs.parent.mkdir(parents=True, exist_ok=True)
        number = list(FIRST_SLOT).index(self.name) + 1
        append = (
            "console=ttyS0 loglevel=5 panic=-1 oops=panic nokaslr no_timer_check"
            f" lab.host={self.name} lab.gpus={spec.gpus} lab.vram_mb={spec.vram_mb}"
            f" lab.address={spec.address} lab.peers={peers}"
        )
        if spec.systemd:  # ssh is served already
            append += " lab.systemd=1 systemd.unit=multi-user.target"
            append += " systemd.mask=ssh.service systemd.mask=ssh.socket"
        gpus: list[str] = []
        for index in range(spec.gpus):
            slot = FIRST_SLOT[self.name] + index
            gpus += ["-object", f"memory-backend-ram,id=gpu{index},size={DOORBELL_BYTES},share=on"]
            gpus += ["-device", f"ivshmem-plain,memdev=gpu{index},addr={slot:#x}"]
        return [
            *("qemu-system-x86_64", "-name", f"lab-{self.name}", "-machine", "pc"),
            *("-daemonize", "-pidfile", str(self.folder / "pid")),
            *accelerator(self.layout),
            *("-smp", str(spec.cpus), "-m", str(spec.memory_mb)),
            *("-nodefaults", "-display", "none", "-no-reboot"),
            *("-serial", f"file:{self.console}"),
            *("-qmp", f"unix:{self.folder / 'qmp'},server=on,wait=off"),
            *("-kernel", str(self.layout.kernel), "-initrd", str(self.layout.initrd)),
            *("-append", append),
            *("-drive", f"file={self.folder / 'disk.qcow2'},if=virtio,cache=unsafe,discard=unmap"),
            *("-device", "virtio-rng-pci"),
            *(
                "-netdev",
                f"user,id=control,restrict=on,hostfwd=tcp:127.0.0.1:{port}-:22,"
                f"hostfwd=tcp:127.0.0.1:{agent_port}-:{AGENT_PORT}",
            ),
            *("-device", f"virtio-net-pci,netdev=control,mac=52:54:00:00:00:0{number}"),
            *(
                "-netdev",
                f"dgram,id=lab,local.type=unix,local.path={mine},remote.type=unix,remote.path={theirs}",
            ),
            *("-device", f"virtio-net-pci,id=labnic,netdev=lab,mac=52:54:00:00:01:0{number}"),
            *gpus,
        ]

    def wait_ready(self) -> None:
        """Wait until a host that was switched on answers ssh."""
        deadline = time.monotonic() + BOOT_SECONDS
        while b"LAB READY" not in (self.console.read_bytes() if self.console.exists() else b""):
            if self.running is None:
                raise LabError(f"host {self.name} ended while booting:\n{self.last_words()}")
            if time.monotonic() > deadline:
                self.stop()
                raise LabError(f"host {self.name} did not boot:\n{self.last_words()}")
            time.sleep(0.1)
        self.ssh("true")

    def last_words(self) -> str:
        """The end of what QEMU and the console said."""
        words = ""
        for file in (self.folder / "qemu.log", self.console):
            if file.exists():
                words += "\n".join(file.read_text(errors="replace").splitlines()[-15:])
        return words

    def ssh_command(
        self, *words: str, terminal: bool = False, options: Sequence[str] = ()
    ) -> list[str]:
        """The ssh command line that runs *words* (a shell line each) on this host."""
        running = self.running
        if running is None:
            raise LabError(f"host {self.name} is not up", advice="python -m scenarios.lab up")
        return [
            *("ssh", "-q", "-i", str(self.layout.key), "-p", str(running.port)),
            *("-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"),
            *("-o", "ConnectTimeout=60", "-o", "ControlMaster=auto", "-o", "ControlPersist=600"),
            *("-o", f"ControlPath={self.folder / 'ssh-%p'}"),
            *(["-t"] if terminal else []),
            *options,
            *("root@127.0.0.1", *words),
        ]

    def ssh(self, *words: str, input_data: bytes | None = None) -> str:
        """Run a shell line; what it printed. Raises LabError with its stderr if it fails."""
        command = self.ssh_command(*words)
        result = subprocess.run(command, input=input_data or b"", capture_output=True, check=False)
        if result.returncode:
            raise LabError(
                f"host {self.name}: {' '.join(words)} ended with {result.returncode}:"
                f" {result.stderr.decode(errors='replace')}{result.stdout.decode(errors='replace')}"
            )
        return result.stdout.decode(errors="replace")

    def ask(self, port: int, request: bytes) -> bytes:
        """What a server on the host's own *port* answers, by ssh; no program runs for it there.

        It must answer a request that ends, and hang up.
        """
        command = self.ssh_command(options=("-W", f"127.0.0.1:{port}"))
        result = subprocess.run(command, input=request, capture_output=True, check=False)
        if result.returncode or not result.stdout:
            raise LabError(f"host {self.name}: nobody answers at port {port}")
        return result.stdout

    def copy(self, *paths: str, source: Path, target: str) -> None:
        """Copy *paths* below *source* into the host's folder *target*."""
        self.unpack(pack(source, *paths), target)

    def unpack(self, archive: bytes, target: str) -> None:
        """Unpack what ``pack`` made into the host's folder *target*."""
        quoted = shlex.quote(target)
        self.ssh(f"mkdir -p {quoted} && tar -C {quoted} -xzf -", input_data=archive)

    def kernel_log(self) -> str:
        """All the kernel said since boot."""
        return self.ssh("dmesg")

    def set_network(self, up: bool) -> None:
        """Plug the cable of the network between the hosts, or pull it."""
        qmp(self.folder / "qmp", "set_link", {"name": "labnic", "up": up})

    def stop(self) -> None:
        """Switch it off, as by its power button held down. Its disk is gone at next start."""
        running = self.running
        if running is None:
            return
        os.kill(running.pid, 15)
        deadline = time.monotonic() + 20
        while _start_time(running.pid) == running.start_time:
            if time.monotonic() > deadline:
                os.kill(running.pid, 9)
                deadline += 20
            time.sleep(0.05)
        (self.folder / "state.json").unlink(missing_ok=True)


def pack(source: Path, *paths: str) -> bytes:
    """An archive of *paths* below *source*."""
    command = ["tar", "-C", str(source), "-czf", "-", *paths]
    return subprocess.run(command, capture_output=True, check=True).stdout


def qmp(path: Path, command: str, arguments: dict[str, object]) -> None:
    """One command to a QEMU's monitor socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as monitor:
        monitor.settimeout(20)
        monitor.connect(str(path))
        with monitor.makefile("rw") as stream:
            stream.readline()  # greeting
            for line in (
                {"execute": "qmp_capabilities"},
                {"execute": command, "arguments": arguments},
            ):
                stream.write(json.dumps(line) + "\n")
                stream.flush()
                answer = json.loads(stream.readline())
                while "event" in answer:
                    answer = json.loads(stream.readline())
                if "error" in answer:
                    raise LabError(f"{command}: {answer['error']['desc']}")


def accelerator(layout: Layout) -> list[str]:
    """Options for QEMU: KVM if the guests' kernel is seen to come up with it, else none."""
    known = layout.stamps / "accelerator"
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    if not known.exists() or known.read_text().split()[0] != boot:
        works = os.access("/dev/kvm", os.R_OK | os.W_OK) and _probe_kvm(layout)
        known.write_text(f"{boot} {'kvm' if works else 'tcg'}")
    if known.read_text().split()[1] == "kvm":
        return ["-accel", "kvm", "-cpu", "host"]
    return ["-accel", "tcg,thread=multi", "-cpu", "max"]


def _probe_kvm(layout: Layout) -> bool:
    try:
        result = subprocess.run(
            [
                *("qemu-system-x86_64", "-accel", "kvm", "-cpu", "host", "-m", "512"),
                *("-nodefaults", "-display", "none", "-no-reboot", "-serial", "stdio"),
                *("-kernel", str(layout.kernel), "-initrd", str(layout.initrd)),
                *("-append", "console=ttyS0 panic=-1 lab.probe"),
            ],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=30,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False
    return b"LAB PROBE" in result.stdout


def _start_time(pid: int) -> int | None:
    """Field 22 of /proc/PID/stat; None for no such process or one that has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else int(fields[19])
