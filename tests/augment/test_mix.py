"""Mixup and CutMix draw from timm's distribution and mix exactly what they say."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, ks_2samp
from timm.data import Mixup
from timm.data.mixup import cutmix_bbox_and_lam, mixup_target
from torch.utils._python_dispatch import TorchDispatchMode

from fat_train.augment.mix import MixDraw, draw_mix, mix, mix_by_table
from fat_train.augment.policy import MIX_MODES, AugmentConfig

DRAWN = 20_000
PX = 224
SIGNIFICANT = 1e-3  # the draws are seeded: a claim that holds once holds always
MINMAX = [0.3, 0.8]


@pytest.fixture
def seeded() -> Iterator[None]:
    """Seed the global generator that timm draws from, and put it back."""
    state = np.random.get_state()
    np.random.seed(5)
    yield
    np.random.set_state(state)


def rows(mode: str, count: int = DRAWN, **settings: Any) -> np.ndarray:
    """`count` independent draws (λ, top, left, bottom, right) of a mode."""
    config, rng = AugmentConfig(mix_mode=mode, **settings), np.random.default_rng([7, MIX_MODES.index(mode)])
    if mode == "batch":
        drawn = [draw_mix(config, rng, 8, PX, PX) for _ in range(count)]
        return np.array([(one.weight, *(one.box or (0, 0, 0, 0))) for one in drawn])
    return draw_mix(config, rng, 2 * count if mode == "pair" else count, PX, PX)[:count]


def timm_rows(count: int = DRAWN, **settings: Any) -> np.ndarray:
    reference = Mixup(mode="elem", **settings)
    found = []
    for weight, is_cut in zip(*reference._params_per_elem(count), strict=True):
        box, share = (0, 0, 0, 0), weight
        if weight < 1 and is_cut:
            (top, bottom, left, right), share = cutmix_bbox_and_lam(
                (3, PX, PX), weight, ratio_minmax=reference.cutmix_minmax
            )
            box = (top, left, bottom, right)
        found.append((share, *box))
    return np.array(found, float)


@pytest.mark.usefixtures("seeded")
@pytest.mark.parametrize("mode", MIX_MODES)
@pytest.mark.parametrize("minmax", [None, MINMAX])
def test_weights_and_boxes_follow_timms_distribution(mode: str, minmax: list[float] | None) -> None:
    """λ of what is blended, λ and box of what is cut, and how often each of them, or neither, is done."""
    ours = rows(mode, mix_prob=0.8, mix_switch_prob=0.4, cutmix_minmax=minmax)
    theirs = timm_rows(mixup_alpha=0.8, cutmix_alpha=1.0, prob=0.8, switch_prob=0.4, cutmix_minmax=minmax)
    our_cut, their_cut = (drawn[:, 3] > drawn[:, 1] for drawn in (ours, theirs))
    assert ks_2samp(ours[~our_cut, 0], theirs[~their_cut, 0]).pvalue > SIGNIFICANT, "mixup's weight"
    for column, name in enumerate(("weight", "top", "left", "bottom", "right")):
        assert ks_2samp(ours[our_cut, column], theirs[their_cut, column]).pvalue > SIGNIFICANT, name
    height, width = (ours[our_cut, 3] - ours[our_cut, 1]), (ours[our_cut, 4] - ours[our_cut, 2])
    their_height = theirs[their_cut, 3] - theirs[their_cut, 1]
    assert ks_2samp(height, their_height).pvalue > SIGNIFICANT
    np.testing.assert_allclose(ours[our_cut, 0], 1 - height * width / PX**2, atol=1e-6)
    assert binomtest(int((ours[:, 0] == 1).sum()), DRAWN, (theirs[:, 0] == 1).mean()).pvalue > SIGNIFICANT
    if minmax is not None:
        assert binomtest(int(our_cut.sum()), DRAWN, 0.8 * 0.4).pvalue > SIGNIFICANT
        assert min(height.min(), width.min()) >= int(0.3 * PX)
        assert max(height.max(), width.max()) < int(0.8 * PX)


@pytest.mark.parametrize(
    ("settings", "cut"),
    [
        ({"mixup_alpha": 0.0}, True),
        ({"cutmix_alpha": 0.0}, False),
        ({"mixup_alpha": 0.0, "cutmix_alpha": 0.0, "cutmix_minmax": MINMAX}, True),
    ],
)
@pytest.mark.parametrize("mode", MIX_MODES)
def test_with_one_of_the_two_off_the_other_is_always_done(mode: str, settings: dict[str, Any], cut: bool) -> None:
    drawn = rows(mode, 200, **settings)
    assert (drawn[:, 0] < 1).mean() > 0.95, "a box of no pixels, or a weight that rounds to 1, is rare"
    assert (drawn[drawn[:, 0] < 1, 3] > 0).all() == cut


def mixture(images: torch.Tensor, drawn: np.ndarray) -> torch.Tensor:
    """The definition, picture by picture, in float64."""
    exact = images.double()
    mixed = exact.clone()
    for i, (weight, *box) in enumerate(drawn.tolist()):
        top, left, bottom, right = (int(edge) for edge in box)
        other = exact[len(exact) - 1 - i]
        if bottom > top:
            mixed[i, :, top:bottom, left:right] = other[:, top:bottom, left:right]
        else:
            mixed[i] = weight * exact[i] + (1 - weight) * other
    return mixed


@pytest.mark.parametrize("mode", ["pair", "elem"])
@pytest.mark.parametrize("number", [1, 2, 7, 64])
def test_each_picture_is_mixed_as_its_row_says(mode: str, number: int) -> None:
    torch.manual_seed(0)
    images, targets = torch.randn(number, 3, 20, 30), torch.arange(number)
    images = images.contiguous(memory_format=torch.channels_last)
    drawn = draw_mix(AugmentConfig(mix_mode=mode, mix_prob=0.9), np.random.default_rng(1), number, 20, 30)
    mixed, labels = mix(images, targets, drawn)
    assert drawn.shape == (number, 5)
    torch.testing.assert_close(mixed.double(), mixture(images, drawn), rtol=0, atol=1e-6)
    assert mixed.is_contiguous(memory_format=torch.channels_last)
    assert labels.second.tolist() == list(reversed(range(number)))
    assert labels.weight.tolist() == drawn[:, 0].tolist()
    if mode == "pair":
        np.testing.assert_array_equal(drawn, drawn[::-1])
    elif number == 64:
        assert len({tuple(row) for row in drawn.tolist() if row[0] < 1}) > 50, "each picture has a draw of its own"


@pytest.mark.parametrize("mode", MIX_MODES)
@pytest.mark.parametrize("number", [1, 5])
def test_the_middle_picture_of_an_odd_batch_stays_as_it_is(mode: str, number: int) -> None:
    images, targets = torch.randn(number, 3, 16, 16), torch.arange(number)
    mixed, labels = mix(
        images, targets, draw_mix(AugmentConfig(mix_mode=mode), np.random.default_rng(3), number, 16, 16)
    )
    middle = number // 2
    torch.testing.assert_close(mixed[middle], images[middle])
    assert labels.first[middle] == labels.second[middle]


@pytest.mark.parametrize("cut", [False, True])
def test_a_table_of_one_draw_mixes_as_that_draw_mixes_a_batch(cut: bool) -> None:
    images, targets = torch.randn(6, 3, 16, 16), torch.arange(6)
    box = (2, 3, 9, 16) if cut else None
    weight = 1 - 7 * 13 / 256 if cut else 0.3
    ours, _ = mix(images, targets, np.array([(weight, *(box or (0, 0, 0, 0)))] * 6, np.float32))
    whole, _ = mix(images, targets, MixDraw(weight, box))
    assert torch.equal(ours, whole) if cut else torch.allclose(ours, whole, atol=1e-6)


@pytest.mark.parametrize("mode", MIX_MODES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_labels_are_timms_targets(mode: str, smoothing: float) -> None:
    targets, classes = torch.tensor([3, 1, 4, 1, 5, 9]), 10
    drawn = draw_mix(AugmentConfig(mix_mode=mode), np.random.default_rng(8), 6, 16, 16)
    _, labels = mix(torch.randn(6, 3, 16, 16), targets, drawn)
    weight = torch.as_tensor(labels.weight, dtype=torch.float32).expand(6)[:, None]
    one_hot = torch.nn.functional.one_hot(labels.first, classes), torch.nn.functional.one_hot(labels.second, classes)
    ours = (weight * one_hot[0] + (1 - weight) * one_hot[1]) * (1 - smoothing) + smoothing / classes
    torch.testing.assert_close(ours, mixup_target(targets, classes, weight, smoothing))


@pytest.mark.parametrize("mode", MIX_MODES)
def test_mixing_keeps_the_pictures_type_and_its_labels_are_float32(mode: str) -> None:
    drawn = draw_mix(AugmentConfig(mix_mode=mode), np.random.default_rng(2), 8, 16, 16)
    images, targets = torch.randn(8, 3, 16, 16), torch.arange(8)
    exact, _ = mix(images, targets, drawn)
    with torch.autocast("cpu", torch.bfloat16):
        mixed, labels = mix(images, targets, drawn)
    assert torch.equal(mixed, exact), "autocast leaves it alone"
    half, labels = mix(images.bfloat16(), targets, drawn)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), exact, rtol=0.02, atol=0.05)
    assert isinstance(labels.weight, float) or labels.weight.dtype == torch.float32


class NoLook(TorchDispatchMode):
    """Refuses what makes a host wait for a GPU: reading a value, and shapes that follow from values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.__name__.split(".")[0] not in ("_local_scalar_dense", "nonzero", "masked_select", "equal"), func
        indices = args[1] if func.__name__.startswith(("index.", "index_put")) else []
        assert all(index is None or index.dtype != torch.bool for index in indices), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", MIX_MODES)
