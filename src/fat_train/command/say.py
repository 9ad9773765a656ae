"""Words for the person at the terminal: once a job, not once a rank."""

from __future__ import annotations

import os
import sys


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


def complain(text: str) -> None:
    """Print an error from any rank, whose number is told where it is not 0."""
    prefix = "" if is_rank_zero() else f"[rank {rank()}] "
    print(f"{prefix}Error: {text}", file=sys.stderr, flush=True)
