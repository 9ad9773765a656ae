"""The operations of RandAugment and ThreeAugment in DALI, by PIL's formulas: what a GPU runs.

A CPU takes rotations from here and has the others from `fat_train.data.dali.host_op`.

PIL's colour operations end in a truncation, DALI's conversions in a rounding; `TRUNCATE` makes one of the other.
What is left of a difference to PIL is measured in `tests/data/test_dali_op.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Float64, Int64
from nvidia.dali import fn, math, types
from nvidia.dali.data_node import DataNode

from fat_train.augment.draws import Draws
from fat_train.augment.policy import INTERPOLATIONS, NO_OP, Op

TRUNCATE = -0.4998  # less than half, so that the float error of a whole number does not take it a level down
MAX_UINT8 = 255.0

INTERPOLATION = {"bicubic": types.INTERP_CUBIC, "bilinear": types.INTERP_LINEAR}
BILINEAR = INTERPOLATIONS.index("bilinear")
SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13


class Column(IntEnum):
    """What stands where in a row of the table of operations that a pipeline is fed."""

    OP = 0  # as `Op`
    ARG = 1  # as `Draws.arg`
    KERNEL = 2  # row of `INTERPOLATIONS`
    BRANCH = 3  # index into `BRANCHES`, or `NO_OP`
    MATRIX = 4  # 3×3, output to source pixels; of use where the branch is a warp
    PHASE = 13  # rotations before it
    # What a CPU does phase by phase; row k is about the image's k-th rotation, whichever operation that is.
    TURNS = 14  # 1 where there is one
    TURN_KERNEL = 15
    TURN_MATRIX = 16
    LATE = 25  # 1 where torch's operations come between it and the next


class Slot(NamedTuple):
    """What one of an image's operations does to it: a row of the table as nodes."""

    branch: DataNode
    arg: DataNode
    matrix: DataNode
    kernel: DataNode


def slot_of(row: DataNode) -> Slot:
    """Take a row of the table apart, as a GPU needs it."""
    return Slot(whole(row[Column.BRANCH]), row[Column.ARG], _matrix_at(row, Column.MATRIX), whole(row[Column.KERNEL]))


def turn_of(row: DataNode) -> Slot:
    """Take a row of the table apart, as a CPU needs it: the rotation that it is about."""
    turns = whole(row[Column.TURNS])
    return Slot(turns, row[Column.ARG], _matrix_at(row, Column.TURN_MATRIX), whole(row[Column.TURN_KERNEL]))


def _matrix_at(row: DataNode, column: int) -> DataNode:
    return fn.reshape(row[column : column + 9], shape=[3, 3])


def whole(number: DataNode) -> DataNode:
    """Make an integer of it: DALI 2.4 takes no float for equal to -1, not even -1.0."""
    return fn.cast(number, dtype=types.INT32)


class Warp(NamedTuple):
    """How warps interpolate and what they draw in from outside."""

    interpolation: str
    """`AugmentConfig.interpolation`."""
    fill: tuple[int, int, int]


def rand_augment(images: DataNode, slots: list[Slot], warp: Warp) -> DataNode:
    """Carry out each image's own operations, one slot after another."""
    for slot in slots:
        if slot.branch != NO_OP:
            images = _branch(0, len(BRANCHES) - 1, images, slot, warp)
    return images


def _branch(first: int, last: int, images: DataNode, slot: Slot, warp: Warp) -> DataNode:
    if first == last:
        return BRANCHES[first](images, slot, warp)
    middle = (first + last) // 2
    if slot.branch <= middle:
        images = _branch(first, middle, images, slot, warp)
    else:
        images = _branch(middle + 1, last, images, slot, warp)
    return images


def _auto_contrast(images: DataNode, _slot: Slot, _warp: Warp) -> DataNode:
    lowest = fn.cast(fn.reductions.min(images, axes=[0, 1], keep_dims=True), dtype=types.FLOAT)
    span = fn.reductions.max(images, axes=[0, 1], keep_dims=True) - lowest
    flat = fn.cast(span == 0, dtype=types.FLOAT)  # a channel of one level stays as it is
    scale = MAX_UINT8 / (span + flat * MAX_UINT8)
    return _to_uint8((images - lowest * (1.0 - flat)) * scale + TRUNCATE)