def test_no_value_is_read_back_from_the_device(mode: str) -> None:
    images, targets = torch.randn(6, 3, 16, 16), torch.arange(6)
    with NoLook(), pytest.raises(AssertionError, match="_local_scalar_dense"):
        images.sum().item()
    with NoLook(), pytest.raises(AssertionError, match="index"):
        images[targets > 3]
    for seed in range(4):  # blended and cut
        drawn = draw_mix(AugmentConfig(mix_mode=mode, mix_prob=0.9), np.random.default_rng(seed), 6, 16, 16)
        with NoLook():
            mix(images, targets, drawn)


@pytest.mark.compile
def test_a_compiled_table_mix_is_one_graph_for_all_draws() -> None:
    torch.compiler.reset()
    compiled = torch.compile(mix_by_table, fullgraph=True, backend="aot_eager")
    images, targets = torch.randn(6, 3, 16, 16), torch.arange(6)
    config = AugmentConfig(mix_mode="elem", mix_prob=0.8)
    for seed in range(3):
        drawn = torch.from_numpy(draw_mix(config, np.random.default_rng(seed), 6, 16, 16))
        with torch.compiler.set_stance("default" if seed == 0 else "fail_on_recompile"):
            mixed, labels = compiled(images, targets, drawn)
        plain, plain_labels = mix_by_table(images, targets, drawn)
        torch.testing.assert_close(mixed, plain)
        assert torch.equal(labels.weight, plain_labels.weight)


