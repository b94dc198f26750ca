"""The simulation itself: a seed is a run, planted bugs are found, what is real is real."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrate import faults
from migrate.journal import Journal
from scenarios.simulate.disk import Disk
from scenarios.simulate.scheduler import Crashed, Life, Scheduler, SimulatedEvent, SimulatedLock
from scenarios.simulate.schedules import Runner, run_all


@pytest.fixture
def runner() -> Iterator[Runner]:
    made = Runner()
    yield made
    made.close()


def test_a_seed_is_one_run_whatever_ran_before(runner: Runner) -> None:
    first = {seed: runner.run(seed).story for seed in range(40, 60)}
    for seed in reversed(first):
        assert runner.run(seed).story == first[seed]


def test_some_schedules_move_the_process_and_some_do_not(runner: Runner) -> None:
    outcomes = [runner.run(seed) for seed in range(100)]
    assert not [o.why for o in outcomes if o.bad]
    assert 10 < sum(o.moved for o in outcomes) < 90
    assert len({kind for o in outcomes for kind in o.faults}) > 15


def test_fault_points_are_those_of_the_process_again(runner: Runner) -> None:
    runner.run(1)
    runner.close()
    faults.arm("source.round=fail")
    with pytest.raises(faults.InjectedFault):
        faults.point("source.round")


def test_a_planted_bug_is_found_and_told() -> None:
    totals = run_all(500, 1, mutation="hook_unpause_in_hold", workers=1, stop_at_first=True)
    assert totals.double
    assert "ONE-RUNS" in totals.bad[0].why
    assert any("GRANTED" in line for line in totals.bad[0].story)


# ------------------------------------------------------------ the scheduler


def test_threads_go_in_the_order_of_simulated_time() -> None:
    scheduler, seen = Scheduler(), list[str]()

    def work(name: str, pause: float) -> None:
        for _ in range(3):
            scheduler.sleep(pause)
            seen.append(f"{name}{scheduler.now:g}")

    scheduler.start("a", None, lambda: work("a", 1.0))
    scheduler.start("b", None, lambda: work("b", 1.25))
    scheduler.sleep(100)
    assert seen == ["a1", "b1.25", "a2", "b2.5", "a3", "b3.75"]


def test_a_killed_life_has_no_more_effect_and_its_threads_end() -> None:
    scheduler, life, seen = Scheduler(), Life("agent"), list[str]()

    def work() -> None:
        try:
            scheduler.sleep(10)
        except Crashed:
            seen.append("unwound")
            with pytest.raises(Crashed):
                scheduler.check()
            raise
        seen.append("never")

    task = scheduler.start("x", life, work)
    scheduler.sleep(1)
    scheduler.kill(life)
    scheduler.sleep(1)
    assert seen == ["unwound"]
    assert not task.is_alive()


def test_locks_and_events_wait_in_simulated_time() -> None:
    scheduler, seen = Scheduler(), list[str]()
    lock, event = SimulatedLock(scheduler), SimulatedEvent(scheduler)

    def first() -> None:
        with lock, lock:
            scheduler.sleep(5)
            seen.append("first")
        event.set()

    def second() -> None:
        with lock:
            seen.append("second")

    def third() -> None:
        assert not event.wait(1.0)
        assert event.wait(100.0)
        seen.append(f"third at {scheduler.now:g}")

    for name, work in (("1", first), ("2", second), ("3", third)):
        scheduler.start(name, None, work)
    scheduler.sleep(50)
    assert seen[0] == "first"
    assert sorted(seen[1:]) == ["second", "third at 5"]


# ------------------------------------------------------------ the disk under a real journal


def write(disk: Disk, count: int) -> Journal:
    journal = Journal(disk.path)
    for number in range(count):
        disk.before_last = disk.size()
        journal.append("m", "n", number)
        disk.ends.append(disk.size())
    return journal


def read(disk: Disk) -> list[int]:
    journal = Journal(disk.path)
    found = [record.decode(int) for record in journal.history("m")]
    journal.close()
    return found


def test_a_killed_agent_keeps_every_record(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    journal = write(disk, 5)
    disk.crash(journal.close)
    assert read(disk) == [0, 1, 2, 3, 4]


def test_a_torn_record_is_not_there_and_those_before_are(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    journal = write(disk, 5)
    disk.crash(journal.close, keep=disk.torn())
    assert read(disk) == [0, 1, 2, 3]


def test_a_power_loss_keeps_what_was_synced_and_maybe_more(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    journal = write(disk, 5)
    disk.synced = disk.ends[1]
    kept = {disk.kept(random.Random(seed)) for seed in range(50)}
    assert kept == set(disk.ends[1:])
    disk.crash(journal.close, keep=disk.synced)
    assert read(disk) == [0, 1]


def test_a_lost_journal_is_another_one(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    journal = write(disk, 1)
    store = journal.store_id
    journal.close()
    disk.lose()
    again = Journal(disk.path)
    assert again.store_id != store
    assert again.migrations() == []
    again.close()
