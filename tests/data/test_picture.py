from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize
from torchvision.transforms.functional import resized_crop

from fat_train.augment.draws import crop_box, draw
from fat_train.augment.policy import AugmentConfig
from fat_train.data.index import Place
from fat_train.data.picture import PictureSpec, eval_picture, read_rgb, train_picture

SPEC = PictureSpec(
    image_px=56, eval_resize_px=64, interpolation="bicubic", crop_ratio=(3 / 4, 4 / 3), fill=(124, 116, 104)
)


@pytest.fixture(scope="module")
def images(picture_root: Path) -> list[Image.Image]:
    return [read_rgb(Place(str(path))) for path in sorted(picture_root.glob("*/*/*"))]


def test_validation_pictures_are_torchvisions(images: list[Image.Image]) -> None:
    theirs = Compose([Resize(64, InterpolationMode.BICUBIC), CenterCrop(56)])
    for image in images:
        np.testing.assert_array_equal(eval_picture(image, SPEC), np.asarray(theirs(image)))


def test_crop_and_flip_are_torchvisions(images: list[Image.Image]) -> None:
    draws = draw(AugmentConfig(auto_augment=None), 56, np.random.default_rng(0), len(images))
    for row, image in enumerate(images):
        box = crop_box(draws.crop[row], image.height, image.width, SPEC.crop_ratio)
        theirs = np.asarray(resized_crop(image, *box, [56, 56], InterpolationMode.BICUBIC))
        theirs = theirs[:, ::-1] if draws.flip[row] else theirs
        np.testing.assert_array_equal(train_picture(image, draws, row, SPEC), theirs)


def test_an_exif_turn_is_not_applied(tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (30, 20)).save(tmp_path / "turned.jpg", exif=turned)
    assert read_rgb(Place(str(tmp_path / "turned.jpg"))).size == (30, 20)
