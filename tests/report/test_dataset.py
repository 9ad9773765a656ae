from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from fat_train.data.index import FileIndex
from fat_train.data.layout import scan_pair
from fat_train.report.dataset import FATAL, NOTABLE, DatasetReport, inspect_image, scan_dataset

TURNED = Image.Exif()
TURNED[0x0112] = 6


def picture(mode: str = "RGB", size: tuple[int, int] = (64, 48)) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(noise).convert(mode)


def save_truncated(path: Path) -> None:
    picture(size=(256, 256)).save(path)
    path.write_bytes(path.read_bytes()[:-2000])


FAULTS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "truncated.JPEG": ("unreadable", save_truncated),
    "text.JPEG": ("unreadable", lambda path: path.write_text("no picture at all")),
    "empty.JPEG": ("zero_bytes", lambda path: path.touch()),
    "cmyk.JPEG": ("not_rgb", lambda path: picture("CMYK").save(path)),
    "gray.JPEG": ("not_rgb", lambda path: picture("L").save(path)),
    "alpha.png": ("not_rgb", lambda path: picture("RGBA").save(path)),
    "deep.png": ("not_rgb", lambda path: Image.fromarray(np.zeros((64, 64), np.uint16)).save(path)),
    "turned.JPEG": ("exif_turned", lambda path: picture().save(path, exif=TURNED)),
    "tiny.JPEG": ("tiny", lambda path: picture(size=(300, 31)).save(path)),
    "png.JPEG": ("wrong_extension", lambda path: picture().save(path, format="PNG")),
}


@pytest.fixture
def data_root(tmp_path: Path) -> Path:
    """Two classes with five sound pictures each, in both splits."""
    for split in ("train", "val"):
        for class_name in ("cat", "dog"):
            folder = tmp_path / "data" / split / class_name
            folder.mkdir(parents=True)
            for number in range(5):
                picture().save(folder / f"sound{number}.JPEG")
    return tmp_path / "data"


def scan(root: Path, workers: int = 1) -> DatasetReport:
    return scan_dataset(*scan_pair(str(root)), workers=workers)


def test_sound_pictures_raise_no_finding(data_root: Path) -> None:
    picture().save(data_root / "train" / "cat" / "sound.png")
    picture().save(data_root / "train" / "cat" / "sound.jpg")
    report = scan(data_root)
    assert report.train.findings == report.val.findings == []
    assert report.is_trainable


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_found_by_path(name: str, data_root: Path) -> None:
    kind, plant = FAULTS[name]
    path = data_root / "val" / "dog" / name
    plant(path)
    report = scan(data_root)
    assert report.train.findings == []
    assert [(finding.kind, finding.path) for finding in report.val.findings] == [(kind, str(path))]
    assert report.is_trainable == (kind not in FATAL)
    assert any(str(path) in line for line in report.lines())


def test_a_link_to_nowhere_is_unreadable(tmp_path: Path) -> None:
    link = tmp_path / "gone.JPEG"
    link.symlink_to(tmp_path / "nowhere")
    (finding,) = inspect_image(str(link))
    assert finding.kind == "unreadable"


def test_one_picture_can_have_several_findings(tmp_path: Path) -> None:
    path = tmp_path / "all.png"
    picture("L", (20, 20)).save(path, format="JPEG", exif=TURNED)
    assert {finding.kind for finding in inspect_image(str(path))} == NOTABLE.keys()


def test_processes_find_what_one_finds_in_the_same_order(data_root: Path) -> None:
    for name, (_, plant) in FAULTS.items():
        plant(data_root / "train" / "cat" / name)
    report = scan(data_root, workers=2)
    assert len(report.train.findings) == len(FAULTS)
    assert report == scan(data_root, workers=1)


def test_classes_far_from_the_median_are_named(data_root: Path) -> None:
    for class_name, count in {"few": 2, "many": 11, "usual": 5}.items():
        for split in ("train", "val"):
            folder = data_root / split / class_name
            folder.mkdir()
            for number in range(count if split == "train" else 5):
                picture().save(folder / f"{number}.JPEG")
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
        picture("L").save(data_root / "train" / "dog" / f"gray{number}.JPEG")
    report = scan(data_root)
    gray = [line for line in report.lines(at_most=3) if "gray" in line]
    assert len(gray) == 3
    assert "  and 5 more" in report.lines(at_most=3)
    kept = json.loads(json.dumps(report.as_dict()))
    assert [Path(finding["path"]).name for finding in kept["train"]["findings"]] == [f"gray{n}.JPEG" for n in range(8)]
    assert kept["val"]["images"] == 10


def test_the_table_counts_each_kind(data_root: Path) -> None:
    for name, (_, plant) in FAULTS.items():
        plant(data_root / "train" / "cat" / name)
    console = Console(file=io.StringIO(), width=120)
    console.print(scan(data_root).table())
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for kind, meaning in (FATAL | NOTABLE).items():
        (line,) = (line for line in text.splitlines() if meaning in line)
        assert line.split("│")[2].strip() == str(sum(planted == kind for planted, _ in FAULTS.values()))


def test_a_bar_is_shown_on_a_terminal_alone(data_root: Path) -> None:
    train, val = scan_pair(str(data_root))
    screens = {terminal: Console(file=io.StringIO(), force_terminal=terminal) for terminal in (True, False)}
    for screen in screens.values():
        scan_dataset(train, val, workers=1, console=screen)
    assert "reading train" in screens[True].file.getvalue()  # type: ignore[attr-defined]
    assert screens[False].file.getvalue() == ""  # type: ignore[attr-defined]
