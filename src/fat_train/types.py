"""The words that every other file uses: axis letters, the batch, the pyramid, and errors a user can mend.

Axis legend (jaxtyping strings and trailing comments):
  B images in the batch · C channels · H, W height and width of the map at hand · K classes
  M attention heads · D channels of one head · N tokens of the (down-sampled) key/value map
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from jaxtyping import Float, Int, UInt8
from torch import Tensor

NAMED_AT_MOST = 5

EXIT_UNFINISHED = 75
"""Status of a run that saved and left before its end: sysexits' EX_TEMPFAIL, the same command goes on."""
EXIT_HUNG = 70
"""Status of a run that ended itself because a rank made no progress: sysexits' EX_SOFTWARE."""


class UserError(ValueError):
    """Something the user wrote and can mend: the message says the field, what is allowed and what was got.

    The command line prints the message alone and exits with 2; any other exception is a fault of ours.
    """


class MissingPathError(FileNotFoundError, UserError):
    """A path that a setting led to is not there; the message names the setting."""


class UnfinishedRunError(Exception):
    """The run was asked to leave (a signal, a time limit), has saved, and goes on with the same command.

    Attributes:
        status: exit status of the process.
    """

    def __init__(self, why: str, status: int = EXIT_UNFINISHED) -> None:
        super().__init__(why)
        self.status = status


def nearest(word: str, known: Iterable[str]) -> str:
    """`"; did you mean …?"` for the known word that is closest or begins alike, or nothing where none does."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5) or [name for name in known if name.startswith(word)]
    return f"; did you mean {close[0]}?" if close else ""


def one_of(field: str, value: str, allowed: Iterable[str]) -> None:
    """Refuse a word that is not among the allowed ones.

    Raises:
        UserError: the field, the nearest allowed word, and all of them.
    """
    allowed = tuple(allowed)
    if value not in allowed:
        raise UserError(f"{field}={value} is not known{nearest(value, allowed)} (allowed: {', '.join(allowed)})")


def some(names: Sequence[str]) -> str:
    """The first few of some names, and how many more there are."""
    more = f" and {len(names) - NAMED_AT_MOST:,} more" if len(names) > NAMED_AT_MOST else ""
    return (", ".join(names[:NAMED_AT_MOST]) or "nothing") + more


class Batch(NamedTuple):
    """What a loader yields, and what crosses from the host to the device: 8-bit pixels, still un-normalised.

    Normalising, erasing and mixing happen on the training device (`fat_train.augment`), so a batch costs a
    quarter of its float32 size on the way.
    """

    images: UInt8[Tensor, "B H W C"]
    targets: Int[Tensor, " B"]
    indices: Int[Tensor, " B"]
    """Row of each image in its `FileIndex`: names the file behind any picture, and proves who saw what."""
    erase: Int[Tensor, "B R 4"]
    """Rectangles (top, left, height, width) in pixels to erase after normalising; height 0 means none; R may be 0."""


class Labels(NamedTuple):
    """What a (possibly mixed) picture shows: `weight` of class `first`, 1 - `weight` of class `second`."""

    first: Int[Tensor, " B"]
    second: Int[Tensor, " B"]
    weight: float | Float[Tensor, " B"]
    """One number where the batch shares it: the host then knows it, and leaves out what a weight of 1 does not need."""


class Pyramid(NamedTuple):
    """Feature maps of a backbone from fine to coarse, with the stride of each against the input image."""

    maps: tuple[Float[Tensor, "B _C _H _W"], ...]
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What a `Task` returns for one batch. `loss` is a mean over the batch and carries the graph."""

    loss: Float[Tensor, ""]
    logits: Float[Tensor, "B K"]
    targets: Int[Tensor, " B"]
