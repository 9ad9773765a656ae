import math

import pytest
from timm.data import auto_augment

from fat_train.augment.policy import AugmentConfig, RandAugment, parse_auto_augment
from fat_train.types import UserError


@pytest.mark.parametrize("text", ["rand-m9-mstd0.5-inc1", "rand-n3-p0.7", "rand", "rand-m5-mstd101"])
def test_a_timm_string_means_what_timm_takes_it_for(text: str) -> None:
    spec = parse_auto_augment(text)
    assert isinstance(spec, RandAugment)
    theirs = auto_augment.rand_augment_transform(text, {"img_mean": (0, 0, 0)})
    op = theirs.ops[0]
    assert (spec.num_ops, spec.magnitude, spec.prob, spec.magnitude_std) == (
        theirs.num_layers,
        op.magnitude,
        op.prob,
        op.magnitude_std,
    )
    assert spec.increasing == any(one.name.endswith("Increasing") for one in theirs.ops)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("augmix-m3", "starts with 'augmix'"),
        ("rand-m9-x2", "'x2' is not one of m, n, p, mstd, inc"),
        ("rand-m9-mstd", "'mstd' is not one of"),
        ("rand-m11", r"m must be in \[0, 10\]"),
        ("rand-m9.5", "m takes a whole number"),
        ("rand-n0", "n must be at least 1"),
        ("rand-p1.5", r"p must be in \[0, 1\]"),
        ("3a-m9", "'m9' is not one of mstd"),
    ],
)
def test_a_string_that_is_not_understood_is_refused_with_what_is_allowed(text: str, why: str) -> None:
    with pytest.raises(UserError, match=rf"augment\.auto_augment must be rand-m.*got '{text}'.*{why}"):
        AugmentConfig(auto_augment=text)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("crop_scale", [0.5, 0.1]),
        ("crop_scale", [0.0, 1.0]),
        ("crop_scale", [0.5, 1.5]),
        ("crop_ratio", [1.0]),
        ("hflip_prob", 1.5),
        ("erase_prob", -0.1),
        ("mixup_alpha", -1.0),
        ("cutmix_alpha", math.nan),
        ("color_jitter", 1.5),
        ("erase_mode", "black"),
        ("erase_count", 0),
        ("erase_area", [0.0, 0.3]),
        ("erase_area", [0.3, 1.1]),
        ("erase_ratio", 0.0),
        ("erase_ratio", 2.0),
        ("mix_mode", "half"),
        ("cutmix_minmax", [0.8, 0.3]),
        ("cutmix_minmax", [0.3]),
        ("cutmix_minmax", [0.3, 1.2]),
        ("repeats", 0),
    ],
)
def test_an_impossible_value_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(UserError, match=rf"augment\.{field} must be"):
        AugmentConfig(**{field: value})
