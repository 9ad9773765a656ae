"""Contestants take turns in processes of their own."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator

import pytest

from fat_train.benchmark.race import Contestant, Outcome, Stream, race
from fat_train.types import UserError


def _pieces() -> Iterator[int]:
    while True:
        time.sleep(0.001)
        yield 4


def _works() -> Stream:
    return Stream(_pieces(), {"process": os.getpid()})


def _is_not_installed() -> Stream:
    raise UserError("it is not installed")


def _dies() -> Stream:
    os._exit(7)


def _breaks_in_its_turn() -> Stream:
    def pieces() -> Iterator[int]:
        yield 1
        raise ZeroDivisionError("a fault of its own")

    return Stream(pieces(), {})


@pytest.mark.slow  # five processes that import torch
def test_each_has_its_turn_in_every_round_and_one_that_fails_does_not_end_the_others_race() -> None:
    turns: list[tuple[str, str]] = []
    entrants = {"a": _works, "b": _is_not_installed, "c": _dies, "d": _breaks_in_its_turn, "e": _works}
    a, b, c, d, e = race(
        [Contestant(name, opened) for name, opened in entrants.items()],
        rounds=2,
        seconds=0.02,
        discard=2,
        on_turn=lambda *turn: turns.append(turn),
    )
    assert len(a.rates) == len(e.rates) == 2
    assert all(0 < rate < 4000 for rate in a.rates + e.rates)
    assert len({a.facts["process"], e.facts["process"], os.getpid()}) == 3
    assert (b.why_not, c.why_not) == ("it is not installed", "its process ended with status 7")
    assert "ZeroDivisionError" in d.why_not
    assert math.isnan(b.rate)
    rounds = [(name, doing) for name, doing in turns if doing.startswith("round")]
    assert rounds == [(name, f"round {n} of 2") for n in (1, 2) for name in ("a", "e")]


def test_a_ratio_is_the_median_of_the_rounds_own_ratios() -> None:
    ours, theirs = Outcome("ours", [30.0, 10.0, 90.0]), Outcome("theirs", [10.0, 10.0, 50.0])
    assert ours.ratio_to(theirs) == pytest.approx(1.8)  # of 3, 1 and 1.8: a round that was slow for both tells nothing
    assert math.isnan(ours.ratio_to(Outcome("gone", [10.0], why_not="it died")))
