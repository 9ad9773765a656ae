"""A data set in tar shards: listed once, remembered in one array file a split, opened in seconds from then on.

`train/*.tar` and `val/*.tar`, or both in one folder with "train" and "val" in their names; `classes.txt` beside them
names the classes, one a line, in the order of their numbers.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import uuid
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from fat_train.cache import cache_folder
from fat_train.data.index import SPLITS, FileIndex, Members
from fat_train.data.tar import NAME_ENCODING, Shard, read_shard
from fat_train.types import MissingPathError, UserError, some

CLASSES = "classes.txt"
LISTING_VERSION = 1
LISTING_THREADS = 16
SPLIT_IN_NAME = re.compile(r"(?:^|[^a-z])(train|val)", re.IGNORECASE)
ORIGINAL_ARCHIVES = "ILSVRC2012_img_"
"""How the archives begin that ImageNet is published in; they hold no labels, and are no shards."""


class _Listing(NamedTuple):
    """All images of a split's shards, sorted by class and name."""

    names: tuple[str, ...]
    archive: Int64[np.ndarray, " N"]
    offset: Int64[np.ndarray, " N"]
    size: Int64[np.ndarray, " N"]
    target: Int64[np.ndarray, " N"]


def has_shards(root: Path) -> bool:
    """Whether a folder holds tar shards, and not images in folders with an archive left beside them."""
    return any(_shards_of(root).values())


def scan_shards(root: Path, splits: Sequence[str] = SPLITS, key: str = "data.root") -> tuple[FileIndex, ...]:
    """List the shards of a data set; rows are sorted by class and name, as those of a folder are.

    Args:
        root: folder with the shards.
        splits: those wanted, of train and val.
        key: the setting that led here.

    Raises:
        MissingPathError: a split has no shards.
        UserError: a shard is truncated; an image lacks its label; labels and classes do not fit each other.
    """
    found = _shards_of(root)
    for split in splits:
        if not found[split]:
            names = sorted(entry.name for entry in os.scandir(root) if entry.name[0] != ".")
            raise MissingPathError(
                f'{key}={root} has no {split} shards: {split}/*.tar, or *.tar with "{split}" in their names; '
                f"found {some(names)}"
            )
    listings = {split: _listing_of(root, split, found[split]) for split in splits}
    classes = _classes(root, listings, key)
    for split, listing in listings.items():
        counts = np.bincount(listing.target, minlength=len(classes))
        if not counts.all():
            empty = [classes[number] for number in np.flatnonzero(counts == 0)]
            raise UserError(f"{key}={root}: {len(empty)} classes have no image in the {split} shards: {some(empty)}")
    return tuple(_index_of(root, found[split], listings[split], classes) for split in splits)


def write_whole(path: Path, content: bytes) -> None:
    """Write beside and rename, under a name that no other process has: readers see all of it or what was there.

    Raises:
        OSError: the system refuses.
    """
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        with beside.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _shards_of(root: Path) -> dict[str, list[Path]]:
    """Split -> its shards, sorted, relative to `root`."""
    nested = {split: _tars_in(root / split) for split in SPLITS}
    if any(nested.values()) or any((root / split).is_dir() for split in SPLITS):
        return {split: [Path(split) / name for name in names] for split, names in nested.items()}
    flat: dict[str, list[Path]] = {split: [] for split in SPLITS}
    for name in _tars_in(root, and_folders=True):
        in_name = SPLIT_IN_NAME.search(name)
        if in_name is not None and not name.startswith(ORIGINAL_ARCHIVES):
            flat[in_name[1].lower()].append(Path(name))
    return flat


def _tars_in(folder: Path, and_folders: bool = False) -> list[str]:
    """Names of the archives; beside class folders they are something left over, unless `and_folders`."""
    if not folder.is_dir():
        return []
    entries = [entry for entry in os.scandir(folder) if entry.name[0] != "."]
    if not and_folders and any(entry.is_dir() for entry in entries):
        return []
    return sorted(entry.name for entry in entries if entry.name.endswith(".tar") and entry.is_file())


