"""Parts of a placement that several threads share."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Iterator

import pytest

from migrate.dataplane.staging import WORTH_SHARING, in_parallel

CORES = len(os.sched_getaffinity(0))


def test_each_part_is_done_once() -> None:
    done: list[int] = []
    in_parallel(range(1000), done.extend, WORTH_SHARING)
    assert sorted(done) == list(range(1000))


@pytest.mark.skipif(CORES < 2, reason="one core: nobody to share with")
def test_what_is_worth_it_is_shared() -> None:
    both = threading.Barrier(2)

    def meet(parts: Iterator[int]) -> None:
        next(parts)
        both.wait(30)

    in_parallel(range(2), meet, WORTH_SHARING)


def test_little_is_done_here() -> None:
    here: list[threading.Thread] = []
    in_parallel(range(2), lambda _parts: here.append(threading.current_thread()), WORTH_SHARING - 1)
    assert here == [threading.current_thread()]


def test_nothing_is_begun_after_an_error() -> None:
    begun: list[int] = []

    def fail(parts: Iterator[int]) -> None:
        for part in parts:
            begun.append(part)
            if part == 5:
                raise ValueError("the fifth")

    with pytest.raises(ValueError, match="fifth"):
        in_parallel(itertools.count(), fail, WORTH_SHARING)
    assert 5 in begun
