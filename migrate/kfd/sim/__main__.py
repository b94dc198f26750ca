"""``python -m migrate.kfd.sim``: the simulated KFD node of one host."""

from __future__ import annotations

import argparse
import os
import resource
import signal
import sys
import threading
from pathlib import Path

from migrate.errors import UsageError

# One thread a GPU is what the engine has; a pool of BLAS threads beside it would not be
# deterministic and would keep CPUs busy. Must be set before numpy is imported.
os.environ["OPENBLAS_NUM_THREADS"] = "1"

SOCKET_PATH_MAX = 107


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m migrate.kfd.sim", description=__doc__)
    parser.add_argument("--root", type=Path, required=True, help="folder of the host")
    parser.add_argument("--profile", required=True, help="machine, see migrate.topology")
    parser.add_argument("--slot-offset", type=int, default=0, help="other PCI slots, other ids")
    parser.add_argument("--vram", type=int, help="bytes of VRAM of each GPU (default: profile's)")
    parser.add_argument("--gpus", type=int, help="only the first N GPUs")
    parser.add_argument(
        "--allow-unprivileged",
        action="store_true",
        help="answer CRIU operations without CAP_CHECKPOINT_RESTORE",
    )
    parser.add_argument("--kfd-minor", type=int, choices=(11, 12), default=11)
    parser.add_argument("--bo-record", type=int, choices=(80, 272), default=80)
    parser.add_argument("--svm", action="store_true", help="processes may have SVM ranges")
    parser.add_argument(
        "--populated",
        type=int,
        default=0,
        help="bytes of each GPU's VRAM whose pages, once touched, stay when they are freed, as a"
        " card's do (default: none; each BO's are touched for the first time)",
    )
    parser.add_argument("--ready-fd", type=int, help="a byte is written there when usable")
    parser.add_argument("--parent-fd", type=int, help="end when this pipe's other end is closed")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Serve until SIGTERM, SIGINT, or the end of the parent."""
    options = _arguments(arguments)
    from migrate.kfd.sim.machine import build_host  # noqa: PLC0415 (environment first)
    from migrate.kfd.sim.server import Server  # noqa: PLC0415

    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a BO takes one
    root = options.root.resolve()
    if len(str(root / "dri" / "renderD999")) > SOCKET_PATH_MAX:
        print(f"{root}: too long a path for sockets", file=sys.stderr)
        return 2
    try:
        server = Server(build_host(root, options))
    except UsageError as failure:
        print(failure, file=sys.stderr)
        return failure.exit_code
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: server.stop())
    if options.parent_fd is not None:
        threading.Thread(
            target=_end_with_parent, args=(options.parent_fd, server.stop), daemon=True
        ).start()
    print("READY", flush=True)
    if options.ready_fd is not None:
        os.write(options.ready_fd, b"\n")
        os.close(options.ready_fd)
    server.serve()
    return 0


def _end_with_parent(fd: int, stop: object) -> None:
    while os.read(fd, 1):
        continue
    assert callable(stop)
    stop()


if __name__ == "__main__":
    sys.exit(main())
