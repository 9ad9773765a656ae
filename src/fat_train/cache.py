"""The folder for what can be made again: data sets that we write, kernels that we compile, what was measured."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$FAT_TRAIN_CACHE`, or `~/.cache/fat_train`; it may not be there yet."""
    chosen = os.environ.get("FAT_TRAIN_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "fat_train"
