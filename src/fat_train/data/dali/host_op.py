"""The operations of RandAugment and ThreeAugment on the CPU, by vectorised torch kernels: PIL's very pictures.

DALI's arithmetic goes value by value on a CPU; the same formulas take a fifth of the time here. Rotations are not among
them: each of their pixels has weights of its own, and DALI is quicker at that than what torch has.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from PIL import Image, ImageFilter
from torch import Tensor

from fat_train.augment.policy import INTERPOLATIONS, Op
from fat_train.data.dali.op import Column
from fat_train.data.picture import PictureSpec

LUMA = (19595.0, 38470.0, 7471.0)
"""PIL's weights of red, green and blue in a grey level, times 2^16: a sum of levels so weighted is exact in float32."""
MAX_LEVEL = 255
UNDER_ONE = 2.0**-10
"""Keeps a float32 sum that should be whole from being truncated to the level below."""

Picture = UInt8[Tensor, "H W 3"]
D = TypeVar("D", float, Tensor)


class Room:
    """One thread's space for intermediate values: fresh memory for each would cost more than the arithmetic on it."""

    def __init__(self, px: int) -> None:
        self.px = px
        self.float_a, self.float_b = torch.empty(2, px, px, 3).unbind()
        self.short_a, self.short_b = torch.empty(2, px, px, 3, dtype=torch.int16).unbind()
        self.int_rows = torch.empty(px, px * 3, dtype=torch.int32)
        self.grey = torch.empty(px * px)
        self.pictures = torch.empty(2, px, px, 3, dtype=torch.uint8).unbind()
        self.luma = torch.tensor(LUMA)
        self.channel_start = (torch.arange(3, dtype=torch.int32) * 256).repeat(px)
        self.pixels = torch.zeros(px, px, 4, dtype=torch.uint8)
        self.float_c, self.float_d = torch.empty(2, px, px * 4).unbind()
        self.along = torch.arange(px, dtype=torch.int32)
        self.centres = self.along + 0.5
        self.line_start = self.along[:, None] * px
        self._blank: dict[tuple[int, int, int], Picture] = {}

    def blank(self, fill: tuple[int, int, int]) -> Picture:
        """A picture of one colour: copying it is a tenth of the work of filling one."""
        if fill not in self._blank:
            self._blank[fill] = torch.tensor(fill, dtype=torch.uint8).expand(self.px, self.px, 3).contiguous()
        return self._blank[fill]


class Operation(NamedTuple):
    """One operation on one picture."""

    picture: Picture
    arg: float
    """As `Draws.arg`."""
    kernel: int
    """Row of `INTERPOLATIONS`."""
    spec: PictureSpec


def carry_out(
    picture: Picture, table: Float32[np.ndarray, "n columns"], spec: PictureSpec, room: Room, out: Picture
) -> None:
    """Write into `out` what the operations of the table make of the picture, one after another; those of `HOST_OPS`
    alone, the others are left to DALI."""
    due = [row for row in table if row[Column.OP] in HOST_OPS]
    for number, row in enumerate(due):
        target = out if number == len(due) - 1 else room.pictures[number % 2]
        HOST_OPS[row[Column.OP]](
            Operation(picture, float(row[Column.ARG]), int(row[Column.KERNEL]), spec), room, target
        )
        picture = target
    if not due:
        out.copy_(picture)


def _auto_contrast(at: Operation, room: Room, out: Picture) -> None:
    lowest, highest = (reduced.view(-1, 3) for reduced in (at.picture.amin(0), at.picture.amax(0)))
    low = lowest.amin(0).double().numpy()[:, None]
    span = highest.amax(0).double().numpy()[:, None] - low
    levels = np.arange(256.0)
    scale = MAX_LEVEL / np.maximum(span, 1)
    table = np.where(span > 0, np.clip(np.trunc(levels * scale + -low * scale), 0, MAX_LEVEL), levels)
    _look_up(at.picture, table, room, out)


