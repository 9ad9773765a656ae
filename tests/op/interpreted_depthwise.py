"""Run by test_depthwise_kernels.py: the depth-wise kernels in Triton's interpreter, against float64; JSON of errors.

A process of its own, since Triton reads TRITON_INTERPRET when a kernel is decorated, its own included.
"""

from __future__ import annotations

import json
import os

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor

from fat_train.op.depthwise import plain
from fat_train.op.triton import depthwise, depthwise_tile
from fat_train.op.triton.depthwise_tile import Tile, key_of, prefer

CASES = [  # name, kernel size, stride, residual, bias, shape, type
    ("k 3", 3, 1, True, True, (2, 5, 7, 5), torch.float32),
    ("k 3, stride 2, C 40", 3, 2, False, True, (1, 40, 9, 4), torch.float32),
    ("k 5, no residual, no bias", 5, 1, False, False, (1, 16, 14, 14), torch.float32),
    ("k 5, stride 2", 5, 2, False, True, (3, 5, 7, 5), torch.float32),
    ("k 5, one pixel", 5, 1, True, True, (2, 16, 1, 1), torch.float32),
    ("k 5, stride 2, one pixel", 5, 2, False, True, (1, 16, 1, 1), torch.float32),
    ("k 7", 7, 1, True, True, (1, 16, 5, 4), torch.float32),
    ("k 7, stride 2, no bias", 7, 2, False, False, (1, 5, 7, 5), torch.float32),
    ("k 9", 9, 1, True, True, (1, 16, 5, 7), torch.float32),
    ("k 9, stride 2", 9, 2, False, True, (1, 5, 5, 4), torch.float32),
    ("k 11", 11, 1, False, True, (1, 5, 2, 1), torch.float32),
    ("k 3, bfloat16", 3, 1, True, True, (2, 16, 7, 5), torch.bfloat16),
    ("k 5, stride 2, float16", 5, 2, False, True, (1, 16, 7, 5), torch.float16),
]


def errors() -> dict[str, dict[str, float]]:
    """Case -> number -> largest error, relative to the largest right value."""
    torch.manual_seed(0)
    depthwise_tile.REDUCING_PROGRAMS = 2  # so that a part has several items, and the last one fewer
    return {name: _errors(*case) for name, *case in CASES}


def _errors(
    kernel_size: int, stride: int, residual: bool, has_bias: bool, shape: tuple[int, ...], dtype: torch.dtype
) -> dict[str, float]:
    channels, height, width = shape[1:]
    x = torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(channels, 1, kernel_size, kernel_size)
    bias = torch.randn(channels) if has_bias else None
    wide = [x.double().requires_grad_(), weight.double().requires_grad_()]
    wide_bias = (torch.zeros(channels) if bias is None else bias).double().requires_grad_()
    right = plain(*wide, wide_bias, stride, residual)
    grad = torch.randn(right.shape).to(dtype)  # laid out as NCHW
    of_x, of_weight, of_bias = torch.autograd.grad(right, [*wide, wide_bias], grad.double())

    y = depthwise.forward(x, weight, bias, stride, residual)
    dx = depthwise.input_grad(grad, weight, height, width, stride, residual)
    dw, db = depthwise.weight_grad(grad, x, kernel_size, stride)
    assert y.dtype == dx.dtype == dtype
    assert dw.dtype == db.dtype == torch.float32
    assert y.is_contiguous(memory_format=torch.channels_last)
    return {"y": _error(y, right), "x": _error(dx, of_x), "weight": _error(dw, of_weight), "bias": _error(db, of_bias)}


def _error(got: Tensor, right: Tensor) -> float:
    assert got.shape == right.shape
    right = right.detach()
    return float((got.double() - right).abs().max() / right.abs().max())


def bits_under_two_tiles() -> list[bool]:
    """Whether forward pass and input gradient give the same bits."""
    x = torch.randn(2, 5, 7, 5).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(5, 1, 3, 3)
    results = []
    for tile in (Tile(1, 4, 16, 1), Tile(3, 8, 16, 1)):
        prefer({key_of(kernel, x.dtype, x.shape, 3, 1): tile for kernel in ("forward", "input_grad")})
        results.append((depthwise.forward(x, weight, None, 1, True), depthwise.input_grad(x, weight, 7, 5, 1, True)))
    prefer({})
    return [torch.equal(one, other) for one, other in zip(*results, strict=True)]


def numbers_outside_are_not_read() -> bool:
    """Whether results are finite although memory around the map and its gradient is not."""
    whole = torch.full((3, 5, 4, 16), float("nan"))
    whole[1] = torch.randn(5, 4, 16)
    x = whole[1:2].permute(0, 3, 1, 2)
    weight = torch.randn(16, 1, 3, 3)
    results = [
        depthwise.forward(x, weight, None, 1, False),
        depthwise.input_grad(x, weight, 5, 4, 1, False),
        *depthwise.weight_grad(x, x, 3, 1),
    ]
    return all(bool(one.isfinite().all()) for one in results)


if __name__ == "__main__":
    print(json.dumps({"errors": errors(), "bits": bits_under_two_tiles(), "finite": numbers_outside_are_not_read()}))
