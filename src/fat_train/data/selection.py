"""Which of the images that were found take part, and on which side.

In this order, each step on what the one before has left:

  1. scan         every image of the layout (`fat_train.data.layout`)
  2. class_list   some classes alone, in both splits
  3. exclude      images that a list names leave their split
  4. subset       a share of the training images, or those of a list
  5. holdout      a share of the training images becomes the validation set

Names in files are looked up among all images of the scan. One list of broken images, or one list of 1 %, so serves with
any choice of classes, and only a name that the data set does not have is a mistake.

Shares are of each class, and follow from the images' names alone: not from the seed of a run, nor from where the files
lie or in which layout. A smaller subset lies within a larger one.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int64

from fat_train.data.index import FileIndex
from fat_train.data.layout import refuse_unlike_classes
from fat_train.types import MissingPathError, UserError, nearest, some

SUBSET_ALLOWED = "null, a share in (0, 1], or a text file that lists training images"


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The settings that choose among the images of a scan; see the module for their order."""

    class_list: str | None = None
    """File of class names, one a line before other words, or a JSON file with them as keys; null takes all classes."""
    exclude: str | None = None
    """File of images to leave out, a line each as `train/<class>/<file>` or `val/...`, a tab and a reason behind it."""
    subset: str | None = None
    """Training images that take part: a share of each class, or a file of names (`<file>` or `<class>/<file>`)."""
    holdout: float = 0.0
    """Share of each class's training images that become the validation set; 0 takes val/."""

    def __post_init__(self) -> None:
        share = share_of(self.subset)
        if share is not None and not 0 < share <= 1:
            raise UserError(f"data.subset must be {SUBSET_ALLOWED}; got {self.subset}")
        if not 0 <= self.holdout < 1:
            raise UserError(
                f"data.holdout must be a share in [0, 1) of each class's training images; got {self.holdout}"
            )


@dataclass(frozen=True)
class Chosen:
    """What a choice has left of a scan."""

    splits: dict[str, FileIndex]
    """The splits of the scan; with a holdout, `train` and the `val` that was held out of it."""
    notes: list[str]
    """What was chosen, a setting a line, with counts."""


def share_of(subset: str | None) -> float | None:
    """The number in `data.subset`, or None where it is a file or nothing."""
    try:
        return None if subset is None else float(subset)
    except ValueError:
        return None


def select(found: Mapping[str, FileIndex], choice: Choice) -> Chosen:
    """Carry out a choice on a scan of `train`, `val` or both; a holdout needs `train` alone.

    Raises:
        MissingPathError: a list is not there.
        UserError: a name that the data set does not have, or a class that is left without a training image.
    """
    keep = {split: np.ones(len(index), bool) for split, index in found.items()}
    notes = []
    names = None
    if choice.class_list is not None:
        names = _read_class_list(choice.class_list, next(iter(found.values())).classes)
        for split, index in found.items():
            _require_classes(choice.class_list, names, index.classes)
            keep[split] &= np.array([name in names for name in index.classes])[index.targets]
        notes.append(f"data.class_list={choice.class_list}: {len(names):,} of {len(index.classes):,} classes")
    if choice.exclude is not None:
        notes.append(_exclude(choice.exclude, found, keep))
    if "train" in found:
        train, kept = found["train"], keep["train"]
        _require_images(train, kept, names, f"data.exclude={choice.exclude}")
        if choice.subset is not None:
            before = int(kept.sum())
            kept &= _subset(choice.subset, train, kept)
            _require_images(train, kept, names, f"data.subset={choice.subset}")
            notes.append(f"data.subset={choice.subset}: {kept.sum():,} of {before:,} training images")
    splits = {split: _narrowed(index, keep[split], names) for split, index in found.items()}
    for split, index in splits.items():
        if not len(index):
            raise UserError(f"no image of {split}/ is left: {'; '.join(notes)}")
    if choice.holdout:
        splits["train"], splits["val"] = hold_out(splits["train"], choice.holdout)
        notes.append(
            f"data.holdout={choice.holdout:g}: {len(splits['val']):,} images of train/ validate and do not train; "
            "val/ is not looked at"
        )
    elif len(splits) > 1:
        refuse_unlike_classes(splits["train"], splits["val"])
    return Chosen(splits, notes)


