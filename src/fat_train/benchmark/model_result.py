"""What came of one network in one mode, as numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fat_train.benchmark.model import ModelJob
from fat_train.benchmark.model_cost import DeviceRates
from fat_train.benchmark.race import Outcome

NOISE = 0.03
"""An exponent that is nearer to 1 than this is called linear."""
LEAST_POINTS = 3


@dataclass(frozen=True)
class Result:
    """A contestant's outcome, and that of the one in the same heat by which it is divided."""

    job: ModelJob
    outcome: Outcome
    reference: Outcome | None
    top1: float | None
    """Published, percent, for images of `job.image_px`."""

    @property
    def who(self) -> str:
        """The network, and which form of it where there are several."""
        return self.job.name if self.job.contestant == "peer" else f"{self.job.name} {self.job.contestant}"

    @property
    def finished(self) -> bool:
        """Whether there are numbers."""
        return not self.outcome.why_not

    @property
    def batch_size(self) -> int:
        """Images of a step: those that were asked for, or as many as memory had room for."""
        return int(self.outcome.facts.get("batch_size", self.job.batch_size))

    @property
    def step_ms(self) -> float:
        """Milliseconds of a step, by the median rate."""
        return 1000 * self.batch_size / self.outcome.rate

    @property
    def gmacs_per_s(self) -> float:
        """Billions of multiply-adds a second; in training those of the backward pass too."""
        return float(self.outcome.facts["flops_per_step"]) / 2e6 / self.step_ms if self.finished else math.nan

    @property
    def base(self) -> str:
        """Whose rate it is that the ratio divides by, in words; nothing where there is none."""
        name = "" if self.reference is None else self.reference.name
        return "the plain reference" if name.endswith(" reference") else name

    @property
    def ratio(self) -> float:
        """Rate over the reference's, the median of the rounds' own ratios."""
        return math.nan if self.reference is None else self.outcome.ratio_to(self.reference)

    @property
    def ratio_span(self) -> tuple[float, float]:
        """Smallest and largest of the rounds' ratios."""
        if math.isnan(self.ratio) or self.reference is None:
            return math.nan, math.nan
        ratios = np.array(self.outcome.rates) / np.array(self.reference.rates)
        return float(ratios.min()), float(ratios.max())

    def share(self, device: DeviceRates) -> float:
        """Of the shortest time that the device allows for a step, in the time that it took."""
        if not self.finished:
            return math.nan
        facts = self.outcome.facts
        return 1000 * device.floor_s(facts["flops_per_step"], facts["bytes_per_step"]) / self.step_ms

    def as_dict(self, device: DeviceRates) -> dict[str, Any]:
        """For JSON; what is not a number is null."""
        numbers = {
            "samples_per_s": self.outcome.rate,
            "ratio_to_reference": self.ratio,
            "gmacs_per_s": self.gmacs_per_s,
            "step_ms": self.step_ms if self.finished else math.nan,
            "share_of_roofline": self.share(device),
        }
        return {
            "model": self.job.name,
            "contestant": self.job.contestant,
            "mode": self.job.mode,
            "published_top1": self.top1,
            "reference": self.base,
            **{name: None if math.isnan(value) else value for name, value in numbers.items()},
            **self.outcome.facts,
            "rates": self.outcome.rates,
            "why_not": self.outcome.why_not,
        }


@dataclass(frozen=True)
class Growth:
    """How a contestant's cost grows along one axis."""

    axis: str
    """batch, pixels or blocks."""
    contestant: str
    sizes: list[float]
    step_ms: list[float]
    """Of the smallest to the largest size."""
    exponent: float
    """Of a power law through the sizes, the median over the rounds; not a number of fewer than three sizes."""
    span: tuple[float, float]
    """Smallest and largest exponent of a round."""

    @property
    def verdict(self) -> str:
        """Linear or not."""
        low, high = self.span
        if low <= 1 <= high or abs(self.exponent - 1) < NOISE:
            return "linear"
        return "better than linear" if self.exponent < 1 else "worse than linear"

    def line(self) -> str:
        """As a sentence."""
        if math.isnan(self.exponent):
            return f"{self.contestant}: too few sizes of {self.axis} to tell how the cost grows"
        return (
            f"{self.contestant}: the time of a step grows as {self.axis}^{self.exponent:.2f} "
            f"({self.span[0]:.2f} to {self.span[1]:.2f} in single rounds): {self.verdict}"
        )


def growths_of(axis: str, results: Sequence[Result]) -> list[Growth]:
    """One a contestant; sizes at which it did not finish, or whose batch had to be halved, are left out.

    Args:
        axis: what was grown: batch, pixels or blocks.
        results: of all sizes.
    """
    found = []
    for name in dict.fromkeys(result.job.contestant for result in results):
        own = [
            result
            for result in results
            if result.job.contestant == name and result.finished and result.batch_size == result.job.batch_size
        ]
        own.sort(key=lambda result: size_of(axis, result.job))
        sizes = [size_of(axis, result.job) for result in own]
        exponents = np.array([math.nan])
        if len(set(sizes)) >= LEAST_POINTS:
            # [rounds, sizes]: each round is fitted by itself, as what slows one down slows all of its sizes down
            steps = np.array([result.batch_size / np.array(result.outcome.rates) for result in own]).T
            exponents = np.array([np.polyfit(np.log(sizes), np.log(row), 1)[0] for row in steps])
        found.append(
            Growth(
                axis,
                name,
                sizes,
                [result.step_ms for result in own],
                float(np.median(exponents)),
                (float(exponents.min()), float(exponents.max())),
            )
        )
    return found


def size_of(axis: str, job: ModelJob) -> float:
    """Images of a batch, pixels of an image, or blocks of the network."""
    if axis == "batch":
        return job.batch_size
    if axis == "pixels":
        return job.image_px**2
    assert job.config is not None
    return sum(job.config.depths)
