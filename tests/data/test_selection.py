from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from fat_train.data.index import FileIndex
from fat_train.data.selection import Choice, Chosen, select
from fat_train.types import MissingPathError, UserError

CLASSES = ("ant", "bee", "cat")
SIZES = (200, 30, 1)
Found = dict[str, FileIndex]


def index_of(split: str, sizes: tuple[int, ...] = SIZES, classes: tuple[str, ...] = CLASSES) -> FileIndex:
    targets = np.repeat(np.arange(len(classes)), sizes)
    names = [
        f"{name}/{name}_{number}.JPEG" for name, size in zip(classes, sizes, strict=True) for number in range(size)
    ]
    return FileIndex(Path("set") / split, tuple(names), targets, classes)


@pytest.fixture
def found() -> Found:
    return {"train": index_of("train"), "val": index_of("val", (4, 4, 4))}


def written(file: Path, *lines: str) -> str:
    file.write_text("\n".join(lines) + "\n")
    return str(file)


def counts(index: FileIndex) -> list[int]:
    return np.bincount(index.targets, minlength=len(index.classes)).tolist()


def names(chosen: Chosen, split: str = "train") -> set[str]:
    return set(chosen.splits[split].paths)


def test_without_a_choice_everything_takes_part(found: Found) -> None:
    chosen = select(found, Choice())
    assert (chosen.splits, chosen.notes) == (found, [])


def test_a_share_is_of_every_class_and_at_least_one_image(found: Found) -> None:
    assert counts(select(found, Choice(subset="0.1")).splits["train"]) == [20, 3, 1]
    assert counts(select(found, Choice(subset="0.01")).splits["train"]) == [2, 1, 1]
    assert len(select(found, Choice(subset="0.01")).splits["val"]) == 12


def test_a_smaller_share_lies_within_a_larger_one(found: Found) -> None:
    shares = [names(select(found, Choice(subset=share))) for share in ("0.01", "0.02", "0.1", "0.5", "1")]
    assert all(less < more for less, more in pairwise(shares))
    assert shares[-1] == set(found["train"].paths)


def test_a_share_follows_from_the_names_alone(found: Found) -> None:
    """The very images are pinned: another hash or another rounding would be another 1 % than that of older runs."""
    chosen = names(select(found, Choice(subset="0.01")))
    assert chosen == {"ant/ant_169.JPEG", "ant/ant_86.JPEG", "bee/bee_15.JPEG", "cat/cat_0.JPEG"}
    order = np.random.default_rng(0).permutation(len(found["train"]))
    assert names(select(found | {"train": found["train"].take(order)}, Choice(subset="0.01"))) == chosen
    deeper = tuple(path.replace("/", "/more/") for path in found["train"].paths)
    moved = FileIndex(Path("elsewhere"), deeper, found["train"].targets, CLASSES)
    there = names(select({"train": moved, "val": found["val"]}, Choice(subset="0.01")))
    assert {name.replace("/more/", "/") for name in there} == chosen


@pytest.mark.parametrize("line", ["bee_7.JPEG", "bee/bee_7.JPEG", "train/bee/bee_7.JPEG", "./train/bee/bee_7.JPEG\r"])
def test_a_list_of_names_is_a_subset_however_they_are_written(found: Found, tmp_path: Path, line: str) -> None:
    file = written(tmp_path / "list.txt", "# one of each", "", "ant_0.JPEG\t# the first", "cat/cat_0.JPEG # last", line)
    chosen = select(found, Choice(subset=file))
    assert chosen.splits["train"].paths == ("ant/ant_0.JPEG", "bee/bee_7.JPEG", "cat/cat_0.JPEG")
    assert chosen.notes == [f"data.subset={file}: 3 of 231 training images"]


def test_a_name_with_spaces_ends_at_the_tab(tmp_path: Path) -> None:
    train = FileIndex(Path("set/train"), ("a/my cat #1.jpg", "a/x.jpg"), np.array([0, 0]), ("a",))
    file = written(tmp_path / "bad.txt", "train/a/my cat #1.jpg\t# blurred")
    assert select({"train": train, "val": train}, Choice(exclude=file)).splits["train"].paths == ("a/x.jpg",)


