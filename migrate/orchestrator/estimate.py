"""What a migration will cost, before anything is moved: pure functions.

The rounds of pre-copy are played through with the figures of the sample, by the same
function that decides on the real ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from migrate.orchestrator.convergence import Costs, Decision, Policy, decide, predict
from migrate.orchestrator.figures import FIXED_GUESS, PLACEMENT_GUESS
from migrate.orchestrator.plan import Options
from migrate.orchestrator.sampling import Sample
from migrate.report import Downtime, Prediction, Report, Round

RATE_GUESS = 200e6  # bytes a second, where nothing was ever measured
SETUP = 0.5  # seconds before the first round
MAX_HISTORY = 20  # reports looked at
MAX_LEARNED = 5  # of those alike
MAX_FINAL = 2.0  # of the last live round's time; more was an accident


class Known:
    """What earlier migrations to the same host tell; else guesses.

    Medians of the last few, as one may have met a busy machine: of those that copied as this
    one will, with pre-copy or without, since the destination has another head start then.
    """

    def __init__(
        self, reports: Sequence[Report] = (), *, precopy: bool, snapshot: float = 0.0
    ) -> None:
        """*reports*: newest first. *snapshot*: seconds that stopping and checkpointing the
        process took just now."""
        self.costs = Costs(placement=PLACEMENT_GUESS, fixed=FIXED_GUESS + snapshot)
        self.rate = RATE_GUESS
        done = [r for r in reports[:MAX_HISTORY] if r.downtime is not None and r.rounds]
        if not done:
            return
        self.rate = done[0].rounds[0].scanned / max(done[0].rounds[0].seconds, 1e-6)
        alike = [r for r in done if (len(r.rounds) > 1) == precopy] or done
        found = [costs_of(r.downtime, r.rounds) for r in alike[:MAX_LEARNED] if r.downtime]
        self.costs = Costs(
            placement=median(costs.placement for costs in found),
            fixed=median(costs.fixed for costs in found),
            final=median(costs.final for costs in found),
        )


def costs_of(down: Downtime, rounds: Sequence[Round]) -> Costs:
    """What one migration has cost. *rounds*: all of it, the final one last."""
    placing, size = down.placement + down.read_back, rounds[-1].scanned
    live = rounds[-2].seconds if len(rounds) > 2 else 0.0
    return Costs(
        placement=size / placing if placing > 0 and size else PLACEMENT_GUESS,
        fixed=down.stop + down.checkpoint + down.build + down.engine + down.handover,
        final=min(down.delta / live, MAX_FINAL) if live > 0 else 1.0,
    )


def estimate(
    contents: int, cpu: int, sample: Sample | None, known: Known, options: Options
) -> Prediction:
    """*contents*: bytes of GPU buffers, *cpu*: of CPU memory, which waits for the freeze."""
    rate = sample.rate if sample is not None else known.rate
    ratio = sample.ratio if sample is not None else 1.0
    if options.bandwidth is not None:
        rate = min(rate, options.bandwidth / max(ratio, 1e-6))
    costs = known.costs
    if not options.precopy:
        downtime = costs.fixed + (contents + cpu) / rate + (contents + cpu) / costs.placement
        seconds, moved = SETUP + downtime, contents + cpu
    else:
        rounds, downtime = _rounds(contents, rate, sample, costs, options)
        downtime += cpu / rate + cpu / costs.placement
        seconds = SETUP + sum(r.seconds for r in rounds) + downtime
        moved = sum(r.changed for r in rounds) + rounds[-1].changed + cpu
        if len(rounds) == 1:  # the final round sends what changed in the first
            moved = contents + _changed(contents, rounds[0].seconds, sample) + cpu
    return Prediction(
        seconds=seconds,
        downtime=downtime,
        wire=int(moved * ratio),
        sampled=sample.size if sample is not None else 0,
        rate=rate,
        ratio=ratio,
        zero=sample.zero / sample.size if sample is not None else 0.0,
        dirty=sample.dirty if sample is not None else 0.0,
        interval=sample.interval if sample is not None else 0.0,
    )


def _rounds(
    contents: int, rate: float, sample: Sample | None, costs: Costs, options: Options
) -> tuple[list[Round], float]:
    """The rounds as they would be, and the downtime after them."""
    look = max(sample.look_rate, rate) if sample is not None else rate
    rounds: list[Round] = []
    changed, seconds = contents, contents / rate
    while True:
        rounds.append(_round(len(rounds) + 1, contents, changed, seconds))
        # Slowed down it would write less: nobody knows how much less.
        policy = Policy(max_downtime=options.max_downtime, max_rounds=options.max_rounds)
        if decide(rounds, costs, policy).decision is Decision.STOP_AND_COPY:
            return rounds, predict(rounds, costs)
        changed = _changed(contents, seconds, sample)
        seconds = contents / look + changed / rate


def _changed(contents: int, seconds: float, sample: Sample | None) -> int:
    """Bytes that the process writes anew within *seconds*: each chunk by the same chance."""
    if sample is None or sample.interval <= 0:
        return 0
    return int(contents * (1 - (1 - sample.dirty) ** (seconds / sample.interval)))


def _round(number: int, scanned: int, changed: int, seconds: float) -> Round:
    return Round(
        number=number,
        frozen=False,
        objects=0,
        scanned=scanned,
        changed=changed,
        zero=0,
        unchanged=scanned - changed,
        wire=0,
        seconds=seconds,
    )
