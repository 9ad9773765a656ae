import shutil
from pathlib import Path

import numpy as np
import pytest

from fat_train.data.layout import scan_folder, scan_pair, scan_splits
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


def test_the_folder_that_was_probably_meant_is_named(tmp_path: Path) -> None:
    lay_out(tmp_path, "imagenet/train/a/1.jpg", "imagenet/val/a/1.jpg")
    for given in (tmp_path, tmp_path / "imagenet" / "train"):
        with pytest.raises(MissingPathError, match=rf"did you mean data\.root={tmp_path / 'imagenet'}\?"):
            scan_pair(given)


def test_every_layout_is_named_where_none_is_there(tmp_path: Path) -> None:
    lay_out(tmp_path, "readme.txt")
    for wrong in (None, tmp_path, tmp_path / "nowhere", tmp_path / "readme.txt"):
        with pytest.raises(
            UserError, match=r"train/<class>/ and val/<class>/, or Kaggle's ILSVRC/Data/CLS-LOC/ with LOC"
        ):
            scan_pair(wrong)


BOXES = "0 86 396 449"
ROWS = (f"v_3,b {BOXES} b 1 2 3 4 ", f"v_1,b {BOXES}", f"v_2,a {BOXES}", f"v_4,c {BOXES}")


def kaggle(archive: Path, *rows: str, header: str = "ImageId,PredictionString") -> Path:
    """What the archive unpacks to, with 3 training and 4 validation images."""
    tree = "ILSVRC/Data/CLS-LOC"
    lay_out(archive, *(f"{tree}/train/{name}/{name}_1.JPEG" for name in "cba"), f"{tree}/test/t_1.JPEG")
    lay_out(archive, *(f"{tree}/val/v_{number}.JPEG" for number in (4, 2, 3, 1)))
    (archive / "LOC_val_solution.csv").write_text("\n".join((header, *(rows or ROWS))) + "\n")
    return archive


@pytest.mark.parametrize("below", ["", "ILSVRC", "ILSVRC/Data", "ILSVRC/Data/CLS-LOC"])
def test_kaggles_tree_is_recognised_from_any_of_its_folders(tmp_path: Path, below: str) -> None:
    train, val = scan_pair(kaggle(tmp_path) / below)
    assert train.classes == val.classes == ("a", "b", "c")
    assert train.paths == ("a/a_1.JPEG", "b/b_1.JPEG", "c/c_1.JPEG")
    assert dict(zip(val.paths, val.targets.tolist(), strict=True)) == {
        "v_2.JPEG": 0,
        "v_1.JPEG": 1,
        "v_3.JPEG": 1,
        "v_4.JPEG": 2,
    }
    assert Path(val.place(0).file) == tmp_path / "ILSVRC/Data/CLS-LOC/val/v_2.JPEG"


def test_kaggles_tree_gives_the_order_of_class_folders(tmp_path: Path) -> None:
    """So the same image is validated by the same rank in both."""
    _, flat = scan_pair(kaggle(tmp_path / "kaggle"))
    lay_out(tmp_path / "folders", "train/a/1.jpg", "train/b/1.jpg", "train/c/1.jpg")
    lay_out(tmp_path / "folders", "val/a/v_2.JPEG", "val/b/v_3.JPEG", "val/b/v_1.JPEG", "val/c/v_4.JPEG")
    _, sorted_ = scan_pair(tmp_path / "folders")
    assert [Path(path).name for path in sorted_.paths] == list(flat.paths)
    np.testing.assert_array_equal(sorted_.targets, flat.targets)


def test_a_linked_tree_finds_its_table(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(kaggle(tmp_path / "archive") / "ILSVRC/Data/CLS-LOC")
    assert len(scan_pair(tmp_path / "link")[1]) == 4


def test_kaggles_validation_images_may_have_been_sorted_into_class_folders(tmp_path: Path) -> None:
    tree = "ILSVRC/Data/CLS-LOC"
    lay_out(tmp_path, f"{tree}/train/a/1.JPEG", f"{tree}/val/a/2.JPEG")
    assert [index.paths for index in scan_pair(tmp_path)] == [("a/1.JPEG",), ("a/2.JPEG",)]


def test_one_split_of_kaggles_tree_has_the_numbers_of_the_whole(tmp_path: Path) -> None:
    root = kaggle(tmp_path)
    whole_train, whole_val = scan_pair(root)
    (root / "ILSVRC/Data/CLS-LOC/val/v_2.JPEG").unlink()
    shutil.rmtree(root / "ILSVRC/Data/CLS-LOC/train")
    (val,) = scan_splits(root, ("val",))
    assert (val.paths, val.classes) == (whole_val.paths[1:], whole_val.classes)
    np.testing.assert_array_equal(val.targets, whole_val.targets[1:])

    root = kaggle(tmp_path / "other")
    (root / "LOC_val_solution.csv").unlink()
    (train,) = scan_splits(root, ("train",))
    assert train.fingerprint == whole_train.fingerprint


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (ROWS[:2] + ROWS[3:], r"LOC_val_solution\.csv lacks 1 of the images in .*val: v_2\.JPEG"),
        ((*ROWS[:3], "v_4,z 1 2 3 4"), r"LOC_val_solution\.csv names 1 classes that train/ lacks: z"),
        ((*ROWS[:3], "v_4,"), r"LOC_val_solution\.csv, line 5: v_4 has no class"),
        ((*ROWS[:3], "v_4"), r"LOC_val_solution\.csv, line 5: v_4 has no class"),
    ],
)
def test_a_table_that_does_not_fit_is_one_message(tmp_path: Path, rows: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        scan_pair(kaggle(tmp_path, *rows))


def test_another_table_is_refused_by_its_columns(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="must have the columns ImageId,PredictionString; got image,label"):
        scan_pair(kaggle(tmp_path, header="image,label"))


def test_a_missing_table_is_named_with_the_ways_out(tmp_path: Path) -> None:
    root = kaggle(tmp_path)
    (root / "LOC_val_solution.csv").unlink()
    with pytest.raises(MissingPathError, match=r"LOC_val_solution\.csv, which names .* sort val/ into val/<class>/"):
        scan_pair(root)
