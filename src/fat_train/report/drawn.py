"""What is drawn for an image, by us and by timm's own objects, in the same words.

timm composes the recipe itself, and each part of it is asked as in training, with the functions that would touch
pixels replaced by ones that note what they are asked for.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int64
from PIL import Image, ImageFilter
from timm.data.auto_augment import AugmentOp, AutoAugment, RandAugment, desaturate, gaussian_blur_rand
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import MaybeToTensor, RandomResizedCropAndInterpolation
from timm.data.transforms_factory import transforms_imagenet_train
from torchvision import transforms

from fat_train.augment.draws import crop_box, draw
from fat_train.augment.policy import JITTERED, NO_OP, AugmentConfig, Op
from fat_train.data.picture import OP_OF_TIMM

IMAGES_PX = {"500×375": (375, 500), "300×100": (100, 300)}
"""Height and width of the images that crops are drawn for: ImageNet's usual one, and one where many attempts miss."""
PASSIVE = (MaybeToTensor, transforms.ToTensor, transforms.Normalize)
"""Parts of timm's transform that draw nothing."""


@dataclass(frozen=True)
class Drawn:
    """What was drawn for N images, by whomever."""

    op: Int64[np.ndarray, "N n"]
    """Operations that were carried out, as `Op`, and `NO_OP` beside them."""
    arg: Float64[np.ndarray, "N n"]
    flip: Bool[np.ndarray, " N"]
    crop: Int64[np.ndarray, "S N 4"]
    """Top, left, height, width for an image of each size of `IMAGES_PX`."""
    erase: Int64[np.ndarray, "N R 4"]
    """Rectangles as `Draws.erase` has them."""


def our_draws(config: AugmentConfig, image_px: int, n: int, seed: int = 0) -> Drawn:
    """What `fat_train.augment.draws.draw` gives."""
    draws = draw(config, image_px, np.random.default_rng(seed), n)
    ratio = (config.crop_ratio[0], config.crop_ratio[1])
    crop = np.array([[crop_box(row, *size, ratio) for row in draws.crop] for size in IMAGES_PX.values()])
    return Drawn(draws.op, draws.arg, draws.flip, crop, draws.erase)


def timm_draws(config: AugmentConfig, image_px: int, n: int, seed: int = 0) -> Drawn:
    """What the transform that timm itself makes of the same words draws."""
    transform = transforms_imagenet_train(
        image_px,
        scale=(config.crop_scale[0], config.crop_scale[1]),
        ratio=(config.crop_ratio[0], config.crop_ratio[1]),
        hflip=config.hflip_prob,
        color_jitter=config.color_jitter or None,  # type: ignore[arg-type]  # timm asks whether it is None
        auto_augment=config.auto_augment,
        interpolation=config.interpolation,
        re_prob=config.erase_prob,
        re_mode="const",  # the cheapest fill; rectangles do not depend on it
        re_count=config.erase_count,
    )
    ops: list[list[tuple[Op, float]]] = [[] for _ in range(n)]
    boxes: list[list[tuple[int, ...]]] = [[] for _ in range(n)]
    flip, crop = np.zeros(n, bool), np.empty((len(IMAGES_PX), n, 4), np.int64)
    with _seeded(seed):
        for part in transform.transforms:
            match part:
                case RandomResizedCropAndInterpolation():
                    for size, (height, width) in enumerate(IMAGES_PX.values()):
                        image = Image.new("L", (width, height))
                        crop[size] = [part.get_params(image, part.scale, part.ratio) for _ in range(n)]
                case transforms.RandomHorizontalFlip():
                    flip[:] = [_is_flipped(part) for _ in range(n)]
                case RandAugment() | AutoAugment():
                    _record_ops(part, ops)
                case transforms.ColorJitter():
                    ops = [[*image, *_jittered(part)] for image in ops]
                case RandomErasing():
                    part.min_area, part.max_area = config.erase_area  # timm's factory does not pass these on
                    part.log_aspect_ratio = (math.log(config.erase_ratio), -math.log(config.erase_ratio))
                    for number in range(n):
                        part(_Canvas(image_px, boxes[number]))
                case _:
                    assert isinstance(part, PASSIVE), f"{part} draws something that is not compared"
    columns = max(map(len, ops))
    padded = [[*image, *[(NO_OP, 0.0)] * (columns - len(image))] for image in ops]
    table = np.array(padded, float).reshape(n, columns, 2)
    erase = np.zeros((n, config.erase_count, 4), np.int64)
    for number, found in enumerate(boxes):
        erase[number, : len(found)] = np.array(found).reshape(-1, 4)
    return Drawn(table[..., 0].astype(np.int64), table[..., 1], flip, crop, erase)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the global generators that timm and torchvision draw from, and put them back."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def _is_flipped(part: transforms.RandomHorizontalFlip) -> bool:
    image = Image.new("L", (2, 1))
    image.putpixel((1, 0), 1)
    return bool(part(image).getpixel((0, 0)))


