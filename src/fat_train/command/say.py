"""Words for the person at the terminal: once a job, not once a rank."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path


def rank() -> int:
    """This process's global rank as its launcher tells it (Lightning, torchrun or SLURM); 0 without a launcher."""
    for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK"):
        if os.environ.get(name, "").isdecimal():
            return int(os.environ[name])
    return 0


def is_rank_zero() -> bool:
    """Whether this process speaks, and writes files, for the job."""
    return rank() == 0


def say(text: str) -> None:
    """Print from rank 0."""
    if is_rank_zero():
        print(text, flush=True)


def this_python() -> str:
    """The word that starts this very Python where the user stands: "python", ".venv/bin/python", or a full path."""
    own = Path(sys.executable)
    for word in ("python", "python3"):
        found = shutil.which(word)
        if found and Path(found).absolute() == own.absolute():
            return word
    return str(own.relative_to(Path.cwd())) if own.is_relative_to(Path.cwd()) else str(own)


def complain(text: str) -> None:
    """Print an error from any rank, whose number is told where it is not 0."""
    prefix = "" if is_rank_zero() else f"[rank {rank()}] "
    print(f"{prefix}Error: {text}", file=sys.stderr, flush=True)
