from collections import Counter

import numpy as np
import pytest
from timm.data.distributed_sampler import RepeatAugSampler

from fat_train.data.order import BatchPlan, Order
from fat_train.types import UserError

WORLD_SIZES = (1, 2, 3, 5, 8)


def plans_of_all_ranks(epoch: int, world_size: int, **kwargs: int | bool) -> list[list[BatchPlan]]:
    orders = (Order(rank=rank, world_size=world_size, **kwargs) for rank in range(world_size))
    return [list(order.batches(epoch)) for order in orders]


def images_of(plans: list[BatchPlan]) -> list[int]:
    return [int(image) for plan in plans for image in plan.indices]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("num_images", [101, 240, 997])
def test_every_image_is_seen_once_per_epoch_but_for_the_dropped_tail(world_size: int, num_images: int) -> None:
    ranks = plans_of_all_ranks(3, world_size, num_images=num_images, batch_per_device=3, accumulate=2)
    seen = [image for plans in ranks for image in images_of(plans)]
    assert len(seen) == len(set(seen)), "two ranks, or two batches, share an image"
    assert len(seen) == num_images // (6 * world_size) * 6 * world_size
    assert set(seen) <= set(range(num_images))


def test_the_dropped_tail_is_another_one_in_each_epoch() -> None:
    order = Order(num_images=101, batch_per_device=8)
    dropped = [set(range(101)) - set(images_of(list(order.batches(epoch)))) for epoch in range(4)]
    assert all(len(tail) == 5 for tail in dropped)
    assert len({frozenset(tail) for tail in dropped}) == 4


def test_each_epoch_and_each_seed_is_a_permutation_of_its_own() -> None:
    drawn = {
        tuple(images_of(list(Order(num_images=64, batch_per_device=8, seed=seed).batches(epoch))))
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(drawn) == 9
    assert all(sorted(images) == list(range(64)) for images in drawn)


@pytest.mark.parametrize("world_size", [2, 3, 5, 8])
def test_a_step_takes_the_same_images_and_draws_for_any_world_size(world_size: int) -> None:
    share = 120 // world_size

    def rows_of_images(world: int, batch: int, accumulate: int) -> dict[tuple[int, int], int]:
        ranks = plans_of_all_ranks(
            5, world, num_images=1000, batch_per_device=batch, accumulate=accumulate, seed=7, train=True
        )
        return {
            (plan.step, int(image)): int(row)
            for plans in ranks
            for plan in plans
            for image, row in zip(plan.indices, plan.rows, strict=True)
        }

    assert rows_of_images(world_size, share, 1) == rows_of_images(1, 60, 2) == rows_of_images(1, 120, 1)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("num_images", [1, 4, 50, 101])
def test_validation_takes_each_image_exactly_once(world_size: int, num_images: int) -> None:
    ranks = plans_of_all_ranks(0, world_size, num_images=num_images, batch_per_device=4, train=False)
    assert sorted(image for plans in ranks for image in images_of(plans)) == list(range(num_images))
    for rank, plans in enumerate(ranks):
        order = Order(num_images=num_images, batch_per_device=4, rank=rank, world_size=world_size, train=False)
        assert len(plans) == order.num_batches == order.steps_per_epoch
        assert all(len(plan.indices) == 4 for plan in plans[:-1])


def test_imagenet_at_batch_1024_makes_1251_steps() -> None:
    order = Order(num_images=1_281_167, batch_per_device=64, accumulate=2, world_size=8)
    assert (order.global_batch, order.steps_per_epoch, order.num_batches) == (1024, 1251, 2502)


@pytest.mark.parametrize("train", [True, False])
def test_batches_can_begin_anywhere(train: bool) -> None:
    order = Order(num_images=50, batch_per_device=4, accumulate=2, train=train)
    whole = [(plan.step, plan.indices.tolist()) for plan in order.batches(2)]
    for first in range(len(whole) + 1):
        assert [(plan.step, plan.indices.tolist()) for plan in order.batches(2, first)] == whole[first:]


def test_a_set_smaller_than_the_global_batch_is_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"trainer\.global_batch=1024 needs at least 1024 .*the data set has 202"):
        Order(num_images=202, batch_per_device=128, world_size=8)


def test_indices_are_int64_for_any_list() -> None:
    for plan in Order(num_images=5, batch_per_device=2, train=False).batches(0):
        assert plan.indices.dtype == plan.rows.dtype == np.int64


