from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from fat_train.augment.policy import AugmentConfig, Op
from fat_train.data.photograph import embedded_photographs
from fat_train.data.picture import PictureSpec, make_pictures
from fat_train.report.parity import save_squares
from fat_train.report.parity_sheet import AMPLIFIED, Strip, operation_strips, parity_sheet, recipe_strips

SPEC = PictureSpec(
    image_px=64, eval_resize_px=64, interpolation="bicubic", crop_ratio=(3 / 4, 4 / 3), fill=(124, 116, 104)
)


def test_each_operation_has_its_strip_and_a_difference_is_amplified(tmp_path: Path) -> None:
    def one_level_up(places: object, draws: object, spec: PictureSpec) -> np.ndarray:
        return np.minimum(make_pictures(places, draws, spec), 254) + 1

    squares = save_squares(embedded_photographs(tmp_path, 3), SPEC, tmp_path)
    strips = operation_strips(squares, SPEC, AugmentConfig(), one_level_up)
    assert len(strips) == len(Op)
    rotate = strips[Op.ROTATE]
    assert rotate.title == "rotate 27"
    assert set(np.unique(rotate.tiles[3])) <= {0, AMPLIFIED}
    assert not np.array_equal(rotate.tiles[0], rotate.tiles[1])
    assert "largest 1" in rotate.note


def test_the_recipes_strips_name_what_was_done(tmp_path: Path) -> None:
    places = embedded_photographs(tmp_path, 12)
    strips = recipe_strips(places, SPEC, AugmentConfig(auto_augment="rand-m9-p1"), make_pictures)
    assert 0 < len(strips) < 12
    assert all(", then " in strip.title for strip in strips)
    bare = recipe_strips(places, SPEC, AugmentConfig(auto_augment=None), make_pictures)
    assert {strip.title for strip in bare} == {"crop and flip alone"}


def test_the_sheet_is_no_wider_than_a_screen_whatever_the_pictures(tmp_path: Path) -> None:
    sizes = []
    for px in (32, 224, 512):
        tile = np.full((px, px, 3), 40, np.uint8)
        strips = [Strip("rotate 27", (tile,) * 4, "mean 0.00, largest 0")] * 3
        with Image.open(parity_sheet([("First", strips), ("Second", strips)], tmp_path / "sheet.png")) as sheet:
            sizes.append(sheet.size)
            assert (np.asarray(sheet) == 40).all(axis=-1).sum() > 6 * 4 * 224**2 * 0.99
    assert len(set(sizes)) == 1
    assert sizes[0][0] <= 2500
