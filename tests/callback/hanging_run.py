"""A real training run whose loader hangs at the fourth batch: `python hanging_run.py <how> <words of the run>`."""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Iterator

from fat_train.__main__ import main
from fat_train.callback import hang
from fat_train.data.loader import Planned
from fat_train.data.synthetic import SyntheticLoader
from fat_train.types import Batch

LOAD = SyntheticLoader._load
FOR_EVER_S = 10_000


def wait_for_a_disk(how: str) -> None:
    if how == "wait":
        time.sleep(FOR_EVER_S)
    else:
        ctypes.PyDLL(None).sleep(FOR_EVER_S)  # holds the GIL: no other thread of Python runs


def load(self: SyntheticLoader, planned: Iterator[Planned]) -> Iterator[Batch]:
    for number, batch in enumerate(LOAD(self, planned)):
        if number == 3:
            wait_for_a_disk(sys.argv[1])
        yield batch


if __name__ == "__main__":
    SyntheticLoader._load = load
    hang.BACKUP_S = 1.0
    sys.exit(main(sys.argv[2:]))
