"""A data set rewritten as tar shards of smaller pictures: few files to open, fewer bytes to read and to decode.

Any layout and choice of images goes in. What comes out, byte for byte, follows from source and settings alone: not from
the number of processes, nor from how often the packing was broken off.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import __version__ as pillow_version
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fat_train.data.encode import Encoded, EncodingPool, Recipe
from fat_train.data.index import SPLITS, FileIndex
from fat_train.data.shard import CLASSES, scan_shards, write_whole
from fat_train.data.shard_writer import ShardWriter, keys_of
from fat_train.data.tar import NAME_ENCODING
from fat_train.types import UserError, some

MANIFEST = "manifest.json"
FORMAT = "fat_train packed images, version 1"
SHUFFLE_TAG = 0x5041434B  # keeps the shards' order apart from any other random stream
VERIFYING_THREADS = 4
Advance = Callable[[int], None]


@dataclass(frozen=True, kw_only=True)
class PackSettings:
    """What `conf/pack.yaml` adds to the choice of a data set."""

    out: str
    """Folder for the shards: a new or empty one, or that of a packing that was broken off."""
    short_side_px: int | None = 320
    """Shorter side of the training images, pixels; smaller ones are not enlarged, and null shrinks none.

    The recipes' smallest random crop is 8 % of an image. Of a photograph of 3:4 with 320 pixels that is 105 x 105,
    which 224 enlarge 2.1 times; of the 375 that ImageNet's have in the middle 1.8 times, of 256 2.7 times.
    """
    val_short_side_px: int | None = None
    """The same of the validation images; null keeps them, so that an accuracy is that on the original files."""
    quality: int = 92
    """JPEG quality of what is encoded anew, at 4:2:0, as nearly all photographs come and decoders like best."""
    max_shard_mb: int | None = 256
    """Most million bytes in a shard; null makes one a split. Also what a broken-off packing loses at most."""
    num_workers: int | None = None
    """Processes that read and encode; null takes a process a core."""
    verify: bool = False
    """Read every shard again at the end and compare its checksum."""

    def __post_init__(self) -> None:
        for name in ("short_side_px", "val_short_side_px", "max_shard_mb", "num_workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, or null; got {value}")
        if not 1 <= self.quality <= 95:
            raise UserError(f"quality must be in [1, 95] (above 95 files grow and pictures do not); got {self.quality}")
        if not self.out:
            raise UserError("out must be the folder for the shards; got nothing")


class Packed(NamedTuple):
    """What there is at the end."""

    images: int
    source_bytes: int
    bytes: int
    shards: int
    seconds: float
    """Of this call alone."""
    repacked: tuple[str, ...]
    """Shards of an earlier call that were gone or damaged, and are there again."""


def pack(train: FileIndex, val: FileIndex, settings: PackSettings, workers: int, console: Console) -> Packed:
    """Write all shards that are not there yet, and what makes them a data set.

    Args:
        train: training images.
        val: validation images, of the same classes.
        settings: how, and where to.
        workers: processes that encode; with 1 this one does.
        console: where a bar is shown, if it is a terminal.

    Raises:
        UserError: `out` holds something else, or shards of other settings or another source; an image cannot be
            read; the disk is full; a checksum is wrong.
    """
    began = time.monotonic()
    out = Path(settings.out).expanduser()
    indexes = {"train": train, "val": val}
    with _alone_in(out), EncodingPool(workers) as pool:
        manifest = _Manifest.open(out, settings, indexes)
        _write(out / CLASSES, _class_list(train.classes))
        repacked = manifest.forget_lost()
        for split, index in indexes.items():
            with _bar(console, f"packing {split}", len(index)) as advance:
                _pack_split(manifest, split, index, pool, settings, advance)
        if settings.verify:
            _verify(manifest, console)
        lists = scan_shards(out, key="out")
    assert [len(found) for found in lists] == [len(index) for index in indexes.values()]
    shards = [shard for split in indexes for shard in manifest.shards(split).values()]
    source_bytes, size = (sum(shard[name] for shard in shards) for name in ("source_bytes", "bytes"))
    return Packed(len(train) + len(val), source_bytes, size, len(shards), time.monotonic() - began, repacked)


class _Manifest:
    """`manifest.json`: settings, source, and each finished shard. It is rewritten whole after every shard."""

    def __init__(self, out: Path, content: dict[str, Any]) -> None:
        self.out = out
        self.content = content

    @classmethod
    def open(cls, out: Path, settings: PackSettings, indexes: dict[str, FileIndex]) -> _Manifest:
        """That of an earlier call with the same settings and source, or a new one.

        Raises:
            UserError: the folder holds other things, or other settings or another source made it.
        """
        names = ("short_side_px", "val_short_side_px", "quality", "max_shard_mb")
        wanted: dict[str, Any] = {
            "format": FORMAT,
            "settings": {name: getattr(settings, name) for name in names},
            "source": {
                split: {"images": len(index), "classes": len(index.classes), "fingerprint": index.fingerprint}
                for split, index in indexes.items()
            },
        }
        path = out / MANIFEST
        if not path.is_file():
            present = sorted(entry.name for entry in os.scandir(out))
            if present:
                raise UserError(
                    f"out={out} must be a new or empty folder, or one that pack began; it holds {some(present)}"
                )
            nothing_yet: dict[str, Any] = {split: {} for split in indexes}
            manifest = cls(out, wanted | {"pillow": pillow_version, "shards": nothing_yet})
            manifest.write()
            return manifest
        try:
            content = json.loads(path.read_bytes())
            made = {name: content[name] for name in wanted}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is not what pack writes: give out=<another folder>") from error
        manifest = cls(out, content)
        for group in ("settings", "source"):
            for name, value in wanted[group].items():
                if made[group].get(name) != value:
                    manifest._refuse(group, name, value)
        return manifest

    def _refuse(self, group: str, name: str, value: Any) -> None:
        made = self.content[group].get(name)
        what = f"{name}={json.dumps(made)}, not {json.dumps(value)}"
        if group == "source":
            what = f"another list of {name} images ({made['images']:,} of {made['classes']:,} classes)"
            what += f", not this one ({value['images']:,} of {value['classes']:,} classes)"
        raise UserError(f"out={self.out} was begun with {what}: give what it was begun with, or another out")

    def shards(self, split: str) -> dict[str, dict[str, Any]]:
        """Finished shards by name, in their order."""
        return self.content["shards"][split]

    def add(self, split: str, writer: ShardWriter) -> None:
        """Finish a shard and record it."""
        digest = writer.finish()
        shards = self.shards(split)
        shards[writer.path.name] = {
            "images": writer.images,
            "bytes": writer.bytes,
            "source_bytes": writer.source_bytes,
            "sha256": digest,
        }
        self.write()

    def write(self) -> None:
        """Replace the file."""
        _write(self.out / MANIFEST, json.dumps(self.content, indent=1).encode())

    def forget_lost(self) -> tuple[str, ...]:
        """Mark the shards that are gone or of another size as unwritten; what a kill left behind is deleted."""
        lost = []
        _sweep(self.out)
        for split, shards in self.content["shards"].items():
            (self.out / split).mkdir(exist_ok=True)
            _sweep(self.out / split)
            for name, about in shards.items():
                path = self.out / split / name
                if not path.is_file() or path.stat().st_size != about["bytes"]:
                    about["sha256"] = None
                    lost.append(f"{split}/{name}")
        return tuple(lost)


def _pack_split(
    manifest: _Manifest, split: str, index: FileIndex, pool: EncodingPool, settings: PackSettings, advance: Advance
) -> None:
    """Write a split's missing shards. How many images a shard holds is known once it has been written."""
    side = settings.short_side_px if split == "train" else settings.val_short_side_px
    order = np.random.default_rng([SHUFFLE_TAG, len(index)]).permutation(len(index)).tolist()
    keys = keys_of(index)

    def write(number: int, rows: list[int], limit: float) -> None:
        images = pool.encode(index, rows, split, Recipe(side, settings.quality))
        samples = ((keys[row], int(index.targets[row]), image) for row, image in zip(rows, images, strict=True))
        _write_shards(manifest, split, number, samples, limit, advance)

    start = 0
    for number, about in enumerate(list(manifest.shards(split).values())):
        stop = start + about["images"]
        if about["sha256"] is None:
            write(number, order[start:stop], math.inf)
        else:
            advance(about["images"])
        start = stop
    limit = math.inf if settings.max_shard_mb is None else settings.max_shard_mb * 10**6
    write(len(manifest.shards(split)), order[start:], limit)


