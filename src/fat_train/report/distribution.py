"""Whether our draws are distributed as timm's: thousands of ours against thousands of timm's own objects'."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Int64
from rich.table import Table
from scipy import stats

from fat_train.augment.draws import CROP_ATTEMPTS, crop_box
from fat_train.augment.policy import NO_OP, AugmentConfig, Op
from fat_train.report.drawn import IMAGES_PX, Drawn

FALSE_ALARMS = 0.001
"""How often a right policy may fail: the threshold of one comparison is this over their number."""
NEUTRAL = dict.fromkeys((Op.ROTATE, Op.SHEAR_X, Op.SHEAR_Y, Op.TRANSLATE_X, Op.TRANSLATE_Y), 0.0) | dict.fromkeys(
    (Op.COLOR, Op.CONTRAST, Op.BRIGHTNESS, Op.SHARPNESS), 1.0
)
"""The argument that changes nothing, of the operations that go to either side of it."""

Pair = tuple[np.ndarray, np.ndarray]
"""Ours and timm's."""


@dataclass(frozen=True)
class Comparison:
    """One property of the draws, ours beside timm's."""

    name: str
    ours: str
    timm: str
    test: str
    statistic: float
    p_value: float


def compare(ours: Drawn, timm: Drawn, config: AugmentConfig, image_px: int) -> list[Comparison]:
    """Every property of the draws that the recipe has, ours beside timm's.

    Counts go through Pearson's chi-squared test of independence, values through the two-sample Kolmogorov-Smirnov test.
    """
    found = _compare_ops(ours, timm)
    found.append(_counts("flips", (ours.flip, timm.flip)))
    ratio = (config.crop_ratio[0], config.crop_ratio[1])
    for size, (name, (height, width)) in enumerate(IMAGES_PX.items()):
        central = crop_box(np.full((CROP_ATTEMPTS, 4), 4.0), height, width, ratio)
        boxes = ours.crop[size], timm.crop[size]
        missed = ((boxes[0] == central).all(axis=1), (boxes[1] == central).all(axis=1))
        found.append(_counts(f"crop of {name}: no attempt fits", missed))
        found += _compare_boxes(f"crop of {name}", boxes, height, width)
    number = ((ours.erase[..., 2] > 0).sum(axis=1), (timm.erase[..., 2] > 0).sum(axis=1))
    found.append(_counts("rectangles erased", number))
    erased = (ours.erase[ours.erase[..., 2] > 0], timm.erase[timm.erase[..., 2] > 0])
    found += _compare_boxes("erased", erased, image_px, image_px)
    return [comparison for comparison in found if comparison is not None]


def _compare_ops(ours: Drawn, timm: Drawn) -> list[Comparison | None]:
    def both(measure: Callable[[Drawn], np.ndarray]) -> Pair:
        return measure(ours), measure(timm)

    found = [
        _counts("operations carried out", both(lambda drawn: (drawn.op != NO_OP).sum(axis=1))),
        _counts("which operation", both(lambda drawn: drawn.op[drawn.op != NO_OP]), say=_spread),
        _counts("which after which", both(_successions), say=_spread),
        _counts("to which side", both(_sides), say=_spread),
    ]
    for op in Op:
        args = ours.arg[ours.op == op], timm.arg[timm.op == op]
        if any(arg.any() for arg in args):
            found.append(_values(f"argument of {op.name.lower().replace('_', ' ')}", args))
    return found


def _successions(drawn: Drawn) -> Int64[np.ndarray, " successions"]:
    """Each operation with the one carried out before it in the same image, as one number."""
    carried_out = [row[row != NO_OP].tolist() for row in drawn.op]
    return np.array([len(Op) * one + other for row in carried_out for one, other in pairwise(row)], np.int64)


def _sides(drawn: Drawn) -> Int64[np.ndarray, " sided"]:
    """Operation and side of its neutral argument, as one number, wherever it has two sides."""
    sides = [2 * op + (drawn.arg[drawn.op == op] > neutral) for op, neutral in NEUTRAL.items()]
    return np.concatenate(sides).astype(np.int64)


