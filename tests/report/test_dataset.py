from __future__ import annotations

import io
import json
import os
import shutil
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from fat_train.data.index import FileIndex
from fat_train.data.layout import scan_pair
from fat_train.report.dataset import DatasetReport, class_order, exclude_list, scan_dataset
from fat_train.report.inspection import EXCLUDED, KINDS
from fat_train.report.scan_cache import ScanCache


def picture(seed: int, mode: str = "RGB") -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (48, 64, 3), np.uint8)
    return Image.fromarray(noise).convert(mode)


@pytest.fixture
def data_root(tmp_path: Path) -> Path:
    """Two classes with five sound pictures each, in both splits."""
    seeds = count()
    for split in ("train", "val"):
        for class_name in ("cat", "dog"):
            folder = tmp_path / "data" / split / class_name
            folder.mkdir(parents=True)
            for number in range(5):
                picture(next(seeds)).save(folder / f"sound{number}.JPEG")
    return tmp_path / "data"


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where checks keep what they have seen."""
    monkeypatch.setenv("FAT_TRAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "check-v1"


def scan(root: Path, workers: int = 1, keep: bool = False) -> DatasetReport:
    return scan_dataset(*scan_pair(str(root)), workers=workers, cache=ScanCache(root) if keep else None)


def plant(root: Path) -> dict[str, str]:
    """Put images into the set that are better left out; their kinds by name."""
    (root / "train/cat/empty.JPEG").touch()
    (root / "train/dog/text.JPEG").write_text("no picture")
    (root / "val/dog/cut.JPEG").write_bytes((root / "val/dog/sound0.JPEG").read_bytes()[:-900])
    Image.fromarray(np.full((64, 64), 999, np.uint16)).save(root / "val/cat/deep.png")
    shutil.copy(root / "val/cat/sound1.JPEG", root / "train/cat/leak.JPEG")
    kinds = {"train/cat/empty.JPEG": "empty", "train/dog/text.JPEG": "unreadable", "val/dog/cut.JPEG": "truncated"}
    return kinds | {"val/cat/deep.png": "ambiguous", "train/cat/leak.JPEG": "in_val"}


def test_sound_pictures_raise_no_finding(data_root: Path) -> None:
    report = scan(data_root)
    assert report.train.findings == report.val.findings == []
    assert report.is_trainable
    assert report.excluded() == {}


def test_what_stops_or_spoils_training_is_listed_by_name(data_root: Path) -> None:
    kinds = plant(data_root)
    picture(90, "L").save(data_root / "train/dog/grey.JPEG")
    report = scan(data_root)
    assert not report.is_trainable
    found = {finding.image: finding.kind for _, split in report.splits() for finding in split.findings}
    assert found == kinds | {"train/dog/grey.JPEG": "grey"}
    assert report.excluded().keys() == kinds.keys()
    for name in kinds:
        assert any(line.startswith(f"  {name}: ") for line in report.lines())


def test_the_list_has_a_name_a_tab_and_a_reason_a_line_and_keeps_what_it_had(data_root: Path) -> None:
    kinds = plant(data_root)
    old = "# by hand\ntrain/cat/mine.JPEG\t# ugly"
    lines = exclude_list(scan(data_root).excluded(), old).splitlines()
    assert lines[:2] == old.splitlines()
    for line, name in zip(lines[2:], sorted(kinds, key=lambda name: (name[:3] == "val", name)), strict=True):
        image, reason = line.split("\t")
        assert image == name
        assert reason.startswith(f"# {kinds[name].replace('_', ' ')}: ")
    assert exclude_list({}) == ""


def test_a_validation_image_in_training_spoils_and_does_not_stop(data_root: Path) -> None:
    shutil.copy(data_root / "val/cat/sound1.JPEG", data_root / "train/dog/leak.JPEG")
    report = scan(data_root)
    (finding,) = report.train.findings
    assert finding.kind == "in_val"
    assert finding.detail == "is val/cat/sound1.JPEG, where it is labelled cat instead of dog"
    assert report.is_trainable
    assert "train/dog/leak.JPEG" in report.excluded()


def test_copies_within_a_split_are_told_and_stay(data_root: Path) -> None:
    for name in ("a", "b"):
        shutil.copy(data_root / "val/dog/sound1.JPEG", data_root / f"val/dog/{name}.JPEG")
    report = scan(data_root)
    assert [(f.kind, f.image, f.detail) for f in report.val.findings] == [
        ("duplicate", "val/dog/b.JPEG", "is val/dog/a.JPEG"),
        ("duplicate", "val/dog/sound1.JPEG", "is val/dog/a.JPEG"),
    ]
    assert report.excluded() == {}


def test_one_file_in_both_splits_is_no_copy(data_root: Path) -> None:
    train, _ = scan_pair(str(data_root))
    (data_root / "train/cat/empty.JPEG").touch()
    broken, _ = scan_pair(str(data_root))
    report = scan_dataset(broken, train, workers=1)  # as debug.overfit_images and a held-out part have it
    assert [finding.kind for finding in report.train.findings] == ["empty"]


def test_empty_files_are_no_copies_of_each_other(data_root: Path) -> None:
    for name in ("train/cat/a.JPEG", "train/cat/b.JPEG", "val/cat/c.JPEG"):
        (data_root / name).touch()
    report = scan(data_root)
    assert {finding.kind for _, split in report.splits() for finding in split.findings} == {"empty"}


def test_processes_find_what_one_finds_in_the_same_order(data_root: Path) -> None:
    plant(data_root)
    assert scan(data_root, workers=2) == scan(data_root, workers=1)


def test_a_second_scan_reads_nothing_and_finds_the_same(data_root: Path, kept: Path) -> None:
    plant(data_root)
    first = scan(data_root, keep=True)
    assert (first.unchanged, first.read) == (0, 25)
    second = scan(data_root, keep=True)
    assert (second.unchanged, second.read) == (25, 0)
    assert (second.train, second.val) == (first.train, first.val)
    assert "files          25 unchanged since the last check, 0 read" in second.lines()


def test_a_file_that_was_touched_is_read_again(data_root: Path, kept: Path) -> None:
    plant(data_root)
    scan(data_root, keep=True)
    os.utime(data_root / "train/cat/sound0.JPEG", ns=(1, 1))
    picture(91).save(data_root / "train/cat/empty.JPEG")  # mended
    report = scan(data_root, keep=True)
    assert report.read == 2
    assert "train/cat/empty.JPEG" not in report.excluded()


def test_torn_ends_of_the_kept_files_cost_their_images_alone(data_root: Path, kept: Path) -> None:
    plant(data_root)
    first = scan(data_root, keep=True)
    (seen,), (odd,) = kept.glob("*.seen"), kept.glob("*.odd")
    os.truncate(seen, seen.stat().st_size - 40)  # one record and a part of another
    assert scan(data_root, keep=True).read == 2
    os.truncate(odd, odd.stat().st_size - 5)
    third = scan(data_root, keep=True)
    assert third.read == 1
    assert (third.train, third.val) == (first.train, first.val)


def test_a_folder_that_nothing_can_be_kept_in_is_told_and_no_more(data_root: Path, kept: Path) -> None:
    kept.parent.mkdir()
    kept.write_text("a file where the folder would be")
    report = scan(data_root, keep=True)
    assert report.read == 20
    assert any(line.startswith("Warning: what is read cannot be kept") for line in report.lines())


def test_the_numbers_of_the_classes_are_held_against_torchvisions(data_root: Path) -> None:
    train, _ = scan_pair(str(data_root))
    told = class_order(train)
    assert told is not None
    assert "numbered as torchvision's ImageFolder" in told
    told = class_order(replace(train, classes=("dog", "cat")))
    assert told is not None
    assert "number 0 is dog here, cat there" in told
    (data_root / "train/eel").mkdir()
    told = class_order(train)
    assert told is not None
    assert "number 2 is none here, eel there" in told
    assert class_order(replace(train, root=data_root / "nowhere")) is None


def test_classes_far_from_the_median_are_named(data_root: Path) -> None:
    for class_name, images in {"few": 2, "many": 11, "usual": 5}.items():
        for split in ("train", "val"):
            folder = data_root / split / class_name
            folder.mkdir()
            for number in range(images if split == "train" else 5):
                picture(number).save(folder / f"{number}.JPEG")
    report = scan(data_root)
    assert report.train.far_classes == {"few": 2, "many": 11}
    assert report.val.far_classes == {}
    assert (report.train.per_class_min, report.train.per_class_median, report.train.per_class_max) == (2, 5, 11)
    assert "  few: 2 images" in report.lines()


def test_a_thousand_classes_are_held_against_imagenet(data_root: Path) -> None:
    sound = data_root / "train" / "cat"
    classes = tuple(f"n{number:08}" for number in range(1000))
    index = FileIndex(sound, ("sound0.JPEG",), np.array([0]), classes)
    report = scan_dataset(index, index, workers=1)
    assert "train: 1 images where ImageNet-1k has 1,281,167" in report.lines()
    assert "val: 1 images where ImageNet-1k has 50,000" in report.lines()
    assert scan(data_root).train.expected_images is None


def test_long_lists_are_cut_on_the_screen_and_whole_in_the_file(data_root: Path) -> None:
    for number in range(8):
        picture(number, "L").save(data_root / "train" / "dog" / f"gray{number}.JPEG")
    report = scan(data_root)
    gray = [line for line in report.lines(at_most=3) if "gray" in line]
    assert len(gray) == 3
    assert "  and 5 more" in report.lines(at_most=3)
    kept = json.loads(json.dumps(report.as_dict()))
    assert [Path(finding["path"]).name for finding in kept["train"]["findings"]] == [f"gray{n}.JPEG" for n in range(8)]
    assert kept["val"]["images"] == 10


def test_the_table_counts_what_there_is_and_every_fault(data_root: Path) -> None:
    kinds = plant(data_root)
    picture(90, "L").save(data_root / "val/dog/grey.JPEG")
    console = Console(file=io.StringIO(), width=120)
    console.print(scan(data_root).table())
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for kind in (*EXCLUDED, "grey"):
        (line,) = (line for line in text.splitlines() if line[1:].strip().startswith(KINDS[kind].title))
        counts = [int(cell) for cell in line.split("│")[2:4]]
        assert counts == [
            sum(name.startswith(split) and found == kind for name, found in kinds.items())
            + (split == "val" and kind == "grey")
            for split in ("train", "val")
        ]
    assert KINDS["palette"].title not in text


def test_a_bar_is_shown_on_a_terminal_alone(data_root: Path) -> None:
    train, val = scan_pair(str(data_root))
    screens = {terminal: Console(file=io.StringIO(), force_terminal=terminal) for terminal in (True, False)}
    for screen in screens.values():
        scan_dataset(train, val, workers=1, console=screen)
    assert "reading train" in screens[True].file.getvalue()  # type: ignore[attr-defined]
    assert screens[False].file.getvalue() == ""  # type: ignore[attr-defined]
