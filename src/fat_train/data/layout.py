"""How a data set lies on disk: the layouts that `data.root` may have, told apart by looking at them.

`LAYOUTS` lists them in the order in which they are tried. Every one of them gives the same list of images for the same
files: classes numbered in sorted order, images sorted by class and then by name.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fat_train.data.index import EXTENSIONS, SPLITS, FileIndex
from fat_train.data.shard import has_shards, scan_shards
from fat_train.types import MissingPathError, UserError, some

KEY = "data.root"
SCAN_THREADS = 16

KAGGLE_TREE = "ILSVRC/Data/CLS-LOC"
KAGGLE_LABELS = "LOC_val_solution.csv"
KAGGLE_COLUMNS = ("ImageId", "PredictionString")


class Layout(NamedTuple):
    """One way in which the images of a data set may lie."""

    wanted: str
    """What `data.root` holds, for messages."""
    recognise: Callable[[Path], bool]
    """Whether a folder is laid out so."""
    scan: Callable[[Path, Sequence[str]], Sequence[FileIndex]]
    """The images of some splits of such a folder, in the given order; the others need not be there."""


def scan_pair(root: str | Path | None) -> tuple[FileIndex, FileIndex]:
    """List the training and the validation images of a folder in any of the layouts.

    Raises:
        MissingPathError: the folder, or a part of its layout, is not there.
        UserError: no root was given, it is no folder, it has no classes, a class is empty or in one split only.
    """
    train, val = scan_splits(root, SPLITS)
    refuse_unlike_classes(train, val)
    return train, val


def scan_splits(root: str | Path | None, splits: Sequence[str]) -> Sequence[FileIndex]:
    """List the images of some splits of a folder in any of the layouts; their classes are not compared.

    Raises:
        UserError: as `scan_pair`.
    """
    folder = checked_root(root)
    return next(layout for layout in LAYOUTS if layout.recognise(folder)).scan(folder, splits)


def refuse_unlike_classes(train: FileIndex, val: FileIndex) -> None:
    """Refuse two splits that do not have the same classes.

    Raises:
        UserError: a class in one of them alone.
    """
    root = train.root.parent
    for have, lack, split, other in ((train, val, "train", "val"), (val, train, "val", "train")):
        alone = sorted(set(have.classes) - set(lack.classes))
        if alone:
            raise UserError(
                f"{KEY}={root}: {len(alone)} classes are in {split}/ and not in {other}/: {some(alone)}. "
                "data.class_list=<file> keeps the classes of a list alone"
            )


def scan_folder(root: Path, split: str) -> FileIndex:
    """List the images under `root/split/<class>/`, at any depth; symbolic links are followed, hidden names are not.

    Raises:
        MissingPathError: the split is not there.
        UserError: it has no class folders, or a class has no image.
    """
    split_folder = root / split
    if not split_folder.is_dir():
        raise _missing(root, split)
    classes = sorted(entry.name for entry in os.scandir(split_folder) if entry.is_dir() and entry.name[0] != ".")
    if not classes:
        raise UserError(f"{KEY}={root}: {split}/ holds no class folders; images belong in {split}/<class>/")
    with ThreadPoolExecutor(SCAN_THREADS) as pool:
        files = list(pool.map(lambda name: _images_in(str(split_folder), name), classes))
    empty = [name for name, paths in zip(classes, files, strict=True) if not paths]
    if empty:
        raise UserError(
            f"{KEY}={root}: {len(empty)} class folders of {split}/ hold no image: {some(empty)}; "
            f"files count that end in {' '.join(EXTENSIONS)}"
        )
    targets = np.repeat(np.arange(len(classes)), [len(paths) for paths in files])
    return FileIndex(split_folder, tuple(path for paths in files for path in paths), targets, tuple(classes))


def _scan_folders(root: Path, splits: Sequence[str]) -> list[FileIndex]:
    return [scan_folder(root, split) for split in splits]


def _is_kaggle(root: Path) -> bool:
    return _kaggle_tree(root) != root or _is_flat(root / "val")


def _scan_kaggle(root: Path, splits: Sequence[str]) -> list[FileIndex]:
    """The archive of Kaggle's ImageNet challenge: its validation images lie flat, and a table names their classes.

    Where somebody has sorted them into class folders already, they are an image folder.
    """
    tree = _kaggle_tree(root)
    flat = _is_flat(tree / "val")
    scans = {split: (_scan_flat if split == "val" and flat else scan_folder)(tree, split) for split in splits}
    if flat and set(splits) == set(SPLITS):
        train, val = scans["train"], scans["val"]
        unknown = sorted(set(val.classes) - set(train.classes))
        if unknown:
            raise UserError(f"{_labels_file(tree)} names {len(unknown)} classes that train/ lacks: {some(unknown)}")
    return [scans[split] for split in splits]


def _kaggle_tree(root: Path) -> Path:
    """Where train/ and val/ lie: below the archive's folder or ILSVRC/, or here."""
    names = KAGGLE_TREE.split("/")
    below = [root / "/".join(names[skip:]) for skip in range(len(names))]
    return next((tree for tree in below if tree.is_dir()), root)


