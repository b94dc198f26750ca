"""The faults themselves: what is done to whom, and how it is mended."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from migrate import inventory
from migrate.cli.following import abort
from migrate.decode import from_json
from migrate.engine import procfs
from migrate.kfd.sim.faults import Fault, arm
from migrate.orchestrator.destination import CopyRecord
from scenarios.cluster import wait_until
from scenarios.drills.drill import Drill
from scenarios.drills.stage import Side, Stage

GONE_WAIT = 60.0  # seconds for a killed process to be gone
LIMIT = 1  # bytes a file may grow to: every write of a journal that holds something fails


class Strike:
    """One fault: ``hit`` does it, ``mend`` undoes it. *now* is what a drill is about."""

    def __init__(
        self, drill: Drill, stage: Stage, job: int, command: Callable[[], subprocess.Popen[bytes]]
    ) -> None:
        self._drill = drill
        self._stage = stage
        self._job = job
        self._command = command
        side, _, self._what = drill.actor.rpartition("-")
        self._side: Side | None = stage.sides.get(side)
        self.side_name = side
        self.migration = ""
        self.restarted = False

    def hit(self) -> None:
        """Do it. The agent that holds the moment open is stopped, or has died of it."""
        match self._drill.actor:
            case "source-agent" | "destination-agent":
                self._hit_agent()
            case "cli":
                number = signal.SIGKILL if self._drill.fault == "kill" else signal.SIGINT
                self._command().send_signal(number)
            case "operator":
                abort(inventory.load(self._stage.inventory), "a", self.migration)
            case "workload":
                end_process(self._job)
            case "copy":
                end_process(self._copy())
            case "source-host" | "destination-host":
                self._agent.kill()
                copy = self._job if self.side_name == "source" else self._copy()
                end_process(copy)
                self._agent.wait(60)
            case "network":
                self._hit_network()
            case "source-disk" | "destination-disk":
                self._hit_disk()
            case "source-clock" | "destination-clock":
                Path(self._stage.clock(self.side_name)).write_text(f"{self._drill.amount:.0f}")
            case "source-gpu" | "destination-gpu":
                arm(self._host.host.root, Fault(self._drill.fault), self._drill.amount or 1)

    def mend(self) -> None:
        """Undo it, as far as somebody would."""
        match self._drill.actor:
            case "source-agent" | "destination-agent" | "source-host" | "destination-host":
                if self._drill.fault == "pause":
                    self._agent.send_signal(signal.SIGCONT)
                    return
                self._agent.wait(60)
                self._stage.restart(self.side_name)
                self.restarted = True
            case "network":
                for side in self._stage.sides.values():
                    side.control.heal()
                    side.data.heal()
            case "source-disk" | "destination-disk":
                self._mend_disk()
            case "source-clock" | "destination-clock":
                Path(self._stage.clock(self.side_name)).unlink(missing_ok=True)

    # ------------------------------------------------------------ pieces

    @property
    def _host(self) -> Side:
        assert self._side is not None
        return self._side

    @property
    def _agent(self) -> subprocess.Popen[bytes]:
        return self._host.agent

    def _hit_agent(self) -> None:
        if self._drill.action != "stop":
            self._agent.wait(60)  # the fault point itself did it
            return
        match self._drill.fault:
            case "kill":
                self._agent.kill()
                self._agent.wait(60)
            case "terminate":
                self._agent.terminate()
            case "pause":
                self._agent.send_signal(signal.SIGSTOP)

    def _hit_network(self) -> None:
        everything = [w for s in self._stage.sides.values() for w in (s.control, s.data)]
        control = [s.control for s in self._stage.sides.values()]
        data = [s.data for s in self._stage.sides.values()]
        match self._drill.fault:
            case "cut-control":
                for wire in control:
                    wire.cut()
            case "stall-control":
                for wire in control:
                    wire.stall()
            case "cut-data":
                for wire in data:
                    wire.cut()
            case "stall-data":
                for wire in data:
                    wire.stall()
            case "cut-all":
                for wire in everything:
                    wire.cut()
            case "loss":
                for wire in everything:
                    wire.lose(self._drill.amount)

    def _hit_disk(self) -> None:
        """No room, which a journal outlives, or an error (EFBIG), which ends the agent."""
        if self._drill.fault == "full":
            Path(self._stage.disk(self.side_name)).touch()
            return
        _, hard = resource.prlimit(self._agent.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(self._agent.pid, resource.RLIMIT_FSIZE, (LIMIT, hard))

    def _mend_disk(self) -> None:
        if self._drill.fault == "full":
            Path(self._stage.disk(self.side_name)).unlink(missing_ok=True)
            return
        self._agent.wait(60)  # it ends by itself
        self._stage.restart(self.side_name)
        self.restarted = True

    def _copy(self) -> int:
        """The newest copy that the destination has built of this migration."""
        found = [
            record
            for record in self._stage.sides["destination"].records()
            if record.kind == "copy" and record.migration == self.migration
        ]
        return from_json(found[-1].data, CopyRecord).process.pid


def wait_stopped(pid: int, timeout: float) -> None:
    """Until a process stands: a fault point has said so a moment before."""

    def stopped() -> bool:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"

    wait_until(stopped, timeout, f"process {pid} to stand")


def end_process(pid: int) -> None:
    """kill -9, and wait until it is gone: the agent that holds the moment goes on after that."""
    process = procfs.reference(pid)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not procfs.is_alive(process), GONE_WAIT, f"process {pid} to be gone")


def pause(seconds: float) -> None:
    """Let *seconds* pass."""
    time.sleep(seconds)