def test_weight_of_cutmix_is_the_share_of_pixels_that_stay() -> None:
    rng, config = np.random.default_rng(2), AugmentConfig(mixup_alpha=0.0)
    for _ in range(50):
        drawn = draw_mix(config, rng, 2, 20, 30)
        images = torch.stack([torch.zeros(1, 20, 30), torch.ones(1, 20, 30)])
        mixed, _ = mix(images, torch.tensor([0, 1]), drawn)
        assert 1 - mixed[0].mean().item() == pytest.approx(drawn.weight, abs=1e-6)


def test_mixup_blends_a_picture_with_its_mirror_in_the_batch() -> None:
    images, targets = torch.randn(4, 3, 8, 8), torch.arange(4)
    mixed, labels = mix(images, targets, MixDraw(weight=0.3))
    torch.testing.assert_close(mixed[1], 0.3 * images[1] + 0.7 * images[2])
    assert labels.second.tolist() == [3, 2, 1, 0]
    assert labels.weight == 0.3


@pytest.mark.parametrize("off", [{"mix_prob": 0.0}, {"mixup_alpha": 0.0, "cutmix_alpha": 0.0}])
@pytest.mark.parametrize("mode", MIX_MODES)
def test_without_mixing_a_batch_passes_untouched(mode: str, off: dict[str, float]) -> None:
    drawn = draw_mix(AugmentConfig(mix_mode=mode, **off), np.random.default_rng(0), 2, 8, 8)
    images = torch.randn(2, 3, 8, 8)
    mixed, labels = mix(images, torch.arange(2), drawn)
    assert mixed is images
    assert labels.weight == 1
