from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fat_train.data.datamodule import DigitsDataConfig, open_data
from fat_train.data.digits import COMPLETE_MARKER, digits_root, stratified_split


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FAT_TRAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_digits_are_written_once_as_an_image_folder(cache: Path) -> None:
    source = open_data(DigitsDataConfig())
    assert (len(source.train), len(source.val), source.num_classes) == (1442, 355, 10)
    assert source.train.classes == tuple("0123456789")
    with Image.open(source.train.place(0).file) as image:
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (64, 64))
    written = {path: path.stat().st_mtime_ns for path in cache.rglob("*.jpg")}
    assert open_data(DigitsDataConfig()).fingerprint == source.fingerprint
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*.jpg")} == written


def test_several_at_once_end_with_one_whole_folder(cache: Path) -> None:
    with ThreadPoolExecutor(3) as pool:
        roots = {future.result() for future in [pool.submit(digits_root) for _ in range(3)]}
    (root,) = roots
    assert [path.name for path in cache.iterdir()] == [root.name]
    assert len(list(root.rglob("*.jpg"))) == 1797


def test_a_folder_that_was_not_finished_is_written_anew(cache: Path) -> None:
    root = digits_root()
    (root / COMPLETE_MARKER).unlink()
    next(root.rglob("*.jpg")).unlink()
    assert len(list(digits_root().rglob("*.jpg"))) == 1797


def test_every_class_keeps_a_fifth_for_validation() -> None:
    labels = np.random.default_rng(0).integers(3, size=100)
    validation = stratified_split(labels)
    for label in range(3):
        assert validation[labels == label].sum() == (labels == label).sum() // 5