def _equalize(at: Operation, room: Room, out: Picture) -> None:
    rows = torch.add(at.picture.view(room.px, -1), room.channel_start, out=room.int_rows)
    count = torch.bincount(rows.view(-1), minlength=3 * 256).view(3, 256).numpy()
    last = MAX_LEVEL - (count[:, ::-1] > 0).argmax(axis=1)
    step = (room.px**2 - count[np.arange(3), last])[:, None] // MAX_LEVEL
    below = count.cumsum(axis=1) - count
    table = np.where(step > 0, np.minimum((step // 2 + below) // np.maximum(step, 1), MAX_LEVEL), np.arange(256))
    _look_up(at.picture, table, room, out)


def _look_up(picture: Picture, table: np.ndarray, room: Room, out: Picture) -> None:
    """`out` = `table[channel, picture]`."""
    rows = torch.add(picture.view(room.px, -1), room.channel_start, out=room.int_rows)
    torch.index_select(torch.from_numpy(table.astype(np.uint8)).view(-1), 0, rows.view(-1), out=out.view(-1))


def _invert(at: Operation, _room: Room, out: Picture) -> None:
    torch.bitwise_not(at.picture, out=out)


def _posterize(at: Operation, _room: Room, out: Picture) -> None:
    torch.bitwise_and(at.picture, 256 - 2 ** (8 - int(at.arg)), out=out)


def _solarize(at: Operation, room: Room, out: Picture) -> None:
    level = room.short_a.copy_(at.picture)
    below = torch.sub(level, int(at.arg), out=room.short_b).bitwise_right_shift_(15)  # the sign: -1 or 0
    out.copy_(level.bitwise_xor_(below.bitwise_not_().bitwise_and_(MAX_LEVEL)))


def _solarize_add(at: Operation, _room: Room, out: Picture) -> None:
    # Added everywhere, and taken away again, modulo 256, where the top bit is set.
    torch.bitwise_right_shift(at.picture, 7, out=out).mul_(256 - int(at.arg)).add_(at.picture).add_(int(at.arg))


def _color(at: Operation, room: Room, out: Picture) -> None:
    own, grey = room.float_a.copy_(at.picture), room.float_b
    grey.view(-1, 3).copy_(_grey(own, room)[:, None])
    _to_levels(own.sub_(grey).mul_(at.arg).add_(grey), room, out)


def _contrast(at: Operation, room: Room, out: Picture) -> None:
    own = room.float_a.copy_(at.picture)
    mean = math.floor(float(_grey(own, room).mean(dtype=torch.float64)) + 0.5)
    _to_levels(own.sub_(mean).mul_(at.arg).add_(mean), room, out)


def _brightness(at: Operation, room: Room, out: Picture) -> None:
    _to_levels(room.float_a.copy_(at.picture).mul_(at.arg), room, out)


def _sharpness(at: Operation, room: Room, out: Picture) -> None:
    level, inner = room.short_a.copy_(at.picture), (slice(1, -1), slice(1, -1))
    columns = torch.add(level[:-2], level[2:], out=room.short_b[:-2]).add_(level[1:-1])
    blurred = (columns[:, :-2] + columns[:, 2:]).add_(columns[:, 1:-1]).add_(level[inner], alpha=4)  # × 13
    smooth = room.float_a[inner].copy_(blurred).mul_(1 / 13).add_(0.5).floor_()
    sharp = room.float_b[inner].copy_(level[inner]).sub_(smooth).mul_(at.arg).add_(smooth).clamp_(0, MAX_LEVEL)
    level[inner] = sharp.to(torch.int16)  # PIL's filter leaves the outermost pixels alone
    out.copy_(level)


def _grey(own: Tensor, room: Room) -> Tensor:
    """PIL's `convert("L")`, as whole numbers in float32."""
    return torch.mv(own.view(-1, 3), room.luma, out=room.grey).add_(2**15).mul_(2**-16).floor_()


def _to_levels(values: Tensor, room: Room, out: Picture) -> None:
    """Clip, and truncate as PIL's blending does; 16 bits on the way because float to 8 bits is not vectorised."""
    out.copy_(room.short_a.copy_(values.clamp_(0, MAX_LEVEL)))


def _translate(at: Operation, room: Room, out: Picture, *, axis: int) -> None:
    """PIL's transform along one axis: each pixel is a weighted sum of neighbours, with the same weights everywhere."""
    shift = at.arg * room.px
    whole = math.floor(shift)
    first = max(0, math.ceil(-shift - 0.5))  # pixels whose source lies inside are first … end − 1
    end = min(room.px, math.ceil(room.px - shift - 0.5))
    out.copy_(room.blank(at.spec.fill))
    if end <= first:
        return
    own = room.float_a.copy_(at.picture)
    total = room.float_b.narrow(axis, 0, end - first).fill_(UNDER_ONE)
    for tap, weight in _taps(shift - whole, at.kernel):
        _add_shifted(total, own, first + whole + tap, weight, axis)
    out.narrow(axis, first, end - first).copy_(total.clamp_(0, MAX_LEVEL).to(torch.int16))


def _add_shifted(total: Tensor, own: Tensor, start: int, weight: float, axis: int) -> None:
    """`total[i] += weight * own[start + i]` along the axis, where the outermost pixels go on for ever."""
    length, px = total.shape[axis], own.shape[axis]
    before, after = max(0, -start), max(0, start + length - px)
    inside = length - before - after
    total.narrow(axis, before, inside).add_(own.narrow(axis, start + before, inside), alpha=weight)
    if before:
        total.narrow(axis, 0, before).add_(own.narrow(axis, 0, 1), alpha=weight)
    if after:
        total.narrow(axis, length - after, after).add_(own.narrow(axis, px - 1, 1), alpha=weight)


def _taps(d: D, kernel: int) -> list[tuple[int, D]]:
    """Neighbour and weight of PIL's transforms at the fraction d of a pixel; its cubic has a = −1."""
    if INTERPOLATIONS[kernel] == "bilinear":
        return [(0, 1 - d), (1, d)]
    return [(-1, -d + 2 * d**2 - d**3), (0, 1 - 2 * d**2 + d**3), (1, d + d**2 - d**3), (2, -(d**2) + d**3)]


def _shear(at: Operation, room: Room, out: Picture, *, axis: int) -> None:
    """PIL's transform by a shear: along each line all pixels have the same weights, and only their start differs.

    Lines are rows where `axis` is 1, columns where it is 0. A pixel is one 32-bit number while it is fetched.
    """
    px = room.px
    shift = at.arg * (torch.arange(px, dtype=torch.float64) + 0.5)
    whole = shift.floor()
    source = room.along + whole.int()[:, None]  # [line, pixel], the neighbour of tap 0
    place = room.centres + shift.float()[:, None]
    room.pixels[..., :3].copy_(at.picture)
    pixels = room.pixels.view(torch.int32).view(px, px)
    table = (pixels if axis == 1 else pixels.t().contiguous()).view(-1)
    total = room.float_c.fill_(UNDER_ONE)
    for tap, weight in _taps(shift - whole, at.kernel):
        fetched = table.index_select(0, (source + tap).clamp_(0, px - 1).add_(room.line_start).view(-1))
        levels = room.float_d.copy_(fetched.view(torch.uint8).view(px, -1))
        total.addcmul_(levels, weight.float()[:, None])
    made = total.clamp_(0, MAX_LEVEL).to(torch.int16).to(torch.uint8).view(torch.int32)
    made.masked_fill_((place < 0) | (place >= px), int.from_bytes(bytes(at.spec.fill), "little"))
    made = made if axis == 1 else made.t().contiguous()
    out.copy_(made.view(torch.uint8).view(px, px, 4)[..., :3])


def _gaussian_blur(at: Operation, _room: Room, out: Picture) -> None:
    blurred = Image.fromarray(at.picture.numpy()).filter(ImageFilter.GaussianBlur(at.arg))
    out.copy_(torch.from_numpy(np.array(blurred)))


HOST_OPS: dict[int, Callable[[Operation, Room, Picture], None]] = {
    Op.AUTO_CONTRAST: _auto_contrast,
    Op.EQUALIZE: _equalize,
    Op.INVERT: _invert,
    Op.POSTERIZE: _posterize,
    Op.SOLARIZE: _solarize,
    Op.SOLARIZE_ADD: _solarize_add,
    Op.COLOR: _color,
    Op.CONTRAST: _contrast,
    Op.BRIGHTNESS: _brightness,
    Op.SHARPNESS: _sharpness,
    Op.SHEAR_X: partial(_shear, axis=1),
    Op.SHEAR_Y: partial(_shear, axis=0),
    Op.TRANSLATE_X: partial(_translate, axis=1),
    Op.TRANSLATE_Y: partial(_translate, axis=0),
    Op.GAUSSIAN_BLUR: _gaussian_blur,
}
