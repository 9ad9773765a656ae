"""What is in a data set, and which of its images a long run would stumble over."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import zip_longest
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table
from torchvision.datasets.folder import find_classes

from fat_train.data.index import SPLITS, FileIndex
from fat_train.report.inspection import EXCLUDED, KINDS, STOPPING
from fat_train.report.scan import Scan, copies, scan_index
from fat_train.report.scan_cache import ScanCache

IMAGENET_COUNTS = {"train": 1_281_167, "val": 50_000}
IMAGENET_CLASSES = 1000
FAR_FROM_MEDIAN = 2.0
SHOWN_AT_MOST = 5


class Finding(NamedTuple):
    """One thing about one image."""

    kind: str
    """A key of `KINDS`."""
    image: str
    """Its name in the data set: `train/<class>/<file>` or `val/<class>/<file>`, as in a list of images to leave out."""
    path: str
    """Where it lies."""
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
    read: int
    """Files that this check has read."""
    unchanged: int
    """Files that were read by an earlier one and are as they were."""
    class_order: str | None
    """How the numbers of the classes compare to torchvision's; None where the classes are no folders."""
    trouble: str | None
    """Why a later check starts over, if it does."""

    @property
    def is_trainable(self) -> bool:
        """Whether every file can be decoded, to the same picture by both back ends."""
        return not any(finding.kind in STOPPING for _, split in self.splits() for finding in split.findings)

    def splits(self) -> list[tuple[str, SplitReport]]:
        """Name and report, training first."""
        return [("train", self.train), ("val", self.val)]

    def excluded(self) -> dict[str, str]:
        """Images that training is better off without, by name, with the reason."""
        found = [finding for _, split in self.splits() for finding in split.findings if finding.kind in EXCLUDED]
        return {finding.image: f"{finding.kind.replace('_', ' ')}: {finding.detail}" for finding in found}

    def as_dict(self) -> dict[str, Any]:
        """Everything, every path included, in plain types for JSON."""
        splits = {
            name: asdict(split) | {"findings": [finding._asdict() for finding in split.findings]}
            for name, split in self.splits()
        }
        own = {name: getattr(self, name) for name in ("read", "unchanged", "class_order", "trouble")}
        return splits | own

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
        for kind, (title, _) in KINDS.items():
            counts = [len(split.of_kind(kind)) for split in splits]
            if any(counts) or kind in EXCLUDED:
                style = "bold red" if kind in EXCLUDED and any(counts) else None
                table.add_row(title, *(f"{count:,}" for count in counts), style=style)
        return table

    def lines(self, at_most: int = SHOWN_AT_MOST) -> list[str]:
        """What is behind the counts in plain text: up to `at_most` names of each kind, worst first."""
        lines = [f"files          {self.unchanged:,} unchanged since the last check, {self.read:,} read"]
        lines += [text for text in (self.class_order, self.trouble) if text]
        for name, split in self.splits():
            if split.expected_images not in (None, split.images):
                lines.append(f"{name}: {split.images:,} images where ImageNet-1k has {split.expected_images:,}")
        for kind, (title, effect) in KINDS.items():
            found = [finding for _, split in self.splits() for finding in split.of_kind(kind)]
            if found:
                lines.append(f"{title}: {len(found):,} ({effect})")
                lines += _shortened([f"  {_printable(finding.image)}: {finding.detail}" for finding in found], at_most)
        for name, split in self.splits():
            far = [f"  {class_name}: {count:,} images" for class_name, count in split.far_classes.items()]
            if far:
                lines += [f"{name}: {len(far):,} classes far from {split.per_class_median:,.0f} images"]
                lines += _shortened(far, at_most)
        return lines


