"""The augmentation recipe: settings, and timm's strings that name a policy. `fat_train.augment.draws` draws by it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum

from fat_train.types import UserError, one_of

MAX_LEVEL = 10.0
UNIFORM_ABOVE_STD = 100.0

INTERPOLATIONS = ("bicubic", "bilinear")
RANDOM_INTERPOLATION = "random"
ERASE_MODES = ("pixel", "rand", "const")
MIX_MODES = ("batch", "pair", "elem")


class Op(IntEnum):
    """RandAugment's fifteen operations, and the blur of ThreeAugment; the comment says what the number beside one
    (`Draws.arg`) means."""

    AUTO_CONTRAST = 0  # unused
    EQUALIZE = 1  # unused
    INVERT = 2  # unused
    ROTATE = 3  # degrees, counter-clockwise
    POSTERIZE = 4  # bits kept, 1 to 8
    SOLARIZE = 5  # levels from this one on are inverted, 0 to 256
    SOLARIZE_ADD = 6  # added to levels under 128
    COLOR = 7  # factor: 0 grey, 1 the picture itself
    CONTRAST = 8  # factor: 0 the mean grey, 1 the picture itself
    BRIGHTNESS = 9  # factor: 0 black, 1 the picture itself
    SHARPNESS = 10  # factor: 0 smoothed, 1 the picture itself
    SHEAR_X = 11  # source x moves by this times y
    SHEAR_Y = 12  # source y moves by this times x
    TRANSLATE_X = 13  # source x moves by this fraction of the width
    TRANSLATE_Y = 14  # source y moves by this fraction of the height
    GAUSSIAN_BLUR = 15  # standard deviation, pixels


NO_OP = -1
RAND_AUGMENT_OPS = 15
WARPS = (Op.ROTATE, Op.SHEAR_X, Op.SHEAR_Y, Op.TRANSLATE_X, Op.TRANSLATE_Y)
"""The operations that move pixels, and so interpolate."""
JITTERED = (Op.BRIGHTNESS, Op.CONTRAST, Op.COLOR)


@dataclass(frozen=True, kw_only=True)
class RandAugment:
    """What a timm string such as `rand-m9-mstd0.5-inc1` says."""

    magnitude: int = 10
    """Mean level of every operation, 0 to 10 (`m`)."""
    num_ops: int = 2
    """Operations drawn for an image, with replacement (`n`)."""
    prob: float = 0.5
    """Probability that a drawn operation is carried out (`p`)."""
    magnitude_std: float = 0.0
    """Standard deviation of the level; infinite means uniform in [0, magnitude] (`mstd`, infinite over 100)."""
    increasing: bool = False
    """Take the operations whose strength grows with the level (`inc1`)."""


@dataclass(frozen=True, kw_only=True)
class ThreeAugment:
    """What `3a` says: one of solarizing, grey, blurring for each image (DeiT III, arXiv:2204.07118, section 3)."""

    magnitude_std: float = 0.0
    """As of RandAugment, around the levels 5 (solarize), 10 (grey) and 10 (blur)."""


_RAND_AUGMENT_FIELDS: dict[str, tuple[str, Callable[[str], int | float | bool]]] = {
    "m": ("magnitude", int),
    "n": ("num_ops", int),
    "p": ("prob", float),
    "mstd": ("magnitude_std", float),
    "inc": ("increasing", lambda text: bool(int(text))),
}
_THREE_AUGMENT_FIELDS = {"mstd": _RAND_AUGMENT_FIELDS["mstd"]}
_AUTO_AUGMENT_HELP = (
    "rand-m<0..10>[-n<operations>][-p<probability>][-mstd<deviation>][-inc<0|1>], such as rand-m9-mstd0.5-inc1, "
    "or 3a[-mstd<deviation>], or null"
)


def parse_auto_augment(text: str) -> RandAugment | ThreeAugment:
    """Read timm's string for RandAugment or ThreeAugment.

    Raises:
        UserError: another policy, a part that is not understood, or a number out of range.
    """

    def refuse(why: str) -> UserError:
        return UserError(f"augment.auto_augment must be {_AUTO_AUGMENT_HELP}; got {text!r}: {why}")

    head, *parts = text.split("-")
    if head not in ("rand", "3a"):
        raise refuse(f"it starts with {head!r}")
    fields = _RAND_AUGMENT_FIELDS if head == "rand" else _THREE_AUGMENT_FIELDS
    values: dict[str, int | float | bool] = {}
    for part in parts:
        match = re.fullmatch(r"([a-z]+)(\d+(?:\.\d+)?)", part)
        if match is None or match[1] not in fields:
            raise refuse(f"part {part!r} is not one of {', '.join(fields)} followed by a number")
        name, convert = fields[match[1]]
        try:
            values[name] = convert(match[2])
        except ValueError as error:
            raise refuse(f"{match[1]} takes a whole number, not {match[2]}") from error
    if values.get("magnitude_std", 0.0) > UNIFORM_ABOVE_STD:
        values["magnitude_std"] = math.inf
    if head == "3a":
        return ThreeAugment(magnitude_std=float(values.get("magnitude_std", 0.0)))
    spec = RandAugment(**values)  # type: ignore[arg-type]  # each value went through its field's own converter
    if not 0 <= spec.magnitude <= MAX_LEVEL:
        raise refuse("m must be in [0, 10]")
    if spec.num_ops < 1:
        raise refuse("n must be at least 1")
    if not 0 <= spec.prob <= 1:
        raise refuse("p must be in [0, 1]")
    return spec


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """How training images are augmented. Validation images never are."""

    auto_augment: str | None = "rand-m9-mstd0.5-inc1"
    """RandAugment or ThreeAugment (`3a`) in timm's notation, or null for none."""
    color_jitter: float = 0.0
    """Largest change of brightness, contrast and saturation, with 3a or null; idle beside RandAugment, as in timm."""
    crop_scale: list[float] = field(default_factory=lambda: [0.08, 1.0])
    """Smallest and largest area of the random crop, as a fraction of the image's area."""
    crop_ratio: list[float] = field(default_factory=lambda: [3 / 4, 4 / 3])
    """Smallest and largest width/height of the random crop."""
    hflip_prob: float = 0.5
    """Probability of a left-right flip."""
    interpolation: str = "bicubic"
    """Kernel of every resize (antialiased) and warp: bicubic, bilinear, or random (either, drawn each time; evaluation
    is bicubic then)."""
    erase_prob: float = 0.25
    """Probability that an image has rectangles erased."""
    erase_mode: str = "pixel"
    """Fill of an erased rectangle: pixel (normal noise each pixel), rand (one normal colour), const (the mean)."""
    erase_count: int = 1
    """Most rectangles erased in an image; the number is uniform from 1, and they share the area."""
    erase_area: list[float] = field(default_factory=lambda: [0.02, 1 / 3])
    """Smallest and largest area that is erased in an image, as a fraction of it, before its rectangles share it."""
    erase_ratio: float = 0.3
    """Smallest height/width of an erased rectangle; the largest is its inverse."""
    mixup_alpha: float = 0.8
    """Both parameters of the Beta distribution of mixup's weight; 0 turns mixup off."""
    cutmix_alpha: float = 1.0
    """Both parameters of the Beta distribution of cutmix's weight; 0 turns cutmix off."""
    cutmix_minmax: list[float] | None = None
    """Bounds of the sides of cutmix's box, as fractions of the picture's; turns cutmix on, whatever cutmix_alpha."""
    mix_mode: str = "batch"
    """What shares a draw of mixup or cutmix: the batch, a pair (images that are mixed with each other), or elem."""
    mix_prob: float = 1.0
    """Probability that a batch (pair, image: see mix_mode) is mixed at all."""
    mix_switch_prob: float = 0.5
    """Probability of cutmix rather than mixup where both are on."""
    repeats: int = 1
    """Times that an image comes in an epoch, each augmented on its own; an epoch then shows 1/repeats of the images."""

    def __post_init__(self) -> None:
        if self.auto_augment is not None:
            parse_auto_augment(self.auto_augment)
        if not 0 <= self.color_jitter <= 1:
            raise UserError(f"augment.color_jitter must be in [0, 1]; got {self.color_jitter}")
        for name, highest in (("crop_scale", 1.0), ("crop_ratio", math.inf), ("erase_area", 1.0)):
            bounds = getattr(self, name)
            if len(bounds) != 2 or not 0 < bounds[0] <= bounds[1] <= highest:
                limit = "" if highest == math.inf else f" <= {highest:g}"
                raise UserError(f"augment.{name} must be [low, high] with 0 < low <= high{limit}; got {list(bounds)}")
        for name in ("hflip_prob", "erase_prob", "mix_prob", "mix_switch_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"augment.{name} must be in [0, 1]; got {getattr(self, name)}")
        for name in ("mixup_alpha", "cutmix_alpha"):
            if not getattr(self, name) >= 0:
                raise UserError(f"augment.{name} must be at least 0; got {getattr(self, name)}")
        one_of("augment.interpolation", self.interpolation, (*INTERPOLATIONS, RANDOM_INTERPOLATION))
        if self.erase_mode not in ERASE_MODES:
            raise UserError(f"augment.erase_mode must be one of {', '.join(ERASE_MODES)}; got {self.erase_mode!r}")
        if self.erase_count < 1:
            raise UserError(f"augment.erase_count must be at least 1 (erase_prob=0 is none); got {self.erase_count}")
        if not 0 < self.erase_ratio <= 1:
            raise UserError(f"augment.erase_ratio must be in (0, 1]; got {self.erase_ratio}")
        self._check_batches()

    def _check_batches(self) -> None:
        if self.mix_mode not in MIX_MODES:
            raise UserError(f"augment.mix_mode must be one of {', '.join(MIX_MODES)}; got {self.mix_mode!r}")
        sides = self.cutmix_minmax
        if sides is not None and (len(sides) != 2 or not 0 <= sides[0] < sides[1] <= 1):
            raise UserError(f"augment.cutmix_minmax must be [low, high] with 0 <= low < high <= 1 or null; got {sides}")
        if self.repeats < 1:
            raise UserError(f"augment.repeats must be at least 1; got {self.repeats}")

    @property
    def policy(self) -> RandAugment | ThreeAugment | None:
        """What `auto_augment` says."""
        return None if self.auto_augment is None else parse_auto_augment(self.auto_augment)

    @property
    def jitters(self) -> bool:
        """Whether colours are jittered."""
        return self.color_jitter > 0 and not isinstance(self.policy, RandAugment)

    @property
    def num_ops(self) -> int:
        """Columns of `Draws.op`."""
        policy = self.policy
        of_policy = policy.num_ops if isinstance(policy, RandAugment) else int(policy is not None)
        return of_policy + len(JITTERED) * self.jitters

    @property
    def eval_interpolation(self) -> str:
        """Kernel of evaluation's resize."""
        return INTERPOLATIONS[0] if self.interpolation == RANDOM_INTERPOLATION else self.interpolation