def _record_ops(part: RandAugment | AutoAugment, ops: list[list[tuple[Op, float]]]) -> None:
    """Run timm's transform once an image; what its operations are asked for goes into `ops`."""
    asked: list[tuple[Op, float]] = []

    def recorder(op: Op) -> Callable[..., Image.Image]:
        def record(image: Image.Image, *args: float, **_: object) -> Image.Image:
            # Our one deviation, see `operation_argument`: never 0 bits.
            asked.append((op, max(1, args[0]) if op == Op.POSTERIZE else args[0] if args else 0.0))
            return image

        return record

    def blur_recorder(_image: Image.Image, *args: float, **_: object) -> Image.Image:
        # timm's own function draws the radius: it gets a picture that notes by what it is filtered.
        return gaussian_blur_rand(_Filtered(asked), *args)

    def grey_recorder(image: Image.Image, factor: float, **_: object) -> Image.Image:
        return recorder(Op.COLOR)(image, 1 - factor)

    special: dict[Callable[..., Image.Image], Callable[..., Image.Image]] = {
        gaussian_blur_rand: blur_recorder,
        desaturate: grey_recorder,
    }
    members: list[AugmentOp] = part.ops if isinstance(part, RandAugment) else [op for sub in part.policy for op in sub]
    for member in members:
        function = member.aug_fn
        member.aug_fn = special[function] if function in special else recorder(OP_OF_TIMM[function])
    image = Image.new("RGB", (1, 1))
    for number in range(len(ops)):
        asked.clear()
        part(image)
        ops[number] += asked


def _jittered(part: transforms.ColorJitter) -> list[tuple[Op, float]]:
    order, *factors = part.get_params(part.brightness, part.contrast, part.saturation, part.hue)
    return [(JITTERED[number], factors[number]) for number in order.tolist() if number < len(JITTERED)]


class _Filtered:
    """As much of a picture as timm's blur asks for; it notes the radius."""

    def __init__(self, asked: list[tuple[Op, float]]) -> None:
        self.asked = asked

    def filter(self, kernel: ImageFilter.GaussianBlur) -> Image.Image:
        self.asked.append((Op.GAUSSIAN_BLUR, float(kernel.radius)))  # type: ignore[arg-type]  # a pair if asked for
        return Image.new("RGB", (1, 1))


class _Canvas:
    """As much of a tensor as timm's eraser asks for; it keeps the rectangles."""

    dtype = torch.float32

    def __init__(self, image_px: int, boxes: list[tuple[int, ...]]) -> None:
        self.image_px = image_px
        self.boxes = boxes

    def size(self) -> tuple[int, int, int]:
        return 3, self.image_px, self.image_px

    def __setitem__(self, place: tuple[slice, slice, slice], _fill: object) -> None:
        _, rows, columns = place
        self.boxes.append((rows.start, columns.start, rows.stop - rows.start, columns.stop - columns.start))