def _compare_boxes(name: str, pair: Pair, height: int, width: int) -> list[Comparison | None]:
    """Area, shape and place of boxes (top, left, height, width), as fractions of an image's."""
    measures: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "area": lambda box: box[:, 2] * box[:, 3] / (height * width),
        "width/height": lambda box: box[:, 3] / box[:, 2],
        "from the top": lambda box: box[:, 0] / height,
        "from the left": lambda box: box[:, 1] / width,
    }
    return [_values(f"{name}: {what}", (measure(pair[0]), measure(pair[1]))) for what, measure in measures.items()]


def _shares(counts: np.ndarray, values: np.ndarray) -> str:
    percent = 100 * counts / max(1, counts.sum())
    if set(values.tolist()) <= {0, 1}:
        return f"{percent[-1] if values[-1] else 0.0:.2f} %"
    return " ".join(f"{int(value)}: {share:.1f} %" for value, share in zip(values, percent, strict=True))


def _spread(counts: np.ndarray, _kinds: np.ndarray) -> str:
    percent = 100 * counts / max(1, counts.sum())
    return f"{len(counts)} kinds, {percent.min():.2f} to {percent.max():.2f} %"


def _counts(name: str, pair: Pair, *, say: Callable[[np.ndarray, np.ndarray], str] = _shares) -> Comparison | None:
    """Compare how often each value comes; None where neither has any."""
    values = np.unique(np.concatenate(pair))
    if not len(values):
        return None
    ours, timm = table = np.array([[(side == value).sum() for value in values] for side in pair])
    statistic, p_value = np.inf, 0.0
    if len(values) == 1 and ours.any() and timm.any():
        statistic, p_value = 0.0, 1.0
    elif ours.any() and timm.any():
        result = stats.chi2_contingency(table, correction=False)
        statistic, p_value = float(result.statistic), float(result.pvalue)
    return Comparison(name, say(ours, values), say(timm, values), "χ²", statistic, p_value)


def _values(name: str, pair: Pair) -> Comparison | None:
    """Compare two samples of a number; None where both are empty."""
    ours, timm = pair
    if not len(ours) and not len(timm):
        return None
    statistic, p_value = 1.0, 0.0
    if len(ours) and len(timm):
        result = stats.ks_2samp(ours, timm, method="asymp")
        statistic, p_value = float(result.statistic), float(result.pvalue)
    return Comparison(name, _centre(ours), _centre(timm), "KS", statistic, p_value)


def _centre(sample: np.ndarray) -> str:
    return f"{sample.mean():.3f} ± {sample.std():.3f}" if len(sample) else "none"


def threshold(comparisons: Sequence[Comparison]) -> float:
    """The p-value under which a comparison fails: Bonferroni's share of `FALSE_ALARMS`."""
    return FALSE_ALARMS / len(comparisons)


def failures(comparisons: Sequence[Comparison]) -> list[str]:
    """Names of the properties that differ by more than chance."""
    return [one.name for one in comparisons if one.p_value < threshold(comparisons)]


def as_dicts(comparisons: Sequence[Comparison]) -> list[dict[str, Any]]:
    """Ready for JSON."""
    failed = failures(comparisons)
    return [asdict(one) | {"holds": one.name not in failed} for one in comparisons]


def distribution_table(comparisons: Sequence[Comparison], n: int) -> Table:
    """A row a property."""
    title = f"The same distribution? {n:,} images of ours against {n:,} of timm's; p must be at least"
    table = Table(title=f"{title} {FALSE_ALARMS:g} / {len(comparisons)} = {threshold(comparisons):.1e}")
    table.title_justify = "left"
    table.add_column("")
    for name in ("ours", "timm", "test", "statistic", "p", ""):
        table.add_column(name, justify="right", no_wrap=True)
    failed = failures(comparisons)
    for one in comparisons:
        verdict = "FAILS" if one.name in failed else "holds"
        table.add_row(one.name, one.ours, one.timm, one.test, f"{one.statistic:.3g}", f"{one.p_value:.3g}", verdict)
    return table
