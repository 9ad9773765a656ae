"""A look at every file of a data set before a long run does it."""

from __future__ import annotations

import multiprocessing
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fat_train.data.index import FileIndex

IMAGENET_COUNTS = {"train": 1_281_167, "val": 50_000}
IMAGENET_CLASSES = 1000
SHORT_SIDE_AT_LEAST_PX = 32
FAR_FROM_MEDIAN = 2.0
CHUNK = 64
SHOWN_AT_MOST = 5

FATAL = {
    "zero_bytes": "empty files",
    "unreadable": "cannot be decoded to the end",
}
"""Faults that stop a training run, and what they are."""
NOTABLE = {
    "not_rgb": "not RGB of 8 bits (they are converted)",
    "exif_turned": "lie turned, and say so in their EXIF orientation",
    "tiny": f"short side under {SHORT_SIDE_AT_LEAST_PX} px",
    "wrong_extension": "another format than the name says",
}
"""Peculiarities that a run lives with, and what they are."""
ORIENTATION_TAG = 0x0112
"""EXIF's number of the orientation; 1 is upright."""


class Finding(NamedTuple):
    """One thing about one file."""

    kind: str
    """A key of `FATAL` or `NOTABLE`."""
    path: str
    detail: str


@dataclass(frozen=True)
class SplitReport:
    """What one split holds, and what is the matter with it."""

    images: int
    classes: int
    per_class_min: int
    per_class_median: float
    per_class_max: int
    far_classes: dict[str, int]
    """Classes with less than half, or more than twice, the median number of images, and their numbers."""
    expected_images: int | None
    """ImageNet-1k's number where there are 1000 classes."""
    findings: list[Finding]
    """In the order of the index."""

    def of_kind(self, kind: str) -> list[Finding]:
        """All findings of one kind."""
        return [finding for finding in self.findings if finding.kind == kind]


@dataclass(frozen=True)
class DatasetReport:
    """Both splits of a data set."""

    train: SplitReport
    val: SplitReport

    @property
    def is_trainable(self) -> bool:
        """Whether every file can be decoded."""
        return not any(finding.kind in FATAL for _, split in self.splits() for finding in split.findings)

    def splits(self) -> list[tuple[str, SplitReport]]:
        """Name and report, training first."""
        return [("train", self.train), ("val", self.val)]

    def as_dict(self) -> dict[str, Any]:
        """Everything, every path included, in plain types for JSON."""
        return {
            name: asdict(split) | {"findings": [finding._asdict() for finding in split.findings]}
            for name, split in self.splits()
        }

    def table(self) -> Table:
        """Counts, a column a split, for a terminal."""
        table = Table(title="Data set", title_justify="left")
        table.add_column("")
        for name, _ in self.splits():
            table.add_column(name, justify="right")
        splits = [split for _, split in self.splits()]
        table.add_row("images", *(f"{split.images:,}" for split in splits))
        if all(split.expected_images for split in splits):
            table.add_row("images of ImageNet-1k", *(f"{split.expected_images:,}" for split in splits))
        table.add_row("classes", *(f"{split.classes:,}" for split in splits))
        table.add_row(
            "images of a class: least, median, most",
            *(f"{s.per_class_min:,}, {s.per_class_median:,.0f}, {s.per_class_max:,}" for s in splits),
        )
        table.add_row("classes far from the median", *(f"{len(split.far_classes):,}" for split in splits))
        for kind, meaning in (FATAL | NOTABLE).items():
            counts = [len(split.of_kind(kind)) for split in splits]
            style = "bold red" if kind in FATAL and any(counts) else None
            table.add_row(meaning, *(f"{count:,}" for count in counts), style=style)
        return table

    def lines(self, at_most: int = SHOWN_AT_MOST) -> list[str]:
        """What is behind the counts in plain text: up to `at_most` names of each kind, worst first."""
        lines = []
        for name, split in self.splits():
            if split.expected_images not in (None, split.images):
                lines.append(f"{name}: {split.images:,} images where ImageNet-1k has {split.expected_images:,}")
        for kind, meaning in (FATAL | NOTABLE).items():
            for name, split in self.splits():
                found = [f"  {finding.path}: {finding.detail}" for finding in split.of_kind(kind)]
                if found:
                    lines += [f"{name}: {len(found):,} {meaning}", *_shortened(found, at_most)]
        for name, split in self.splits():
            far = [f"  {class_name}: {count:,} images" for class_name, count in split.far_classes.items()]
            if far:
                lines += [f"{name}: {len(far):,} classes far from {split.per_class_median:,.0f} images"]
                lines += _shortened(far, at_most)
        return lines


