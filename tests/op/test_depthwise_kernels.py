"""The Triton kernels of depth-wise convolution compute what the definition says, and fit into a GPU's registers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from fat_train.op import choice
from fat_train.op.choice import OpConfig
from fat_train.op.depthwise import depthwise_conv, plain

triton = pytest.importorskip("triton")

from assembled_depthwise import CONVOLUTIONS, DEFAULT, TYPES, assemble, assemble_tile, cases  # noqa: E402

from fat_train.op.triton import depthwise, depthwise_tile  # noqa: E402

ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
"""Of a result, relative to its largest number."""
WIDTHS = {"B0": (32, 80, 160, 256), "B1": (48, 96, 192, 384), "B2": (64, 128, 256, 512), "B3": (64, 128, 256, 512)}


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    script = Path(__file__).with_name("interpreted_depthwise.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("number", ["y", "x", "weight", "bias"])
def test_value_and_gradients_are_those_of_float64_up_to_rounding(interpreted: dict[str, Any], number: str) -> None:
    errors = {name: found[number] for name, found in interpreted["errors"].items()}
    rounding = {"bfloat16": 8e-3, "float16": 1e-3} if number in ("y", "x") else {}
    for name, error in errors.items():
        assert error < rounding.get(name.split(", ")[-1], 1e-6), name


def test_no_tile_changes_a_bit_of_the_output_or_the_inputs_gradient(interpreted: dict[str, Any]) -> None:
    assert interpreted["bits"] == [True, True]


def test_nothing_outside_the_map_is_read_as_a_number(interpreted: dict[str, Any]) -> None:
    assert interpreted["finite"]


@pytest.mark.parametrize("shape", [(128, 32, 56, 56), (8, 48, 7, 7), (1, 5, 33, 3), (3, 1024, 1, 1), (0, 16, 8, 8)])
@pytest.mark.parametrize("kernel_size", [3, 5, 9, 13])
def test_every_pixel_row_and_channel_is_the_work_of_one_part(shape: tuple[int, ...], kernel_size: int) -> None:
    batch, channels, height, width = shape
    strip = depthwise_tile.weight_grad_tile(torch.float32, shape, kernel_size, 1)
    work = strip.work(shape, kernel_size)
    assert work.tiles_w * strip.columns >= width
    assert work.tiles_c * strip.channels >= channels
    assert (work.strips - 1) * work.strip_rows < height <= work.strips * work.strip_rows
    assert work.items == batch * work.tiles_w * work.strips
    assert work.programs == work.parts * work.tiles_c * -(-kernel_size // strip.tap_rows)
    assert 1 <= work.parts <= max(1, work.items)


def test_a_measured_tile_takes_the_defaults_place_for_every_batch_size() -> None:
    sizes: tuple[Any, ...] = (torch.float32, (8, 32, 56, 56), 3, 1)
    default = depthwise_tile.output_tile(*sizes)
    chosen = default._replace(rows=default.rows + 1)
    try:
        depthwise_tile.prefer({depthwise_tile.key_of("forward", *sizes): chosen})
        assert depthwise_tile.output_tile(torch.float32, (9, 32, 56, 56), 3, 1) == chosen
        assert depthwise_tile.output_tile(torch.bfloat16, (8, 32, 56, 56), 3, 1) == default
        assert depthwise_tile.input_grad_tile(*sizes) == default
    finally:
        depthwise_tile.prefer({})
    assert depthwise_tile.output_tile(*sizes) == default


def test_candidates_are_few_and_hold_the_default() -> None:
    for shape, kernel_size, stride in CONVOLUTIONS:
        for name, default in DEFAULT.items():
            found = depthwise_tile.candidates(name, torch.bfloat16, shape, kernel_size, stride)
            assert found[0] == default(torch.bfloat16, shape, kernel_size, stride)
            assert len(set(found)) == len(found) <= 20


@pytest.fixture
def own_cache(tmp_path: Path) -> Iterator[None]:
    """What Triton has compiled before is not what is compiled now."""
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path)
        yield


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("name", DEFAULT)
def test_a_kernel_assembles_for_hopper_without_spilling(name: str) -> None:
    shape = (64, 32, 56, 56)
    got = assemble_tile(name, DEFAULT[name](torch.bfloat16, shape, 3, 1), torch.bfloat16, 3, 1)
    assert got.spilled == 0
    assert got.registers <= 128


@pytest.mark.slow
@pytest.mark.usefixtures("own_cache")
def test_every_default_assembles_for_hopper_without_spilling() -> None:
    for name, tile, dtype, _, kernel_size, stride in cases(all_candidates=False):
        assert assemble_tile(name, tile, dtype, kernel_size, stride).spilled == 0, (name, tile, dtype, kernel_size)
    constants = {"TAPS": 25, "BLOCK_P": 32, "BLOCK_C": 32}
    assert assemble(depthwise.add_parts_kernel, torch.float32, constants, warps=4).spilled == 0


@pytest.mark.slow
@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("name", DEFAULT)
def test_kernels_assemble_for_ampere_too(name: str) -> None:
    tile = DEFAULT[name](torch.bfloat16, (64, 128, 56, 56), 5, 1)
    assert assemble_tile(name, tile, torch.bfloat16, 5, 1, capability=80).spilled == 0


@pytest.mark.parametrize("stride", [1, 2])
def test_flops_are_counted_as_those_of_the_definition(stride: int) -> None:
    x = torch.empty(2, 8, 14, 13, device="meta", requires_grad=True)
    weight = torch.empty(8, 1, 5, 5, device="meta", requires_grad=True)
    ops = torch.ops.fat_train
    with FlopCounterMode(display=False) as plain_forward:
        right = plain(x, weight, None, stride, False)
    with FlopCounterMode(display=False) as plain_grad:
        torch.autograd.grad(right, x, torch.empty_like(right))
    with FlopCounterMode(display=False) as forward:
        y = ops.depthwise_conv(x, weight, None, stride, False)
    with FlopCounterMode(display=False) as input_grad:
        ops.depthwise_conv_input_grad(y, weight, 14, 13, stride, False)
    with FlopCounterMode(display=False) as weight_grad:
        ops.depthwise_conv_weight_grad(y, x, 5, stride)
    assert forward.get_total_flops() == plain_forward.get_total_flops() > 0
    assert input_grad.get_total_flops() == plain_grad.get_total_flops() > 0
    assert weight_grad.get_total_flops() == forward.get_total_flops()


# What follows runs where a GPU is.
def fat_convolutions(name: str) -> Iterator[tuple[int, int, int, int, bool]]:
    """Channels, side, kernel size, stride, residual of FAT's depth-wise convolutions at 224 px."""
    for width, side, kernel_size in zip(WIDTHS[name], (56, 28, 14, 7), (3, 5, 7, 9), strict=True):
        yield width, side, kernel_size, 1, True
        yield 4 * width, side, 5, 1, True
        yield 4 * width, side, 5, 2, False
        yield width, side, 5, 2, False


