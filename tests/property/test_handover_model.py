"""Every interleaving of the handover in a small world, and proof that the search has teeth."""

from collections.abc import Sequence

import pytest
from _pytest.mark.structures import ParameterSet

from migrate.orchestrator.handover import DestinationHandover
from scenarios.simulate.model.mutations import MUTATIONS, OF_HOLD, planted
from scenarios.simulate.model.search import Bound, Search

# Found where nothing is lost for good; the others need a lost host, journal or copy.
QUICK = (
    "thaw_on_timeout_after_granted",
    "stale_answer",
    "grant_before_granted",
    "restart_aborts_granted",
    "stale_token",
    "resume_before_owned",
    "reply_before_owned",
    "forget_refused_on_restart",
    "skip_fsync",
    "undo_without_record",
    "watchdog_ignores_granted",
    "no_retry",
)


def short(names: Sequence[str]) -> list[ParameterSet]:
    """The first three in every run, all of them in the long one."""
    return [pytest.param(name, marks=[pytest.mark.soak] * (n > 2)) for n, name in enumerate(names)]


def test_no_interleaving_breaks_an_invariant_and_an_end_can_always_be_reached() -> None:
    found = Search(Bound(broken=0)).run()
    assert found.violation == ""
    assert found.states > 20_000


@pytest.mark.parametrize("name", short(QUICK))
def test_a_planted_bug_is_found(name: str) -> None:
    with planted(name):
        found = Search(Bound(broken=0)).run()
    assert found.violation
    assert len(found.story) > 5


def test_with_a_kept_source_no_interleaving_breaks_an_invariant() -> None:
    found = Search(Bound(broken=0, hold=True)).run()
    assert found.violation == ""
    assert found.states > 50_000


@pytest.mark.parametrize("name", short(sorted(OF_HOLD)))
def test_a_planted_bug_of_the_kept_source_is_found(name: str) -> None:
    with planted(name):
        assert Search(Bound(broken=0, hold=True)).run().violation


def test_a_planted_bug_is_gone_afterwards() -> None:
    before = DestinationHandover.on
    with planted("stale_token"):
        assert DestinationHandover.on is not before
    assert DestinationHandover.on is before


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_no_interleaving_breaks_an_invariant_when_something_is_lost_for_good() -> None:
    found = Search(Bound(broken=1)).run()
    assert found.violation == ""
    assert found.states > 1_000_000


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", sorted(set(MUTATIONS) - set(QUICK) - set(OF_HOLD)))
def test_a_planted_bug_is_found_when_something_is_lost_for_good(name: str) -> None:
    with planted(name):
        assert Search(Bound(broken=1)).run().violation
