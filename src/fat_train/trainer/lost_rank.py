"""What torch says when another process of the job is gone, in words for people."""

from __future__ import annotations

import re

from torch import distributed

# gloo has no exception of its own; NCCL's is a DistBackendError.
SIGNS = re.compile(r"gloo|Connection (reset|closed) by peer|Broken pipe")


def lost_rank(error: RuntimeError) -> str | None:
    """One line on the loss of another process, or None where the error is about something else."""
    if not (isinstance(error, distributed.DistError) or SIGNS.search(str(error))):
        return None
    where = f"rank {distributed.get_rank()}" if distributed.is_initialized() else "this rank"
    return (
        f"{where} stops, since another process of the job has ended or cannot be reached: see its own last words, or "
        f"those of the machine that it ran on ({_first_words(str(error))})"
    )


def _first_words(text: str) -> str:
    """The fact in torch's message, without the path of its source and without its advice."""
    fact = re.sub(r"^\[[^\]]*\]\s*", "", text.strip().splitlines()[0])
    return fact.partition(". ")[0]
