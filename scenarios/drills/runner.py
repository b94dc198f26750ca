"""Plays one drill on a stage and judges what came of it."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from migrate.errors import MigrateError
from migrate.kfd.sim.faults import Fault, arm
from scenarios.cluster import wait_until
from scenarios.drills import judge
from scenarios.drills.drill import Drill
from scenarios.drills.outcome import Mark, Outcome, lanes, states
from scenarios.drills.stage import Stage, last_state
from scenarios.drills.strike import Strike, pause, wait_stopped
from scenarios.drills.watch import STANDS, Watch, look

VRAM = 8 << 20
PACE = 0.02  # seconds between steps
IN_FLIGHT = 10  # steps that prove running queues: more than were under way
LET_GO = 5.0  # seconds within which the watchdog lets a source go; the drill's own promise
HELPERS = 4  # starts of a helper, and as much of other work, that lie within LET_GO
UNREACHABLE = 11  # exit code of AGENT_UNREACHABLE

# A shell's background jobs start with SIGINT ignored, and so would their children.
COMMAND = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
    " from migrate.cli.main import main; main()"
)


class Failed(Exception):
    """The drill can't go on: what was to happen did not."""


class Play:
    """One drill. ``run`` raises nothing that a drill may bring about."""

    def __init__(self, drill: Drill, stage: Stage) -> None:
        self.drill = drill
        self.stage = stage
        self.problems: list[str] = []
        self.marks: list[tuple[float, str]] = []
        self.exit: int | None = None
        self.reason = ""
        self.migration = ""
        self.digest = ""
        self.runs = ""
        name = f"{drill.name}-{secrets.token_hex(3)}"
        self.log = stage.folder / f"{name}.log"
        self.result = stage.folder / f"{name}.json"
        self.until = stage.folder / f"{name}.until"
        self._key = secrets.token_hex(8)
        self._command: subprocess.Popen[bytes] | None = None
        self._before: set[str] = set()
        self.kernel_before: dict[str, int] = {}  # characters of each kernel's log at the start

    def run(self) -> Outcome:
        """Play it, clear up, and tell."""
        started = time.monotonic()
        stage, drill = self.stage, self.drill
        looks: Watch | None = None
        self._deadline = started + drill.limit
        offsets: dict[str, int] = {}
        began = time.time()
        try:
            for side in stage.sides:
                shim = drill.actor in {f"{side}-clock", f"{side}-disk"}
                stage.arm(side, drill.faults_of(side), shim=shim)
            offsets = {side: stage.log_size(side) for side in stage.sides}
            if drill.hangs:
                arm(stage.sides["destination"].host.root, Fault.RESUME_DEAD)
            self.kernel_before = {
                name: len(side.kernel_log.read_text()) for name, side in stage.sides.items()
            }
            self._start_job()
            looks = Watch(self.log)
            looks.start()
            began = time.time()
            self._play(offsets)
            judge.processes(self)
        except (
            Failed,
            TimeoutError,
            MigrateError,
            OSError,
            ValueError,
            subprocess.SubprocessError,
        ) as error:
            self.problems.append(f"{type(error).__name__}: {error}")
        ended = time.time()
        seen = looks.end() if looks is not None else []
        self._clear_up()
        source = judge.shifted(
            self, "source", states(self._records("source"), self.migration, "source")
        )
        destination = judge.shifted(
            self, "destination", states(self._records("destination"), self.migration, "destination")
        )
        if not self.problems:
            self.problems += judge.history(self, source, destination, seen)
        if self.problems:
            stage.spoiled = True
        pid = self.job.pid if hasattr(self, "job") else 0
        spans = lanes(source, destination, seen, pid, began, ended)
        return Outcome(
            drill=drill,
            problems=tuple(self.problems),
            seconds=time.monotonic() - started,
            exit=self.exit,
            reason=self.reason,
            source=source[-1][1] if source else "",
            destination=destination[-1][1] if destination else "",
            owner=next((s.text for s in reversed(spans) if s.lane == "owner"), ""),
            runs=self.runs,
            migration=self.migration,
            digest=self.digest,
            log=self._logs(offsets) if self.problems else "",
            spans=spans,
            marks=tuple(Mark(at=wall - began, text=text) for wall, text in self.marks),
        )

    # ------------------------------------------------------------ the play

    def _play(self, offsets: dict[str, int]) -> None:
        drill, stage = self.drill, self.stage
        strike = Strike(drill, stage, self.job.pid, lambda: self.command)
        self._before = {r.migration for r in self._records("source")}
        if not drill.point:
            self._hit(strike)
        self._start_command()
        if drill.point:
            self._wait_point(offsets)
            strike.migration = self.migration = self._find()
            self._hit(strike)
            self._go_on(strike)
        if drill.alone:
            self._left_alone()
        if not drill.lasts:
            pause(drill.after)
            self._mend(strike)
        self._finish_command(strike)
        if drill.lasts:
            pause(drill.after)
            self._mend(strike)
        self.migration = self.migration or self._find()
        self._settle()

    def _hit(self, strike: Strike) -> None:
        self._mark(f"{self.drill.fault}: {self.drill.actor}")
        strike.hit()

    def _mend(self, strike: Strike) -> None:
        strike.mend()
        self._mark("mended")

    def _go_on(self, strike: Strike) -> None:
        """Continue the agent that held the moment open, unless it is what was paused."""
        drill = self.drill
        if drill.action != "stop":
            return
        side = drill.point.partition(".")[0]
        if drill.fault == "pause" and drill.actor == f"{side}-agent":
            return
        agent = self.stage.sides[side].agent
        if agent.poll() is None:
            agent.send_signal(signal.SIGCONT)

    def _start_job(self) -> None:
        self.job = self.stage.cluster.workload(
            "a",
            [
                "-m", "scenarios.workloads.train",
                "--steps", "1000000",
                "--until", str(self.until),
                "--vram", str(VRAM),
                "--gpus", "2",
                "--seed", str(judge.SEED),
                "--pace", str(PACE),
                "--log", str(self.log),
                "--result", str(self.result),
            ],
        )  # fmt: skip
        wait_until(lambda: self.steps() >= 3 or self.job.poll() is not None, 120, "the job's steps")
        if self.job.poll() is not None:
            raise Failed(f"the job ended by itself with {self.job.returncode}")

    def steps(self) -> int:
        """Steps that the job has logged, wherever it ran."""
        try:
            return self.log.read_bytes().count(b"\n")
        except OSError:
            return 0

    @property
    def command(self) -> subprocess.Popen[bytes]:
        """The ``migrate run`` that started it."""
        assert self._command is not None
        return self._command

    def _start_command(self) -> None:
        self._mark("migrate run")
        self._command = subprocess.Popen(
            [
                sys.executable, "-c", COMMAND, "--json",
                "--inventory", str(self.stage.inventory),
                "run", "a", "b", str(self.job.pid),
                "--idempotency-key", self._key,
                *self.drill.options,
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )  # fmt: skip

    def _wait_point(self, offsets: dict[str, int]) -> None:
        drill = self.drill
        side = drill.point.partition(".")[0]
        agent = self.stage.sides[side].agent

        def came() -> bool:
            return self.stage.announced(side, offsets[side], drill.point)

        def settled() -> bool:
            return came() or self.command.poll() is not None

        wait_until(settled, self._left(), f"fault point {drill.point}")
        if not came():
            pause(0.2)
            if not came():
                self._finish_command(None)
                raise Failed(
                    f"fault point {drill.point} never came; the command ended with"
                    f" {self.exit} {self.reason}"
                )
        if drill.action == "stop":
            wait_stopped(agent.pid, 60)

    def _find(self) -> str:
        """The migration that our command started, "" if it started none."""
        fresh = [r.migration for r in self._records("source") if r.kind == "request"]
        return next((m for m in reversed(fresh) if m not in self._before), "")

    def _left_alone(self) -> None:
        """Nobody restarts anything for a while: the watchdog acts, or leaves it frozen."""
        pid, since = self.job.pid, time.monotonic()
        if self.drill.meanwhile == "runs":
            before = self.steps()
            wait_until(lambda: self.steps() > before + IN_FLIGHT, 120, "the source to run again")
            took = time.monotonic() - since
            self._mark(f"runs again after {took:.1f} s")
            at_most = LET_GO + IN_FLIGHT * PACE * 4 + HELPERS * _start_of_a_helper()
            if took > at_most:
                self.problems.append(f"the source ran again only after {took:.1f} s")
            return
        pause(0.5)
        first = look(pid)
        while time.monotonic() - since < self.drill.alone:
            seen = look(pid)
            if seen.state != STANDS or seen.cpu != first.cpu:
                raise Failed(f"a granted source was touched: {first} then {seen}")
            pause(0.1)
        self._mark("still frozen")

    def _finish_command(self, strike: Strike | None) -> None:
        """Wait for the command's end; repeat one that its agent's death left without answer."""
        out, error = self._ended()
        if (
            self.exit == UNREACHABLE
            and strike is not None
            and strike.restarted
            and strike.side_name == "source"
        ):
            # What a scheduler does, with the key that starts nothing twice.
            self._start_command()
            out, error = self._ended()
        if self.exit is not None and self.exit < 0:
            self.exit = None  # killed by us
        elif out:
            self.reason = _reason(json.loads(out))
        else:
            self.problems.append(f"the command printed nothing: {error.decode()[-400:]}")

    def _ended(self) -> tuple[bytes, bytes]:
        try:
            out, error = self.command.communicate(timeout=self._left())
        except subprocess.TimeoutExpired:
            self.command.kill()
            out, error = self.command.communicate()
            self.problems.append("the command did not end in time")
        self._mark("the command ended")
        self.exit = self.command.returncode
        return out, error

    def _settle(self) -> None:
        """Until both journals say what is expected, or the time is over."""
        expect = self.drill.expect

        def settled() -> bool:
            return (
                last_state(self._records("source"), self.migration, "source") == expect.source
                and last_state(self._records("destination"), self.migration, "destination")
                == expect.destination
            )

        try:
            wait_until(settled, max(1.0, self._left()), "the journals")
        except TimeoutError:
            self.problems.append("the journals did not come to the expected states")

    # ------------------------------------------------------------ helpers

    def _left(self) -> float:
        return max(0.5, self._deadline - time.monotonic())

    def _mark(self, text: str) -> None:
        self.marks.append((time.time(), text))

    def _records(self, side: str) -> list[Any]:
        return list(self.stage.sides[side].records())

    def _states(self, side: str) -> list[tuple[float, str]]:
        return judge.shifted(self, side, states(self._records(side), self.migration, side))

    def _logs(self, offsets: dict[str, int]) -> str:
        return "\n".join(
            f"--- {side}\n{self.stage.log_tail(side, offset)[-3000:]}"
            for side, offset in offsets.items()
        )

    def _clear_up(self) -> None:
        """Whatever came out: nothing of this drill is there for the next one to meet."""
        if self._command is not None and self._command.poll() is None:
            self._command.kill()
            self._command.communicate()
        for side in self.stage.sides.values():
            side.control.heal()
            side.data.heal()
        for name in self.stage.sides:
            Path(self.stage.disk(name)).unlink(missing_ok=True)
            Path(self.stage.clock(name)).unlink(missing_ok=True)
        for pid in judge.copies(self.log):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        if hasattr(self, "job"):
            self.job.wait(60)
        if self.drill.expect.runs == "frozen":
            self.stage.spoiled = True
        for path in (self.log, self.result, self.until):
            Path(path).unlink(missing_ok=True)


def _start_of_a_helper() -> float:
    """Seconds that a Python helper takes to start just now; on an idle machine a fifth of one."""
    since = time.monotonic()
    subprocess.run([sys.executable, "-c", "import migrate.engine.tracer"], check=True)
    return time.monotonic() - since


def _reason(document: dict[str, Any]) -> str:
    found = document.get("failure") or document.get("error") or {}
    return str(found.get("reason", ""))
