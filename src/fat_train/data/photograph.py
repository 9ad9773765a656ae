"""A few photographs to look closely at: out of any folder, or the two that scikit-learn brings along."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from fat_train.data.index import EXTENSIONS, Place
from fat_train.types import MissingPathError, UserError

PIECE_WIDTH_PX, PIECE_HEIGHT_PX = 400, 300
PIECE_LEFTS, PIECE_TOPS = (0, 120, 240), (0, 127)
PIECE_QUALITY = 95


def find_photographs(root: str, count: int, key: str = "data.root") -> list[Place]:
    """Find images in `root/train/<class>/`, in `root/<class>/` or in `root` itself, spread over the classes.

    No more folders are read than are needed: the 1,281,167 files of ImageNet are not listed for the sake of 64.

    Raises:
        MissingPathError: the folder is not there.
        UserError: it is no folder, or holds no image.
    """
    folder = Path(root).expanduser()
    if not folder.exists():
        raise MissingPathError(f"{key}={folder} is not there: give a folder of images")
    if not folder.is_dir():
        raise UserError(f"{key}={folder} must be a folder of images; it is a file")
    folder = folder / "train" if (folder / "train").is_dir() else folder
    classes = sorted(entry.path for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != ".")
    chosen = [classes[row] for row in np.linspace(0, len(classes) - 1, min(count, len(classes))).astype(int)]
    walks = [_images_below(name) for name in chosen]
    found: list[str] = []
    while walks and len(found) < count:
        turn = [(walk, path) for walk in walks if (path := next(walk, None)) is not None]
        found += [path for _, path in turn]
        walks = [walk for walk, _ in turn]
    found = sorted(found[:count]) or list(islice(_images_below(str(folder)), count))
    if not found:
        raise UserError(f"{key}={folder} holds no image; files count that end in {' '.join(EXTENSIONS)}")
    return [Place(path) for path in found]


def _images_below(folder: str) -> Iterator[str]:
    for parent, subfolders, names in os.walk(folder, followlinks=True):
        subfolders[:] = sorted(name for name in subfolders if name[0] != ".")
        yield from (
            f"{parent}/{name}" for name in sorted(names) if name[0] != "." and name.lower().endswith(EXTENSIONS)
        )


def embedded_photographs(folder: Path, count: int) -> list[Place]:
    """Cut scikit-learn's two photographs into at most twelve overlapping pieces, as JPEG files in `folder`."""
    pieces = (
        photograph[top : top + PIECE_HEIGHT_PX, left : left + PIECE_WIDTH_PX]
        for top in PIECE_TOPS
        for left in PIECE_LEFTS
        for photograph in load_sample_images().images
    )
    places = []
    for number, piece in enumerate(islice(pieces, count)):
        path = folder / f"{number:02d}.jpg"
        Image.fromarray(piece).save(path, quality=PIECE_QUALITY)
        places.append(Place(str(path)))
    return places