def test_chosen_classes_are_numbered_anew_in_both_splits(found: Found, tmp_path: Path) -> None:
    for lines in (("cat a small tiger", "bee"), ('{"cat": "a small tiger, tame", "bee": "an insect"}',)):
        chosen = select(found, Choice(class_list=written(tmp_path / "classes", *lines)))
        for index in chosen.splits.values():
            assert index.classes == ("bee", "cat")
            assert {path.split("/")[0] for path in index.paths} == {"bee", "cat"}
            assert [index.classes[number] for number in index.targets] == [path.split("/")[0] for path in index.paths]


def test_a_class_in_one_split_alone_does_no_harm_where_it_is_not_chosen(found: Found, tmp_path: Path) -> None:
    found["val"] = index_of("val", (2, 2), ("ant", "bee"))
    with pytest.raises(UserError, match=r"1 classes are in train/ and not in val/: cat\. data\.class_list=<file>"):
        select(found, Choice())
    chosen = select(found, Choice(class_list=written(tmp_path / "classes", "ant", "bee")))
    assert chosen.splits["train"].classes == chosen.splits["val"].classes == ("ant", "bee")


def test_excluded_images_leave_their_own_split_alone(found: Found, tmp_path: Path) -> None:
    file = written(
        tmp_path / "bad.txt", "# broken", "train/ant/ant_1.JPEG\t# truncated", "val/bee/bee_1.JPEG", "train/x/y"
    )
    chosen = select(found, Choice(exclude=file))
    assert set(found["train"].paths) - names(chosen) == {"ant/ant_1.JPEG"}
    assert set(found["val"].paths) - names(chosen, "val") == {"bee/bee_1.JPEG"}
    assert chosen.notes == [f"data.exclude={file}: 2 of its 3 images found and left out"]


def test_flat_validation_images_are_excluded_by_their_name(found: Found, tmp_path: Path) -> None:
    found["val"] = FileIndex(Path("set/val"), ("v_1.JPEG", "v_2.JPEG", "v_3.JPEG"), np.arange(3), CLASSES)
    chosen = select(found, Choice(exclude=written(tmp_path / "bad.txt", "val/v_2.JPEG")))
    assert chosen.splits["val"].paths == ("v_1.JPEG", "v_3.JPEG")


def test_what_is_excluded_of_a_split_that_is_not_looked_at_is_not_judged(found: Found, tmp_path: Path) -> None:
    file = written(tmp_path / "bad.txt", "train/ant/ant_1.JPEG")
    assert len(select({"val": found["val"]}, Choice(exclude=file)).splits["val"]) == 12
    assert len(select({"val": found["val"]}, Choice(exclude=written(tmp_path / "none.txt"))).splits["val"]) == 12


def test_a_held_out_split_keeps_every_class_and_trains_on_none_of_it(found: Found) -> None:
    train = index_of("train", (200, 30, 2))
    for share, sizes in ((0.01, [2, 1, 1]), (0.1, [20, 3, 1]), (0.999, [199, 29, 1])):
        chosen = select({"train": train}, Choice(holdout=share))
        assert counts(chosen.splits["val"]) == sizes
        assert not names(chosen) & names(chosen, "val")
        assert names(chosen) | names(chosen, "val") == set(train.paths)
        assert chosen.splits["val"].root == train.root
    assert "val/ is not looked at" in chosen.notes[0]


def test_what_is_held_out_is_independent_of_the_subset(found: Found) -> None:
    """By one and the same order of the names, the holdout of a subset would be that of the whole set."""
    train = index_of("train", (200, 100, 50))
    held_out = names(select({"train": train}, Choice(holdout=0.1)), "val")
    assert len(held_out & names(select({"train": train}, Choice(subset="0.1")))) < 0.5 * len(held_out)


def test_the_steps_take_place_in_the_written_order(found: Found, tmp_path: Path) -> None:
    """Names are looked up in the whole set, whatever the steps before have left of it."""
    choice = Choice(
        class_list=written(tmp_path / "classes", "ant", "bee"),
        exclude=written(tmp_path / "bad.txt", "train/ant/ant_1.JPEG", "train/cat/cat_0.JPEG"),
        subset=written(
            tmp_path / "list.txt", *(f"ant_{k}.JPEG" for k in range(11)), "bee_0.JPEG", "bee_1.JPEG", "cat_0.JPEG"
        ),
        holdout=0.2,
    )
    chosen = select({"train": found["train"]}, choice)
    assert {split: counts(index) for split, index in chosen.splits.items()} == {"train": [8, 1], "val": [2, 1]}
    assert [note.partition("=")[0] for note in chosen.notes] == [
        f"data.{name}" for name in ("class_list", "exclude", "subset", "holdout")
    ]