def _is_flat(folder: Path) -> bool:
    """Whether images lie in this very folder, and no folders."""
    if not folder.is_dir():
        return False
    images = False
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name[0] != "." and entry.is_dir():
                return False
            images = images or _is_image(entry.name)
    return images


def _scan_flat(tree: Path, split: str) -> FileIndex:
    file = _labels_file(tree)
    wnids = _read_labels(file)
    names = [entry.name for entry in os.scandir(tree / split) if _is_image(entry.name)]
    unlabelled = sorted(name for name in names if Path(name).stem not in wnids)
    if unlabelled:
        raise UserError(f"{file} lacks {len(unlabelled)} of the images in {tree / split}: {some(unlabelled)}")
    # The classes are the table's: a folder of which a part is missing keeps their numbers.
    classes = sorted(set(wnids.values()))
    numbers = {name: number for number, name in enumerate(classes)}
    rows = sorted((numbers[wnids[Path(name).stem]], name) for name in names)
    targets = np.array([target for target, _ in rows], np.int64)
    return FileIndex(tree / split, tuple(name for _, name in rows), targets, tuple(classes))


def _labels_file(tree: Path) -> Path:
    """The table lies beside ILSVRC/, where the archive unpacks; links on the way there are followed."""
    levels = KAGGLE_TREE.count("/") + 1
    folders = [tree, *tree.absolute().parents[:levels], *tree.resolve().parents[:levels]]
    found = next((folder / KAGGLE_LABELS for folder in folders if (folder / KAGGLE_LABELS).is_file()), None)
    if found is None:
        raise MissingPathError(
            f"{KEY}={tree}: the images of val/ lie in no class folders, and {KAGGLE_LABELS}, which names their "
            f"classes, is neither there nor in the {levels} folders above: put it there, or sort val/ into val/<class>/"
        )
    return found


def _read_labels(file: Path) -> dict[str, str]:
    """Name without its ending -> class; of several boxes the first tells it."""
    with file.open(newline="", encoding="utf-8-sig", errors="replace") as lines:
        table = csv.DictReader(lines)
        if not set(KAGGLE_COLUMNS) <= set(table.fieldnames or ()):
            got = ",".join(table.fieldnames or ["nothing"])
            raise UserError(f"{file} must have the columns {','.join(KAGGLE_COLUMNS)}; got {got[:80]}")
        wnids = {}
        for row in table:
            name, prediction = (row[column] or "" for column in KAGGLE_COLUMNS)
            if not prediction.split():
                raise UserError(f"{file}, line {table.line_num}: {name} has no class")
            wnids[name] = prediction.split()[0]
    return wnids


def checked_root(root: str | Path | None) -> Path:
    """The folder that was given.

    Raises:
        MissingPathError: it is not there.
        UserError: none was given, or it is a file.
    """
    if root is None or str(root) in ("", "???"):
        raise UserError(
            f"{KEY} is not set: give the folder that holds {_wanted()}, as {KEY}=<folder> or by "
            "the environment's FAT_TRAIN_DATA; data=digits needs no folder"
        )
    folder = Path(root).expanduser()
    if not folder.exists():
        raise MissingPathError(f"{KEY}={folder} is not there: give the folder that holds {_wanted()}")
    if not folder.is_dir():
        raise UserError(f"{KEY}={folder} must be a folder that holds {_wanted()}; it is a file")
    return folder


def _missing(root: Path, split: str) -> MissingPathError:
    entries = [entry for entry in os.scandir(root) if entry.name[0] != "."]
    found = sorted(entry.name + "/" * entry.is_dir() for entry in entries)
    near = [root.parent] * (root.name in SPLITS) + [root / entry.name for entry in entries if entry.is_dir()]
    better = next((folder for folder in near if any((folder / name).is_dir() for name in (*SPLITS, "ILSVRC"))), None)
    hint = f"; did you mean {KEY}={better}?" if better else ""
    return MissingPathError(f"{KEY}={root} must hold {_wanted()}; {split}/ is missing, found {some(found)}{hint}")


def _wanted() -> str:
    return ", or ".join(layout.wanted for layout in reversed(LAYOUTS))


def _is_image(name: str) -> bool:
    return name[0] != "." and name.lower().endswith(EXTENSIONS)


def _images_in(split_folder: str, class_name: str) -> list[str]:
    paths: list[str] = []
    for folder, subfolders, names in os.walk(f"{split_folder}/{class_name}", followlinks=True):
        subfolders[:] = [name for name in subfolders if name[0] != "."]
        prefix = folder[len(split_folder) + 1 :]
        paths += [f"{prefix}/{name}" for name in names if _is_image(name)]
    return sorted(paths)


LAYOUTS = (
    Layout("train/*.tar and val/*.tar", has_shards, scan_shards),
    Layout(f"Kaggle's {KAGGLE_TREE}/ with {KAGGLE_LABELS} beside ILSVRC/", _is_kaggle, _scan_kaggle),
    # The last one takes what no other has recognised, and says what is missing.
    Layout("train/<class>/ and val/<class>/", lambda _: True, _scan_folders),
)
