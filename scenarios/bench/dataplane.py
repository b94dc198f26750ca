"""The data plane against its rivals: ``python -m scenarios.bench.dataplane``.

Everything compared runs interleaved in one run; medians and, first of all, ratios are
reported as one JSON document, with the machine described.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path

from migrate.dataplane.channel import TcpListener, connect_tcp
from migrate.dataplane.chooser import OPTIONS, RAW, Chooser, FixedChooser
from migrate.dataplane.memory import MmapAccess
from migrate.dataplane.messages import ObjectInfo, ObjectKind
from migrate.dataplane.receiver import Receiver
from migrate.dataplane.sender import Sender
from scenarios.bench import certs, data
from scenarios.bench.programs import Workshop
from scenarios.bench.rivals import STREAMS, Job, Sample, cpu, over_grpc, over_sockets, receiver

SESSION, SECRET = bytes(16), bytes(range(32))
GIGABIT = 1e9 / 8  # bytes a second


def _our_receiver(pipe: Connection, size: int) -> None:
    listener = TcpListener("127.0.0.1")
    ours = Receiver(listener)
    session = ours.open_session(SESSION, SECRET, size)
    session.staging.prepare([ObjectInfo(id=1, kind=ObjectKind.VRAM, size=size)])
    ours.start()
    began = cpu()
    pipe.send(listener.port)
    manifest = pipe.recv()
    if manifest is not None:
        fd = os.memfd_create("bench-target", os.MFD_CLOEXEC)
        os.ftruncate(fd, size)
        target = MmapAccess(fd, size)
        session.staging.place(1, target)
        session.staging.verify(1, target, manifest)
    pipe.send(cpu() - began)
    ours.close()


def ours(
    job: Job,
    *,
    chooser: Chooser | None = None,
    link: float | None = None,
    place: bool = False,
) -> Sample:
    """Encrypted and every chunk's digest checked on arrival; with *place*, into a BO and back."""
    access = MmapAccess(job.fd, job.size, own=False)
    piece = memoryview(bytearray(1 << 20))
    for offset in range(0, job.size, len(piece)):  # mapped ahead, as for the bare copy
        access.read(offset, piece[: job.size - offset])
    info = ObjectInfo(id=1, kind=ObjectKind.VRAM, size=job.size)
    epochs = itertools.count(1)
    with receiver(_our_receiver, job.size) as pipe:
        port = pipe.recv()
        sender = Sender(
            lambda _: connect_tcp("127.0.0.1", port),
            SECRET,
            SESSION,
            lambda: next(epochs),
            streams=STREAMS,
            chooser=chooser,
            bandwidth_limit=link,
        )
        began, spent = time.perf_counter(), cpu()
        sender.send_round([(info, access)])
        mine = cpu() - spent
        pipe.send(sender.manifest()[1][1] if place else None)
        theirs = pipe.recv() if place else None
        seconds = time.perf_counter() - began
        if theirs is None:
            theirs = pipe.recv()
        sender.close()
        return Sample(seconds=seconds, cpu=mine + theirs)


Way = Callable[[Job], Sample]


def rivals(programs: dict[str, Way]) -> dict[str, Way]:
    """Everything that moves random bytes over an unpaced loopback."""
    return {
        "bare": lambda job: over_sockets(job, encrypted=False),
        "ours": ours,
        "ours placed": lambda job: ours(job, place=True),
        "ssl": lambda job: over_sockets(job, encrypted=True),
        "grpc": over_grpc,
        **programs,
    }


def codecs(link: float | None) -> dict[str, Way]:
    """Each fixed codec and the adaptive choice, on one link."""

    def fixed(option: object) -> Way:
        return lambda job: ours(job, chooser=FixedChooser(option), link=link)  # type: ignore[arg-type]

    ways: dict[str, Way] = {str(option): fixed(option) for option in (RAW, *OPTIONS)}
    ways["adaptive"] = lambda job: ours(job, link=link)
    return ways


def interleaved(ways: Mapping[str, Way], job: Job, repeat: int) -> dict[str, object]:
    """Run all ways in turn, *repeat* times; medians, and ratios within each turn."""
    samples: dict[str, list[Sample]] = {name: [] for name in ways}
    for _ in range(repeat):
        for name, way in ways.items():
            samples[name].append(way(job))
    first = next(iter(ways))
    return {
        name: {
            f"ratio to {first}": round(
                statistics.median(
                    base.seconds / one.seconds
                    for base, one in zip(samples[first], taken, strict=True)
                ),
                3,
            ),
            f"cpu ratio to {first}": round(
                statistics.median(
                    base.cpu / one.cpu for base, one in zip(samples[first], taken, strict=True)
                ),
                3,
            ),
            "GB/s": round(job.size / statistics.median(s.seconds for s in taken) / 1e9, 3),
            "cpu seconds per GB": round(
                statistics.median(s.cpu for s in taken) / job.size * 1e9, 3
            ),
            "seconds": [round(s.seconds, 4) for s in taken],
        }
        for name, taken in samples.items()
    }


def machine() -> dict[str, object]:
    """What the figures were measured on."""
    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load": [round(load, 2) for load in os.getloadavg()],
    }


def main(arguments: list[str] | None = None) -> int:
    """The command line; prints one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=512, help="MiB")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--only", choices=["rivals", "codecs"], help="one part")
    parser.add_argument("--kinds", nargs="*", default=[*data.KINDS, "weights"])
    parser.add_argument("--links", nargs="*", type=float, default=[0, 1, 5, 10, 25], help="Gbit/s")
    options = parser.parse_args(arguments)
    size = options.size << 20
    result: dict[str, object] = {"machine": machine(), "bytes": size, "repeat": options.repeat}
    with tempfile.TemporaryDirectory() as folder:
        certs.make(Path(folder))
        if options.only != "codecs":
            job = Job(fd=data.memfd("random", size), size=size, certs=folder)
            with tempfile.TemporaryDirectory(dir="/dev/shm") as files:
                ways = rivals(Workshop(Path(files), job).ways())
                result["rivals"] = interleaved(ways, job, options.repeat)
            os.close(job.fd)
        for kind in options.kinds if options.only != "rivals" else ():
            job = Job(fd=data.memfd(kind, size), size=size, certs=folder)
            for link in options.links:
                ways = codecs(link * GIGABIT or None)
                name = f"{kind}, {f'{link:g} Gbit/s' if link else 'unpaced'}"
                result[name] = interleaved(ways, job, options.repeat)
            os.close(job.fd)
    sys.stdout.write(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