def hold_out(train: FileIndex, share: float) -> tuple[FileIndex, FileIndex]:
    """Part the training images into those that train and a share of each class, at least one image, that validates.

    Raises:
        UserError: a class with a single image.
    """
    counts = np.bincount(train.targets, minlength=len(train.classes))
    if counts.min() < 2:
        few = [train.classes[number] for number in np.flatnonzero(counts < 2)]
        raise UserError(
            f"data.holdout={share:g} needs at least 2 training images of every class, one to train on and one to hold "
            f"out; these have one: {some(few)}"
        )
    out = first_share(train, np.ones(len(train), bool), share, "holdout", leave=1)
    return train.take(np.flatnonzero(~out)), train.take(np.flatnonzero(out))


def first_share(
    index: FileIndex, among: Bool[np.ndarray, " N"], share: float, purpose: str, leave: int = 0
) -> Bool[np.ndarray, " N"]:
    """Mark the first share of each class, at least one image, in an order that hashes of the images' names give.

    Args:
        index: the images.
        among: those that take part.
        share: in (0, 1]; of what takes part of each class, rounded.
        purpose: shares for different purposes are independent of each other.
        leave: images of each class that stay unmarked in any case.
    """
    rows = np.flatnonzero(among)
    targets = index.targets[rows]
    keys = np.frombuffer(b"".join(_digests(index, rows, purpose)), "<u8")
    order = np.lexsort((keys, targets))
    counts = np.bincount(targets, minlength=len(index.classes))
    starts = np.cumsum(counts) - counts
    rank = np.arange(len(rows)) - starts[targets[order]]
    quota = np.clip(np.rint(share * counts), 1, np.maximum(counts - leave, 1))
    marked = np.zeros(len(index), bool)
    marked[rows[order[rank < quota[targets[order]]]]] = True
    return marked


def _digests(index: FileIndex, rows: Int64[np.ndarray, " n"], purpose: str) -> Iterator[bytes]:
    """Eight bytes an image of its class and file name, which are the same in every layout."""
    for row, target in zip(rows.tolist(), index.targets[rows].tolist(), strict=True):
        name = f"{purpose}/{index.classes[target]}/{_base(index.paths[row])}"
        yield hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=8).digest()


def _subset(subset: str, train: FileIndex, kept: Bool[np.ndarray, " N"]) -> Bool[np.ndarray, " N"]:
    share = share_of(subset)
    if share is not None:
        return first_share(train, kept, share, "subset")
    wanted = {name.removeprefix("train/") for name in _read_names("data.subset", subset, SUBSET_ALLOWED)}
    listed = np.zeros(len(train), bool)
    hits: Counter[str] = Counter()
    for row, path in enumerate(train.paths):
        for name in (path, _base(path)):  # a bare file name does where it is the name of one image
            if name in wanted:
                listed[row] = True
                hits[name] += 1
    unknown = sorted(wanted - hits.keys())
    if unknown:
        raise UserError(
            f"data.subset={subset}: {len(unknown):,} of its {len(wanted):,} names are no training image: "
            f"{some(unknown)}{_hint(unknown[0], train.paths)}"
        )
    ambiguous = sorted(name for name, count in hits.items() if count > 1)
    if ambiguous:
        raise UserError(
            f"data.subset={subset}: {len(ambiguous):,} of its names are those of several training images: "
            f"{some(ambiguous)}; write <class>/<file>"
        )
    return listed


def _exclude(exclude: str, found: Mapping[str, FileIndex], keep: Mapping[str, Bool[np.ndarray, " N"]]) -> str:
    """Take the listed images out of `keep`; returns the note."""
    listed = _read_names("data.exclude", exclude, "null, or a text file that lists images")
    # What is listed of a split that is not looked at cannot be judged.
    other = tuple(f"{split}/" for split in ("train", "val") if split not in found)
    wanted = {name for name in listed if not name.startswith(other)}
    matched = 0
    for split, index in found.items():
        skip = len(split) + 1
        names = {name[skip:] for name in wanted if name.startswith(f"{split}/")}
        out = np.fromiter((path in names for path in index.paths), bool, len(index))
        keep[split][out] = False
        matched += int(out.sum())
    if wanted and not matched:
        paths = [f"{split}/{path}" for split, index in found.items() for path in index.paths]
        first = min(wanted)
        raise UserError(
            f"data.exclude={exclude}: none of its {len(wanted):,} names is an image of the data set, the first being "
            f"{first}{_hint(first, paths)}"
        )
    return f"data.exclude={exclude}: {matched:,} of its {len(wanted):,} images found and left out"