@pytest.mark.parametrize("repeats", [2, 3, 4])
@pytest.mark.parametrize(("num_images", "world_size"), [(960, 2), (961, 4), (1029, 1), (1100, 4)])
def test_a_step_takes_the_images_that_deits_sampler_gives_all_ranks(
    num_images: int, world_size: int, repeats: int
) -> None:
    """timm's own sampler, over the list of our permutation, in batches of 64 at 4 ranks: the same images, as often."""
    images = Order(num_images=num_images, batch_per_device=1)
    permutation = images_of(list(images.batches(6)))
    samplers = [
        RepeatAugSampler(range(num_images), 4, rank, shuffle=False, num_repeats=repeats, selected_round=256)
        for rank in range(4)
    ]
    theirs = [list(sampler) for sampler in samplers]
    plans = [
        plan
        for rank in plans_of_all_ranks(
            6, world_size, num_images=num_images, batch_per_device=256 // world_size, repeats=repeats
        )
        for plan in rank
    ]
    steps = num_images // 256
    assert len(theirs[0]) == steps * 64
    for step in range(steps):
        ours_of_step = images_of([plan for plan in plans if plan.step == step])
        of_step = [permutation[place] for rank in theirs for place in rank[step * 64 : (step + 1) * 64]]
        assert sorted(ours_of_step) == sorted(of_step)


@pytest.mark.parametrize("repeats", [1, 2, 3, 5])
def test_each_image_of_an_epoch_comes_as_often_as_asked(repeats: int) -> None:
    order = Order(num_images=101, batch_per_device=8, repeats=repeats)
    assert order.steps_per_epoch == 12
    seen = Counter(images_of(list(order.batches(1))))
    assert len(seen) == -(-96 // repeats)
    assert sorted(seen.values())[1:] == [repeats] * (len(seen) - 1), "all but the one at the epoch's end"
    assert set(seen) != set(images_of(list(order.batches(2)))) or repeats == 1


@pytest.mark.parametrize("world_size", [2, 3, 4, 8])
@pytest.mark.parametrize("repeats", [2, 3, 5])
def test_repeats_are_the_same_for_any_world_size(world_size: int, repeats: int) -> None:
    def rows_of_step(world: int, batch: int, accumulate: int) -> list[tuple[int, int, int]]:
        kwargs = {"num_images": 1000, "batch_per_device": batch, "accumulate": accumulate, "repeats": repeats}
        plans = [plan for rank in plans_of_all_ranks(5, world, **kwargs) for plan in rank]
        return sorted(
            (plan.step, int(row), int(image))
            for plan in plans
            for row, image in zip(plan.rows, plan.indices, strict=True)
        )

    assert rows_of_step(world_size, 120 // world_size, 1) == rows_of_step(1, 60, 2) == rows_of_step(1, 120, 1)


@pytest.mark.parametrize(("world_size", "accumulate"), [(1, 3), (4, 1), (2, 4), (8, 2), (5, 1)])
@pytest.mark.parametrize("repeats", [2, 3])
def test_copies_lie_in_one_step_but_in_different_micro_batches(repeats: int, world_size: int, accumulate: int) -> None:
    ranks = plans_of_all_ranks(
        0, world_size, num_images=1000, batch_per_device=11, accumulate=accumulate, repeats=repeats
    )
    for plans in ranks:
        assert all(len(set(images_of([plan]))) == 11 for plan in plans)
    steps: dict[int, set[int]] = {}
    for image, step in ((image, plan.step) for plans in ranks for plan in plans for image in images_of([plan])):
        steps.setdefault(image, set()).add(step)
    at_an_edge = sum(len(where) > 1 for where in steps.values())
    assert at_an_edge < ranks[0][-1].step + 1


@pytest.mark.parametrize("batch", [32, 33, 100, 128, 1024])
@pytest.mark.parametrize("accumulate", [1, 2, 8])
@pytest.mark.parametrize("repeats", [2, 3, 4, 5])
def test_mixing_seldom_pairs_two_copies_of_an_image(batch: int, accumulate: int, repeats: int) -> None:
    """It pairs picture i with picture B - 1 - i."""
    order = Order(num_images=3 * batch * accumulate, batch_per_device=batch, accumulate=accumulate, repeats=repeats)
    for plan in order.batches(0):
        half = batch // 2
        assert (plan.indices[:half] == plan.indices[::-1][:half]).sum() < repeats


@pytest.mark.parametrize("first", range(0, 13, 3))
def test_repeats_can_begin_anywhere(first: int) -> None:
    order = Order(num_images=50, batch_per_device=4, repeats=3)
    whole = [plan.indices.tolist() for plan in order.batches(2)]
    assert [plan.indices.tolist() for plan in order.batches(2, first)] == whole[first:]


@pytest.mark.parametrize("repeats", [0, 33])
def test_no_copies_or_more_than_a_global_batch_holds_are_refused_by_name(repeats: int) -> None:
    with pytest.raises(
        UserError, match=rf"augment\.repeats must be .* at most trainer\.global_batch=32, .*got {repeats}"
    ):
        Order(num_images=100, batch_per_device=32, repeats=repeats)
