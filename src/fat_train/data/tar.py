"""One tar shard: where the bytes of its images lie, and what labels stand beside them.

WebDataset's naming: members whose names are alike up to the first dot of the last part make a sample, here an image
(`<key>.jpg`, `.jpeg`, `.png` or `.webp`) and its class number (`<key>.cls` as text, or `"label"` or `"cls"` in
`<key>.json`).
"""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from fat_train.types import UserError

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
LABEL_SUFFIX = "cls"
DALI_INDEX_VERSION = "v1.2"
BLOCK = tarfile.BLOCKSIZE
AHEAD = 4096  # bytes asked for at a time: a label before its image comes with both of their headers
NAME_ENCODING = ("utf-8", "surrogateescape")
REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE)


class Member(NamedTuple):
    """One regular file in an archive."""

    name: str
    offset: int
    """First byte of its content."""
    size: int


class Shard(NamedTuple):
    """The images of one archive in the order in which they lie there."""

    names: list[str]
    """Each image's whole name."""
    offset: Int64[np.ndarray, " N"]
    size: Int64[np.ndarray, " N"]
    target: Int64[np.ndarray, " N"]
    dali_index: str | None
    """What DALI's `fn.readers.webdataset` wants beside the shard; None where a name holds a space, which it cannot."""


class _Reader:
    """Reads of a few bytes here and there, from one window that moves on."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb", buffering=0)
        self.size = os.fstat(self._file.fileno()).st_size
        self._start, self._window = 0, b""

    def at(self, offset: int, count: int) -> bytes:
        inside = offset - self._start
        if inside < 0 or inside + count > len(self._window):
            self._start, self._window = offset, os.pread(self._file.fileno(), max(AHEAD, count), offset)
            inside = 0
        return self._window[inside : inside + count]

    def close(self) -> None:
        self._file.close()


def read_shard(path: Path) -> Shard:
    """List one shard.

    Raises:
        UserError: it is truncated or no tar archive; a sample lacks its image or its label; a label is no number.
        OSError: it cannot be read.
    """
    reader = _Reader(path)
    try:
        members = list(_members(reader, path))
        images: dict[str, Member] = {}
        labels: dict[str, int] = {}
        for member in members:
            key, suffix = _split(member.name)
            suffix = suffix.lower()
            if suffix in IMAGE_SUFFIXES:
                images[key] = member
            elif suffix == LABEL_SUFFIX:
                labels[key] = _class_number(reader.at(member.offset, member.size), path, member.name)
            elif suffix == "json" and key not in labels:
                number = _number_in_json(reader.at(member.offset, member.size))
                if number is not None:
                    labels[key] = number
    finally:
        reader.close()
    _refuse_halves(path, images, labels)
    rows = list(images.items())
    return Shard(
        [member.name for _, member in rows],
        np.array([member.offset for _, member in rows], np.int64),
        np.array([member.size for _, member in rows], np.int64),
        np.array([labels[key] for key, _ in rows], np.int64),
        _dali_index(members),
    )


def _refuse_halves(path: Path, images: dict[str, Member], labels: dict[str, int]) -> None:
    if not images and not labels:
        raise UserError(f"{path} holds no images: <key>.{{{','.join(IMAGE_SUFFIXES)}}} beside <key>.{LABEL_SUFFIX}")
    for key, member in images.items():
        if key not in labels:
            raise UserError(f"{path}:{member.name} has no label: a shard holds {key}.{LABEL_SUFFIX}, its class number")
    for key in labels:
        if key not in images:
            raise UserError(f"{path}: {key} has a label and no image ({', '.join(IMAGE_SUFFIXES)})")


def _members(reader: _Reader, path: Path) -> Iterator[Member]:
    """The regular files."""
    at, long_name, long_size = 0, "", None
    while True:
        header = reader.at(at, BLOCK)
        if len(header) == BLOCK and not any(header):
            return
        try:
            name, kind, size = _plain_header(header) or _any_header(header)
        except tarfile.HeaderError as error:
            if at == 0:
                raise UserError(f"{path} is no tar archive, or an empty one") from error
            cut = len(header) < BLOCK
            raise UserError(f"{path} is {'truncated' if cut else f'broken at byte {at:,}'}: copy it anew") from error
        size = size if long_size is None else long_size
        content, at = at + BLOCK, at + BLOCK + -(-size // BLOCK) * BLOCK
        if at > reader.size:
            raise UserError(f"{path} is truncated: {name} ends after the file does; copy it anew")
        if kind == tarfile.GNUTYPE_LONGNAME:
            long_name = reader.at(content, size).rstrip(b"\0").decode(*NAME_ENCODING)
        elif kind == tarfile.XHDTYPE:
            records = _pax_records(reader.at(content, size))
            long_name = records.get("path", long_name)
            long_size = int(records["size"]) if "size" in records else None
        else:
            if kind in REGULAR:
                yield Member(long_name or name, content, size)
            long_name, long_size = "", None


def _plain_header(header: bytes) -> tuple[str, bytes, int] | None:
    """Name, kind and size of a regular file whose name is not long; None for anything else, and where in doubt.

    Nearly all headers are like this, and the standard library takes four times as long over each of millions.
    """
    if len(header) < BLOCK or header[156:157] != tarfile.REGTYPE or header[345] or header[99]:
        return None
    try:
        size, checksum = (int(field.rstrip(b" \0"), 8) for field in (header[124:136], header[148:156]))
        if sum(header) - sum(header[148:156]) + 8 * ord(" ") != checksum:
            return None
        return header[: header.index(0)].decode(*NAME_ENCODING), tarfile.REGTYPE, size
    except ValueError:
        return None


def _any_header(header: bytes) -> tuple[str, bytes, int]:
    info = tarfile.TarInfo.frombuf(header, *NAME_ENCODING)
    return info.name, info.type, info.size


def _pax_records(content: bytes) -> dict[str, str]:
    """`<length> <keyword>=<value>\\n`, one after another; the length counts the whole record."""
    records = {}
    while (found := re.match(rb"(\d+) ([^=]+)=", content)) is not None:
        length = int(found[1])
        records[found[2].decode()] = content[found.end() : length - 1].decode(*NAME_ENCODING)
        content = content[length:]
    return records


def _split(name: str) -> tuple[str, str]:
    """Key and suffix: what stands before and after the first dot of the last part."""
    folder, slash, last = name.rpartition("/")
    stem, _, suffix = last.partition(".")
    return folder + slash + stem, suffix


def _class_number(text: bytes, path: Path, name: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = -1
    if number < 0:
        raise UserError(f"{path}:{name} must hold a class number from 0 on; got {text[:40]!r}")
    return number


def _number_in_json(text: bytes) -> int | None:
    try:
        values = json.loads(text)
    except ValueError:
        return None
    found = values.get("label", values.get("cls")) if isinstance(values, dict) else None
    return found if type(found) is int and found >= 0 else None


def _dali_index(members: list[Member]) -> str | None:
    lines: list[list[str]] = []
    last_key = None
    for name, offset, size in members:
        key, suffix = _split(name)
        if not key or key.endswith("/"):  # a hidden file
            continue
        if re.search(r"\s", name):
            return None
        if key != last_key:
            lines.append([])
            last_key = key
        lines[-1].append(f"{suffix} {offset} {size} {name}")
    return "".join(f"{line}\n" for line in (f"{DALI_INDEX_VERSION} {len(lines)}", *map(" ".join, lines)))