def _write_shards(
    manifest: _Manifest,
    split: str,
    number: int,
    samples: Iterable[tuple[str, int, Encoded]],
    limit: float,
    advance: Advance,
) -> None:
    """Write samples into shards of at most `limit` bytes, from shard `number` on."""
    writer: ShardWriter | None = None
    try:
        for key, label, image in samples:
            if writer is not None and not writer.has_room(len(image.content), limit):
                manifest.add(split, writer)
                writer, number = None, number + 1
            if writer is None:
                writer = ShardWriter(manifest.out / split / f"{split}-{number:06d}.tar")
            writer.add(key, image.content, label, image.source_bytes)
            advance(1)
        if writer is not None:
            manifest.add(split, writer)
    except BaseException as error:
        if writer is not None:
            writer.abandon()
        if isinstance(error, OSError):  # what is read has its own words
            raise _unwritable(manifest.out / split, error, "; the same command goes on from there") from error
        raise


def _verify(manifest: _Manifest, console: Console) -> None:
    wrong = []
    files = [(split, name, about) for split in SPLITS for name, about in manifest.shards(split).items()]
    with _bar(console, "verifying", len(files)) as advance, ThreadPoolExecutor(VERIFYING_THREADS) as pool:
        hashes = pool.map(_sha256, [manifest.out / split / name for split, name, _ in files])
        for (split, name, about), found in zip(files, hashes, strict=True):
            if found != about["sha256"]:
                wrong.append(f"{split}/{name}")
            advance(1)
    if wrong:
        raise UserError(
            f"out={manifest.out}: {len(wrong)} shards are not what was written: {some(wrong)}; "
            "delete them, and the same command packs them anew"
        )


def _sweep(folder: Path) -> None:
    for leftover in folder.glob(".*.part"):
        leftover.unlink()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _alone_in(out: Path) -> Iterator[None]:
    """Make the folder, and keep other packings out of it; a lock ends with its process, however that ends."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        folder = os.open(out, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise _unwritable(out, error) from error
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"out={out}: another pack is writing there") from error
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(folder)


def _write(path: Path, content: bytes) -> None:
    try:
        write_whole(path, content)
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError, then: str = "") -> UserError:
    return UserError(f"cannot write into {path} ({error.strerror}): make room, or give out=<another folder>{then}")


def _class_list(classes: tuple[str, ...]) -> bytes:
    broken = [name for name in classes if "\n" in name or "\r" in name]
    if broken:
        raise UserError(f"{CLASSES} holds a class name a line; this one has a line break: {broken[0]!r}")
    return "".join(f"{name}\n" for name in classes).encode(*NAME_ENCODING)


@contextmanager
def _bar(console: Console, what: str, total: int) -> Iterator[Advance]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)