def scan_dataset(train: FileIndex, val: FileIndex, *, workers: int, console: Console | None = None) -> DatasetReport:
    """Read every image of both splits to its end.

    Args:
        train: index of the training images.
        val: index of the validation images.
        workers: processes that read; with 1 this one does.
        console: where a bar is shown, if it is a terminal; None shows none.
    """
    imagenet = len(train.classes) == IMAGENET_CLASSES
    reports = []
    for name, index in (("train", train), ("val", val)):
        findings: list[Finding] = []
        with _bar(console) as bar:
            task = bar.add_task(name, total=len(index))
            for found, images in _inspect_all([str(index.place(row)) for row in range(len(index))], workers):
                findings += found
                bar.advance(task, images)
        reports.append(_split_report(index, findings, IMAGENET_COUNTS[name] if imagenet else None))
    return DatasetReport(*reports)


def inspect_image(path: str) -> list[Finding]:
    """Decode one file to its end and say what is out of the ordinary about it.

    JPEGs are decoded at an eighth of their size: every byte is read just the same, in two thirds of the time.
    """
    findings = []
    try:
        if Path(path).stat().st_size == 0:
            return [Finding("zero_bytes", path, "0 bytes")]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a colour table, of a broken EXIF block: the picture is whole
            with Image.open(path) as image:
                short_side = min(image.size)
                image.draft(None, (max(1, image.width // 8), max(1, image.height // 8)))
                image.load()
                orientation = image.getexif().get(ORIENTATION_TAG, 1)
    except Exception as error:  # a broken file makes PIL's many readers raise nearly anything
        return [Finding("unreadable", path, str(error) or type(error).__name__)]
    if image.mode != "RGB":
        findings.append(Finding("not_rgb", path, f"mode {image.mode}"))
    if orientation != 1:
        findings.append(Finding("exif_turned", path, f"orientation {orientation}"))
    if short_side < SHORT_SIDE_AT_LEAST_PX:
        findings.append(Finding("tiny", path, f"short side {short_side} px"))
    actual = "JPEG" if image.format == "MPO" else image.format  # a camera's JPEG with a second picture behind it
    if Image.registered_extensions().get(Path(path).suffix.lower()) != actual:
        findings.append(Finding("wrong_extension", path, f"is {actual}"))
    return findings


def _inspect_chunk(paths: list[str]) -> list[Finding]:
    return [finding for path in paths for finding in inspect_image(path)]


def _inspect_all(paths: list[str], workers: int) -> Iterator[tuple[list[Finding], int]]:
    """Findings and number of images, a chunk at a time, in the order of the paths."""
    chunks = [paths[start : start + CHUNK] for start in range(0, len(paths), CHUNK)]
    sizes = [len(chunk) for chunk in chunks]
    if workers == 1:
        yield from zip(map(_inspect_chunk, chunks), sizes, strict=True)
        return
    # Not forked from this process: its torch and DALI threads may hold a lock at that moment.
    clean = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(clean)
    context.set_forkserver_preload(["__main__", __name__])
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        yield from zip(pool.map(_inspect_chunk, chunks), sizes, strict=True)


def _split_report(index: FileIndex, findings: list[Finding], expected_images: int | None) -> SplitReport:
    counts = np.bincount(index.targets, minlength=len(index.classes))
    median = float(np.median(counts))
    far = (counts * FAR_FROM_MEDIAN < median) | (counts > median * FAR_FROM_MEDIAN)
    return SplitReport(
        images=len(index),
        classes=len(index.classes),
        per_class_min=int(counts.min()),
        per_class_median=median,
        per_class_max=int(counts.max()),
        far_classes={index.classes[number]: int(counts[number]) for number in np.flatnonzero(far)},
        expected_images=expected_images,
        findings=findings,
    )


def _bar(console: Console | None) -> Progress:
    columns = (TextColumn("reading {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=console is None or not console.is_terminal, transient=True)


def _shortened(lines: list[str], at_most: int) -> list[str]:
    rest = len(lines) - at_most
    return lines if rest <= 0 else [*lines[:at_most], f"  and {rest:,} more"]
