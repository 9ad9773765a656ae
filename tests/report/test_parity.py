"""DALI's pictures against those of PIL and timm, operation by operation and from file to picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fat_train.augment.draws import Draws
from fat_train.augment.policy import NO_OP, AugmentConfig, Op
from fat_train.data.index import Place
from fat_train.data.photograph import embedded_photographs, find_photographs
from fat_train.data.picture import PictureSpec, make_pictures
from fat_train.report.parity import (
    WARPS,
    Lowering,
    arguments,
    draws_of_one,
    operation_rows,
    parity_table,
    road_rows,
    save_squares,
)

SPEC = PictureSpec(
    image_px=224, eval_resize_px=256, interpolation="bicubic", crop_ratio=(3 / 4, 4 / 3), fill=(124, 116, 104)
)
RECIPE = AugmentConfig()
EXACT = (Op.INVERT, Op.POSTERIZE, Op.SOLARIZE, Op.SOLARIZE_ADD)


@pytest.fixture(scope="module", params=[True, False], ids=["cpu", "as_on_a_gpu"])
def dali(request: pytest.FixtureRequest) -> Lowering:
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    from fat_train.data.dali.carry_out import CarryOut  # noqa: PLC0415  # the other tests need no DALI

    return CarryOut(num_threads=2, torch_ops=request.param)


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> list[Place]:
    return embedded_photographs(tmp_path_factory.mktemp("embedded"), 12)


@pytest.fixture(scope="module")
def imagenet(imagenet_samples: Path) -> list[Place]:
    return find_photographs(str(imagenet_samples), 12)


@pytest.fixture(scope="module")
def squares(embedded: list[Place], tmp_path_factory: pytest.TempPathFactory) -> list[Place]:
    return save_squares(embedded, SPEC, tmp_path_factory.mktemp("squares"))


@pytest.fixture(scope="module")
def imagenet_squares(imagenet: list[Place], tmp_path_factory: pytest.TempPathFactory) -> list[Place]:
    """Photographs of ImageNet, one of them with a third of white."""
    places = save_squares(imagenet, SPEC, tmp_path_factory.mktemp("imagenet"))
    with Image.open(places[0].file) as image:
        pixels = np.array(image)
    pixels[:75] = 255
    Image.fromarray(pixels).save(places[0].file)
    return places


@pytest.mark.parametrize("op", list(Op), ids=lambda op: op.name)
def test_an_operation_gives_timms_photograph_within_its_tolerance(op: Op, squares: list[Place], dali: Lowering) -> None:
    (row,) = operation_rows(squares, SPEC, RECIPE, {"DALI": dali}, [op])
    assert row.holds, row
    assert row.most("largest") == 0 or op not in EXACT


@pytest.mark.parametrize("op", list(Op), ids=lambda op: op.name)
def test_so_it_does_on_imagenets(op: Op, imagenet_squares: list[Place], dali: Lowering) -> None:
    (row,) = operation_rows(imagenet_squares, SPEC, RECIPE, {"DALI": dali}, [op])
    assert row.holds, row


@pytest.mark.parametrize("op", WARPS, ids=lambda op: op.name)
def test_a_warps_fill_differs_by_no_more_than_the_rim(op: Op, squares: list[Place], dali: Lowering) -> None:
    (row,) = operation_rows(squares, SPEC, RECIPE, {"DALI": dali}, [op])
    assert row.most("inside") <= 2
    assert row.most("filled_by_one") <= 2 / SPEC.image_px


@pytest.mark.parametrize("photographs", ["embedded", "imagenet"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_files_become_timms_pictures(
    photographs: str, interpolation: str, dali: Lowering, request: pytest.FixtureRequest
) -> None:
    spec, config = replace(SPEC, interpolation=interpolation), replace(RECIPE, interpolation=interpolation)
    rows = road_rows(request.getfixturevalue(photographs), spec, config, {"DALI": dali}, held=["DALI"])
    assert all(row.holds for row in rows), rows
    assert max(row.most("worst") for row in rows[:3]) <= 0.5
    assert rows[3].most("mean") <= 0.7


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_keeps_the_tolerances_of_single_operations(squares: list[Place]) -> None:
    from fat_train.data.dali.carry_out import CarryOut  # noqa: PLC0415  # the other tests need no DALI

    rows = operation_rows(squares, SPEC, RECIPE, {"GPU": CarryOut(num_threads=2, device_id=0)})
    assert all(row.holds for row in rows), rows


def test_a_square_reaches_the_operation_as_it_is(squares: list[Place], dali: Lowering) -> None:
    untouched = draws_of_one(NO_OP, 0.0, len(squares), RECIPE, SPEC.image_px)
    there = np.stack([np.asarray(Image.open(place.file)) for place in squares])
    np.testing.assert_array_equal(dali(squares, untouched, SPEC), there)
    np.testing.assert_array_equal(make_pictures(squares, untouched, SPEC), there)


def test_arguments_go_to_both_sides_and_to_both_ends() -> None:
    assert arguments(Op.ROTATE) == [-30.0, -27.0, -15.0, 0.0, 15.0, 27.0, 30.0]
    assert (arguments(Op.COLOR)[0], arguments(Op.COLOR)[-1]) == pytest.approx((0.1, 1.9))
    assert arguments(Op.INVERT) == [0.0]


def two_levels_up(places: Sequence[Place], draws: Draws | None, spec: PictureSpec) -> np.ndarray:
    return np.clip(make_pictures(places, draws, spec).astype(int) + 2, 0, 255).astype(np.uint8)


def other_way_round(places: Sequence[Place], draws: Draws | None, spec: PictureSpec) -> np.ndarray:
    return make_pictures(places, None if draws is None else replace(draws, arg=-draws.arg), spec)


def test_a_back_end_that_is_wrong_fails(squares: list[Place], embedded: list[Place]) -> None:
    def held(lowering: Lowering, op: Op) -> bool:
        return operation_rows(squares[:2], SPEC, RECIPE, {"": lowering}, [op])[0].holds

    assert held(make_pictures, Op.BRIGHTNESS)
    assert held(make_pictures, Op.ROTATE)
    assert not held(two_levels_up, Op.BRIGHTNESS)
    assert not held(other_way_round, Op.ROTATE)
    (row,) = operation_rows(squares[:2], SPEC, RECIPE, {"": other_way_round}, [Op.TRANSLATE_X])
    assert row.most("filled_by_one") > 0.8
    roads = road_rows(embedded[:2], SPEC, RECIPE, {"": two_levels_up}, held=[""])
    assert [road.holds for road in roads[:3]] == [False] * 3
    shown_only = road_rows(embedded[:2], SPEC, RECIPE, {"": two_levels_up}, held=[])
    assert all(road.holds for road in shown_only)


def test_the_table_has_a_row_for_each_operation_and_back_end(squares: list[Place]) -> None:
    both = {"one": make_pictures, "other": make_pictures}
    rows = operation_rows(squares[:1], SPEC, RECIPE, both, [Op.INVERT, Op.SHEAR_X])
    assert [(row.name, row.back_end) for row in rows] == [
        (name, end) for name in ("invert", "shear x") for end in ("one", "other")
    ]
    assert parity_table(rows).row_count == 4
    assert rows[0].as_dict()["differences"][0]["arg"] is None
    assert rows[2].as_dict()["tolerance"] == {"measure": "mean", "levels": 2}
