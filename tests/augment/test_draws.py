import random
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image
from scipy import stats
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation

from fat_train.augment.draws import Draws, crop_box, draw
from fat_train.augment.policy import AugmentConfig, Op

DRAWN = 4000
SIGNIFICANT = 1e-3  # the draws are seeded: a claim that holds once holds always
DEIT = "rand-m9-mstd0.5-inc1"


@pytest.fixture
def seeded() -> Iterator[None]:
    """Seed the two global generators that timm draws from, and put them back."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    random.seed(11)
    np.random.seed(11)
    yield
    random.setstate(python_state)
    np.random.set_state(numpy_state)


def table(config: AugmentConfig, n: int = DRAWN, image_px: int = 224) -> Draws:
    return draw(config, image_px, np.random.default_rng([1, 2, 3]), n)


@pytest.mark.parametrize(("auto_augment", "columns"), [(None, 3), ("3a", 4), ("rand-m9-n2", 2)])
def test_colour_jitter_is_idle_beside_rand_augment_alone(auto_augment: str | None, columns: int) -> None:
    assert table(AugmentConfig(auto_augment=auto_augment, color_jitter=0.4), 9).op.shape == (9, columns)


def test_random_interpolation_takes_either_kernel_for_each_resize_and_each_warp() -> None:
    draws = table(AugmentConfig(interpolation="random"))
    assert draws.kernel.shape == (DRAWN, 3)
    np.testing.assert_allclose(draws.kernel.mean(axis=0), 0.5, atol=0.02)
    both = np.corrcoef(draws.kernel.T) - np.eye(3)
    assert np.abs(both).max() < 0.03
    assert AugmentConfig(interpolation="random").eval_interpolation == "bicubic"
    assert (table(AugmentConfig(interpolation="bilinear"), 9).kernel == 1).all()


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


@pytest.mark.usefixtures("seeded")
@pytest.mark.parametrize(
    ("count", "area", "ratio"),
    [(1, [0.02, 1 / 3], 0.3), (3, [0.02, 1 / 3], 0.3), (1, [0.3, 1.0], 0.2), (4, [0.1, 0.9], 0.8), (2, [0.2, 0.2], 1)],
)
def test_erased_rectangles_are_drawn_as_timm_draws_them(
    count: int, area: list[float], ratio: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How many (timm's min_count 1 to max_count), how large, of which shape, and where."""
    px, images, boxes = 64, 20_000, []
    eraser = RandomErasing(0.7, min_area=area[0], max_area=area[1], min_aspect=ratio, min_count=1, max_count=count)

    class Canvas:
        def __setitem__(self, place: tuple[slice, slice, slice], _value: object) -> None:
            _, rows, columns = place
            boxes[-1].append((rows.start, columns.start, rows.stop - rows.start, columns.stop - columns.start))

    monkeypatch.setattr("timm.data.random_erasing._get_pixels", lambda *_, **__: None)
    for _ in range(images):
        boxes.append([])
        eraser._erase(Canvas(), 3, px, px, None)
    recipe = AugmentConfig(auto_augment=None, erase_prob=0.7, erase_count=count, erase_area=area, erase_ratio=ratio)
    ours = table(recipe, images, px).erase
    assert ours.shape == (images, count, 4)
    their_number = Counter(len(image) for image in boxes)
    our_number = Counter((ours[..., 2] > 0).sum(axis=1).tolist())
    numbers = np.array([[their_number[k], our_number[k]] for k in range(count + 1)])
    assert stats.chi2_contingency(numbers).pvalue > SIGNIFICANT
    theirs, ours = np.array([box for image in boxes for box in image]), ours[ours[..., 2] > 0]
    for column, name in enumerate(("top", "left", "height", "width")):
        assert stats.ks_2samp(theirs[:, column], ours[:, column]).pvalue > SIGNIFICANT, name
    for of_size in (np.multiply, np.divide):  # area, and height / width
        assert stats.ks_2samp(*(of_size(drawn[:, 2], drawn[:, 3]) for drawn in (theirs, ours))).pvalue > SIGNIFICANT


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
