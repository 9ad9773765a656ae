from pathlib import Path

import numpy as np
import pytest

from fat_train.data.index import scan_folder, scan_pair
from fat_train.types import MissingPathError, UserError


def lay_out(root: Path, *files: str) -> Path:
    for name in files:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def test_classes_are_numbered_as_torchvision_numbers_them(tmp_path: Path) -> None:
    from torchvision.datasets import ImageFolder  # noqa: PLC0415  # slow to import

    lay_out(tmp_path, "train/b/2.jpg", "train/b/10.jpg", "train/B/1.jpg", "train/a/x.jpeg", "train/c/sub/deep.png")
    index = scan_folder(tmp_path, "train")
    theirs = ImageFolder(tmp_path / "train")
    assert list(index.classes) == theirs.classes
    assert {str(index.place(row)): int(index.targets[row]) for row in range(len(index))} == dict(theirs.samples)


def test_suffixes_count_in_any_case_and_hidden_and_other_files_do_not(tmp_path: Path) -> None:
    lay_out(tmp_path, "train/a/1.JPEG", "train/a/2.Png", "train/a/.3.jpg", "train/a/notes.txt", "train/.git/4.jpg")
    assert scan_folder(tmp_path, "train").paths == ("a/1.JPEG", "a/2.Png")


def test_links_to_folders_and_files_are_followed(tmp_path: Path) -> None:
    lay_out(tmp_path, "elsewhere/1.jpg", "elsewhere/2.jpg", "train/b/own.jpg")
    (tmp_path / "train" / "a").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "train" / "b" / "link.jpg").symlink_to(tmp_path / "elsewhere" / "1.jpg")
    index = scan_folder(tmp_path, "train")
    assert index.paths == ("a/1.jpg", "a/2.jpg", "b/link.jpg", "b/own.jpg")
    np.testing.assert_array_equal(index.targets, [0, 0, 1, 1])


def test_the_fingerprint_tells_lists_apart_and_does_not_depend_on_the_place(tmp_path: Path) -> None:
    here = scan_folder(lay_out(tmp_path / "here", "train/a/1.jpg", "train/b/2.jpg"), "train")
    there = scan_folder(lay_out(tmp_path / "there", "train/a/1.jpg", "train/b/2.jpg"), "train")
    renamed = scan_folder(lay_out(tmp_path / "renamed", "train/a/1.jpg", "train/b/3.jpg"), "train")
    assert here.fingerprint == there.fingerprint != renamed.fingerprint


@pytest.mark.parametrize("root", [None, "", "???"])
def test_a_root_that_was_not_given_is_asked_for_by_name(root: str | None) -> None:
    with pytest.raises(UserError, match=r"data\.root is not set.*train/<class>/"):
        scan_pair(root)


def test_a_root_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingPathError, match=r"data\.root=.*nowhere is not there"):
        scan_pair(str(tmp_path / "nowhere"))


def test_a_root_that_is_a_file_is_refused(tmp_path: Path) -> None:
    lay_out(tmp_path, "file")
    with pytest.raises(UserError, match=r"must be a folder.*it is a file"):
        scan_pair(str(tmp_path / "file"))


@pytest.mark.parametrize(("split", "other"), [("train", "val"), ("val", "train")])
def test_the_missing_split_is_named_with_what_was_found(tmp_path: Path, split: str, other: str) -> None:
    lay_out(tmp_path, f"{other}/a/1.jpg", "readme.txt")
    with pytest.raises(MissingPathError, match=rf"{split}/ is missing, found .*{other}/"):
        scan_pair(str(tmp_path))


@pytest.mark.parametrize(("split", "other"), [("train", "val"), ("val", "train")])
def test_classes_of_one_split_alone_are_named_five_at_most(tmp_path: Path, split: str, other: str) -> None:
    lay_out(tmp_path, "train/both/1.jpg", "val/both/1.jpg", *(f"{split}/alone{k}/1.jpg" for k in range(7)))
    expected = rf"7 classes are in {split}/ and not in {other}/: alone0, alone1, alone2, alone3, alone4 and 2 more"
    with pytest.raises(UserError, match=expected):
        scan_pair(str(tmp_path))


def test_an_empty_class_is_named(tmp_path: Path) -> None:
    lay_out(tmp_path, "train/a/1.jpg", "train/b/notes.txt", "val/a/1.jpg", "val/b/1.jpg")
    with pytest.raises(UserError, match="1 class folders of train/ hold no image: b;"):
        scan_pair(str(tmp_path))


def test_a_split_without_class_folders_is_refused(tmp_path: Path) -> None:
    lay_out(tmp_path, "train/1.jpg", "val/a/1.jpg")
    with pytest.raises(UserError, match="train/ holds no class folders"):
        scan_pair(str(tmp_path))
