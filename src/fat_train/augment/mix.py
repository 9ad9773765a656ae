"""Mixup (Zhang et al., 2018) and CutMix (Yun et al., 2019), one draw a batch, on the device that trains."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from fat_train.types import Labels


@dataclass(frozen=True)
class MixDraw:
    """What is done to one batch: nothing (`weight` 1), Mixup (no box) or CutMix (a box).

    Attributes:
        weight: share λ of a picture in its own mixture; for CutMix the share of pixels that it keeps.
        box: (top, left, bottom, right) in pixels that the partner fills.
    """

    weight: float
    box: tuple[int, int, int, int] | None = None


def draw_mix(
    rng: np.random.Generator,
    height: int,
    width: int,
    *,
    mixup_alpha: float,
    cutmix_alpha: float,
    prob: float,
    switch_prob: float,
) -> MixDraw:
    """One batch's mixing by timm's rules.

    With probability `prob` the batch is mixed: by CutMix with probability `switch_prob` where both alphas are
    positive, else by the one whose alpha is. λ ~ Beta(α, α). CutMix's box has sides sqrt(1 − λ) of the picture's around
    a uniform centre, is clipped to the picture, and λ is recomputed from what is left of it.
    """
    if rng.random() >= prob or (mixup_alpha <= 0 and cutmix_alpha <= 0):
        return MixDraw(weight=1.0)
    use_cutmix = cutmix_alpha > 0 and (mixup_alpha <= 0 or rng.random() < switch_prob)
    if not use_cutmix:
        return MixDraw(weight=float(rng.beta(mixup_alpha, mixup_alpha)))
    side = float(np.sqrt(1 - rng.beta(cutmix_alpha, cutmix_alpha)))
    tall, wide = int(height * side), int(width * side)
    y, x = int(rng.integers(height)), int(rng.integers(width))
    top, bottom = (int(np.clip(edge, 0, height)) for edge in (y - tall // 2, y + tall // 2))
    left, right = (int(np.clip(edge, 0, width)) for edge in (x - wide // 2, x + wide // 2))
    covered = (bottom - top) * (right - left) / (height * width)
    return MixDraw(weight=1 - covered, box=(top, left, bottom, right))


def mix(
    images: Float[Tensor, "B C H W"], targets: Int[Tensor, " B"], drawn: MixDraw
) -> tuple[Float[Tensor, "B C H W"], Labels]:
    """Mix picture i with picture B − 1 − i, as timm pairs them; any B does (the middle one of an odd batch mixes
    with itself)."""
    labels = Labels(first=targets, second=targets.flip(0), weight=drawn.weight)
    if drawn.weight >= 1:
        return images, labels
    partner = images.flip(0)
    if drawn.box is None:
        return torch.lerp(partner, images, drawn.weight), labels
    top, left, bottom, right = drawn.box
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = partner[:, :, top:bottom, left:right]
    return mixed, labels
