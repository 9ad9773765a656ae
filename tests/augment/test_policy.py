import math

import numpy as np
import pytest
from PIL import Image
from timm.data import auto_augment
from timm.data.transforms import RandomResizedCropAndInterpolation

from fat_train.augment.policy import AugmentConfig, Draws, Op, crop_box, draw, parse_rand_augment
from fat_train.types import UserError

DRAWN = 4000


def table(config: AugmentConfig, n: int = DRAWN, image_px: int = 224) -> Draws:
    return draw(config, image_px, np.random.default_rng([1, 2, 3]), n)


@pytest.mark.parametrize(("height", "width"), [(10, 1000), (1000, 10), (64, 64), (1, 1), (3, 2), (375, 500)])
def test_a_crop_always_lies_inside_the_image(height: int, width: int) -> None:
    for attempts in table(AugmentConfig(), 200).crop:
        top, left, crop_height, crop_width = crop_box(attempts, height, width, (3 / 4, 4 / 3))
        assert crop_height > 0
        assert crop_width > 0
        assert 0 <= top <= height - crop_height
        assert 0 <= left <= width - crop_width


@pytest.mark.parametrize(("height", "width"), [(10, 1000), (1000, 11), (63, 64), (97, 211)])
def test_the_crop_where_no_attempt_fits_is_torchvisions_central_one(height: int, width: int) -> None:
    impossible = np.full((10, 4), [4.0, 1.0, 0.5, 0.5])
    image, too_large = Image.new("RGB", (width, height)), (4.0, 4.0)
    theirs = RandomResizedCropAndInterpolation.get_params(image, too_large, (3 / 4, 4 / 3))
    assert crop_box(impossible, height, width, (3 / 4, 4 / 3)) == theirs


def test_no_flips_are_drawn_where_none_are_wanted() -> None:
    assert not table(AugmentConfig(hflip_prob=0.0)).flip.any()


def test_a_table_depends_on_the_generator_alone() -> None:
    first, again, other = (
        draw(AugmentConfig(), 224, np.random.default_rng(seed), 16) for seed in ([4, 2], [4, 2], [4, 3])
    )
    assert all(np.array_equal(getattr(first, name), getattr(again, name)) for name in vars(first))
    assert not np.array_equal(first.crop, other.crop)


def test_taking_rows_keeps_each_images_decisions_together() -> None:
    whole = table(AugmentConfig(), 20)
    rows = np.array([3, 17, 4])
    part = whole.take(rows)
    assert len(part) == 3
    assert all(np.array_equal(getattr(part, name), getattr(whole, name)[rows]) for name in vars(whole))


def test_no_policy_draws_no_operations_and_no_erasing_no_rectangles() -> None:
    draws = table(AugmentConfig(auto_augment=None, erase_prob=0.0), 5)
    assert draws.op.shape == draws.arg.shape == (5, 0)
    assert draws.erase.shape == (5, 0, 4)


def test_posterize_never_asks_for_no_bits_at_all() -> None:
    draws = table(AugmentConfig(auto_augment="rand-m10-inc1"))
    assert set(draws.arg[draws.op == Op.POSTERIZE]) == {1.0}


@pytest.mark.parametrize("text", ["rand-m9-mstd0.5-inc1", "rand-n3-p0.7", "rand", "rand-m5-mstd101"])
def test_a_timm_string_means_what_timm_takes_it_for(text: str) -> None:
    spec = parse_rand_augment(text)
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
        ("interpolation", "nearest"),
        ("erase_mode", "black"),
        ("erase_count", 0),
    ],
)
def test_an_impossible_value_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(UserError, match=rf"augment\.{field} must be"):
        AugmentConfig(**{field: value})