def test_the_fingerprint_changes_with_each_choice(found: Found, tmp_path: Path) -> None:
    found["train"] = index_of("train", (20, 20, 20))
    choices = [
        Choice(),
        Choice(class_list=written(tmp_path / "classes", "ant", "bee")),
        Choice(exclude=written(tmp_path / "bad.txt", "train/ant/ant_1.JPEG")),
        Choice(subset="0.5"),
        Choice(holdout=0.1),
        Choice(holdout=0.2),
    ]
    assert len({select(found, choice).splits["train"].fingerprint for choice in choices}) == len(choices)
    held_out = select(found, choices[-1]).splits["val"]
    assert held_out.fingerprint != found["val"].fingerprint


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("subset", "0", r"data\.subset must be null, a share in \(0, 1\], or a text file .*; got 0"),
        ("subset", "1.5", "got 1.5"),
        ("subset", "nan", "got nan"),
        ("holdout", 1.0, r"data\.holdout must be a share in \[0, 1\) .*; got 1\.0"),
        ("holdout", -0.1, "got -0.1"),
    ],
)
def test_an_impossible_share_is_refused(field: str, value: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Choice(**{field: value})


@pytest.mark.parametrize("field", ["class_list", "exclude", "subset"])
def test_a_list_that_is_not_there_is_named_with_its_setting(found: Found, tmp_path: Path, field: str) -> None:
    with pytest.raises(
        MissingPathError, match=rf"data\.{field} must be null, .*; got 'nowhere\.txt', which is not there"
    ):
        select(found, Choice(**{field: "nowhere.txt"}))
    with pytest.raises(UserError, match=rf"data\.{field} must be null, .*, which is a folder"):
        select(found, Choice(**{field: str(tmp_path)}))


@pytest.mark.parametrize(
    ("field", "lines", "message"),
    [
        (
            "class_list",
            ["ant", "bea", "dog"],
            r"2 of its 3 classes are not in the data set: bea, dog; did you mean bee\?",
        ),
        ("class_list", ["{ant}"], "begins like JSON and is not: Expecting"),
        ("class_list", ["# nothing"], "names no class"),
        ("exclude", ["PK\0"], r"data\.exclude must be null, .*, which is not text"),
        ("subset", ["ant_0.JPEG", "ant_900.JPEG", "z"], r"2 of its 3 names are no training image: ant_900\.JPEG, z"),
        ("subset", ["dog/ant_0.JPEG"], r"did you mean ant/ant_0\.JPEG\?"),
        ("subset", ["ant_0.JPEG"], r"leaves 2 classes without a training image: bee, cat; data\.class_list=<file>"),
        ("exclude", ["ant/ant_0.JPEG"], r"none of its 1 names is an image .* did you mean train/ant/ant_0\.JPEG\?"),
        ("exclude", ["train/ant/ant_0.JPG"], r"; did you mean train/ant/ant_\d+\.JPEG\?"),
        ("exclude", ["n01/x"], r"; names here are like train/ant/ant_0\.JPEG"),
        (
            "exclude",
            ["train/cat/cat_0.JPEG"],
            r"data\.exclude=.*list\.txt leaves 1 classes without a training image: cat",
        ),
        (
            "exclude",
            [f"val/{n}/{n}_{k}.JPEG" for n in CLASSES for k in range(4)],
            r"no image of val/ is left: .*12 of its",
        ),
    ],
)
def test_a_list_that_does_not_fit_is_one_message(
    found: Found, tmp_path: Path, field: str, lines: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        select(found, Choice(**{field: written(tmp_path / "list.txt", *lines)}))


def test_a_bare_name_of_several_images_is_refused(tmp_path: Path) -> None:
    train = FileIndex(Path("set/train"), ("a/1.jpg", "b/1.jpg"), np.arange(2), ("a", "b"))
    with pytest.raises(UserError, match=r"1 of its names are those of several training images: 1\.jpg; write <class>"):
        select({"train": train, "val": train}, Choice(subset=written(tmp_path / "list.txt", "1.jpg")))


def test_a_class_of_one_image_cannot_be_held_out(found: Found) -> None:
    with pytest.raises(UserError, match=r"data\.holdout=0\.1 needs at least 2 training images .* these have one: cat"):
        select({"train": found["train"]}, Choice(holdout=0.1))