def _equalize(images: DataNode, _slot: Slot, _warp: Warp) -> DataNode:
    # DALI's rule spreads the levels from the first one in use, PIL's from the last one: the same rule on the negative.
    equalized = _negative(fn.equalize(_negative(images)))
    # PIL divides by whole pixels a level, DALI by fractions of them.
    highest = fn.reductions.max(images, axes=[0, 1], keep_dims=True)
    counted = fn.cast(images != highest, dtype=types.FLOAT)
    spread = fn.reductions.sum(counted, axes=[0, 1], keep_dims=True) / MAX_UINT8
    step = math.floor(spread)
    empty = fn.cast(step == 0, dtype=types.FLOAT)  # too few pixels for a level: PIL leaves the channel as it is
    return _to_uint8(equalized * ((1.0 - empty) * spread / (step + empty)) + images * empty)


def _invert(images: DataNode, _slot: Slot, _warp: Warp) -> DataNode:
    return _negative(images)


def _posterize(images: DataNode, slot: Slot, _warp: Warp) -> DataNode:
    kept = fn.cast(256.0 - math.pow(2.0, 8.0 - slot.arg), dtype=types.UINT8)
    return images & _beside(images, kept)


def _solarize(images: DataNode, slot: Slot, _warp: Warp) -> DataNode:
    return images ^ ((images >= _beside(images, fn.cast(slot.arg, dtype=types.INT32))) * np.uint8(255))


def _solarize_add(images: DataNode, slot: Slot, _warp: Warp) -> DataNode:
    # 127 + 128, the most there can be, is no overflow.
    return images + (images < 128) * _beside(images, fn.cast(slot.arg, dtype=types.UINT8))


def _color(images: DataNode, slot: Slot, _warp: Warp) -> DataNode:
    return _blend(_grey(images), images, slot.arg)


def _contrast(images: DataNode, slot: Slot, _warp: Warp) -> DataNode:
    mean = fn.reductions.mean(_grey(images), axes=[0, 1], keep_dims=True)
    return _blend(math.floor(mean + 0.5), images, slot.arg)


def _brightness(images: DataNode, slot: Slot, _warp: Warp) -> DataNode:
    return fn.brightness_contrast(images, brightness=slot.arg, brightness_shift=TRUNCATE / MAX_UINT8)


def _sharpness(images: DataNode, slot: Slot, _warp: Warp) -> DataNode:
    inside = images[1:-1, 1:-1]
    smooth = fn.filter(images, types.Constant(SMOOTH, device=images.device), mode="valid")
    sharp = _blend(smooth, inside, slot.arg)
    # PIL's filter leaves the outermost pixels alone.
    middle = fn.cat(images[1:-1, :1], sharp, images[1:-1, -1:], axis=1)
    return fn.cat(images[:1], middle, images[-1:], axis=0)


def perspective(images: DataNode, slot: Slot, warp: Warp) -> DataNode:
    """Warp each image by its matrix."""
    return with_kernel(warp.interpolation, slot.kernel, lambda kernel: _warped(images, slot, warp, kernel))


def _along_lines(images: DataNode, slot: Slot, warp: Warp) -> DataNode:
    return perspective(images, slot, warp)  # a branch of its own, since a CPU does these by other means


def with_kernel(interpolation: str, kernel: DataNode, make: Callable[[Any], DataNode]) -> DataNode:
    """Call `make` with DALI's kernel; where it is drawn, each image goes through the one with its own."""
    if interpolation in INTERPOLATION:
        return make(INTERPOLATION[interpolation])
    if kernel == BILINEAR:  # noqa: SIM108  # DALI's conditionals are statements
        made = make(types.INTERP_LINEAR)
    else:
        made = make(types.INTERP_CUBIC)
    return made


def _warped(images: DataNode, slot: Slot, warp: Warp, kernel: Any) -> DataNode:
    # `warp_affine` knows neither cubic interpolation nor a fill of three channels.
    return fn.experimental.warp_perspective(
        images,
        _beside(images, slot.matrix),
        interp_type=kernel,
        border_mode="constant",
        fill_value=[float(level) for level in warp.fill],
    )


def _gaussian_blur(images: DataNode, slot: Slot, _warp: Warp) -> DataNode:
    return fn.gaussian_blur(images, sigma=slot.arg)


def _beside(images: DataNode, values: DataNode) -> DataNode:
    """Bring values from the CPU to where the images are."""
    return values.gpu() if images.device == "gpu" else values


