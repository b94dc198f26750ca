"""The watchdog: lets a source go on within seconds of its agent's death, if nobody else does.

    python -m agents.watchdog --agent-fd N --paths JSON --engine NAME

A small process in a session of its own, started by the agent. It sleeps until the agent's
end of a pipe is closed, which the kernel does however the agent ends. Then it reads the
journal, read-only, and UNPAUSEs and thaws every process whose migration was not granted.

It touches nothing that is GRANTED, or whose record can't be read, and stands back as soon as
a new agent holds the lock: two that act at once are kept apart by ``watchdog.lock``, which
a new agent waits for before it recovers.

A process that it let go may end by itself before an agent comes back. That agent must not
take the destination's copy for the only one, so the watchdog notes what it lets go, in a
file whose room was taken beforehand: a full disk does not keep it from acting.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from agents.engines import ENGINES, make_engine
from agents.logs import use_json_lines
from migrate.decode import from_json
from migrate.engine.seam import ProcessEngine, Survey
from migrate.errors import AgentBusy, MigrateError, NoSuchProcess, UsageError
from migrate.journal import Record, read_records
from migrate.kfd.process import KfdProcess
from migrate.model import HostPaths, ProcessRef
from migrate.orchestrator.source_handover import StateRecord
from migrate.status import SourceState

_log = logging.getLogger(__name__)

GRACE = 1.0  # seconds that a supervisor has to start a new agent
AGAIN = 0.25  # seconds between attempts, e.g. while a helper of the dead agent still undoes
GIVE_UP = 600.0  # seconds
NOTES_ROOM = 64 << 10  # bytes taken beforehand
LOCK_WAIT = 90.0  # seconds that a new agent waits for a watchdog at work on one process

# The source's own to run: nothing was granted, or the grant was refused or taken back.
MAY_RUN = frozenset(
    {
        SourceState.SETUP,
        SourceState.ACTIVE,
        SourceState.DEVICE,
        SourceState.RECLAIMED,
        SourceState.UNDOING,
    }
)


class _Request(msgspec.Struct):
    """What is looked at of the journal's ``request`` record."""

    survey: Survey


# ------------------------------------------------------------------ the agent's side


class Watchdog:
    """Started by an agent that holds the lock; ``close`` ends it without any action.

    *json_log*: the host's name, if the agent's log is JSON lines.
    """

    def __init__(self, paths: HostPaths, engine: str, json_log: str = "") -> None:
        """Wait for the watchdog of the agent before us, then start our own."""
        run = Path(paths.run)
        _wait_for_the_one_before(run)
        self.let_go = notes(run)
        _take_room(run)
        reader, self._writer = os.pipe()
        command = [sys.executable, "-m", "agents.watchdog", "--agent-fd", str(reader)]
        command += ["--paths", msgspec.json.encode(paths).decode(), "--engine", engine]
        if json_log:
            command += ["--json-log", json_log]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[reader],
                start_new_session=True,  # what ends the agent's group must not end it
            )
        finally:
            os.close(reader)

    def close(self, *, needed: bool) -> None:
        """The agent ends. *needed*: it leaves something that it could not undo."""
        if not needed:
            self._process.kill()
            self._process.wait()
        os.close(self._writer)


def _wait_for_the_one_before(run: Path) -> None:
    deadline = time.monotonic() + LOCK_WAIT
    while True:
        with _locked(run / "watchdog.lock") as mine:
            if mine:
                return
        if time.monotonic() > deadline:
            raise AgentBusy(f"a watchdog is still at work in {run}")
        time.sleep(AGAIN)


def _take_room(run: Path) -> None:
    path = run / "watchdog.notes"
    try:
        if not path.exists():
            path.write_bytes(b"\n" * NOTES_ROOM)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error


def notes(run: Path) -> frozenset[str]:
    """Migrations whose process a watchdog let go."""
    try:
        return frozenset((run / "watchdog.notes").read_text("ascii").split())
    except (OSError, UnicodeDecodeError):
        return frozenset()


# ------------------------------------------------------------------ the watchdog's side


