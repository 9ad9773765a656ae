"""Our draws against those of timm's own objects, and that the comparison would notice another policy."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from fat_train.augment.policy import AugmentConfig, Op
from fat_train.report.distribution import FALSE_ALARMS, compare, failures, threshold
from fat_train.report.drawn import Drawn, our_draws, timm_draws

PX, IMAGES = 224, 20_000
DEIT = AugmentConfig()


@pytest.fixture(scope="module")
def of_timm() -> Drawn:
    return timm_draws(DEIT, PX, IMAGES)


def test_the_papers_recipe_is_drawn_as_timm_draws_it(of_timm: Drawn) -> None:
    comparisons = compare(our_draws(DEIT, PX, IMAGES), of_timm, DEIT, PX)
    assert failures(comparisons) == []
    assert threshold(comparisons) == FALSE_ALARMS / len(comparisons)
    names = " ".join(comparison.name for comparison in comparisons)
    constant = {Op.AUTO_CONTRAST, Op.EQUALIZE, Op.INVERT}
    drawn = set(of_timm.op[of_timm.op >= 0].tolist())
    assert all(f"argument of {Op(op).name.lower().replace('_', ' ')}" in names for op in drawn - constant)


@pytest.mark.parametrize(
    "config",
    [
        AugmentConfig(auto_augment="rand-m6-n3-mstd1-p0.7", erase_prob=0.6, erase_count=3),
        AugmentConfig(auto_augment="rand-m10-mstd101-inc1", hflip_prob=0.0, crop_scale=[0.5, 0.9]),
        AugmentConfig(auto_augment=None, erase_prob=0.0, crop_ratio=[0.4, 0.7]),
        AugmentConfig(auto_augment="3a-mstd1.5", color_jitter=0.3, erase_area=[0.1, 0.5], erase_ratio=0.6),
        AugmentConfig(auto_augment=None, color_jitter=0.4, interpolation="random"),
        AugmentConfig(color_jitter=0.4),
    ],
    ids=["plain", "uniform", "bare", "three_augment", "jitter", "idle_jitter"],
)
def test_so_is_any_other(config: AugmentConfig) -> None:
    ours, timm = (draws(config, 64, IMAGES // 2) for draws in (our_draws, timm_draws))
    assert failures(compare(ours, timm, config, 64)) == []


@pytest.mark.parametrize(
    ("wrong", "noticed"),
    [
        ({"auto_augment": "rand-m8-mstd0.5-inc1"}, "argument of rotate"),
        ({"auto_augment": "rand-m9-mstd1-inc1"}, "argument of shear x"),
        ({"auto_augment": "rand-m9-mstd0.5"}, "argument of solarize"),
        ({"auto_augment": "rand-m9-mstd0.5-inc1-p0.55"}, "operations carried out"),
        ({"crop_scale": [0.1, 1.0]}, "crop of 500×375: area"),
        ({"crop_ratio": [0.7, 4 / 3]}, "crop of 500×375: width/height"),
        ({"hflip_prob": 0.53}, "flips"),
        ({"erase_prob": 0.3}, "rectangles erased"),
    ],
)
def test_a_policy_that_is_a_little_off_fails(wrong: dict[str, object], noticed: str, of_timm: Drawn) -> None:
    assert noticed in failures(compare(our_draws(replace(DEIT, **wrong), PX, IMAGES), of_timm, DEIT, PX))


def test_wrong_draws_that_no_setting_makes_fail_too(of_timm: Drawn) -> None:
    ours = our_draws(DEIT, PX, IMAGES)
    one_sided = np.where(ours.op == Op.SHEAR_X, np.abs(ours.arg), ours.arg)
    never_twice = np.where(ours.op[:, :1] == ours.op[:, 1:], (ours.op + 1) % len(Op), ours.op)
    never_twice[:, 0] = ours.op[:, 0]
    corner = np.where(np.arange(4) < 1, 0, ours.erase)
    for change, noticed in (
        ({"arg": one_sided}, "to which side"),
        ({"op": never_twice}, "which after which"),
        ({"op": np.where(ours.op == Op.INVERT, Op.EQUALIZE, ours.op)}, "which operation"),
        ({"erase": corner}, "erased: from the top"),
    ):
        assert noticed in failures(compare(replace(ours, **change), of_timm, DEIT, PX))


def test_nothing_drawn_against_something_fails(of_timm: Drawn) -> None:
    nothing = our_draws(AugmentConfig(auto_augment=None, erase_prob=0.0), PX, 2000)
    failed = failures(compare(nothing, of_timm, DEIT, PX))
    assert {"which operation", "argument of color", "rectangles erased", "erased: area"} <= set(failed)


def test_asking_timm_leaves_the_global_generators_as_they_were() -> None:
    def state() -> tuple[object, ...]:
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    before = state()
    first, again, other = (timm_draws(DEIT, PX, 50, seed) for seed in (3, 3, 4))
    assert state() == before
    assert all(np.array_equal(getattr(first, name), getattr(again, name)) for name in vars(first))
    assert not np.array_equal(first.crop, other.crop)
