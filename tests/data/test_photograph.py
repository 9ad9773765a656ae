from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from fat_train.data.photograph import embedded_photographs, find_photographs
from fat_train.data.picture import read_rgb
from fat_train.types import MissingPathError, UserError


def fill(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)
    return folder


def names(root: Path, count: int) -> list[str]:
    return [str(Path(place.file).relative_to(root)) for place in find_photographs(str(root), count)]


def test_a_data_set_its_training_half_or_one_flat_folder_will_do(tmp_path: Path) -> None:
    classes = ("ant/1.jpg", "ant/2.jpg", "bee/1.PNG", "bee/deep/2.jpg")
    assert names(
        fill(tmp_path / "whole", *(f"{split}/{name}" for split in ("train", "val") for name in classes)), 9
    ) == [f"train/{name}" for name in classes]
    assert names(fill(tmp_path / "classes", *classes), 9) == list(classes)
    assert names(fill(tmp_path / "flat", "b.jpg", "a.jpg", ".hidden.jpg"), 9) == ["a.jpg", "b.jpg"]


def test_few_images_are_of_many_classes(tmp_path: Path) -> None:
    root = fill(tmp_path, *(f"{letter}/{number}.jpg" for letter in "abcde" for number in range(3)))
    assert names(root, 3) == ["a/0.jpg", "c/0.jpg", "e/0.jpg"]
    assert names(root, 7) == ["a/0.jpg", "a/1.jpg", "b/0.jpg", "b/1.jpg", "c/0.jpg", "d/0.jpg", "e/0.jpg"]


def test_a_folder_without_images_is_refused_with_the_setting(tmp_path: Path) -> None:
    with pytest.raises(MissingPathError, match=r"data\.root=.*nowhere is not there"):
        find_photographs(str(tmp_path / "nowhere"), 4)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match=r"holds no image; files count that end in \.jpg"):
        find_photographs(str(tmp_path), 4)
    with pytest.raises(UserError, match="it is a file"):
        find_photographs(str(tmp_path / "notes.txt"), 4)


def test_the_embedded_photographs_are_real_files_of_twelve_different_views(tmp_path: Path) -> None:
    places = embedded_photographs(tmp_path, 64)
    pictures = [read_rgb(place) for place in places]
    assert len({picture.tobytes() for picture in pictures}) == 12
    assert {picture.size for picture in pictures} == {(400, 300)}
    assert len(embedded_photographs(tmp_path, 5)) == 5
