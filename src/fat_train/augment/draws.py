"""What is drawn for a batch, as values, before anything touches a pixel.

`draw` turns an `AugmentConfig` and a random generator into a table of `Draws`, one row an image. The back ends
(`fat_train.data.dali`, `fat_train.data.torch_folder`) only carry a row out, so the same row gives the same picture
in either, and a run resumes exactly by drawing the same table again. The distribution is timm's: of
`timm.data.auto_augment.rand_augment_transform`, of its `RandomResizedCropAndInterpolation` and of its `RandomErasing`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import numpy as np
from jaxtyping import Bool, Float64, Int64

from fat_train.augment.policy import (
    INTERPOLATIONS,
    JITTERED,
    MAX_LEVEL,
    NO_OP,
    RAND_AUGMENT_OPS,
    RANDOM_INTERPOLATION,
    AugmentConfig,
    Op,
    RandAugment,
    ThreeAugment,
)

CROP_ATTEMPTS = 10
ERASE_ATTEMPTS = 10
THREE_AUGMENT_LEVELS = (5, 10, 10)
BLUR_SIGMA = (0.1, 2.0)


@dataclass(frozen=True)
class Draws:
    """Every random decision for B images, as values."""

    crop: Float64[np.ndarray, "B 10 4"]
    """Attempts at a crop: area fraction, width/height, and the place in x and in y as a fraction of the free way."""
    flip: Bool[np.ndarray, " B"]
    op: Int64[np.ndarray, "B n"]
    """The operations to carry out one after another, as `Op`; `NO_OP` where the coin said no."""
    arg: Float64[np.ndarray, "B n"]
    """The argument of each operation in its own unit, see `Op`."""
    kernel: Int64[np.ndarray, "B n+1"]
    """What the resize of the crop, and then each operation that warps, interpolates with: rows of `INTERPOLATIONS`."""
    erase: Int64[np.ndarray, "B R 4"]
    """Rectangles to erase: top, left, height, width in pixels of the crop; height 0 means none."""

    def __len__(self) -> int:
        return len(self.flip)

    def take(self, rows: Int64[np.ndarray, " b"]) -> Draws:
        """The draws of some rows: a rank's share of the global batch."""
        return Draws(*(getattr(self, column.name)[rows] for column in fields(self)))


def draw(config: AugmentConfig, image_px: int, rng: np.random.Generator, n: int) -> Draws:
    """Draw the augmentation of `n` images that will be `image_px` pixels high and wide."""
    crop = np.empty((n, CROP_ATTEMPTS, 4))
    smallest, largest = config.crop_scale
    log_narrowest, log_widest = np.log(config.crop_ratio)
    crop[..., 0] = rng.uniform(smallest, largest, (n, CROP_ATTEMPTS))
    crop[..., 1] = np.exp(rng.uniform(log_narrowest, log_widest, (n, CROP_ATTEMPTS)))
    crop[..., 2:] = rng.random((n, CROP_ATTEMPTS, 2))
    flip = rng.random(n) < config.hflip_prob
    op, arg = _draw_ops(config, rng, n)
    erase = _draw_erase(config, image_px, rng, n)
    return Draws(crop, flip, op, arg, _draw_kernel(config, rng, (n, op.shape[1] + 1)), erase)


def _draw_kernel(config: AugmentConfig, rng: np.random.Generator, shape: tuple[int, int]) -> Int64[np.ndarray, "n k"]:
    if config.interpolation == RANDOM_INTERPOLATION:
        return rng.integers(len(INTERPOLATIONS), size=shape)
    return np.full(shape, INTERPOLATIONS.index(config.interpolation))


Ops = tuple[Int64[np.ndarray, "n k"], Float64[np.ndarray, "n k"]]


def _draw_ops(config: AugmentConfig, rng: np.random.Generator, n: int) -> Ops:
    drawn: list[Ops] = [(np.empty((n, 0), np.int64), np.empty((n, 0)))]
    policy = config.policy
    if isinstance(policy, RandAugment):
        drawn.append(_draw_rand_augment(policy, rng, n))
    elif policy is not None:
        drawn.append(_draw_three_augment(policy, rng, n))
    if config.jitters:
        drawn.append(_draw_jitter(config.color_jitter, rng, n))
    op, arg = (np.concatenate(columns, axis=1) for columns in zip(*drawn, strict=True))
    return op, arg


def _draw_rand_augment(policy: RandAugment, rng: np.random.Generator, n: int) -> Ops:
    shape = (n, policy.num_ops)
    op = rng.integers(RAND_AUGMENT_OPS, size=shape)
    applied = rng.random(shape) < policy.prob
    level = _draw_level(policy.magnitude, policy.magnitude_std, rng, shape)
    sign = rng.choice(np.array([-1.0, 1.0]), size=shape)
    arg = operation_argument(op, level, sign, policy.increasing)
    return np.where(applied, op, NO_OP), np.where(applied, arg, 0.0)


def _draw_level(mean: float, std: float, rng: np.random.Generator, shape: tuple[int, ...]) -> Float64[np.ndarray, ...]:
    if std == math.inf:
        return rng.uniform(0, mean, size=shape)
    return np.clip(rng.normal(mean, std, size=shape), 0, MAX_LEVEL)


