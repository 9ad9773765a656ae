"""Writing one tar shard: whole or not at all, the same bytes for the same images."""

from __future__ import annotations

import hashlib
import os
import re
import tarfile
from itertools import pairwise
from pathlib import Path

from fat_train.data.index import FileIndex
from fat_train.data.tar import BLOCK, LABEL_SUFFIX, NAME_ENCODING

HEADERS = 8 * BLOCK
"""At most so much stands around an image: two headers, each with a long name, and the label."""


def keys_of(index: FileIndex) -> list[str]:
    """Key of each row's image: `<class>/<path within it>`, without suffix, dots in its last part, and white space.

    Within a class the keys are all different and sort as the rows do, so that whoever lists the shards gets the order
    of this index again. Where the names alone would not give that, each gets its number before it.
    """
    folders = _class_folders(index.classes)
    keys: list[str] = []
    by_class: dict[int, list[int]] = {}
    for row, (path, target) in enumerate(zip(index.paths, index.targets.tolist(), strict=True)):
        parts = [part for part in path.split("/") if part not in ("", ".", "..")]
        parts = parts[1:] if len(parts) > 1 and parts[0] == index.classes[target] else parts
        stem = parts[-1].rpartition(".")[0] or parts[-1]
        keys.append("/".join((folders[target], *map(_plain, parts[:-1]), _plain(stem).replace(".", "_"))))
        by_class.setdefault(target, []).append(row)
    for target, rows in by_class.items():
        own = [keys[row] for row in rows]
        names = [f"{key}.jpg" for key in own]
        if any(one >= other for one, other in pairwise(names)):
            for number, row in enumerate(rows):
                keys[row] = f"{folders[target]}/{number:07d}_{keys[row].rpartition('/')[2]}"
    return keys


def _class_folders(classes: tuple[str, ...]) -> list[str]:
    """Folders of the classes within an archive: their names, or numbers where names are alike once made plain."""
    folders = [_plain(name).replace("/", "_").lstrip(".") for name in classes]
    if len(set(folders)) < len(classes) or "" in folders:
        return [f"{number:0{len(str(len(classes) - 1))}d}" for number in range(len(classes))]
    return folders


def _plain(name: str) -> str:
    return re.sub(r"\s", "_", name)


class ShardWriter:
    """A tar archive under a temporary name, until `finish`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.images = 0
        self.source_bytes = 0
        self.bytes = 0
        self._digest = hashlib.sha256()
        self._beside = path.with_name(f".{path.name}.part")
        self._file = self._beside.open("wb")

    def has_room(self, image_bytes: int, limit: float) -> bool:
        """Whether the finished archive stays within `limit` bytes with one more image of this size."""
        return self.bytes + image_bytes + HEADERS + tarfile.RECORDSIZE <= limit

    def add(self, key: str, image: bytes, label: int, source_bytes: int) -> None:
        """Store a sample; the label first, so that whoever lists the archive reads it along with the headers."""
        for suffix, content in ((LABEL_SUFFIX, str(label).encode()), ("jpg", image)):
            member = tarfile.TarInfo(f"{key}.{suffix}")  # of nobody, from the year 1970: nothing here but the content
            member.size = len(content)
            self._write(member.tobuf(tarfile.GNU_FORMAT, *NAME_ENCODING))
            self._write(content)
            self._write(bytes(-len(content) % BLOCK))
        self.images += 1
        self.source_bytes += source_bytes

    def finish(self) -> str:
        """Flush to the disk and give the archive its name; returns its SHA-256 in hex."""
        self._write(bytes(2 * BLOCK))  # the mark of an archive's end
        self._write(bytes(-self.bytes % tarfile.RECORDSIZE))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._beside.replace(self.path)
        return self._digest.hexdigest()

    def abandon(self) -> None:
        """Delete what was written."""
        self._beside.unlink(missing_ok=True)
        self._file.close()

    def _write(self, content: bytes) -> None:
        self._digest.update(content)
        self._file.write(content)
        self.bytes += len(content)
