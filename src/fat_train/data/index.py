"""Which images there are: one sorted list a split, whatever the layout that they were found in."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm")
"""Suffixes, in any case, of the formats that both DALI and PIL decode."""

SPLITS = ("train", "val")


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
        paths = tuple(self.paths[row] for row in rows.tolist())
        return replace(self, paths=paths, targets=self.targets[rows], members=members)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 in hex of class names, relative paths and labels: the same list of images, wherever it lies."""
        digest = hashlib.sha256("\n".join(self.classes).encode())
        digest.update(b"\0")
        digest.update("\n".join(self.paths).encode(errors="surrogateescape"))
        digest.update(b"\0")
        digest.update(self.targets.astype("<i8").tobytes())  # a path need not say its class
        return digest.hexdigest()
