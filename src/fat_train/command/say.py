"""Words for the person at the terminal: once a job, not once a rank."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path


def is_rank_zero() -> bool:
    """Whether this process speaks, and writes files, for the job, as its launcher tells it.

    RANK is torchrun's. Lightning's own launcher gives LOCAL_RANK to the processes that it starts, and NODE_RANK tells
    nodes apart that were started by hand. SLURM_PROCID comes last: whoever starts Lightning's launcher in a shell of
    SLURM hands that shell's 0 on to every process.
    """
    if "RANK" in os.environ:
        return os.environ["RANK"] == "0"
    if "LOCAL_RANK" in os.environ or "NODE_RANK" in os.environ:
        return os.environ.get("LOCAL_RANK", "0") == "0" and os.environ.get("NODE_RANK", "0") == "0"
    return os.environ.get("SLURM_PROCID", "0") == "0"


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
    """Print an error from any rank; those of other ranks than 0 are marked."""
    prefix = "" if is_rank_zero() else "[another rank] "
    print(f"{prefix}Error: {text}", file=sys.stderr, flush=True)
