"""The training loop, broken off between random lines and begun again from its record.

    python -m tests.integration.interrupted_training SEED TRAIN-OPTIONS...

What a freeze and a restart do to the program, thousands of times in one process: the
operation under way is lost in its middle, and a new program goes on from the record.
"""

from __future__ import annotations

import os
import random
import sys
from types import FrameType
from typing import Any

from migrate.engine import runtime as runtime_module
from migrate.engine.runtime import Runtime
from scenarios.workloads import device, steps, train
from scenarios.workloads.record import Record

FILES = frozenset(module.__file__ for module in (device, steps, train))
CHANCE = 1 / 150  # of breaking off at a line


class BrokenOff(BaseException):
    """The process was frozen here, and started anew."""


class InterruptibleRuntime(Runtime):
    """Tells whether a freeze would be kept out at this moment."""

    @property
    def is_indivisible(self) -> bool:
        """Whether the program is inside ``indivisible``."""
        return self._indivisible > 0


def main() -> None:
    chance = random.Random(int(sys.argv[1]))
    config = train.parse(sys.argv[2:])
    runtime = InterruptibleRuntime.start()
    record = Record(config=config, pids=(os.getpid(),), rng=config.seed)
    runtime.commit(record)
    program = train.Training(runtime, config)
    breaks = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        if frame.f_code.co_filename not in FILES:
            return None
        if event == "line" and not runtime.is_indivisible and chance.random() < CHANCE:
            raise BrokenOff
        return trace

    while True:
        try:
            sys.settrace(trace)
            after = program.advance(record)
            sys.settrace(None)
        except BrokenOff:
            breaks += 1
            waiter = program.waiter
            os.close(program.log)
            program = train.Training(runtime, config)
            # Threads don't outlive a process, but they do this. One that was broken off before
            # its start would never wait for anything.
            program.waiter = waiter if waiter is not None and waiter.ident is not None else None
            record = runtime.state(Record) or record
            continue
        finally:
            sys.settrace(None)
        if after is None:
            break
        record = after
        runtime.commit(record)
    print(breaks, runtime_module.__name__)


if __name__ == "__main__":
    main()
