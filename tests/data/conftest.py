"""A small folder of pictures of every kind that a photo collection holds, made on the spot."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SIZES = ((160, 120), (90, 200), (333, 250), (64, 64), (500, 75), (121, 97))  # width, height


def photograph(seed: int, width: int, height: int) -> Image.Image:
    """Soft shapes of many colours with a little grain: nearer to a photograph than noise is."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(256, size=(height // 16 + 2, width // 16 + 2, 3), dtype=np.uint8)
    soft = np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), np.int16)
    grain = rng.integers(-6, 7, size=soft.shape)
    return Image.fromarray(np.clip(soft + grain, 0, 255).astype(np.uint8))


@pytest.fixture(scope="session")
def picture_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/ and val/ with 3 classes of 7 and 5 JPEGs: grey-scale, CMYK, EXIF-turned and PNG-in-disguise among them."""
    root = tmp_path_factory.mktemp("pictures")
    turned = Image.Exif()
    turned[0x0112] = 6  # "rotate me by 90 degrees"
    number = 0
    for split, images_per_class in (("train", 7), ("val", 5)):
        for class_name in ("ant", "bee", "cat"):
            folder = root / split / class_name
            folder.mkdir(parents=True)
            for _ in range(images_per_class):
                image = photograph(number, *SIZES[number % len(SIZES)])
                path = folder / f"{number:03d}.JPEG"
                match number % 7:
                    case 1:
                        image.convert("L").save(path, quality=92)
                    case 2:
                        image.convert("CMYK").save(path, quality=92)
                    case 3:
                        image.save(path, quality=92, exif=turned)
                    case 4:
                        image.save(path, format="PNG")
                    case _:
                        image.save(path, quality=92)
                number += 1
    return root
