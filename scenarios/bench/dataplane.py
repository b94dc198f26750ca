"""The data plane against its rivals: ``python -m scenarios.bench.dataplane``.

Everything compared runs interleaved in one run; medians and, first of all, ratios are
reported as one JSON document, with the machine described. Exit code 1 if a claim does not
hold; on a busy machine look at CPU seconds, which say more than the clock.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from migrate.dataplane.channel import TcpListener, connect_tcp
from migrate.dataplane.chooser import OPTIONS, RAW, Chooser, FixedChooser
from migrate.dataplane.frame import AeadFactory
from migrate.dataplane.memory import MmapAccess
from migrate.dataplane.messages import ObjectInfo, ObjectKind
from migrate.dataplane.receiver import Receiver
from migrate.dataplane.sender import Sender
from scenarios.bench import certs, data
from scenarios.bench.pages import bars, commit, write
from scenarios.bench.plain import NoAead
from scenarios.bench.programs import Workshop
from scenarios.bench.rivals import STREAMS, Job, Sample, cpu, over_grpc, over_sockets, receiver

SESSION, SECRET = bytes(16), bytes(range(32))
GIGABIT = 1e9 / 8  # bytes a second


def _our_receiver(pipe: Connection, size: int, encrypted: bool) -> None:
    listener = TcpListener("127.0.0.1")
    ours = Receiver(listener, aead=_aead(encrypted))
    target = _buffer(size)
    session = ours.open_session(SESSION, SECRET, size)
    session.staging.prepare([ObjectInfo(id=1, kind=ObjectKind.VRAM, size=size)])
    ours.start()
    began = cpu()
    pipe.send(listener.port)
    manifest = pipe.recv()
    if manifest is not None:
        session.staging.place(1, target)
        session.staging.verify(1, target, manifest)
    pipe.send(cpu() - began)
    ours.close()


def _buffer(size: int) -> MmapAccess:
    """What a BO of the destination is: memory that is there before its bytes come.

    VRAM has no first touch; here its cost is paid before the clock starts, as for the memory
    that the rivals receive into.
    """
    fd = os.memfd_create("bench-target", os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    target = MmapAccess(fd, size)
    piece = memoryview(bytearray(b"x" * (1 << 20)))
    for offset in range(0, size, len(piece)):
        target.write(offset, piece[: size - offset])
    return target


def _aead(encrypted: bool) -> AeadFactory:
    return AESGCM if encrypted else NoAead


def ours(
    job: Job,
    *,
    encrypted: bool = True,
    chooser: Chooser | None = None,
    link: float | None = None,
    place: bool = False,
) -> Sample:
    """Every chunk's digest checked on arrival; with *place*, into a BO and read back.

    Not *encrypted*: the same sender and receiver over :mod:`scenarios.bench.plain`, which the
    product has not.
    """
    access = MmapAccess(job.fd, job.size, own=False)
    piece = memoryview(bytearray(1 << 20))
    for offset in range(0, job.size, len(piece)):  # mapped ahead, as for the bare copy
        access.read(offset, piece[: job.size - offset])
    info = ObjectInfo(id=1, kind=ObjectKind.VRAM, size=job.size)
    epochs = itertools.count(1)
    with receiver(_our_receiver, job.size, encrypted) as pipe:
        port = pipe.recv()
        sender = Sender(
            lambda _: connect_tcp("127.0.0.1", port),
            SECRET,
            SESSION,
            lambda: next(epochs),
            streams=STREAMS,
            chooser=chooser,
            bandwidth_limit=link,
            aead=_aead(encrypted),
        )
        began, spent = time.perf_counter(), cpu()
        sender.send_round([(info, access)], still=True)
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
        "ours, placed": lambda job: ours(job, place=True),
        "no cipher": lambda job: ours(job, encrypted=False),
        "no cipher, placed": lambda job: ours(job, encrypted=False, place=True),
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


def times(theirs: Iterable[float], ours: Iterable[float]) -> float:
    """How many times as long theirs took, the median of the turns."""
    return statistics.median(t / o for t, o in zip(theirs, ours, strict=True))


def interleaved(ways: Mapping[str, Way], job: Job, repeat: int) -> dict[str, Any]:
    """Run all ways in turn, *repeat* times; medians, and ratios within each turn.

    Each turn has an order of its own, so that none always comes after the same one.
    """
    samples: dict[str, list[Sample]] = {name: [] for name in ways}
    first, order = next(iter(ways)), random.Random(1)
    for _ in range(repeat):
        for name in order.sample(list(ways), len(ways)):
            samples[name].append(ways[name](job))
    return {
        name: {
            f"ratio to {first}": round(
                times((s.seconds for s in samples[first]), (s.seconds for s in taken)), 3
            ),
            f"cpu ratio to {first}": round(
                times((s.cpu for s in samples[first]), (s.cpu for s in taken)), 3
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


# What must hold: (what, of what, at least) in ratios of medians within one run.
RIVAL_CLAIMS = (
    ("no cipher, placed", "bare", 0.8),
    ("no cipher", "bare", 0.9),
    ("ours", "bare", 0.65),
    ("ours", "ssl", 2.0),
    ("ours", "grpc", 2.5),
    ("ours", "scp", 4.0),
    ("ours", "rsync", 2.0),
)
OF_BEST, OF_RAW, BF16_GAIN = 0.95, 0.97, 1.25


def rival_claims(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each claim about the rivals, by wall time and by CPU time."""
    return [
        {
            "claim": f"{one} at least {least} x {other}",
            "by wall time": round(found[one]["GB/s"] / found[other]["GB/s"], 3),
            "by cpu time": round(
                found[other]["cpu seconds per GB"] / found[one]["cpu seconds per GB"], 3
            ),
            "holds": found[one]["GB/s"] >= least * found[other]["GB/s"],
        }
        for one, other, least in RIVAL_CLAIMS
        if other in found
    ]