class Rescue:
    """What the watchdog does once its agent is dead."""

    def __init__(self, run: Path, engine: ProcessEngine) -> None:
        self._run = run
        self._engine = engine

    def act(self) -> bool:
        """One attempt. True: nothing is left to do, or it is another's business."""
        with _locked(self._run / "watchdog.lock") as mine:
            if not mine:
                return False
            try:
                records = read_records(self._run / "journal.db")
            except MigrateError as error:
                _log.error("nothing is touched: %s", error)
                return True
            done = True
            for migration, found in _by_migration(records).items():
                if _held(self._run / "agent.lock"):
                    _log.info("a new agent is there, and goes on")
                    return True
                done &= self._let_go(migration, found)
            return done

    def _let_go(self, migration: str, records: Sequence[Record]) -> bool:
        """UNPAUSE and thaw one process. False: to be tried again."""
        try:
            last = {record.kind: record for record in records}
            if "check" in last:
                return self._end_check(last)
            if "request" not in last or "source" not in last:
                return True
            state = last["source"].decode(StateRecord).state
            if state not in MAY_RUN:
                return True
            process = last["request"].decode(_Request).survey.process
            paused = "paused" in last and last["paused"].decode(bool)
        except MigrateError as error:
            _log.error("migration %s is not touched: %s", migration, error)
            return True
        if not self._engine.is_alive(process):
            return True
        try:
            self._note(migration)
            if paused:
                with contextlib.suppress(NoSuchProcess):
                    self._engine.visit_frozen(process, _unpause)
            self._engine.thaw(process)
        except (MigrateError, OSError) as error:
            _log.warning("process %d can't be let go yet: %s", process.pid, error)
            return False
        _log.warning("migration %s: process %d was let go (%s)", migration, process.pid, state)
        return True

    def _end_check(self, last: dict[str, Record]) -> bool:
        """UNPAUSE a process that was only looked at. False: to be tried again."""
        process = last["check"].decode(ProcessRef)
        paused = "paused" in last and last["paused"].decode(bool)
        if not paused or not self._engine.is_alive(process):
            return True
        try:
            self._engine.snapshot(process, _unpause)
        except NoSuchProcess:
            return True
        except (MigrateError, OSError) as error:
            _log.warning("process %d can't be let go yet: %s", process.pid, error)
            return False
        return True

    def _note(self, migration: str) -> None:
        """Durable before the process runs. Raises OSError."""
        known = notes(self._run)
        if migration in known:
            return
        text = "\n".join([*sorted(known), migration, ""]).encode()
        fd = os.open(self._run / "watchdog.notes", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.pwrite(fd, text, 0)
            os.fsync(fd)
        finally:
            os.close(fd)


def _by_migration(records: Sequence[Record]) -> dict[str, list[Record]]:
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(record.migration, []).append(record)
    return found


def _unpause(kfd: Sequence[KfdProcess]) -> None:
    for process in kfd:
        process.unpause_if_paused()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Hold a lock file; False if somebody else does."""
    fd = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        try:
            os.lockf(fd, os.F_TLOCK, 0)
        except OSError:
            yield False
            return
        yield True
    finally:
        os.close(fd)


def _held(path: Path) -> bool:
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        os.lockf(fd, os.F_TEST, 0)
    except OSError:
        return True
    finally:
        os.close(fd)
    return False


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the watchdog's process."""
    parser = argparse.ArgumentParser(description="Let sources go when their agent dies.")
    parser.add_argument("--agent-fd", type=int, required=True, help="pipe; closed when it dies")
    parser.add_argument("--paths", required=True, help="HostPaths as JSON")
    parser.add_argument("--engine", choices=sorted(ENGINES), required=True)
    parser.add_argument("--json-log", metavar="HOST", help="log JSON lines, as of this host")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s watchdog: %(message)s")
    if options.json_log:
        use_json_lines(options.json_log)
    paths = from_json(options.paths, HostPaths)
    rescue = Rescue(Path(paths.run), make_engine(options.engine, paths))
    while os.read(options.agent_fd, 1):
        continue
    deadline = time.monotonic() + GIVE_UP
    time.sleep(GRACE)
    while time.monotonic() < deadline:
        try:
            if rescue.act():
                return
        except OSError as error:  # the run directory went away, or the disk is gone
            _log.error("%s", error)
            return
        time.sleep(AGAIN)


if __name__ == "__main__":
    main()
