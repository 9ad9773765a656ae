"""Operation by operation: the DALI lowering against timm's own functions on the same uint8 pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from jaxtyping import UInt8
from PIL import Image

from fat_train.augment.policy import NO_OP, Op, operation_argument
from fat_train.data.picture import PictureSpec, apply_op

pytest.importorskip("nvidia.dali", reason="DALI is not installed")

from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.data_node import DataNode

from fat_train.data.dali.graph import Execution
from fat_train.data.dali.op import BRANCHES, Slot, Warp, branch_of, rand_augment, warp_matrix

PX = 96
FILL = (124, 116, 104)
LEVELS = (0.0, 5.0, 9.0, 10.0)

# Largest mean difference in grey levels over the pictures of one operation at one level.
# Point operations differ by PIL's intermediate roundings alone; equalize by the whole-number step of PIL's rule;
# warps by the cubic kernel (a = -0.75 against PIL's -0.5) and by the blending of the picture's rim with the fill.
POINT_TOLERANCE = 0.02
TOLERANCE = {Op.EQUALIZE: 0.7} | dict.fromkeys((Op.ROTATE, Op.SHEAR_X, Op.SHEAR_Y, Op.TRANSLATE_X, Op.TRANSLATE_Y), 2.0)


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
    branch = fn.external_source(name="branch", dtype=types.INT32, ndim=0)
    arg = fn.external_source(name="arg", dtype=types.FLOAT, ndim=0)
    matrix = fn.external_source(name="matrix", dtype=types.FLOAT, ndim=2)
    return rand_augment(images, [Slot(branch, arg, matrix)], Warp(interpolation, FILL))


def by_dali(
    pictures: UInt8[np.ndarray, "N H W 3"], op: int, args: list[float], interpolation: str = "bicubic"
) -> UInt8[np.ndarray, "A N H W 3"]:
    """Carry out one operation with each argument on each picture, all in one run."""
    count = len(pictures) * len(args)
    graph = _graph(interpolation, **Execution(count, num_threads=2, device_id=None).arguments())
    graph.build()
    ops, repeated = np.full(count, op), np.repeat(args, len(pictures))
    graph.feed_input("images", np.tile(pictures, (len(args), 1, 1, 1)))
    graph.feed_input("branch", branch_of(ops))
    graph.feed_input("arg", repeated.astype(np.float32))
    graph.feed_input("matrix", warp_matrix(ops, repeated, pictures.shape[1]))
    graph.schedule_run()
    (outputs,) = graph.share_outputs()
    return np.asarray(outputs.as_tensor()).reshape(len(args), *pictures.shape).copy()


def by_timm(
    pictures: UInt8[np.ndarray, "N H W 3"], op: Op, args: list[float], interpolation: str = "bicubic"
) -> UInt8[np.ndarray, "A N H W 3"]:
    spec = PictureSpec(
        image_px=pictures.shape[1], eval_resize_px=256, interpolation=interpolation, crop_ratio=(1.0, 1.0), fill=FILL
    )
    return np.stack([[np.asarray(apply_op(Image.fromarray(one), op, arg, spec)) for one in pictures] for arg in args])


def arguments(op: Op) -> list[float]:
    """Every argument that a level of `LEVELS` can lead to, of either sign, in both of timm's sets of operations."""
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
    branches = branch_of(np.array([*Op, NO_OP]))
    assert branches[-1] == NO_OP
    assert set(branches[:-1].tolist()) == set(range(len(BRANCHES)))
