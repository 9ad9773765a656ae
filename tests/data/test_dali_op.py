"""The DALI lowering on awkward pictures, against timm's own functions; photographs: `tests/report/test_parity.py`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fat_train.augment.policy import NO_OP, AugmentConfig, Op
from fat_train.data.index import Place
from fat_train.data.picture import PictureSpec, make_pictures
from fat_train.report.parity import arguments, draws_of_one, operation_rows, save_squares, stack

pytest.importorskip("nvidia.dali", reason="DALI is not installed")

from fat_train.data.dali.carry_out import CarryOut
from fat_train.data.dali.op import BRANCHES, branch_of

PX = 96
FILL = (124, 116, 104)
SPEC = PictureSpec(image_px=PX, eval_resize_px=PX, interpolation="bicubic", crop_ratio=(1.0, 1.0), fill=FILL)
BILINEAR = replace(SPEC, interpolation="bilinear")
RECIPE = AugmentConfig()


@pytest.fixture(scope="module")
def dali() -> CarryOut:
    return CarryOut(num_threads=2)


@pytest.fixture(scope="module")
def squares(picture_root: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Place]:
    """The pictures of the generated folder, and the awkward ones: black, one level, two levels."""
    folder = tmp_path_factory.mktemp("squares")
    places = save_squares([Place(str(path)) for path in sorted(picture_root.glob("*/*/*"))[::2]], SPEC, folder)
    flat = [np.full((PX, PX, 3), level, np.uint8) for level in (0, 77)]
    halves = np.where(np.arange(PX)[:, None, None] < PX // 2, np.uint8(10), np.uint8([200, 10, 11]))
    for number, pixels in enumerate([*flat, np.broadcast_to(halves, (PX, PX, 3))]):
        places.append(Place(str(folder / f"flat{number}.bmp")))
        Image.fromarray(pixels).save(places[-1].file)
    return places


@pytest.mark.parametrize("op", list(Op), ids=lambda op: op.name)
def test_an_operation_gives_timms_picture_within_its_tolerance(op: Op, squares: list[Place], dali: CarryOut) -> None:
    (row,) = operation_rows(squares, SPEC, RECIPE, {"DALI": dali}, [op])
    assert row.holds, row


@pytest.mark.parametrize("op", [Op.ROTATE, Op.SHEAR_X, Op.TRANSLATE_Y], ids=lambda op: op.name)
def test_warps_agree_closely_away_from_the_rim_where_both_interpolate_bilinearly(
    op: Op, squares: list[Place], dali: CarryOut
) -> None:
    recipe = AugmentConfig(interpolation="bilinear")
    draws = stack([draws_of_one(op, arg, len(squares), recipe, PX) for arg in arguments(op)])
    places = squares * len(arguments(op))
    apart = np.abs(dali(places, draws, BILINEAR).astype(int) - make_pictures(places, draws, BILINEAR))
    assert np.median(apart) == 0
    assert np.percentile(apart, 95) <= 2


def test_a_warp_fills_each_channel_with_its_own_level(squares: list[Place], dali: CarryOut) -> None:
    shifted = dali(squares, draws_of_one(Op.TRANSLATE_X, 0.45, len(squares), RECIPE, PX), SPEC)
    np.testing.assert_array_equal(shifted[:, :, -10:], np.broadcast_to(FILL, shifted[:, :, -10:].shape))


def test_no_operation_leaves_every_picture_as_it_is(squares: list[Place], dali: CarryOut) -> None:
    untouched = dali(squares, draws_of_one(NO_OP, 0.0, len(squares), RECIPE, PX), SPEC)
    np.testing.assert_array_equal(untouched, [np.asarray(Image.open(place.file)) for place in squares])


def test_every_operation_has_a_branch_and_no_branch_is_idle() -> None:
    branches = branch_of(np.array([*Op, NO_OP]))
    assert branches[-1] == NO_OP
    assert set(branches[:-1].tolist()) == set(range(len(BRANCHES)))
