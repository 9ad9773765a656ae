from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFont

from fat_train.report.sheet import FONT, GAP_PX, contact_sheet, shorten


def tiles(count: int, side_px: int = 200) -> list[np.ndarray]:
    return [np.full((side_px, side_px, 3), 20 * number + 20, np.uint8) for number in range(count)]


def read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def test_every_picture_is_on_the_sheet_unchanged_and_in_order(tmp_path: Path) -> None:
    pictures = [np.random.default_rng(number).integers(0, 256, (200, 200, 3), np.uint8) for number in range(5)]
    sheet = read(contact_sheet(pictures, list("abcde"), tmp_path / "sheet.png", columns=3))
    row_px = (sheet.shape[0] - GAP_PX) // 2
    for number, picture in enumerate(pictures):
        top, left = GAP_PX + number // 3 * row_px, GAP_PX + number % 3 * (200 + GAP_PX)
        assert (sheet[top : top + 200, left : left + 200] == picture).all()
    assert sheet.shape[1] == GAP_PX + 3 * (200 + GAP_PX)


def test_captions_stand_under_their_pictures_and_the_header_above(tmp_path: Path) -> None:
    bare = read(contact_sheet(tiles(2), ["", ""], tmp_path / "bare.png"))
    sheet = read(contact_sheet(tiles(2), ["", "pug · λ 0.63\n+ golf ball"], tmp_path / "sheet.png"))
    first, second = sheet[GAP_PX + 200 :, : GAP_PX + 200], sheet[GAP_PX + 200 :, 2 * GAP_PX + 200 :]
    assert (first == 255).all()
    assert (second < 128).any()
    assert sheet.shape[0] > bare.shape[0]
    headed = read(contact_sheet(tiles(2), ["", ""], tmp_path / "headed.png", header="epoch 0"))
    above = headed[: headed.shape[0] - bare.shape[0] + GAP_PX]
    assert (above < 128).any()


def test_small_pictures_are_enlarged_without_blurring(tmp_path: Path) -> None:
    picture = np.zeros((8, 8, 3), np.uint8)
    picture[::2] = 255
    sheet = read(contact_sheet([picture], ["0"], tmp_path / "sheet.png"))
    assert (sheet[GAP_PX : GAP_PX + 160, GAP_PX : GAP_PX + 160] == picture.repeat(20, 0).repeat(20, 1)).all()


@pytest.mark.parametrize("width_px", [60, 100, 199])
def test_a_long_caption_is_cut_to_the_width_with_an_ellipsis(width_px: int) -> None:
    font = ImageFont.truetype(FONT, 13)
    text = "n02110958 a dog with a very long name"
    short = shorten(text, font, width_px)
    assert short.endswith("…")
    assert text.startswith(short[:-1])
    assert width_px - 20 < font.getlength(short) <= width_px


def test_a_caption_that_fits_is_left_alone() -> None:
    assert shorten("pug · λ 0.63", ImageFont.truetype(FONT, 13), 200) == "pug · λ 0.63"
