"""Contestants that take turns, each in a fresh process of its own, so that a noisy machine hurts all of them alike."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

import numpy as np

from fat_train.types import UserError

PATIENCE_S = 10.0
"""How long a process may take to end by itself."""


class Stream(NamedTuple):
    """What a contestant does, piece by piece and without end."""

    work: Iterator[int]
    """Each step does one piece and says how many images that was."""
    facts: dict[str, Any]
    """What it works on, for the record and for a proof that all work on the same."""
    rest: Callable[[], object] = lambda: None
    """Called at the end of each turn, outside the clock: what it holds beyond its need goes back for the others."""


@dataclass(frozen=True)
class Contestant:
    """A name and a way to open its `Stream`."""

    name: str
    open: Callable[[], Stream]
    """Called in the contestant's process; it must pickle. What it raises is why the contestant does not take part."""
    instead: Callable[[str], Contestant | None] = lambda why: None  # noqa: ARG005
    """Who starts in its place, in a fresh process, where `open` failed for a reason; None for nobody."""


@dataclass
class Outcome:
    """What came of one contestant."""

    name: str
    rates: list[float] = field(default_factory=list)
    """Images per second of each round."""
    facts: dict[str, Any] = field(default_factory=dict)
    why_not: str = ""
    """Why it did not take part, or gave up."""

    @property
    def rate(self) -> float:
        """Median over the rounds; not a number where it did not finish."""
        return float(np.median(self.rates)) if self.rates and not self.why_not else float("nan")

    def ratio_to(self, other: Outcome) -> float:
        """Median over the rounds of this one's rate by the other's; not a number where either did not finish."""
        if self.why_not or other.why_not or not self.rates:
            return float("nan")
        return float(np.median(np.array(self.rates) / np.array(other.rates)))


class _Refusal(NamedTuple):
    why: str


def race(
    contestants: Sequence[Contestant],
    *,
    rounds: int,
    seconds: float,
    discard: int,
    on_turn: Callable[[str, str], None],
) -> list[Outcome]:
    """Time every contestant once a round, one after another, the others waiting.

    Args:
        contestants: who takes part; all start before the first round.
        rounds: turns of each; one more, the first, is not counted.
        seconds: that a turn is timed.
        discard: pieces of work before the clock starts: as many as can have been done ahead while others had theirs.
        on_turn: told the contestant's name and what it is about to do.
    """
    outcomes = [Outcome(contestant.name) for contestant in contestants]
    with ExitStack() as stack:
        runners = []
        for contestant, outcome in zip(contestants, outcomes, strict=True):
            on_turn(outcome.name, "starts")
            runner, answer = _start(contestant)
            runners.append(stack.enter_context(runner))
            if isinstance(answer, _Refusal):
                outcome.why_not = answer.why
            else:
                outcome.facts = answer
        for number in range(rounds + 1):
            for runner, outcome in zip(runners, outcomes, strict=True):
                if outcome.why_not:
                    continue
                on_turn(outcome.name, f"round {number} of {rounds}" if number else "warms up")
                answer = runner.turn(seconds if number else 0.0, discard)
                if isinstance(answer, _Refusal):
                    outcome.why_not = answer.why
                elif number:
                    outcome.rates.append(answer)
    return outcomes


def _start(contestant: Contestant) -> tuple[_Runner, Any]:
    while True:
        runner = _Runner(contestant)
        answer = runner.answer()
        other = contestant.instead(answer.why) if isinstance(answer, _Refusal) else None
        if other is None:
            return runner, answer
        runner.close()
        contestant = other


class _Runner:
    """A contestant's process, started with `spawn`: a fork of one that has DALI's or CUDA's threads may hang."""

    def __init__(self, contestant: Contestant) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(target=_serve, args=(theirs, contestant.open))
        self.process.start()
        theirs.close()

    def __enter__(self) -> _Runner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        self.connection.close()  # which ends a process that is waiting for its turn
        self.process.join(PATIENCE_S)
        if self.process.is_alive():
            self.process.terminate()
            self.process.join()

    def turn(self, seconds: float, discard: int) -> Any:
        """Images per second, or a refusal."""
        self.connection.send((seconds, discard))
        return self.answer()

    def answer(self) -> Any:
        """What the process sends next; a refusal if it ends without a word."""
        try:
            if self.connection in wait([self.connection, self.process.sentinel]):
                return self.connection.recv()
        except (EOFError, ConnectionError):
            pass
        self.process.join()
        return _Refusal(f"its process ended with status {self.process.exitcode}")


def _serve(connection: Connection, open_stream: Callable[[], Stream]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one who started us, and who ends us
    multiprocessing.set_start_method(None, force=True)  # `spawn` made itself the default here, also for data workers
    try:
        stream = open_stream()
        connection.send(stream.facts)
        while True:
            rate = _measure(stream.work, *connection.recv())
            stream.rest()
            connection.send(rate)
    except (EOFError, BrokenPipeError):
        pass  # the race is over
    except (UserError, ImportError) as error:
        connection.send(_Refusal(str(error)))
    except Exception as error:  # a fault of another's library must not end the others' race
        connection.send(_Refusal(f"{type(error).__name__}: {str(error).strip().splitlines()[-1:]}"))


def _measure(work: Iterator[int], seconds: float, discard: int) -> float:
    for _ in range(discard):
        next(work)
    images, started, elapsed = 0, time.perf_counter(), 0.0
    while not images or elapsed < seconds:
        images += next(work)
        elapsed = time.perf_counter() - started
    return images / elapsed
