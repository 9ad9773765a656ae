"""One picture by the reference road: PIL decodes and resizes, timm's own functions augment.

The DALI pipeline is held against this file, picture by picture.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from timm.data import auto_augment

from fat_train.augment.draws import Draws, crop_box
from fat_train.augment.policy import INTERPOLATIONS, NO_OP, Op
from fat_train.data.agreement import disagreement
from fat_train.data.index import Place
from fat_train.types import UserError

RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
KERNELS = tuple(RESAMPLING[name] for name in INTERPOLATIONS)

READ_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
"""What PIL raises at a file that it cannot read, over all formats."""

_TIMM: dict[Op, tuple[Callable[..., Image.Image], type | None]] = {
    Op.AUTO_CONTRAST: (auto_augment.auto_contrast, None),
    Op.EQUALIZE: (auto_augment.equalize, None),
    Op.INVERT: (auto_augment.invert, None),
    Op.ROTATE: (auto_augment.rotate, float),
    Op.POSTERIZE: (auto_augment.posterize, int),
    Op.SOLARIZE: (auto_augment.solarize, int),
    Op.SOLARIZE_ADD: (auto_augment.solarize_add, int),
    Op.COLOR: (auto_augment.color, float),
    Op.CONTRAST: (auto_augment.contrast, float),
    Op.BRIGHTNESS: (auto_augment.brightness, float),
    Op.SHARPNESS: (auto_augment.sharpness, float),
    Op.SHEAR_X: (auto_augment.shear_x, float),
    Op.SHEAR_Y: (auto_augment.shear_y, float),
    Op.TRANSLATE_X: (auto_augment.translate_x_rel, float),
    Op.TRANSLATE_Y: (auto_augment.translate_y_rel, float),
    Op.GAUSSIAN_BLUR: (auto_augment.gaussian_blur, float),
}
assert len(_TIMM) == len(Op)
OP_OF_TIMM: dict[object, Op] = {function: op for op, (function, _) in _TIMM.items()}
"""Which operation a function of timm's carries out."""


@dataclass(frozen=True, kw_only=True)
class PictureSpec:
    """What is made of a decoded image, the same for all images of a loader."""

    image_px: int
    eval_resize_px: int
    """Shorter side before the centre crop of validation images."""
    interpolation: str
    """Kernel of validation's resize; the kernels of training are drawn (`Draws.kernel`)."""
    crop_ratio: tuple[float, float]
    """`AugmentConfig.crop_ratio`; unused without draws."""
    fill: tuple[int, int, int]
    """RGB that a rotation, shear or translation draws in from outside."""


def unreadable(place: Place, reason: str) -> UserError:
    """Say which file stopped the loader, and why."""
    return UserError(
        f"cannot read the image {place} ({reason}): mend it, "
        "or leave it out (check lists all such files for data.exclude)"
    )


def read_rgb(place: Place) -> Image.Image:
    """Decode an image and convert it to RGB; an EXIF orientation is not applied.

    Raises:
        UserError: it is missing, truncated or no image, or DALI would make another picture of it.
    """
    try:
        encoded = place.read()
        # PIL warns of odd metadata that do not touch the pixels; a training log is no place for them.
        with (
            warnings.catch_warnings(action="ignore", category=UserWarning),
            Image.open(io.BytesIO(encoded)) as image,
        ):
            different = disagreement(image, encoded)
            picture = image.convert("RGB")
    except READ_ERRORS as error:
        raise unreadable(place, reason_of(error)) from error
    if different:
        raise unreadable(place, different)
    return picture


def reason_of(error: Exception) -> str:
    """Why an image could not be read, in words for its owner."""
    if isinstance(error, FileNotFoundError):
        return "the file is not there any more"
    if isinstance(error, Image.UnidentifiedImageError):
        return "it is no image, or an unknown kind"
    return str(error) or type(error).__name__


def apply_op(image: Image.Image, op: Op, arg: float, kernel: int, spec: PictureSpec) -> Image.Image:
    """Carry out one operation with timm's own function; a warp with row `kernel` of `INTERPOLATIONS`."""
    function, kind = _TIMM[op]
    arguments = () if kind is None else (kind(arg),)
    return function(image, *arguments, fillcolor=spec.fill, resample=KERNELS[kernel])


def train_picture(image: Image.Image, draws: Draws, row: int, spec: PictureSpec) -> UInt8[np.ndarray, "H W 3"]:
    """Crop, resize, flip and augment an RGB image as one row of `draws` says."""
    top, left, height, width = crop_box(draws.crop[row], image.height, image.width, spec.crop_ratio)
    image = image.crop((left, top, left + width, top + height))
    image = image.resize((spec.image_px, spec.image_px), KERNELS[draws.kernel[row, 0]])
    if draws.flip[row]:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for op, arg, kernel in zip(draws.op[row], draws.arg[row], draws.kernel[row, 1:], strict=True):
        if op != NO_OP:
            image = apply_op(image, Op(op), arg, kernel, spec)
    return np.array(image)


def eval_picture(image: Image.Image, spec: PictureSpec) -> UInt8[np.ndarray, "H W 3"]:
    """Resize an RGB image's shorter side and cut the centre out, as torchvision's `Resize` and `CenterCrop` do."""
    height, width, top, left = eval_geometry(image.height, image.width, spec.eval_resize_px, spec.image_px)
    image = image.resize((width, height), RESAMPLING[spec.interpolation])
    return np.array(image.crop((left, top, left + spec.image_px, top + spec.image_px)))


def eval_geometry(height: int, width: int, resize_px: int, crop_px: int) -> tuple[int, int, int, int]:
    """Find validation's size after the resize and the corner of its centre crop, rounded as in torchvision.

    Returns:
        Resized height and width, top and left of the crop, in pixels.
    """
    longer = int(resize_px * max(height, width) / min(height, width))
    new_height, new_width = (resize_px, longer) if height <= width else (longer, resize_px)
    return new_height, new_width, round((new_height - crop_px) / 2.0), round((new_width - crop_px) / 2.0)


def make_pictures(places: Sequence[Place], draws: Draws | None, spec: PictureSpec) -> UInt8[np.ndarray, "B H W 3"]:
    """Decode a batch of images and make the network's input of each; without draws, as for validation.

    Raises:
        UserError: an image cannot be read.
    """
    pictures = np.empty((len(places), spec.image_px, spec.image_px, 3), np.uint8)
    for row, place in enumerate(places):
        image = read_rgb(place)
        pictures[row] = eval_picture(image, spec) if draws is None else train_picture(image, draws, row, spec)
    return pictures
