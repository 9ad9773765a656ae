"""From 8-bit pixels to the model's input, on the device that trains: normalise, then erase."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from jaxtyping import Bool, Float, Int, Shaped, UInt8
from torch import Tensor


def to_input(
    images: UInt8[Tensor, "B H W C"],
    mean: Sequence[float],
    std: Sequence[float],
    out: Float[Tensor, "B H W C"] | None = None,
) -> Float[Tensor, "B C H W"]:
    """(pixel / 255 − mean) / std as float32, channel by channel; into `out` where that is given.

    The result is a view of channels-last memory (a permuted NHWC tensor), which is the layout that the models want.
    """
    scale, shift = _scale_and_shift(tuple(mean), tuple(std), images.shape[2], images.device)
    floats = images.float() if out is None else out.copy_(images)
    rows = floats.flatten(2)  # [B, H, W C]: the arithmetic runs along whole rows, not along three channels
    torch.addcmul(shift, rows, scale, out=rows)
    return floats.permute(0, 3, 1, 2)  # [B, C, H, W]


@lru_cache(maxsize=8)
def _scale_and_shift(
    mean: tuple[float, ...], std: tuple[float, ...], width: int, device: torch.device
) -> tuple[Float[Tensor, " WC"], Float[Tensor, " WC"]]:
    """Kept on the device: copying them there for every batch would make the host wait for the GPU."""
    scale = torch.tensor([1 / (255 * s) for s in std], device=device)
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=device)
    return scale.repeat(width), shift.repeat(width)


def to_pixels(
    images: Float[Tensor, "B C H W"], mean: Sequence[float], std: Sequence[float]
) -> UInt8[Tensor, "B H W C"]:
    """The inverse of `to_input`, clipped to what a screen shows."""
    device = images.device
    pixels = images.permute(0, 2, 3, 1) * torch.tensor(std, device=device) + torch.tensor(mean, device=device)
    return (pixels * 255).round().clamp(0, 255).to(torch.uint8)


def erase(
    images: Float[Tensor, "B C H W"],
    boxes: Int[Tensor, "B R 4"],
    mode: str,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "B C H W"]:
    """Random erasing (Zhong et al., 2020) of the given rectangles, on normalised pixels.

    Args:
        images: normalised pictures; on the CPU they are changed in place.
        boxes: (top, left, height, width) in pixels; height 0 erases nothing.
        mode: "pixel" draws each value from N(0, 1), "rand" one colour a rectangle from N(0, 1), "const" fills with 0
            (the mean colour).
        generator: of the noise, on the images' device; torch's own unless given.

    On a GPU the rectangles become a mask, so no value of theirs is ever read by the host. On the CPU the rectangles
    themselves are overwritten, in `images`: noise for the whole batch would take as long as reading the batch's files.
    """
    if images.device.type == "cpu":
        return _erase_on_cpu(images, boxes, mode, generator)
    _, channels, height, width = images.shape
    for box in boxes.unbind(1):  # R is the recipe's count, 1 as a rule
        corners = torch.cat([box[:, :2], box[:, :2] + box[:, 2:]], dim=1)
        images = torch.where(box_mask(corners, height, width), _fill(images, mode, channels, generator), images)
    return images


def box_mask(corners: Shaped[Tensor, "B 4"], height: int, width: int) -> Bool[Tensor, "B 1 H W"]:
    """Where each picture's box is, from its (top, left, bottom, right) in pixels; nowhere if that encloses nothing."""
    top, left, bottom, right = (column[:, None] for column in corners.unbind(1))  # each [B, 1]
    y = torch.arange(height, device=corners.device)
    x = torch.arange(width, device=corners.device)
    rows = (y >= top) & (y < bottom)  # [B, H]
    columns = (x >= left) & (x < right)  # [B, W]
    return (rows[:, :, None] & columns[:, None, :])[:, None]


def _fill(images: Tensor, mode: str, channels: int, generator: torch.Generator | None) -> Tensor:
    if mode == "pixel":
        return torch.empty_like(images).normal_(generator=generator)
    if mode == "rand":
        return images.new_empty(len(images), channels, 1, 1).normal_(generator=generator)
    assert mode == "const", mode
    return torch.zeros((), device=images.device, dtype=images.dtype)


def _erase_on_cpu(images: Tensor, boxes: Tensor, mode: str, generator: torch.Generator | None) -> Tensor:
    for image, of_image in zip(images.permute(0, 2, 3, 1), boxes.tolist(), strict=True):  # each [H, W, C]
        for top, left, tall, wide in of_image:
            if tall:
                # In the order of memory: torch's noise for other orders is made value by value.
                noise = _fill(images.new_empty(1, tall, wide, image.shape[-1]), mode, image.shape[-1], generator)
                image[top : top + tall, left : left + wide] = noise[0] if mode == "pixel" else noise.flatten()
    return images
