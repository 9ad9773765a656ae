"""Mixup (Zhang et al., 2018) and CutMix (Yun et al., 2019) by timm's rules, on the device that trains.

Picture i is mixed with picture B − 1 − i. The draws are values, made on the host: one for the batch (`MixDraw`), or a
table with a row for each picture, whose boxes become a mask on the device, so that no value is ever read back.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float32, Int, Shaped
from torch import Tensor

from fat_train.augment.device import box_mask
from fat_train.augment.policy import AugmentConfig
from fat_train.types import Labels


@dataclass(frozen=True)
class MixDraw:
    """What is done to a whole batch: nothing (`weight` 1), Mixup (no box) or CutMix (a box).

    Attributes:
        weight: share λ of a picture in its own mixture; for CutMix the share of pixels that it keeps.
        box: (top, left, bottom, right) in pixels that the partner fills.
    """

    weight: float
    box: tuple[int, int, int, int] | None = None


def draw_mix(
    config: AugmentConfig, rng: np.random.Generator, images: int, height: int, width: int
) -> MixDraw | Float32[np.ndarray, "B 5"]:
    """Draw how a batch of `images` pictures is mixed.

    Returns:
        One draw for the batch where `config.mix_mode` is batch, or where nothing is ever mixed; else a row (λ, top,
        left, bottom, right) for each picture, whose box encloses nothing where it is Mixup's or the picture stays as
        it is. In mode pair the rows of pictures i and B − 1 − i are the same.

    With probability `mix_prob` there is mixing: by CutMix with probability `mix_switch_prob` where both are on, else by
    the one that is. λ ~ Beta(α, α). CutMix's box has sides sqrt(1 − λ) of the picture's around a uniform centre and is
    clipped to the picture; with `cutmix_minmax` its sides are uniform between those bounds and it lies inside. Either
    way λ is recomputed from what the box covers.
    """
    if config.mix_prob == 0 or not (config.mixup_alpha > 0 or cutmix_is_on(config)):
        return MixDraw(weight=1.0)
    if config.mix_mode == "batch":
        return _draw_for_batch(config, rng, height, width)
    pairs = -(-images // 2)  # the middle picture of an odd batch is a pair with itself
    table = _draw_table(config, rng, pairs if config.mix_mode == "pair" else images, height, width)
    return np.concatenate([table, table[: images // 2][::-1]]) if config.mix_mode == "pair" else table


def cutmix_is_on(config: AugmentConfig) -> bool:
    """Whether some pictures get a box."""
    return config.cutmix_alpha > 0 or config.cutmix_minmax is not None


def _draw_for_batch(config: AugmentConfig, rng: np.random.Generator, height: int, width: int) -> MixDraw:
    if rng.random() >= config.mix_prob:
        return MixDraw(weight=1.0)
    if not cutmix_is_on(config) or (config.mixup_alpha > 0 and rng.random() >= config.mix_switch_prob):
        return MixDraw(weight=float(rng.beta(config.mixup_alpha, config.mixup_alpha)))
    box = _draw_boxes(config, rng, None, height, width)
    top, left, bottom, right = (int(edge) for edge in box)
    return MixDraw(weight=float(1 - _covered(box, height, width)), box=(top, left, bottom, right))


def _draw_table(
    config: AugmentConfig, rng: np.random.Generator, rows: int, height: int, width: int
) -> Float32[np.ndarray, "rows 5"]:
    mixed = rng.random(rows) < config.mix_prob
    cut = np.full(rows, cutmix_is_on(config))
    weight, boxes = np.ones(rows), np.zeros((rows, 4))
    if config.mixup_alpha > 0:
        cut &= rng.random(rows) < config.mix_switch_prob
        weight = rng.beta(config.mixup_alpha, config.mixup_alpha, size=rows)
    if cutmix_is_on(config):
        boxes = _draw_boxes(config, rng, rows, height, width) * (mixed & cut)[:, None]
    weight = np.where(mixed, np.where(cut, 1 - _covered(boxes, height, width), weight), 1.0)
    return np.concatenate([weight[:, None], boxes], axis=1).astype(np.float32)


def _draw_boxes(
    config: AugmentConfig, rng: np.random.Generator, rows: int | None, height: int, width: int
) -> Shaped[np.ndarray, "*rows 4"]:
    """(top, left, bottom, right) in whole pixels: of one box where `rows` is None, else of so many."""
    if config.cutmix_minmax is not None:
        edges = []
        for side in (height, width):
            low, high = (int(side * bound) for bound in config.cutmix_minmax)
            length = rng.integers(low, max(high, low + 1), size=rows)  # timm's upper bound is exclusive, too
            start = rng.integers(0, side - length + 1)
            edges.append((start, start + length))
    else:
        part = np.sqrt(1 - rng.beta(config.cutmix_alpha, config.cutmix_alpha, size=rows))
        edges = []
        for side in (height, width):
            half, centre = np.trunc(side * part) // 2, rng.integers(side, size=rows)
            edges.append((np.clip(centre - half, 0, side), np.clip(centre + half, 0, side)))
    (top, bottom), (left, right) = edges
    return np.stack([top, left, bottom, right], axis=-1)


def _covered(boxes: Shaped[np.ndarray, "*rows 4"], height: int, width: int) -> np.float64 | Float[np.ndarray, "*rows"]:
    """Share of the picture that a box covers."""
    top, left, bottom, right = np.moveaxis(boxes, -1, 0)
    return (bottom - top) * (right - left) / (height * width)


def mix(
    images: Float[Tensor, "B C H W"], targets: Int[Tensor, " B"], drawn: MixDraw | Float32[np.ndarray, "B 5"]
) -> tuple[Float[Tensor, "B C H W"], Labels]:
    """Mix picture i with picture B − 1 − i, as timm pairs them; any B does (the middle one of an odd batch mixes
    with itself)."""
    if not isinstance(drawn, MixDraw):
        return mix_by_table(images, targets, _to_device(drawn, images.device))
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


def mix_by_table(
    images: Float[Tensor, "B C H W"], targets: Int[Tensor, " B"], table: Float32[Tensor, "B 5"]
) -> tuple[Float[Tensor, "B C H W"], Labels]:
    """Mix each picture by its own row (λ, top, left, bottom, right), without a look at any value.

    Both ways of mixing are one blend with a weight a pixel: λ, or, where there is a box, 0 in it and 1 around it, at
    which `lerp` returns one of its ends to the bit.
    """
    weight, corners = table[:, 0], table[:, 1:]
    height, width = images.shape[2:]
    is_cut = (corners[:, 2] > corners[:, 0])[:, None, None, None]
    of_pixel = torch.where(is_cut, 1 - box_mask(corners, height, width).float(), weight[:, None, None, None])
    mixed = torch.lerp(images.flip(0), images, of_pixel.to(images.dtype))
    return mixed, Labels(first=targets, second=targets.flip(0), weight=weight)


def _to_device(table: Float32[np.ndarray, "B 5"], device: torch.device) -> Float32[Tensor, "B 5"]:
    rows = torch.from_numpy(table)
    if device.type == "cuda":
        rows = rows.pin_memory()  # from other memory the host waits for the copy
    return rows.to(device, non_blocking=True)