def _negative(images: DataNode) -> DataNode:
    return images ^ np.uint8(255)


def _grey(images: DataNode) -> DataNode:
    return fn.color_space_conversion(images, image_type=types.RGB, output_type=types.GRAY)


def _blend(away: DataNode, images: DataNode, factor: DataNode) -> DataNode:
    """PIL's `Image.blend`: `away` at factor 0, the images themselves at 1, beyond them over 1."""
    own = fn.brightness_contrast(images, brightness=factor, dtype=types.FLOAT)
    other = fn.brightness_contrast(away, brightness=1.0 - factor, brightness_shift=TRUNCATE, dtype=types.FLOAT)
    return _to_uint8(own + other)


def _to_uint8(levels: DataNode) -> DataNode:
    return fn.cast(levels, dtype=types.UINT8)


_LOWERING: dict[Op, Callable[[DataNode, Slot, Warp], DataNode]] = {
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
    Op.ROTATE: perspective,
    Op.SHEAR_X: _along_lines,
    Op.SHEAR_Y: _along_lines,
    Op.TRANSLATE_X: _along_lines,
    Op.TRANSLATE_Y: _along_lines,
    Op.GAUSSIAN_BLUR: _gaussian_blur,
}

BRANCHES = tuple(dict.fromkeys(_LOWERING[op] for op in Op))
"""What an image can be sent through; warps differ in their matrix alone and share one."""
PERSPECTIVE = BRANCHES.index(perspective)

_BRANCH_OF_OP = np.array([BRANCHES.index(_LOWERING[op]) for op in Op], np.int32)


def operation_table(draws: Draws, image_px: int) -> Float32[np.ndarray, "B n columns"]:
    """Write out what each image's operations need, see `Column`."""
    op, arg = draws.op, draws.arg
    branch = np.where(op == NO_OP, NO_OP, _BRANCH_OF_OP[op])
    kernel = draws.kernel[:, 1:]
    matrix = warp_matrix(op, arg, image_px).reshape(*op.shape, 9)
    turns = branch == PERSPECTIVE
    phase = turns.cumsum(axis=1) - turns
    nth = np.argsort(~turns, axis=1, kind="stable")  # the slots of an image's rotations come first
    due = (branch != NO_OP) & ~turns
    late = np.stack([(due & (phase == number + 1)).any(axis=1) for number in range(op.shape[1])], axis=1)
    columns = {
        Column.OP: op[..., None],
        Column.ARG: arg[..., None],
        Column.KERNEL: kernel[..., None],
        Column.BRANCH: branch[..., None],
        Column.MATRIX: matrix,
        Column.PHASE: phase[..., None],
        Column.TURNS: np.take_along_axis(turns, nth, axis=1)[..., None],
        Column.TURN_KERNEL: np.take_along_axis(kernel, nth, axis=1)[..., None],
        Column.TURN_MATRIX: np.take_along_axis(matrix, nth[..., None], axis=1),
        Column.LATE: late[..., None],
    }
    return np.concatenate([columns[column] for column in sorted(columns)], axis=-1).astype(np.float32)


def warp_matrix(
    op: Int64[np.ndarray, "B n"], arg: Float64[np.ndarray, "B n"], image_px: int
) -> Float64[np.ndarray, "B n 3 3"]:
    """Build the matrix from output to source pixels of each warp, as PIL's `rotate` and timm's shears have it.

    The origin is the corner of the first pixel; where the operation is no warp the matrix is the identity.
    """
    matrix = np.tile(np.eye(3), (*op.shape, 1, 1))
    angle = np.deg2rad(np.where(op == Op.ROTATE, -arg, 0.0))
    cos, sin, centre = np.cos(angle), np.sin(angle), image_px / 2
    matrix[..., 0, 0] = matrix[..., 1, 1] = cos
    matrix[..., 0, 1], matrix[..., 1, 0] = sin, -sin
    matrix[..., 0, 2] = centre - (cos + sin) * centre
    matrix[..., 1, 2] = centre - (cos - sin) * centre
    for member, row, column, scale in (
        (Op.SHEAR_X, 0, 1, 1),
        (Op.SHEAR_Y, 1, 0, 1),
        (Op.TRANSLATE_X, 0, 2, image_px),
        (Op.TRANSLATE_Y, 1, 2, image_px),
    ):
        matrix[op == member, row, column] = arg[op == member] * scale
    return matrix
