"""Operation by operation: both DALI lowerings against timm's own functions on the same uint8 pictures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from jaxtyping import Float32, UInt8
from PIL import Image

from fat_train.augment.draws import draw, operation_argument
from fat_train.augment.policy import INTERPOLATIONS, NO_OP, WARPS, AugmentConfig, Op
from fat_train.data.picture import PictureSpec, apply_op

pytest.importorskip("nvidia.dali", reason="DALI is not installed")

from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.data_node import DataNode

from fat_train.data.dali.graph import Execution
from fat_train.data.dali.host_op import HOST_OPS, Room, carry_out
from fat_train.data.dali.op import BRANCHES, Column, Warp, operation_table, perspective, rand_augment, slot_of

PX = 96
FILL = (124, 116, 104)
LEVELS = (0.0, 5.0, 9.0, 10.0)
BLURS = [0.1, 0.5, 1.0, 2.0]

# Largest mean difference in grey levels over the pictures of one operation at one level.
# Point operations differ by PIL's intermediate roundings alone; equalize by the whole-number step of PIL's rule;
# warps by the cubic kernel (a = -0.75 against PIL's -1) and by the blending of the picture's rim with the fill;
# the blur because PIL's is a threefold box.
POINT_TOLERANCE = 0.02
TOLERANCE = {Op.EQUALIZE: 0.4, Op.GAUSSIAN_BLUR: 1.0} | dict.fromkeys(WARPS, 2.0)


@pytest.fixture(scope="module")
def made_pictures(picture_root: Path) -> UInt8[np.ndarray, "N H W 3"]:
    """The pictures of the generated folder, and the awkward ones: black, one level, two levels."""
    opened = [Image.open(path).convert("RGB").resize((PX, PX)) for path in sorted(picture_root.glob("*/*/*"))]
    flat = [np.full((PX, PX, 3), level, np.uint8) for level in (0, 77)]
    halves = np.where(np.arange(PX)[:, None, None] < PX // 2, np.uint8(10), np.uint8([200, 10, 11]))
    return np.stack([*map(np.asarray, opened), *flat, np.broadcast_to(halves, (PX, PX, 3))])


@pytest.fixture(scope="module")
def real_pictures(imagenet_samples: Path) -> UInt8[np.ndarray, "N H W 3"]:
    paths = sorted(imagenet_samples.glob("*/*"))[::17]
    return np.stack([np.asarray(Image.open(path).convert("RGB").resize((224, 224))) for path in paths])


@pipeline_def(enable_conditionals=True)
def _graph(interpolation: str) -> DataNode:
    images = fn.external_source(name="images", dtype=types.UINT8, ndim=3, layout="HWC")
    table = fn.external_source(name="table", dtype=types.FLOAT, ndim=2)
    return rand_augment(images, [slot_of(table[0])], Warp(interpolation, FILL))


def by_dali(
    pictures: UInt8[np.ndarray, "N H W 3"], op: int, args: list[float], interpolation: str = "bicubic"
) -> UInt8[np.ndarray, "A N H W 3"]:
    """Carry out one operation with each argument on each picture, all in one run."""
    count = len(pictures) * len(args)
    graph = _graph(interpolation, **Execution(count, num_threads=2, device_id=None).arguments())
    graph.build()
    graph.feed_input("images", np.tile(pictures, (len(args), 1, 1, 1)))
    graph.feed_input("table", table_of(pictures.shape[1], op, args, len(pictures), interpolation))
    graph.schedule_run()
    (outputs,) = graph.share_outputs()
    return np.asarray(outputs.as_tensor()).reshape(len(args), *pictures.shape).copy()


def by_torch(
    pictures: UInt8[np.ndarray, "N H W 3"], op: int, args: list[float], interpolation: str = "bicubic"
) -> UInt8[np.ndarray, "A N H W 3"]:
    """The same by the operations of the CPU."""
    px = pictures.shape[1]
    spec, room = spec_of(px, interpolation), Room(px)
    made = np.empty((len(args), *pictures.shape), np.uint8)
    given = np.broadcast_to(pictures, made.shape).reshape(-1, px, px, 3)
    table = table_of(px, op, args, len(pictures), interpolation)
    for picture, row, out in zip(given, table, made.reshape(-1, px, px, 3), strict=True):
        carry_out(torch.from_numpy(picture.copy()), row, spec, room, torch.from_numpy(out))
    return made


def by_timm(
    pictures: UInt8[np.ndarray, "N H W 3"], op: Op, args: list[float], interpolation: str = "bicubic"
) -> UInt8[np.ndarray, "A N H W 3"]:
    spec, kernel = spec_of(pictures.shape[1], interpolation), INTERPOLATIONS.index(interpolation)
    made = [[np.asarray(apply_op(Image.fromarray(one), op, arg, kernel, spec)) for one in pictures] for arg in args]
    return np.array(made)


def table_of(
    px: int, op: int, args: list[float], pictures: int, interpolation: str
) -> Float32[np.ndarray, "N 1 columns"]:
    """One operation with each argument for each picture."""
    arg = np.repeat(args, pictures)[:, None]
    kernel = np.full((len(arg), 2), INTERPOLATIONS.index(interpolation))
    op_of = np.full(arg.shape, op)
    nothing = draw(AugmentConfig(auto_augment=None), px, np.random.default_rng(0), len(arg))
    return operation_table(replace(nothing, op=op_of, arg=arg, kernel=kernel), px)


def spec_of(px: int, interpolation: str) -> PictureSpec:
    return PictureSpec(image_px=px, eval_resize_px=256, interpolation=interpolation, crop_ratio=(1.0, 1.0), fill=FILL)


def arguments(op: Op) -> list[float]:
    """Every argument that a level of `LEVELS` can lead to, of either sign, in both of timm's sets of operations."""
    if op == Op.GAUSSIAN_BLUR:
        return BLURS
    asked = {
        float(operation_argument(np.array(op), np.array(level), np.array(sign), increasing))
        for level in LEVELS
        for sign in (-1.0, 1.0)
        for increasing in (False, True)
    }
    return sorted(asked)