def numbers(
    batch: int, channels: int, side: int, kernel_size: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Map, weights and bias on the GPU; weights as small as training keeps them."""
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(batch, channels, side, side, device="cuda", generator=generator).to(dtype)
    weight = torch.randn(channels, 1, kernel_size, kernel_size, device="cuda", generator=generator) / kernel_size
    bias = torch.randn(channels, device="cuda", generator=generator)
    x = x.contiguous(memory_format=torch.channels_last)
    return x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()


def assert_close(got: Tensor, right: Tensor, tolerance: float) -> None:
    assert float((got.double() - right).abs().max() / right.abs().max()) < tolerance


@pytest.fixture
def by_triton() -> Iterator[None]:
    with choice.using(OpConfig(depthwise="triton")):
        yield


@pytest.mark.gpu
@pytest.mark.usefixtures("by_triton")
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", WIDTHS)
def test_gpu_values_and_gradients_at_the_sizes_of_fat(name: str, dtype: torch.dtype) -> None:
    for channels, side, kernel_size, stride, residual in fat_convolutions(name):
        x, weight, bias = numbers(8, channels, side, kernel_size, dtype)
        y = depthwise_conv(x, weight, bias, stride, residual=residual)
        grad = torch.randn_like(y)
        got = torch.autograd.grad(y, [x, weight, bias], grad)
        wide = [one.detach().double().requires_grad_() for one in (x, weight, bias)]
        right = plain(*wide, stride, residual)
        wanted = torch.autograd.grad(right, wide, grad.double())
        assert y.dtype == got[0].dtype == dtype
        assert_close(y, right, ROUNDING[dtype])
        assert_close(got[0], wanted[0], ROUNDING[dtype])
        assert_close(got[1], wanted[1], 2e-5)  # sums of 25,088 products in float32
        assert_close(got[2], wanted[2], 2e-5)


@pytest.mark.gpu
@pytest.mark.usefixtures("by_triton")
def test_gpu_inside_autocast_it_computes_in_bfloat16() -> None:
    x, weight, bias = numbers(8, 80, 28, 5)
    with torch.autocast("cuda", torch.bfloat16):
        y = depthwise_conv(x, weight, bias, residual=True)
    y.sum().backward()
    right = plain(x.bfloat16().double(), weight.double(), bias.double(), 1, True)
    assert y.dtype == torch.bfloat16
    assert_close(y, right, ROUNDING[torch.bfloat16])
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.usefixtures("by_triton")
def test_gpu_gradients_repeat_to_the_bit() -> None:
    x, weight, bias = numbers(32, 128, 56, 5, torch.bfloat16)
    runs = []
    for _ in range(3):
        y = depthwise_conv(x, weight, bias, residual=True)
        runs.append([y, *torch.autograd.grad(y, [x, weight, bias], y.detach())])
    assert all(torch.equal(one, other) for run in runs[1:] for one, other in zip(runs[0], run, strict=True))


@pytest.mark.gpu
@pytest.mark.usefixtures("by_triton")
def test_gpu_offsets_beyond_32_bits() -> None:
    x = torch.zeros(11, 1024, 448, 448, device="cuda", dtype=torch.bfloat16, memory_format=torch.channels_last)
    x[-1].normal_()
    weight = torch.randn(1024, 1, 3, 3, device="cuda")
    y = depthwise_conv(x, weight, None)
    right = plain(x[-1:].float(), weight, None, 1, False)
    assert_close(y[-1:], right.double(), ROUNDING[torch.bfloat16])
    dx = depthwise.input_grad(x, weight.flip(2, 3), 448, 448, 1, False)
    assert_close(dx[-1:], right.double(), ROUNDING[torch.bfloat16])
    of_weight, _ = depthwise.weight_grad(x, x, 3, 1)
    assert_close(of_weight[:, 0, 1, 1], x[-1].double().square().sum((1, 2)), 1e-4)


@pytest.mark.gpu
@pytest.mark.compile
@pytest.mark.usefixtures("by_triton")
def test_gpu_torch_compile_takes_it_without_a_break() -> None:
    x, weight, bias = numbers(8, 80, 28, 5)
    eager = depthwise_conv(x, weight, bias, residual=True)
    y = torch.compile(depthwise_conv, fullgraph=True)(x, weight, bias, residual=True)
    assert torch.equal(y, eager)
    for one, other in zip(*(torch.autograd.grad(z.sum(), [x, weight, bias]) for z in (y, eager)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.gpu
@pytest.mark.usefixtures("by_triton")
def test_gpu_a_cuda_graph_holds_forward_and_backward() -> None:
    x, weight, bias = numbers(8, 128, 28, 5, torch.bfloat16)

    def step() -> list[Tensor]:
        y = depthwise_conv(x, weight, bias, residual=True)
        return [y, *torch.autograd.grad(y, [x, weight, bias], torch.ones_like(y))]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = step()
    with torch.no_grad():
        x.normal_()
    graph.replay()
    assert all(torch.equal(one, other) for one, other in zip(recorded, step(), strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("stride", [1, 2])
def test_gpu_the_operations_keep_torchs_rules(stride: int) -> None:
    x, weight, bias = numbers(2, 16, 9, 5)
    grad = plain(x, weight, bias, stride, False).detach().contiguous(memory_format=torch.channels_last)
    ops = torch.ops.fat_train
    opcheck(ops.depthwise_conv.default, (x, weight, bias, stride, False))
    opcheck(ops.depthwise_conv.default, (x, weight, None, stride, stride == 1))
    opcheck(ops.depthwise_conv_input_grad.default, (grad, weight.detach(), 9, 9, stride, False))
    opcheck(ops.depthwise_conv_weight_grad.default, (grad, x.detach(), 5, stride))


@pytest.mark.gpu
def test_gpu_measuring_gives_a_tile_for_each_kernel_and_leaves_the_defaults() -> None:
    x, weight, _ = numbers(8, 32, 28, 3, torch.bfloat16)
    found = depthwise.tune(x.detach(), weight.detach(), 1, True)
    assert sorted(str(key[0]) for key in found) == ["forward", "input_grad", "weight_grad"]
    assert not depthwise_tile.measured()
    before = depthwise.forward(x.detach(), weight.detach(), None, 1, True)
    try:
        depthwise_tile.prefer(found)
        assert torch.equal(depthwise.forward(x.detach(), weight.detach(), None, 1, True), before)
    finally:
        depthwise_tile.prefer({})
