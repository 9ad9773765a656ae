import numpy as np
import pytest

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