def difference(ours: UInt8[np.ndarray, ...], theirs: UInt8[np.ndarray, ...]) -> UInt8[np.ndarray, ...]:
    return np.abs(ours.astype(int) - theirs.astype(int))


@pytest.mark.parametrize("pictures", ["made_pictures", "real_pictures"])
@pytest.mark.parametrize("op", list(Op), ids=lambda op: op.name)
def test_an_operation_gives_timms_picture_within_its_tolerance(
    op: Op, pictures: str, request: pytest.FixtureRequest
) -> None:
    given = request.getfixturevalue(pictures)
    args = arguments(op)
    apart = difference(by_dali(given, op, args), by_timm(given, op, args))
    mean = apart.mean(axis=(1, 2, 3, 4))
    assert mean.max() <= TOLERANCE.get(op, POINT_TOLERANCE), dict(zip(args, mean, strict=True))
    if op not in TOLERANCE:
        assert apart.max() <= 1


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("pictures", ["made_pictures", "real_pictures"])
@pytest.mark.parametrize("op", sorted(HOST_OPS), ids=lambda op: Op(op).name)
def test_an_operation_of_the_cpu_gives_timms_picture_to_the_level(
    op: Op, pictures: str, interpolation: str, request: pytest.FixtureRequest
) -> None:
    given = request.getfixturevalue(pictures)
    args = arguments(op)
    apart = difference(by_torch(given, op, args, interpolation), by_timm(given, op, args, interpolation))
    if op in WARPS:  # one level where float32 and PIL's double fall on different sides of a whole number
        assert apart.max() <= 1
        assert apart.mean() <= 0.05
    else:
        assert apart.max() == 0


def test_operations_of_the_cpu_follow_one_another(made_pictures: UInt8[np.ndarray, "N H W 3"]) -> None:
    first, second, third = (Op.COLOR, 0.3), (Op.TRANSLATE_Y, -0.2), (Op.EQUALIZE, 0.0)
    rows = np.concatenate([table_of(PX, op, [arg], 1, "bicubic") for op, arg in (first, second, third)], axis=1)[0]
    out, spec = torch.empty(PX, PX, 3, dtype=torch.uint8), spec_of(PX, "bicubic")
    for picture in made_pictures:
        carry_out(torch.from_numpy(picture), rows, spec, Room(PX), out)
        by_one = picture[None]
        for op, arg in (first, second, third):
            by_one = by_torch(by_one, op, [arg])[0]
        np.testing.assert_array_equal(out.numpy(), by_one[0])


@pytest.mark.parametrize("op", [Op.ROTATE, Op.SHEAR_X, Op.TRANSLATE_Y], ids=lambda op: op.name)
def test_warps_agree_closely_away_from_the_rim_where_both_interpolate_bilinearly(
    op: Op, made_pictures: UInt8[np.ndarray, "N H W 3"]
) -> None:
    args = arguments(op)
    ours, theirs = (side(made_pictures, op, args, "bilinear") for side in (by_dali, by_timm))
    apart = difference(ours, theirs)
    assert np.median(apart) == 0
    assert np.percentile(apart, 95) <= 2


def test_a_warp_fills_each_channel_with_its_own_level(made_pictures: UInt8[np.ndarray, "N H W 3"]) -> None:
    shifted = by_dali(made_pictures, Op.TRANSLATE_X, [0.45])[0]
    np.testing.assert_array_equal(shifted[:, :, -10:], np.broadcast_to(FILL, shifted[:, :, -10:].shape))


def test_no_operation_leaves_every_picture_as_it_is(made_pictures: UInt8[np.ndarray, "N H W 3"]) -> None:
    np.testing.assert_array_equal(by_dali(made_pictures, NO_OP, [0.0])[0], made_pictures)


def test_every_operation_has_a_branch_and_no_branch_is_idle() -> None:
    branches = [table_of(PX, op, [1.0], 1, "bicubic")[0, 0, Column.BRANCH] for op in (*Op, NO_OP)]
    assert branches[-1] == NO_OP
    assert set(branches[:-1]) == set(range(len(BRANCHES)))


def test_what_the_cpu_does_not_do_by_torch_are_the_warps_left_to_dali() -> None:
    assert set(Op) - set(HOST_OPS) == {
        op for op in Op if BRANCHES[int(table_of(PX, op, [1.0], 1, "bicubic")[0, 0, Column.BRANCH])] is perspective
    }
