"""Pixels become the model's input and back; erasing touches its rectangles alone."""

from __future__ import annotations

import pytest
import torch

from fat_train.augment.device import box_mask, erase, to_input, to_pixels

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def test_input_is_normalised_as_torchvision_does() -> None:
    pixels = torch.randint(256, (2, 5, 7, 3), dtype=torch.uint8)
    expected = (pixels.double() / 255 - torch.tensor(MEAN).double()) / torch.tensor(STD).double()
    torch.testing.assert_close(to_input(pixels, MEAN, STD).double(), expected.permute(0, 3, 1, 2), rtol=0, atol=2e-6)


def test_input_lies_in_channels_last_memory_without_a_copy() -> None:
    images = to_input(torch.zeros(2, 5, 7, 3, dtype=torch.uint8), MEAN, STD)
    assert images.is_contiguous(memory_format=torch.channels_last)


def test_every_pixel_value_survives_the_way_there_and_back() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).expand(1, 16, 16, 3).contiguous()
    assert torch.equal(to_pixels(to_input(pixels, MEAN, STD), MEAN, STD), pixels)


@pytest.mark.parametrize("mode", ["pixel", "rand", "const"])
def test_erasing_changes_its_rectangle_and_nothing_else(mode: str) -> None:
    torch.manual_seed(0)
    images = torch.full((3, 3, 10, 12), 9.0)
    boxes = torch.tensor([[[2, 3, 4, 5]], [[0, 0, 0, 0]], [[9, 11, 1, 1]]])
    erased = erase(images, boxes, mode)
    inside = torch.zeros(3, 10, 12, dtype=torch.bool)
    inside[0, 2:6, 3:8] = True
    inside[2, 9, 11] = True
    assert torch.equal((erased != 9).any(1), inside)


def test_pixel_mode_fills_with_unit_normal_noise_and_rand_mode_with_one_colour() -> None:
    torch.manual_seed(0)
    images, boxes = torch.full((1, 3, 100, 100), 9.0), torch.tensor([[[0, 0, 100, 100]]])
    noise = erase(images, boxes, "pixel")
    assert noise.mean().abs() < 0.02
    assert noise.std() == pytest.approx(1, abs=0.02)
    colour = erase(images, boxes, "rand")
    assert torch.equal(colour, colour[:, :, :1, :1].expand_as(colour))


def test_several_rectangles_are_erased() -> None:
    erased = erase(torch.full((1, 3, 8, 8), 9.0), torch.tensor([[[0, 0, 2, 2], [6, 6, 2, 2]]]), "const")
    assert (erased == 0).sum() == 3 * 8


def test_a_mask_is_its_box_and_an_empty_box_is_nowhere() -> None:
    boxes = [(1, 2, 4, 5), (0, 0, 6, 7), (3, 3, 3, 6), (2, 4, 5, 4)]
    mask = box_mask(torch.tensor(boxes, dtype=torch.float32), 6, 7)
    for one, (top, left, bottom, right) in zip(mask[:, 0], boxes, strict=True):
        expected = torch.zeros(6, 7, dtype=torch.bool)
        expected[top:bottom, left:right] = True
        assert torch.equal(one, expected)


@pytest.mark.parametrize("mode", ["pixel", "rand"])
def test_noise_follows_a_generator_that_is_given(mode: str) -> None:
    boxes = torch.tensor([[[0, 0, 4, 4]], [[2, 2, 3, 3]]])

    def erased(seed: int) -> torch.Tensor:
        return erase(torch.zeros(2, 3, 8, 8), boxes, mode, torch.Generator().manual_seed(seed))

    assert torch.equal(erased(5), erased(5))
    assert not torch.equal(erased(5), erased(6))