def _classes(root: Path, listings: dict[str, _Listing], key: str) -> tuple[str, ...]:
    highest = {split: int(listing.target.max()) for split, listing in listings.items()}
    file = root / CLASSES
    if not file.is_file():
        number = max(highest.values()) + 1
        return tuple(str(label).zfill(len(str(number - 1))) for label in range(number))
    classes = tuple(line.rstrip("\r") for line in file.read_text(*NAME_ENCODING).rstrip("\n").split("\n"))
    for split, label in highest.items():
        if label >= len(classes):
            row = int(np.argmax(listings[split].target))
            raise UserError(
                f"{key}={root}: the {split} image {listings[split].names[row]} has label {label}, and {CLASSES} names "
                f"{len(classes)} classes, 0 to {len(classes) - 1}"
            )
    return classes


def _index_of(root: Path, shards: list[Path], listing: _Listing, classes: tuple[str, ...]) -> FileIndex:
    folder = root / shards[0].parent
    members = Members(tuple(shard.name for shard in shards), listing.archive, listing.offset, listing.size)
    return FileIndex(folder, listing.names, listing.target, classes, members)


def _listing_of(root: Path, split: str, shards: list[Path]) -> _Listing:
    """From the file of an earlier time, if the shards are as they were then; else from the shards, for next time."""
    seen = [(root / shard).stat() for shard in shards]
    state = np.array([(at.st_size, at.st_mtime_ns) for at in seen], np.int64)
    folders = (root, cache_folder() / "shards" / hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16])
    name = f"{split}.index.npz"
    for folder in folders:
        listing = _remembered(folder / name, shards, state)
        if listing is not None:
            return listing
    with ThreadPoolExecutor(LISTING_THREADS) as pool:  # the waiting is for the disk
        read = list(pool.map(lambda shard: read_shard(root / shard), shards))
    listing = _sorted(read)
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _remember(folder / name, shards, state, listing)
            for shard, content in zip(shards, read, strict=True):
                _write_dali_index(folder / shard.with_suffix(".idx"), content)
        except OSError:
            continue  # read-only, or full: the cache is next, and without one the shards are listed at every start
        break
    return listing


def _sorted(read: list[Shard]) -> _Listing:
    names = np.array([name for shard in read for name in shard.names], object)
    archive = np.repeat(np.arange(len(read)), [len(shard.names) for shard in read])
    offset, size, target = (np.concatenate([shard[column] for shard in read]) for column in (1, 2, 3))
    labels = target.tolist()
    order = np.array(sorted(range(len(names)), key=lambda row: (labels[row], names[row])), np.int64)
    return _Listing(tuple(names[order]), archive[order], offset[order], size[order], target[order])


def _write_dali_index(path: Path, shard: Shard) -> None:
    if shard.dali_index is None:
        return
    content = shard.dali_index.encode(*NAME_ENCODING)
    if not path.is_file() or path.read_bytes() != content:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content)


def _remember(path: Path, shards: list[Path], state: Int64[np.ndarray, "S 2"], listing: _Listing) -> None:
    content = io.BytesIO()
    np.savez(
        content,
        version=np.int64(LISTING_VERSION),
        shards=_packed([str(shard) for shard in shards]),
        state=state,
        names=_packed(listing.names),
        archive=listing.archive.astype(np.int32),
        offset=listing.offset,
        size=listing.size.astype(np.uint32),
        target=listing.target.astype(np.int32),
    )
    write_whole(path, content.getvalue())


def _remembered(path: Path, shards: list[Path], state: Int64[np.ndarray, "S 2"]) -> _Listing | None:
    """What `_remember` wrote, unless a shard has come, gone or changed since."""
    try:
        with path.open("rb") as file, np.load(file) as kept:
            if kept["version"] != LISTING_VERSION or not np.array_equal(kept["state"], state):
                return None
            if _unpacked(kept["shards"]) != [str(shard) for shard in shards]:
                return None
            columns = (kept[name].astype(np.int64) for name in ("archive", "offset", "size", "target"))
            return _Listing(tuple(_unpacked(kept["names"])), *columns)
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile):  # not there, or of another kind
        return None


def _packed(names: Sequence[str]) -> np.ndarray:
    return np.frombuffer("\0".join(names).encode(*NAME_ENCODING), np.uint8)


def _unpacked(blob: np.ndarray) -> list[str]:
    return blob.tobytes().decode(*NAME_ENCODING).split("\0")
