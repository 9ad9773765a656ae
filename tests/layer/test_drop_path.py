"""Our drop path is timm's, in one kernel, and its graph does not depend on the probability."""

from __future__ import annotations

import pytest
import timm.layers
import torch

from fat_train.layer.drop_path import DropPath, rates_of_blocks
from fat_train.model.fat import FATConfig


@pytest.fixture
def maps() -> torch.Tensor:
    return torch.randn(2, 64, 4, 3, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("drop_prob", [0.0, 0.1, 0.5])
def test_values_gradients_and_draws_are_timms(drop_prob: float, maps: torch.Tensor) -> None:
    ours, theirs = ([part.clone().requires_grad_() for part in maps] for _ in range(2))
    torch.manual_seed(1)
    sum_ours = DropPath(drop_prob).train()(*ours)
    next_ours = torch.rand(1)
    torch.manual_seed(1)
    sum_theirs = theirs[0] + timm.layers.DropPath(drop_prob).train()(theirs[1])
    assert torch.equal(next_ours, torch.rand(1)), "as many random numbers were taken"
    torch.testing.assert_close(sum_ours, sum_theirs)
    sum_ours.square().sum().backward()
    sum_theirs.square().sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("drop_prob", [0.1, 0.6])
def test_an_images_branch_is_there_scaled_or_not_at_all_and_is_so_on_average(drop_prob: float) -> None:
    torch.manual_seed(0)
    branch = torch.ones(20_000, 2, 1, 1)
    scale = DropPath(drop_prob).train()(torch.zeros_like(branch), branch)
    assert torch.equal(scale[:, :1].expand_as(scale), scale), "one draw an image"
    torch.testing.assert_close(scale.unique(), torch.tensor([0.0, 1 / (1 - drop_prob)]))
    assert scale.mean().item() == pytest.approx(1.0, abs=4 * (drop_prob / (1 - drop_prob) / 20_000) ** 0.5)


def test_the_scale_of_a_bfloat16_branch_is_not_rounded(maps: torch.Tensor) -> None:
    """1 / 0.7 as a bfloat16 is 1.4297."""
    ones, zeros = torch.ones(64, 4, 3, 3, dtype=torch.bfloat16), torch.zeros(64, 4, 3, 3)
    torch.manual_seed(0)
    total = DropPath(0.3).train()(zeros, ones)
    assert total.dtype == torch.float32
    torch.testing.assert_close(total.max(), torch.tensor(1 / 0.7))
    assert DropPath(0.3).train()(zeros.bfloat16(), ones).dtype == torch.bfloat16, "as of two such summands"


def test_in_evaluation_nothing_is_dropped_and_nothing_is_saved(maps: torch.Tensor) -> None:
    layer = DropPath(0.5).eval()
    assert torch.equal(layer(*maps), maps[0] + maps[1])
    assert layer.state_dict() == {}
    assert "drop_prob=0.500" in repr(layer)


@pytest.mark.compile
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_compiled_graph_serves_every_probability_with_the_right_mask(dtype: torch.dtype) -> None:
    torch.compiler.reset()
    branch = torch.ones(20_000, 2, 1, 1, dtype=dtype)
    for number, drop_prob in enumerate((0.1, 0.3, 0.6)):
        layer = DropPath(drop_prob).train()
        layer.compile(fullgraph=True, dynamic=False, backend="aot_eager")
        with torch.compiler.set_stance("fail_on_recompile" if number else "default"):
            scale = layer(torch.zeros_like(branch), branch)
        assert scale.dtype == dtype
        torch.testing.assert_close(scale.unique(), torch.tensor([0.0, 1 / (1 - drop_prob)], dtype=dtype))
        assert torch.equal(scale[:, :1].expand_as(scale), scale)
        spread = (drop_prob / (1 - drop_prob) / 20_000) ** 0.5
        assert scale.double().mean().item() == pytest.approx(
            1.0, abs=4 * spread + (0.004 if dtype.itemsize == 2 else 0)
        )


def test_state_dict_keys_are_without_it() -> None:
    size = {"name": "tiny", "widths": [8, 12, 16, 24], "depths": [1, 1, 2, 1], "num_heads": [2, 3, 4, 6]}
    keys = [list(FATConfig(**size, drop_path_rate=rate).build(5).state_dict()) for rate in (0.0, 0.3)]
    assert keys[0] == keys[1]


def test_rates_rise_linearly_from_the_first_block_to_the_last():
    assert rates_of_blocks(0.3, [1, 2, 1]) == [[0.0], pytest.approx([0.1, 0.2]), [0.3]]
    assert rates_of_blocks(0.3, [1]) == [[0.0]]
