"""Plays many drills, several stages at a time, and gathers what came of them."""

from __future__ import annotations

import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from migrate.cli.output import Output
from migrate.errors import MigrateError, MigrationFailed, UsageError
from scenarios.drills import page
from scenarios.drills.drill import Drill, load
from scenarios.drills.outcome import Outcome, Results
from scenarios.drills.runner import Play
from scenarios.drills.stage import Stage

LIST = "`migrate drill list` names them."
Tell = Callable[[Outcome], None]


def play_all(drills: Sequence[Drill], *, stages: int, tell: Tell = lambda _: None) -> Results:
    """Play *drills*, *stages* at a time. A stage serves as long as its drills pass."""
    started = time.monotonic()
    waiting: queue.SimpleQueue[Drill] = queue.SimpleQueue()
    for drill in drills:
        waiting.put(drill)
    found: list[Outcome] = []
    stop = threading.Event()
    workers = [
        threading.Thread(target=_work, args=(waiting, found, tell, stop), name=f"stage-{number}")
        for number in range(min(stages, len(drills)))
    ]
    for worker in workers:
        worker.start()
    try:
        for worker in workers:
            worker.join()
    except KeyboardInterrupt:
        stop.set()
        for worker in workers:
            worker.join()
        raise
    order = {drill.name: position for position, drill in enumerate(drills)}
    found.sort(key=lambda outcome: order[outcome.drill.name])
    passed = sum(outcome.passed for outcome in found)
    return Results(
        outcomes=tuple(found),
        seconds=time.monotonic() - started,
        passed=passed,
        failed=len(found) - passed,
    )


def _work(
    waiting: queue.SimpleQueue[Drill], found: list[Outcome], tell: Tell, stop: threading.Event
) -> None:
    stage: Stage | None = None
    try:
        while not stop.is_set():
            try:
                drill = waiting.get_nowait()
            except queue.Empty:
                return
            started = time.monotonic()
            try:
                if stage is None:
                    stage = Stage().__enter__()
                outcome = Play(drill, stage).run()
            except Exception as error:  # a bug of ours must not take the other drills along
                text = f"the runner failed: {type(error).__name__}: {error}"
                seconds = time.monotonic() - started
                outcome = Outcome(drill=drill, problems=(text,), seconds=seconds)
                if stage is not None:
                    stage.spoiled = True
            found.append(outcome)
            tell(outcome)
            if stage is not None and stage.spoiled:
                _leave(stage)
                stage = None
    finally:
        if stage is not None:
            _leave(stage)


def _leave(stage: Stage) -> None:
    with suppress(OSError, MigrateError):
        stage.__exit__(None, None, None)


def choose(names: Sequence[str], *, everything: bool) -> tuple[Drill, ...]:
    """Drills by name, by family, or all. Raises UsageError."""
    drills = load()
    if everything:
        return drills
    if not names:
        raise UsageError(
            "name drills or families, or say --all", advice="See `migrate drill list`."
        )
    chosen: list[Drill] = []
    for name in names:
        fitting = [d for d in drills if name in {d.name, d.family}]
        if not fitting:
            raise UsageError(f"there is no drill {name!r}", advice=LIST)
        chosen += [d for d in fitting if d not in chosen]
    return tuple(chosen)


def show(output: Output) -> int:
    """``migrate drill list``."""
    drills = load()
    if output.json:
        output.document({"schema": "migrate.drill-list/1", "drills": msgspec.to_builtins(drills)})
        return 0
    for family in dict.fromkeys(drill.family for drill in drills):
        output.text(family)
        for drill in drills:
            if drill.family == family:
                output.text(f"  {drill.name:<52} {drill.why}")
    output.text(f"{len(drills)} drills")
    return 0


def run(
    output: Output, names: Sequence[str], *, everything: bool, stages: int, html: Path | None
) -> int:
    """``migrate drill run``: 0 if all passed. Raises UsageError, MigrationFailed."""
    drills = choose(names, everything=everything)
    # As Ctrl-C: what a time limit of CI ends must not leave hosts behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)

    def tell(outcome: Outcome) -> None:
        word = "passed" if outcome.passed else "FAILED"
        output.note(f"{word} {outcome.drill.name} ({outcome.seconds:.1f} s)")
        for problem in outcome.problems:
            output.note(f"    {problem}")

    results = play_all(drills, stages=stages, tell=tell)
    if html is not None:
        try:
            html.write_text(page.render(results))
        except OSError as error:
            raise MigrationFailed(f"{html}: {error.strerror}", advice="") from error
    if output.json:
        output.document(msgspec.to_builtins(results))
    else:
        output.text(
            f"{len(results.outcomes)} drills: {results.passed} passed, {results.failed} failed"
            f" in {results.seconds:.0f} s"
        )
    sys.stdout.flush()
    return 0 if results.failed == 0 else 1
