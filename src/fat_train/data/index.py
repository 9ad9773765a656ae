"""Which images there are: a scan of `root/<split>/<class>/<file>` into one sorted list."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from fat_train.types import MissingPathError, UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm")
"""Suffixes, in any case, of the formats that both DALI and PIL decode."""

SPLITS = ("train", "val")
NAMED_AT_MOST = 5
SCAN_THREADS = 16


class Place(NamedTuple):
    """Where the bytes of one image are: a whole file, or a stretch of a tar archive."""

    file: str
    offset: int = 0
    size: int | None = None
    """Bytes; None is all there are."""
    member: str = ""
    """Name in the archive."""

    def __str__(self) -> str:
        return f"{self.file}:{self.member}" if self.member else self.file

    def read(self) -> bytes:
        """The encoded image.

        Raises:
            OSError: the file cannot be read, or ends before the image does.
        """
        with open(self.file, "rb", buffering=0) as file:  # noqa: PTH123  # a Path costs more than the read of a page
            if self.size is None:
                return file.read()
            encoded = os.pread(file.fileno(), self.size, self.offset)
        if len(encoded) < self.size:
            raise OSError(f"the archive ends after {len(encoded)} of the image's {self.size} bytes")
        return encoded


@dataclass(frozen=True)
class Members:
    """Where in tar archives the images of an index lie, row by row."""

    archives: tuple[str, ...]
    """Paths relative to the index's root."""
    archive: Int64[np.ndarray, " N"]
    """Number of each image's archive."""
    offset: Int64[np.ndarray, " N"]
    """First byte of each image in its archive."""
    size: Int64[np.ndarray, " N"]
    """Bytes of each image."""


@dataclass(frozen=True)
class FileIndex:
    """The images of one split in a fixed order; an image's row here is its number everywhere."""

    root: Path
    """Folder that the paths are relative to."""
    paths: tuple[str, ...]
    """Relative path of each image, or its name within its archive."""
    targets: Int64[np.ndarray, " N"]
    classes: tuple[str, ...]
    """Class names in the order of their numbers: sorted, as torchvision's `ImageFolder` has them."""
    members: Members | None = None
    """For images in archives."""

    def __len__(self) -> int:
        return len(self.paths)

    def place(self, row: int) -> Place:
        """Where the bytes of this row's image are."""
        if self.members is None:
            return Place(f"{self.root}/{self.paths[row]}")
        at = self.members
        archive = at.archives[at.archive[row]]
        return Place(f"{self.root}/{archive}", int(at.offset[row]), int(at.size[row]), self.paths[row])

    def take(self, rows: Int64[np.ndarray, " n"]) -> FileIndex:
        """Some rows in the given order, the classes as they are."""
        members = self.members
        if members is not None:
            columns = {name: getattr(members, name)[rows] for name in ("archive", "offset", "size")}
            members = replace(members, **columns)
        return replace(self, paths=tuple(self.paths[row] for row in rows), targets=self.targets[rows], members=members)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 in hex of the class names and relative paths: the same list of images, wherever it lies."""
        digest = hashlib.sha256("\n".join(self.classes).encode())
        digest.update(b"\0")
        digest.update("\n".join(self.paths).encode(errors="surrogateescape"))
        return digest.hexdigest()


def scan_pair(root: str | None, key: str = "data.root") -> tuple[FileIndex, FileIndex]:
    """Scan `root/train` and `root/val` and hold them against each other.

    Raises:
        MissingPathError: the folder, or train/ or val/ in it, is not there.
        UserError: no root was given, it is no folder, it has no classes, a class is empty or in one split only.
    """
    folder = _checked_root(root, key)
    train, val = (scan_folder(folder, split, key) for split in SPLITS)
    for have, lack, split, other in ((train, val, "train", "val"), (val, train, "val", "train")):
        alone = sorted(set(have.classes) - set(lack.classes))
        if alone:
            raise UserError(f"{key}={folder}: {len(alone)} classes are in {split}/ and not in {other}/: {_some(alone)}")
    return train, val


def scan_folder(root: str | Path | None, split: str, key: str = "data.root") -> FileIndex:
    """List the images under `root/split/<class>/`, at any depth; symbolic links are followed, hidden names are not.

    Raises:
        MissingPathError: the folder, or the split in it, is not there.
        UserError: no root was given, it is no folder, it has no class folders, or a class has no image.
    """
    folder = _checked_root(root, key)
    split_folder = folder / split
    if not split_folder.is_dir():
        found = sorted(entry.name + "/" * entry.is_dir() for entry in os.scandir(folder) if entry.name[0] != ".")
        raise MissingPathError(
            f"{key}={folder} must hold train/<class>/ and val/<class>/; {split}/ is missing, found {_some(found)}"
        )
    classes = sorted(entry.name for entry in os.scandir(split_folder) if entry.is_dir() and entry.name[0] != ".")
    if not classes:
        raise UserError(f"{key}={folder}: {split}/ holds no class folders; images belong in {split}/<class>/")
    with ThreadPoolExecutor(SCAN_THREADS) as pool:
        files = list(pool.map(lambda name: _images_in(str(split_folder), name), classes))
    empty = [name for name, paths in zip(classes, files, strict=True) if not paths]
    if empty:
        raise UserError(
            f"{key}={folder}: {len(empty)} class folders of {split}/ hold no image: {_some(empty)}; "
            f"files count that end in {' '.join(EXTENSIONS)}"
        )
    targets = np.repeat(np.arange(len(classes)), [len(paths) for paths in files])
    return FileIndex(split_folder, tuple(path for paths in files for path in paths), targets, tuple(classes))


def _checked_root(root: str | Path | None, key: str) -> Path:
    if root is None or str(root) in ("", "???"):
        raise UserError(
            f"{key} is not set: give the folder that holds train/<class>/ and val/<class>/, as {key}=<folder>; "
            "data=digits needs no folder"
        )
    folder = Path(root).expanduser()
    if not folder.exists():
        raise MissingPathError(
            f"{key}={folder} is not there: give the folder that holds train/<class>/ and val/<class>/"
        )
    if not folder.is_dir():
        raise UserError(f"{key}={folder} must be a folder that holds train/<class>/ and val/<class>/; it is a file")
    return folder


def _images_in(split_folder: str, class_name: str) -> list[str]:
    paths: list[str] = []
    for folder, subfolders, names in os.walk(f"{split_folder}/{class_name}", followlinks=True):
        subfolders[:] = [name for name in subfolders if name[0] != "."]
        prefix = folder[len(split_folder) + 1 :]
        paths += [f"{prefix}/{name}" for name in names if name[0] != "." and name.lower().endswith(EXTENSIONS)]
    return sorted(paths)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED_AT_MOST} more" if len(names) > NAMED_AT_MOST else ""
    return (", ".join(names[:NAMED_AT_MOST]) or "nothing") + more
