"""The training loop's record: all of its CPU state, replaced at every operation."""

from __future__ import annotations

import msgspec

from migrate.model import Value
from scenarios.workloads.device import Bo, Event, Queue

SLOTS = 8  # steps whose signals, kernargs and results have room at the same time
DEPTH = 4  # steps in flight


class Config(Value):
    """What was asked for on the command line. Sizes in bytes, times in seconds."""

    steps: int
    vram: int
    gpus: int
    seed: int
    layers: int
    log: str
    result: str
    weights: str | None = None
    pace: float = 0.0
    delay_us: int = 0
    seconds: float | None = None
    until: str | None = None


class Draw(Value):
    """What one GPU does in one step, drawn from the RNG when the step begins."""

    layer: int
    tile: int
    alpha: float
    increment: int


class Record(Value):
    """See migrate.engine.runtime: one operation replaces it by the next.

    ``step`` is being submitted, ``gpu`` and ``packet`` say how far it got; ``done`` steps
    have completed. ``written`` has each work queue's write index.
    """

    config: Config
    pids: tuple[int, ...]
    rng: int
    phase: str = "setup"
    gpu_ids: tuple[int, ...] = ()
    bos: dict[str, Bo] = msgspec.field(default_factory=dict)
    queues: dict[str, Queue] = msgspec.field(default_factory=dict)
    events: dict[str, Event] = msgspec.field(default_factory=dict)
    made: int = 0  # objects, in the order of the set-up's plan
    filled: int = 0  # chunks
    step: int = 0
    gpu: int = 0
    packet: int = 0
    draws: tuple[Draw, ...] = ()
    written: tuple[int, ...] = ()
    done: int = 0
    steps: int = 0
    recent: tuple[bytes, ...] = ()  # digests after the last steps, newest last
    log_offset: int = 0
    counters: tuple[int, ...] = ()
    started: float = 0.0  # seconds since the epoch
    fds: int = 0  # open files when training began
    hashed: int = 0  # chunks

    @property
    def digest(self) -> bytes:
        """The chain's newest link."""
        return self.recent[-1]
