"""One training step is the recipe's: normalise, erase, mix, forward, loss; its randomness follows from its place."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fat_train.augment.policy import AugmentConfig
from fat_train.loss.cross_entropy import CrossEntropyConfig
from fat_train.task.classification import Classification, ClassificationConfig
from fat_train.task.step import StepKey
from fat_train.types import Batch

KEY = StepKey(seed=0, update=3, micro_batch=0, rank=0)


def task(**settings: float | str) -> Classification:
    torch.manual_seed(0)
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 5))
    loss = CrossEntropyConfig(label_smoothing=0.1).build()
    return ClassificationConfig().build(model, loss, AugmentConfig(**settings), [0.5] * 3, [0.25] * 3)


def batch(erase: list[list[int]]) -> Batch:
    images = torch.randint(256, (4, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    boxes = torch.tensor(erase).reshape(1, -1, 4).expand(4, -1, -1)
    return Batch(images, torch.arange(4), torch.arange(4), boxes)


def test_erasing_comes_before_mixing() -> None:
    """Each mixed picture shows its own erased rectangle and its partner's, blended like all other pixels."""
    recipe = task(mixup_alpha=0.8, cutmix_alpha=0.0, erase_mode="const")
    images, labels = recipe.prepare(batch([[0, 0, 8, 8]]), KEY)
    assert labels.weight < 1
    assert torch.equal(images, torch.zeros_like(images))


@pytest.mark.parametrize("mode", ["pair", "elem"])
def test_pictures_can_have_mixes_of_their_own(mode: str) -> None:
    recipe = task(mix_mode=mode, erase_mode="const")
    images, labels = recipe.prepare(batch([[0, 0, 0, 0]]), KEY)
    plain, _ = task(mix_prob=0.0).prepare(batch([[0, 0, 0, 0]]), KEY)
    assert len(labels.weight.unique()) == (2 if mode == "pair" else 4)
    assert all(not torch.equal(*pair) for pair in zip(images, plain, strict=True))
    first, again = (recipe.train_step(batch([[0, 0, 0, 0]]), KEY).loss for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, recipe.train_step(batch([[0, 0, 0, 0]]), KEY._replace(rank=1)).loss)


def test_the_same_place_in_the_run_gives_the_same_step_and_another_place_another() -> None:
    recipe = task(erase_mode="const")
    first, again = (recipe.train_step(batch([[0, 0, 0, 0]]), KEY).loss for _ in range(2))
    assert torch.equal(first, again)
    for other in (KEY._replace(update=4), KEY._replace(rank=1), KEY._replace(micro_batch=1), KEY._replace(seed=1)):
        assert not torch.equal(first, recipe.train_step(batch([[0, 0, 0, 0]]), other).loss)


def test_validation_neither_mixes_nor_smooths() -> None:
    recipe = task()
    out = recipe.eval_step(batch([[0, 0, 8, 8]]))
    pixels = batch([[0, 0, 0, 0]]).images.double().permute(0, 3, 1, 2) / 255
    logits = recipe.model.double()((pixels - 0.5) / 0.25)
    expected = -logits.log_softmax(1)[torch.arange(4), torch.arange(4)].mean()
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_another_model_can_stand_in_for_validation() -> None:
    recipe = task()
    other = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 5))
    zeros = [nn.init.zeros_(parameter) for parameter in other.parameters()]
    assert len(zeros) == 2
    assert recipe.eval_step(batch([[0, 0, 0, 0]]), model=other).loss.item() == pytest.approx(np.log(5))


def test_torch_seeds_of_different_places_differ() -> None:
    places = [StepKey(0, update, micro, rank) for update in range(20) for micro in range(3) for rank in range(3)]
    assert len({place.torch_seed() for place in places}) == len(places)
