"""Fault points: named moments at which a drill may hurt an agent.

``point(name)`` does nothing unless the agent was started with
``MIGRATE_FAULTS="name=action[@count],..."``: at the *count*-th time (1 unless said) that
the moment comes, the action is done, once.

    kill      SIGKILL to the agent
    stop      SIGSTOP to the agent, until somebody continues it: a moment held open
    exit      the agent ends at once, as by an unexpected exit()
    fail      InjectedFault is raised
    sleep:S   S seconds pass

Each action is announced by a line on stderr first, with the monotonic clock, so that
whoever drives the drill knows that the moment has come, and when.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping

from migrate.errors import MigrationFailed, UsageError
from migrate.model import Value

VARIABLE = "MIGRATE_FAULTS"
ANNOUNCEMENT = "fault point"
EXIT_CODE = 113  # of the action exit

POINTS: Mapping[str, str] = {
    # ---------------------------------------------------------------- the source
    "source.requested": "the request is journaled, nothing else has begun",
    "source.setup": "SETUP is journaled, nobody has looked at the process",
    "source.snapshot": "the running process is held by a tracer, its queues are paused",
    "source.reserved": "the destination made room",
    "source.round": "a pre-copy round is about to be sent",
    "source.round-sent": "a pre-copy round was sent",
    "source.before-device": "the rounds are over, DEVICE is not journaled",
    "source.device": "DEVICE is journaled, the process runs",
    "source.frozen": "the process is frozen, its queues run",
    "source.checkpointing": "frozen, all queues paused, the tracer still holds the process",
    "source.checkpointed": "frozen, queues paused, the tracer is gone",
    "source.final-round": "the last delta was sent",
    "source.prepared": "the destination said PREPARED",
    "source.granted.before-write": "the process is held, GRANTED is not journaled",
    "source.granted.after-write": "GRANTED is journaled, the grant is not sent",
    "source.answered": "an answer to the grant came, nothing is journaled of it",
    "source.reclaimed": "RECLAIMED is journaled, queues are paused and the process frozen",
    "source.releasing": "RELEASING is journaled, the frozen copy is there",
    "source.killed": "the frozen copy is ended, DONE is not journaled",
    "source.done": "DONE is journaled, the report is not",
    "source.undoing": "UNDOING is journaled, queues may be paused and the process frozen",
    "source.unpaused": "undoing: queues run, the process is frozen",
    "source.thawed": "undoing: the process runs, ROLLED_BACK is not journaled",
    # ----------------------------------------------------------- the destination
    "destination.reserve": "a reservation came, nothing is journaled",
    "destination.reserved": "RESERVED is journaled, the source has no answer",
    "destination.restoring": "RESTORING is journaled, no process was started",
    "destination.built": "the new process is there and on record, without GPU state",
    "destination.restored": "KFD restored its objects, their memory is empty",
    "destination.placed": "all memory is placed, none of it verified",
    "destination.verified": "all digests are right, the CPU side is not rebuilt",
    "destination.prepared.before-write": "the copy is held, PREPARED is not journaled",
    "destination.prepared.after-write": "PREPARED is journaled, the source has no answer",
    "destination.owned.before-write": "a grant came, OWNED is not journaled",
    "destination.owned.after-write": "OWNED is journaled, nothing of the copy runs",
    "destination.resumed": "the copy's queues may run, its threads are held",
    "destination.thawed": "the copy runs, the source has no answer",
    "destination.confirmed": "CONFIRMED is journaled, the source has no answer",
    "destination.revoking": "REVOKING is journaled, the suspect copy is there",
    "destination.revoked": "REVOKED is journaled, the source has no answer",
    "destination.killed": "an attempt was given up: the copy is ended, that is not journaled",
    "destination.aborted": "ABORTED is journaled, the source has no answer",
}


class InjectedFault(MigrationFailed):
    """The action ``fail`` of a fault point."""


class Fault(Value):
    """One entry of MIGRATE_FAULTS. ``seconds`` is of the action sleep."""

    point: str
    action: str
    count: int = 1
    seconds: float = 0.0


_lock = threading.Lock()
_armed: dict[str, Fault] = {}
_seen: dict[str, int] = {}


def parse(text: str) -> tuple[Fault, ...]:
    """The faults of MIGRATE_FAULTS. Raises UsageError."""
    return tuple(_parse_one(item.strip()) for item in text.split(",") if item.strip())


def _parse_one(item: str) -> Fault:
    name, _, rest = item.partition("=")
    action, _, count = rest.partition("@")
    action, _, seconds = action.partition(":")
    if name not in POINTS:
        raise UsageError(f"{VARIABLE}: there is no fault point {name!r}")
    if action not in {"kill", "stop", "exit", "fail", "sleep"}:
        raise UsageError(f"{VARIABLE}: {item!r}: an action is kill, stop, exit, fail or sleep:S")
    try:
        found = Fault(point=name, action=action, count=int(count or 1), seconds=float(seconds or 0))
    except ValueError as error:
        raise UsageError(f"{VARIABLE}: {item!r}: {error}") from error
    if found.count < 1 or found.seconds < 0 or (action == "sleep") != bool(seconds):
        raise UsageError(f"{VARIABLE}: {item!r}: name=action[@count] or name=sleep:S[@count]")
    return found


def arm(text: str) -> None:
    """Set the faults of this process; "" for none. Raises UsageError."""
    faults = parse(text)
    with _lock:
        _seen.clear()
        _armed.clear()
        _armed.update({fault.point: fault for fault in faults})


def point(name: str) -> None:
    """The moment *name* has come. Raises InjectedFault if the drill says so."""
    if not _armed:
        return
    assert name in POINTS, name
    with _lock:
        _seen[name] = _seen.get(name, 0) + 1
        fault = _armed.get(name)
        if fault is None or _seen[name] != fault.count:
            return
        del _armed[name]
    _do(fault)


def _do(fault: Fault) -> None:
    line = f"{ANNOUNCEMENT} {fault.point}: {fault.action} at {time.monotonic():.6f}\n"
    with contextlib.suppress(OSError):  # the disk may be full, by another drill
        os.write(sys.stderr.fileno(), line.encode())
    match fault.action:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            # To this very thread: it must not go a step further while the others stop.
            signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
        case "exit":
            os._exit(EXIT_CODE)
        case "sleep":
            time.sleep(fault.seconds)
        case "fail":
            raise InjectedFault(f"injected at {fault.point}")
