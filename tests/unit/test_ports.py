"""Ports that are chosen now and listened at later."""

from __future__ import annotations

import socket

from scenarios.ports import LOOPBACK, STRETCH, Stretch


def test_no_two_have_the_same_stretch_and_none_gives_a_port_twice_in_a_row() -> None:
    made = [Stretch() for _ in range(30)]
    try:
        assert len({one.first for one in made}) == len(made)
        given = [made[0].take() for _ in range(STRETCH // 2)]
        assert len(set(given)) == len(given)
        assert all(0 < port - made[0].first < STRETCH for port in given)
    finally:
        for one in made:
            one.close()


def test_a_port_that_somebody_listens_at_is_left_out() -> None:
    made = Stretch()
    try:
        with socket.create_server((LOOPBACK, made.first + 1)):
            assert made.take() == made.first + 2
    finally:
        made.close()