def codec_claims(name: str, found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The claims about one kind of data on one link: medians of the ratios within turns."""
    ours = found["adaptive"]["seconds"]
    of = {way: times(one["seconds"], ours) for way, one in found.items() if way != "adaptive"}
    claims = [("best fixed codec", min(of.values()), OF_BEST), ("raw", of["raw"], OF_RAW)]
    if name == "bf16, 1 Gbit/s":
        claims.append(("raw", of["raw"], BF16_GAIN))
    return [
        {
            "claim": f"{name}: adaptive at least {least} x {other}",
            "by wall time": round(ratio, 3),
            "holds": ratio >= least,
        }
        for other, ratio, least in claims
    ]


def carried(link: float, most: int) -> int:
    """Bytes that a turn takes: what *link* (Gbit/s; 0: unpaced) carries in a second, or *most*."""
    if not link:
        return most
    return min(most, int(link * GIGABIT) & -data.PIECE)


def leave(folder: Path, result: dict[str, Any]) -> None:
    """Tables and plots, a page a part."""
    if "rivals" in result:
        rows = list(result["rivals"].items())
        plots = {"CPU seconds per GB": bars(rows, "cpu seconds per GB", "s")}
        plots |= {"rate": bars(rows, "GB/s", "GB/s")}
        write(folder, "throughput", result, rows, plots)
    if "codecs" in result:
        rows = [
            (name, {way: one["GB/s"] for way, one in found.items()})
            for name, found in result["codecs"].items()
        ]
        write(folder, "codecs", result, rows, {"adaptive": bars(rows, "adaptive", "GB/s")})


def main(arguments: list[str] | None = None) -> int:
    """The command line; prints one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--size", type=int, help="MiB: 512; of codecs the most, of what a link carries in 1 s: 1024"
    )
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--only", choices=["rivals", "codecs"], help="one part")
    parser.add_argument("--kinds", nargs="*", default=[*data.KINDS, "weights"])
    parser.add_argument("--links", nargs="*", type=float, default=[0, 1, 5, 10, 25], help="Gbit/s")
    parser.add_argument("--folder", type=Path, help="where tables and plots go (docs/benchmarks)")
    options = parser.parse_args(arguments)
    if options.only != "rivals" and "weights" in options.kinds and not any(data.weights()):
        parser.error("the weights are not installed: `make .venv/.weights`, or leave them out")
    size = (options.size or (1024 if options.only == "codecs" else 512)) << 20
    result: dict[str, Any] = {
        "commit": commit(),
        "machine": machine(),
        "bytes": size,
        "repeat": options.repeat,
        "claims": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        certs.make(Path(folder))
        if options.only != "codecs":
            job = Job(fd=data.memfd("random", size), size=size, certs=folder)
            with tempfile.TemporaryDirectory(dir="/dev/shm") as files:
                ways = rivals(Workshop(Path(files), job).ways())
                result["rivals"] = interleaved(ways, job, options.repeat)
            result["claims"] += rival_claims(result["rivals"])
            os.close(job.fd)
        for kind in options.kinds if options.only != "rivals" else ():
            fd = data.memfd(kind, size)
            for link in options.links:
                job = Job(fd=fd, size=carried(link, size), certs=folder)
                ways = codecs(link * GIGABIT or None)
                name = f"{kind}, {f'{link:g} Gbit/s' if link else 'unpaced'}"
                found = interleaved(ways, job, options.repeat)
                result.setdefault("codecs", {})[name] = found
                result["claims"] += codec_claims(name, found)
            os.close(fd)
    if options.folder is not None:
        leave(options.folder, result)
    sys.stdout.write(json.dumps(result, indent=2) + "\n")
    return 0 if all(claim["holds"] for claim in result["claims"]) else 1


if __name__ == "__main__":
    sys.exit(main())