def scan_dataset(
    train: FileIndex,
    val: FileIndex,
    *,
    workers: int,
    console: Console | None = None,
    cache: ScanCache | None = None,
) -> DatasetReport:
    """Read every image of both splits to its end, and compare them.

    Args:
        train: index of the training images.
        val: index of the validation images.
        workers: processes that read; with 1 this one does.
        console: where a bar is shown, if it is a terminal; None shows none.
        cache: what earlier checks have seen; None reads everything and keeps nothing.
    """
    indexes = (train, val)
    scans = [scan_index(name, index, cache, workers, console) for name, index in zip(SPLITS, indexes, strict=True)]
    findings = _findings(indexes, scans)
    imagenet = len(train.classes) == IMAGENET_CLASSES
    reports = [
        _split_report(index, found, IMAGENET_COUNTS[name] if imagenet else None)
        for name, index, found in zip(SPLITS, indexes, findings, strict=True)
    ]
    unchanged = sum(scan.unchanged for scan in scans)
    return DatasetReport(
        train=reports[0],
        val=reports[1],
        read=len(train) + len(val) - unchanged,
        unchanged=unchanged,
        class_order=class_order(train),
        trouble=None if cache is None else cache.trouble,
    )


def class_order(index: FileIndex) -> str | None:
    """Compare the numbers of the classes to those of torchvision's `ImageFolder`; None where they are no folders."""
    try:
        theirs, _ = find_classes(index.root)
    except OSError:
        return None
    if not set(theirs) & set(index.classes):
        return None  # folders of another meaning
    if list(index.classes) == theirs:
        return f"classes        numbered as torchvision's ImageFolder numbers the folders of {index.root.name}/"
    pairs = enumerate(zip_longest(index.classes, theirs, fillvalue="none"))
    number, own, other = next((number, own, other) for number, (own, other) in pairs if own != other)
    return f"classes        not numbered as by torchvision's ImageFolder: number {number} is {own} here, {other} there"


def exclude_list(images: dict[str, str], old: str = "") -> str:
    """Write down images to leave out, one a line with the reason behind a tab; what was left out before stays.

    Args:
        images: reason of each image, by name.
        old: the list that was in force, so that its images were not looked at.
    """
    kept = old if not old or old.endswith("\n") else old + "\n"
    reasons = {image: " ".join(reason.split()) for image, reason in images.items()}
    return kept + "".join(f"{image}\t# {reason}\n" for image, reason in reasons.items())


def _findings(indexes: tuple[FileIndex, FileIndex], scans: list[Scan]) -> list[list[Finding]]:
    train, val = indexes
    # Held-out validation images, and those of debug.overfit_images, are images of train/.
    names = ("train", "train" if val.root == train.root and val.members is None else "val")
    across, within = copies(*scans)
    splits = []
    for index, name, scan, earlier in zip(indexes, names, scans, within, strict=True):
        found = [(row, kind, detail) for row, oddities in scan.odd.items() for kind, detail in oddities]
        if index is train:
            found += [(row, "in_val", _same(index, row, val, other, names[1])) for row, other in across.items()]
        found += [(row, "duplicate", _same(index, row, index, other, name)) for row, other in earlier.items()]
        stopping = {row for row, kind, _ in found if kind in STOPPING}
        found = [entry for entry in found if entry[0] not in stopping or entry[1] in STOPPING]
        found.sort(key=lambda entry: entry[0])
        splits.append(
            [Finding(kind, f"{name}/{index.paths[row]}", str(index.place(row)), text) for row, kind, text in found]
        )
    return splits


def _same(index: FileIndex, row: int, others: FileIndex, other: int, name: str) -> str:
    classes = index.classes[index.targets[row]], others.classes[others.targets[other]]
    label = "" if classes[0] == classes[1] else f", where it is labelled {classes[1]} instead of {classes[0]}"
    return f"is {name}/{others.paths[other]}{label}"


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


def _shortened(lines: list[str], at_most: int) -> list[str]:
    rest = len(lines) - at_most
    return lines if rest <= 0 else [*lines[:at_most], f"  and {rest:,} more"]


def _printable(name: str) -> str:
    """A file's name may hold bytes that are no text, which a terminal refuses."""
    return name.encode(errors="backslashreplace").decode()