def _hint(name: str, paths: Iterable[str]) -> str:
    """The image that was probably meant: the same file elsewhere, or the nearest of its folder."""
    base, folder = _base(name), name.rpartition("/")[0] + "/"
    paths = list(paths)
    same = next((path for path in paths if _base(path) == base), None)
    if same:
        return f"; did you mean {same}?"
    near = nearest(name, [path for path in paths if path.startswith(folder)] if "/" in name else [])
    return near or f"; names here are like {paths[0]}"


def _narrowed(index: FileIndex, keep: Bool[np.ndarray, " N"], names: set[str] | None) -> FileIndex:
    """The kept images; where classes were chosen, these alone, numbered anew."""
    if not keep.all():
        index = index.take(np.flatnonzero(keep))
    if names is None:
        return index
    kept = np.array([name in names for name in index.classes])
    numbers = np.cumsum(kept) - 1
    classes = tuple(name for name in index.classes if name in names)
    return replace(index, targets=numbers[index.targets], classes=classes)


def _require_images(train: FileIndex, kept: Bool[np.ndarray, " N"], names: set[str] | None, setting: str) -> None:
    counts = np.bincount(train.targets[kept], minlength=len(train.classes))
    lost = [name for name, count in zip(train.classes, counts, strict=True) if not count and name in (names or [name])]
    if lost:
        raise UserError(
            f"{setting} leaves {len(lost):,} classes without a training image: {some(lost)}; "
            "data.class_list=<file> keeps the classes of a list alone"
        )


def _read_class_list(file: str, classes: tuple[str, ...]) -> set[str]:
    """Class names of a text file, one a line before other words, or the keys of a JSON file."""
    text = _read("data.class_list", file, "null, or a text or JSON file of class names")
    if text.lstrip().startswith(("{", "[")):
        try:
            names = [str(name) for name in json.loads(text)]
        except ValueError as error:
            raise UserError(f"data.class_list={file} begins like JSON and is not: {error}") from error
    else:
        # A folder's name may hold spaces.
        names = [line if line in classes else line.split()[0] for line in _lines(text)]
    if not names:
        raise UserError(f"data.class_list={file} names no class")
    return set(names)


def _require_classes(file: str, names: set[str], classes: tuple[str, ...]) -> None:
    unknown = sorted(names - set(classes))
    if unknown:
        raise UserError(
            f"data.class_list={file}: {len(unknown):,} of its {len(names):,} classes are not in the data set: "
            f"{some(unknown)}{nearest(unknown[0], classes)}"
        )


def _read_names(setting: str, file: str, allowed: str) -> set[str]:
    return {name.removeprefix("./") for name in _lines(_read(setting, file, allowed))}


def _read(setting: str, file: str, allowed: str) -> str:
    path = Path(file).expanduser()
    if not path.exists():
        raise MissingPathError(f"{setting} must be {allowed}; got {file!r}, which is not there")
    if not path.is_file():
        raise UserError(f"{setting} must be {allowed}; got {file!r}, which is a folder")
    text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    if "\0" in text:
        raise UserError(f"{setting} must be {allowed}; got {file!r}, which is not text")
    return text


def _lines(text: str) -> Iterator[str]:
    """Names, one a line. A tab ends a name, and so does " #" in a line without a tab; `#` first is a comment."""
    for line in text.split("\n"):  # what else splitlines() takes for a line's end may stand in a name
        name = line.partition("\t" if "\t" in line else " #")[0].strip()
        if name and name[0] != "#":
            yield name


def _base(path: str) -> str:
    return path.rpartition("/")[2]
