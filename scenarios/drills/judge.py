"""What must be true after a drill, whatever was hurt: never two, never none, nothing left."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from migrate.engine import procfs
from migrate.engine.runtime import HOST_ROOT
from migrate.errors import NoSuchProcess
from migrate.kfd.sysfs import read_processes
from scenarios.cluster import wait_until
from scenarios.drills.stage import Stage, processes_of
from scenarios.drills.watch import GONE, STANDS, Look, job, look, overlaps

if TYPE_CHECKING:
    from scenarios.drills.runner import Play

SEED = 23
SOON = 60.0  # seconds for what was decided to be done, e.g. a copy to be ended
TICK = 0.03  # seconds between a record's time and a look that can tell
ENDS_WELL = {"source", "destination"}


def copies(log: Path) -> list[int]:
    """Pids of the copies of a job that are there, frozen or not."""
    return sorted(
        pid for pid, line in processes_of(str(log)).items() if job(line) and look(pid).state != GONE
    )


def processes(play: Play) -> None:
    """Exactly one copy, where it belongs; it runs, ends, and comes to its twin's digest."""
    expect = play.drill.expect
    _compare(play)
    wait_until(lambda: where(play) == expect.runs, SOON, f"the process to be: {expect.runs}")
    play.runs = where(play)
    if play.runs in ENDS_WELL:
        before = play.steps()
        wait_until(lambda: play.steps() > before + 10, 120, "the process to go on")
        play.until.touch()
        wait_until(play.result.exists, 120, "the job's result")
        result = json.loads(play.result.read_text())
        play.digest = result["digest"]
        twin = twin_digest(play.stage, result["steps"])
        if play.digest != twin:
            play.problems.append(f"digest {play.digest}, its twin's {twin}")
        wait_until(lambda: not copies(play.log), SOON, "the job to end")
    if play.runs != "frozen":
        _nothing_left(play)


def _compare(play: Play) -> None:
    expect = play.drill.expect
    if play.exit != expect.exit or play.reason != expect.reason:
        play.problems.append(
            f"the command: {play.exit} {play.reason}, expected {expect.exit} {expect.reason}"
        )


def where(play: Play) -> str:
    """Where the process is, by the processes that are there."""
    found = copies(play.log)
    if not found:
        return "nowhere"
    if len(found) > 1:
        return f"twice: {found}"
    if found[0] != play.job.pid:
        return "destination held" if look(found[0]).state == STANDS else "destination"
    return "frozen" if look(found[0]).state == STANDS else "source"


def _nothing_left(play: Play) -> None:
    """No KFD process, no helper, no kernel oops."""
    stage = play.stage

    def known() -> list[str]:
        return [
            f"{name}: KFD process {usage.pid}"
            for name, side in stage.sides.items()
            for usage in read_processes(side.host.paths)
            if usage.pid != side.agent.pid  # who opens /dev/kfd for RESUME is a KFD process
        ]

    def left() -> list[str]:
        return known() + [f"process {pid}: {line}" for pid, line in strays(stage).items()]

    try:
        wait_until(lambda: not left(), SOON, "nothing to be left")
    except TimeoutError:
        play.problems.append(f"left behind: {'; '.join(left())}")
    for name, side in stage.sides.items():
        said = side.kernel_log.read_text()[play.kernel_before[name] :]
        # The GPU of a process that is killed may be in the middle of a packet: no bug of ours.
        expected = play.drill.actor in {"workload", "copy", "source-host", "destination-host"}
        if said and ("oops" in said or not expected):
            play.problems.append(f"{name}'s kernel said: {said}")


def strays(stage: Stage) -> dict[int, str]:
    """Processes of this stage that nobody should have left behind."""
    known = {side.agent.pid for side in stage.sides.values()}
    known |= {side.host.node.pid for side in stage.sides.values()}
    return {
        pid: line
        for pid, line in processes_of(str(stage.folder)).items()
        if pid not in known
        and "agents.watchdog" not in line
        and "migrate.cli.main" not in line
        and look(pid).state != GONE
        and not _waits(pid, line, known)
    }


def _waits(pid: int, line: str, agents: set[int]) -> bool:
    """Whether it is the helper that an agent keeps for its next look; it holds nobody."""
    with contextlib.suppress(NoSuchProcess):
        return "migrate.engine.tracer" in line and procfs.parent(pid) in agents
    return False


def history(
    play: Play,
    source: list[tuple[float, str]],
    destination: list[tuple[float, str]],
    looks: list[Look],
) -> list[str]:
    """What the journals and the looks say of the whole time."""
    problems = []
    granted = [at for at, state in source if state == "GRANTED"]
    owned = [at for at, state in destination if state == "OWNED"]
    if owned and (not granted or owned[0] < granted[0] - TICK):
        problems.append("OWNED before GRANTED")
    if granted:
        decided = [at for at, state in source if state in {"RELEASING", "RECLAIMED", "UNDOING"}]
        until = (decided[0] if decided else time.time()) - TICK
        ran = overlaps(looks, play.job.pid, granted[0] + TICK, until)
        if ran and play.drill.actor not in {"workload", "source-host"}:
            problems.append(f"the source ran after GRANTED: {ran[0]}")
    reclaimed = any(state == "RECLAIMED" for _, state in source)
    if reclaimed and not any(state == "REVOKED" for _, state in destination):
        problems.append("the source took back what the destination had not revoked")
    if any(state == "UNDOING" for _, state in source) and owned:
        refused = any(state == "REFUSED" for _, state in destination)
        if not refused:
            problems.append("the source undid what the destination owned")
    return problems


def shifted(play: Play, side: str, steps: list[tuple[float, str]]) -> list[tuple[float, str]]:
    """Times as they would be without a clock that the drill made jump."""
    drill = play.drill
    if drill.actor != f"{side}-clock" or not drill.amount:
        return steps
    now = time.time()

    def right(at: float) -> float:
        return at - drill.amount if abs(at - drill.amount - now) < abs(at - now) else at

    return [(right(at), state) for at, state in steps]


@lru_cache(maxsize=1000)
def twin_digest(stage: Stage, steps: int) -> str:
    """The digest of a job of as many steps that nobody hurt or moved."""
    log, result = stage.folder / f"twin-{steps}.log", stage.folder / f"twin-{steps}.json"
    subprocess.run(
        [
            sys.executable, "-m", "scenarios.workloads.train",
            "--steps", str(steps), "--vram", str(8 << 20), "--gpus", "2",
            "--seed", str(SEED), "--log", str(log), "--result", str(result),
        ],
        check=True,
        timeout=120,
        env={**os.environ, HOST_ROOT: str(stage.sides["source"].host.root)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    digest: str = msgspec.json.decode(result.read_bytes())["digest"]
    log.unlink()
    result.unlink()
    return digest
