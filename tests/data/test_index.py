from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from fat_train.data.index import FileIndex


def index_of(root: Path, *paths: str) -> FileIndex:
    classes = tuple(sorted({path.split("/")[0] for path in paths}))
    return FileIndex(root, paths, np.array([classes.index(path.split("/")[0]) for path in paths]), classes)


def test_the_fingerprint_tells_lists_apart_and_does_not_depend_on_the_place(tmp_path: Path) -> None:
    here = index_of(tmp_path / "here", "a/1.jpg", "b/2.jpg")
    there = index_of(tmp_path / "there", "a/1.jpg", "b/2.jpg")
    renamed = index_of(tmp_path / "here", "a/1.jpg", "b/3.jpg")
    assert here.fingerprint == there.fingerprint != renamed.fingerprint


def test_the_fingerprint_tells_labels_apart_that_the_paths_do_not_say(tmp_path: Path) -> None:
    flat = FileIndex(tmp_path, ("1.jpg", "2.jpg"), np.array([0, 1]), ("a", "b"))
    assert flat.fingerprint != replace(flat, targets=np.array([1, 0])).fingerprint
