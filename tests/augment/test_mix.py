"""Mixup and CutMix draw from timm's distribution and mix exactly what they say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp
from timm.data import Mixup

from fat_train.augment.mix import MixDraw, draw_mix, mix

RECIPE = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "prob": 1.0, "switch_prob": 0.5}


def test_label_weights_follow_timms_distribution() -> None:
    size, draws = 32, 2000
    rng = np.random.default_rng(0)
    ours = [draw_mix(rng, size, size, **RECIPE).weight for _ in range(draws)]
    np.random.seed(0)
    reference = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, prob=1.0, switch_prob=0.5, num_classes=2, label_smoothing=0.0)
    targets = torch.tensor([0, 1])
    theirs = [float(reference(torch.zeros(2, 1, size, size), targets)[1][0, 0]) for _ in range(draws)]
    assert ks_2samp(ours, theirs).pvalue > 0.01


def test_half_of_the_batches_are_cut_and_half_are_blended() -> None:
    rng = np.random.default_rng(1)
    drawn = [draw_mix(rng, 224, 224, **RECIPE) for _ in range(2000)]
    assert sum(one.box is not None for one in drawn) == pytest.approx(1000, abs=100)


def test_weight_of_cutmix_is_the_share_of_pixels_that_stay() -> None:
    rng = np.random.default_rng(2)
    for _ in range(50):
        drawn = draw_mix(rng, 20, 30, mixup_alpha=0.0, cutmix_alpha=1.0, prob=1.0, switch_prob=0.5)
        images = torch.stack([torch.zeros(1, 20, 30), torch.ones(1, 20, 30)])
        mixed, _ = mix(images, torch.tensor([0, 1]), drawn)
        assert 1 - mixed[0].mean().item() == pytest.approx(drawn.weight, abs=1e-6)


def test_mixup_blends_a_picture_with_its_mirror_in_the_batch() -> None:
    images, targets = torch.randn(4, 3, 8, 8), torch.arange(4)
    mixed, labels = mix(images, targets, MixDraw(weight=0.3))
    torch.testing.assert_close(mixed[1], 0.3 * images[1] + 0.7 * images[2])
    assert labels.second.tolist() == [3, 2, 1, 0]
    assert labels.weight == 0.3


def test_odd_batches_mix() -> None:
    images = torch.randn(3, 3, 8, 8)
    mixed, _ = mix(images, torch.arange(3), MixDraw(weight=0.25))
    torch.testing.assert_close(mixed[1], images[1])
    torch.testing.assert_close(mixed[0], 0.25 * images[0] + 0.75 * images[2])


@pytest.mark.parametrize("off", [{"prob": 0.0}, {"mixup_alpha": 0.0, "cutmix_alpha": 0.0}])
def test_without_mixing_a_batch_passes_untouched(off: dict) -> None:
    drawn = draw_mix(np.random.default_rng(0), 8, 8, **{**RECIPE, **off})
    images = torch.randn(2, 3, 8, 8)
    mixed, labels = mix(images, torch.arange(2), drawn)
    assert mixed is images
    assert labels.weight == 1
