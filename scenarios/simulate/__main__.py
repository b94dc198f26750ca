"""python -m scenarios.simulate: evidence that a handover runs a process once, not twice, not never.

    python -m scenarios.simulate --schedules 100000 --seed 1
    python -m scenarios.simulate --schedules 5000              a fresh seed, which it prints
    python -m scenarios.simulate --replay SEED                 one schedule, step by step
    python -m scenarios.simulate --mutate NAME                 a bug is planted: is it found?
    python -m scenarios.simulate --mutate all --seed 1         every bug: the table of the docs
    python -m scenarios.simulate --exhaustive [--broken 1] [--hold]
                                                               every interleaving of the tables

Exit code 0: nothing was broken (with --mutate: every bug was found), 1 otherwise.
"""

from __future__ import annotations

import argparse
import secrets
import sys
import time

from scenarios.simulate.model import mutations as model_mutations
from scenarios.simulate.model.search import Bound, Search
from scenarios.simulate.mutations import MUTATIONS
from scenarios.simulate.schedules import Totals, run_all, runner

SCHEDULES = 5000
MUTATION_LIMIT = 100_000


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m scenarios.simulate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--schedules", type=int, help="how many (default 5000)")
    parser.add_argument("--seed", type=int, help="the first seed (default: a fresh one)")
    parser.add_argument("--workers", type=int, default=0, help="processes (default: one a core)")
    parser.add_argument("--replay", type=int, metavar="SEED", help="run one and tell its story")
    parser.add_argument("--mutate", metavar="NAME", help="plant a bug; 'all' for each; 'list'")
    parser.add_argument("--exhaustive", action="store_true", help="check the tables instead")
    parser.add_argument(
        "--hold", action="store_true", help="the exhaustive check with a kept source"
    )
    parser.add_argument(
        "--broken", type=int, default=0, help="hosts, journals, copies that are lost for good"
    )
    return parser.parse_args()


def main() -> int:
    """Entry point."""
    options = _arguments()
    if options.mutate == "list":
        print("\n".join(model_mutations.MUTATIONS if options.exhaustive else MUTATIONS))
        return 0
    if options.exhaustive:
        return _exhaustive(options)
    if options.replay is not None:
        return _replay(options.replay, options.mutate or "")
    if options.mutate:
        return _mutations(options)
    return _schedules(options)


def _schedules(options: argparse.Namespace) -> int:
    count = options.schedules or SCHEDULES
    seed = options.seed if options.seed is not None else secrets.randbelow(1 << 40)
    print(f"{count} schedules from seed {seed}", flush=True)
    began = last = time.monotonic()

    def progress(totals: Totals, seconds: float) -> None:
        nonlocal last
        if time.monotonic() - last >= 10:
            last = time.monotonic()
            print(f"  {totals.schedules} in {seconds:.0f} s, {_result(totals)}", file=sys.stderr)

    totals = run_all(count, seed, workers=options.workers, progress=progress)
    _table(totals, time.monotonic() - began)
    for outcome in totals.bad[:3]:
        print(f"\nseed {outcome.seed}: {outcome.why}")
        print("\n".join(outcome.story))
        print(f"Replay: python -m scenarios.simulate --replay {outcome.seed}")
    return 1 if totals.bad else 0


def _result(totals: Totals) -> str:
    found = f"double={totals.double} lost={totals.lost} stuck={totals.stuck}"
    return f"{found} bugs={totals.bugs}" if totals.bugs else found


def _table(totals: Totals, seconds: float) -> None:
    rate = totals.schedules / max(seconds, 1e-6)
    print(f"\n{'fault':<36}{'injected':>10}")
    for kind, count in sorted(totals.faults.items()):
        print(f"{kind:<36}{count:>10}")
    print(f"{'all':<36}{sum(totals.faults.values()):>10}")
    print(
        f"\n{totals.schedules} schedules in {seconds:.0f} s ({rate:.0f} a second),"
        f" {totals.simulated / 3600:.0f} hours simulated, {totals.points} points at which"
        f" something could go wrong\n"
        f"the process moved in {totals.moved}, an operator had to decide in {totals.operator}\n"
        f"{_result(totals)}"
    )


def _replay(seed: int, mutation: str) -> int:
    with runner(mutation) as one:
        outcome = one.run(seed)
    print("\n".join(outcome.story))
    print(outcome.why or "nothing was broken")
    return 1 if outcome.bad else 0


def _mutations(options: argparse.Namespace) -> int:
    names = list(MUTATIONS) if options.mutate == "all" else [options.mutate]
    limit = options.schedules or MUTATION_LIMIT
    seed = options.seed if options.seed is not None else 1
    missed = 0
    print("| bug | what it is | schedules | found by |\n|---|---|---:|---|")
    for name in names:
        totals = run_all(limit, seed, mutation=name, workers=options.workers, stop_at_first=True)
        found = totals.bad[0].why if totals.bad else "NOT FOUND"
        missed += not totals.bad
        what = (MUTATIONS[name].__doc__ or "").strip().rstrip(".")
        print(f"| `{name}` | {what} | {totals.schedules:,} | {found} |", flush=True)
        if totals.bad and len(names) == 1:
            print("\n".join(totals.bad[0].story))
    return 1 if missed else 0


def _exhaustive(options: argparse.Namespace) -> int:
    names = [options.mutate or ""]
    if options.mutate == "all":
        names = list(model_mutations.MUTATIONS)
    wrong = 0
    for name in names:
        bound = Bound(broken=options.broken, hold=options.hold or name in model_mutations.OF_HOLD)
        wrong += _search(name, bound)
    return 1 if wrong else 0


def _search(mutation: str, bound: Bound) -> bool:
    """Whether the result is not the one that is wanted."""
    began = time.monotonic()
    with model_mutations.planted(mutation):
        found = Search(bound).run()
    print(
        f"{mutation or 'as it is'}: {found.states} states, {found.transitions} transitions,"
        f" {time.monotonic() - began:.0f} s, at most {bound.broken} lost for good"
        f"{', with a kept source' if bound.hold else ''}:"
        f" {found.violation or 'no invariant is broken, an end can always be reached'}",
        flush=True,
    )
    if not mutation:
        print("\n".join(f"  {line}" for line in found.story))
    return bool(found.violation) != bool(mutation)


if __name__ == "__main__":
    sys.exit(main())
