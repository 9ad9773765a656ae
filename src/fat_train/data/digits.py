"""The embedded data set: scikit-learn's 1,797 scanned digits, written once as JPEG files.

From there on they are an image folder like any other, read by the same index, order and pipeline as ImageNet.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int
from PIL import Image

from fat_train.cache import cache_folder
from fat_train.types import UserError

FOLDER_NAME = "digits-64px-v1"  # raise the version when the files would come out different
FILE_PX = 64
JPEG_QUALITY = 95
VAL_EVERY = 5
COMPLETE_MARKER = ".complete"


def digits_root() -> Path:
    """Return the folder with train/<digit>/ and val/<digit>/, writing it first where it is not there yet.

    Raises:
        UserError: it cannot be written.

    The files are written beside it and moved into place in one go, so that an interrupted writing leaves nothing
    behind that looks whole, and of several processes at once the first to finish wins.
    """
    root = cache_folder() / FOLDER_NAME
    if (root / COMPLETE_MARKER).is_file():
        return root
    try:
        _write_beside(root)
    except OSError as error:
        raise UserError(
            f"data=digits writes its images to {root}, which cannot be done: {error.strerror}. "
            "Set FAT_TRAIN_CACHE to a folder that can be written to"
        ) from error
    return root


def _write_beside(root: Path) -> None:
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=FOLDER_NAME + ".", dir=root.parent) as temporary:
        written = Path(temporary) / FOLDER_NAME
        _write_digits(written)
        (written / COMPLETE_MARKER).touch()
        try:
            written.rename(root)
        except OSError:
            # The folder is there already: another process's whole one, or a remnant without its marker.
            if not (root / COMPLETE_MARKER).is_file():
                shutil.rmtree(root)
                written.rename(root)


def _write_digits(root: Path) -> None:
    from sklearn.datasets import load_digits  # noqa: PLC0415 - a fifth of the start of every command, needed once

    scans, labels = load_digits(return_X_y=True)
    validation = stratified_split(labels)
    grey_levels = np.rint(scans * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)
    for row, (grey, label) in enumerate(zip(grey_levels, labels, strict=True)):
        folder = root / ("val" if validation[row] else "train") / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(grey).resize((FILE_PX, FILE_PX), Image.Resampling.BICUBIC).convert("RGB")
        image.save(folder / f"{row:04d}.jpg", quality=JPEG_QUALITY)


def stratified_split(labels: Int[np.ndarray, " N"]) -> Bool[np.ndarray, " N"]:
    """Mark every fifth image of each class as validation: a fixed split, with the classes in equal shares."""
    validation = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        validation[np.flatnonzero(labels == label)[VAL_EVERY - 1 :: VAL_EVERY]] = True
    return validation