def _draw_three_augment(policy: ThreeAugment, rng: np.random.Generator, n: int) -> Ops:
    kinds = np.array([Op.SOLARIZE, Op.COLOR, Op.GAUSSIAN_BLUR])
    x = np.stack([_draw_level(mean, policy.magnitude_std, rng, (n,)) for mean in THREE_AUGMENT_LEVELS]) / MAX_LEVEL
    args = np.stack(
        [
            np.minimum(256, np.trunc(x[0] * 256)),
            0.5 - 0.5 * x[1],  # timm's desaturation, from one half at level 0 to grey at level 10
            rng.uniform(BLUR_SIGMA[0], BLUR_SIGMA[1] * x[2]),
        ]
    )
    kind = rng.integers(len(kinds), size=n)
    return kinds[kind][:, None], args[kind, np.arange(n)][:, None]


def _draw_jitter(strength: float, rng: np.random.Generator, n: int) -> Ops:
    """As torchvision's `ColorJitter`: each factor uniform around 1, the three in any order."""
    op = rng.permuted(np.tile(np.array(JITTERED), (n, 1)), axis=1)
    return op, rng.uniform(1 - strength, 1 + strength, op.shape)


def operation_argument(
    op: Int64[np.ndarray, "*shape"],
    level: Float64[np.ndarray, "*shape"],
    sign: Float64[np.ndarray, "*shape"],
    increasing: bool,
) -> Float64[np.ndarray, "*shape"]:
    """Turn a level in [0, 10] into each operation's own argument, by timm's rules (its `LEVEL_TO_ARG`).

    One deviation: posterize keeps at least one bit. At level 10 (at level under 2.5 of the plain set) timm asks for
    none, which old Pillows answered with a black picture and Pillow 13 refuses; a picture without content teaches
    nothing about its label.
    """
    x = level / MAX_LEVEL
    posterize_bits, solarize_level = np.trunc(x * 4), np.minimum(256, np.trunc(x * 256))
    enhance = np.maximum(0.1, 1 + sign * x * 0.9) if increasing else x * 1.8 + 0.1
    argument = {
        Op.ROTATE: sign * x * 30,
        Op.POSTERIZE: np.maximum(1, 4 - posterize_bits if increasing else posterize_bits),
        Op.SOLARIZE: 256 - solarize_level if increasing else solarize_level,
        Op.SOLARIZE_ADD: np.minimum(128, np.trunc(x * 110)),
        Op.COLOR: enhance,
        Op.CONTRAST: enhance,
        Op.BRIGHTNESS: enhance,
        Op.SHARPNESS: enhance,
        Op.SHEAR_X: sign * x * 0.3,
        Op.SHEAR_Y: sign * x * 0.3,
        Op.TRANSLATE_X: sign * x * 0.45,
        Op.TRANSLATE_Y: sign * x * 0.45,
    }
    unused = np.zeros_like(x)
    return np.choose(op, [argument.get(member, unused) for member in Op])


def _draw_erase(config: AugmentConfig, image_px: int, rng: np.random.Generator, n: int) -> Int64[np.ndarray, "n R 4"]:
    if config.erase_prob == 0:
        return np.empty((n, 0, 4), np.int64)
    boxes = config.erase_count
    erased = rng.random(n) < config.erase_prob
    count = rng.integers(1, boxes, size=n, endpoint=True)
    attempts = (n, boxes, ERASE_ATTEMPTS)
    smallest, largest = config.erase_area
    area_px = rng.uniform(smallest, largest, size=attempts) * image_px**2 / count[:, None, None]
    log_ratio = abs(math.log(config.erase_ratio))
    ratio = np.exp(rng.uniform(-log_ratio, log_ratio, size=attempts))
    place = rng.random((n, boxes, 2))
    size = np.rint(np.sqrt(np.stack([area_px * ratio, area_px / ratio], axis=-1)))  # [n, R, 10, 2] height, width
    fits = (size < image_px).all(axis=-1)
    first = fits.argmax(axis=-1)[..., None, None]
    size = np.take_along_axis(size, first, axis=2)[:, :, 0]  # [n, R, 2]
    wanted = erased[:, None] & (np.arange(boxes) < count[:, None]) & fits.any(axis=-1)
    corner = np.floor(place * (image_px - size + 1))
    return np.where(wanted[..., None], np.concatenate([corner, size], axis=-1), 0).astype(np.int64)


def crop_box(
    attempts: Float64[np.ndarray, "10 4"], height: int, width: int, ratio_bounds: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Find the crop of one image: the first attempt that lies inside it, else the largest central one allowed.

    Args:
        attempts: one row of `Draws.crop`.
        height: of the image, pixels.
        width: of the image, pixels.
        ratio_bounds: `AugmentConfig.crop_ratio`, which limits the central crop.

    Returns:
        Top, left, height, width in pixels, rounded as torchvision's `RandomResizedCrop` rounds them.
    """
    area_px, ratio = attempts[:, 0] * (height * width), attempts[:, 1]
    widths, heights = np.rint(np.sqrt(area_px * ratio)), np.rint(np.sqrt(area_px / ratio))
    inside = (widths <= width) & (heights <= height) & (widths > 0) & (heights > 0)
    if not inside.any():
        crop_height = min(height, round(width / ratio_bounds[0]))
        crop_width = min(width, round(height * ratio_bounds[1]))
        return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width
    first = int(inside.argmax())
    crop_height, crop_width = int(heights[first]), int(widths[first])
    left = math.floor(attempts[first, 2] * (width - crop_width + 1))
    top = math.floor(attempts[first, 3] * (height - crop_height + 1))
    return top, left, crop_height, crop_width
