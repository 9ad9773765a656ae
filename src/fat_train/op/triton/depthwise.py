"""Depth-wise convolution of channels-last maps on CUDA devices: forward, and its two gradients.

Counted from the machine code for sm_90, not yet timed: an H200's memory and the rate at which it issues instructions
are in balance at k = 3 (28 instructions an output of bfloat16), and the latter bounds k = 5 (55 of them, 25 of which
multiply) and above. So what counts is how often a number that was loaded is used. A program owns a tile of pixels ×
channels: channels and columns lie across lanes, so that every access takes whole sectors; rows are a tuple of
registers, so that a row of input, once loaded and widened, is multiplied into every row of output that it touches.

What must move, for a map of N numbers of s bytes at stride 1: 2·N·s in each of the three. What moves by design: a tile
of r × c outputs reads (r + k − 1) × (c + k − 1) inputs, its rim out of L2, where a neighbour has just had it read: so
device memory moves what must move, and L2 up to that rim more (14 × 8 outputs and k = 5: 1.9 times the inputs). Inside
a program each row of input is loaded k times, out of L1, once for each column of the kernel: k·(r + k − 1) / r loads
an output where one after another would be k². The weight gradient walks down a strip of columns, keeps its k² sums in
registers and the last k rows of the gradient too: k + 1 loads an output. Partial sums are written and read once:
(k² + 1)·C float32 a part, and the number of parts follows from the sizes alone, so that equal inputs give equal bits.

Offsets within an image are 32-bit, from image to image 64-bit. Nothing here waits for the device.
"""

# Triton's compiler knows tuples and their sums, but no unpacking:
# ruff: noqa: RUF005

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fat_train.op.layout import empty_map
from fat_train.op.triton.depthwise_tile import (
    Key,
    Strip,
    Tile,
    candidates,
    input_grad_tile,
    key_of,
    measured,
    output_tile,
    prefer,
    weight_grad_tile,
)

PARTS_AT_ONCE = CHANNELS_AT_ONCE = 32
"""Partial sums × channels that a program of the last reduction adds at a time."""


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, residual: bool) -> Tensor:
    """[x +] DWConv(x): a map of [B, C, ceil(H / stride), ceil(W / stride)] in the type of `x`."""
    batch, channels, height, width = x.shape
    kernel_size = weight.shape[-1]
    y = empty_map(x, batch, channels, -(-height // stride), -(-width // stride))
    tile = output_tile(x.dtype, y.shape, kernel_size, stride)
    tiles = tile.counts(y.shape)
    with torch.cuda.device_of(x):
        forward_kernel[(batch * tiles.programs,)](
            _channels_last(x), _taps(weight), bias, y,
            channels, height, width, *y.shape[2:], *tiles,
            K=kernel_size, STRIDE=stride, HAS_BIAS=bias is not None, RESIDUAL=residual, **tile.constants,
            num_warps=tile.warps, num_stages=1,
        )  # fmt: skip
    return y


def input_grad(grad: Tensor, weight: Tensor, height: int, width: int, stride: int, residual: bool) -> Tensor:
    """Gradient of the input of `forward`, [B, C, height, width], from that of its output, in the latter's type."""
    batch, channels, out_height, out_width = grad.shape
    kernel_size = weight.shape[-1]
    dx = empty_map(grad, batch, channels, height, width)
    tile = input_grad_tile(grad.dtype, grad.shape, kernel_size, stride)
    tiles = tile.counts(grad.shape)
    with torch.cuda.device_of(grad):
        input_grad_kernel[(batch * tiles.programs,)](
            _channels_last(grad), _taps(weight), dx,
            channels, height, width, out_height, out_width, *tiles,
            K=kernel_size, STRIDE=stride, RESIDUAL=residual, **tile.constants,
            num_warps=tile.warps, num_stages=1,
        )  # fmt: skip
    return dx


def weight_grad(grad: Tensor, x: Tensor, kernel_size: int, stride: int) -> tuple[Tensor, Tensor]:
    """Gradients of the weights [C, 1, k, k] and of the bias [C], float32, from that of the output."""
    channels, height, width = x.shape[1:]
    tile = weight_grad_tile(x.dtype, grad.shape, kernel_size, stride)
    work = tile.work(grad.shape, kernel_size)
    of_weight = x.new_empty((channels, 1, kernel_size, kernel_size), dtype=torch.float32)
    of_bias = x.new_empty(channels, dtype=torch.float32)
    partial = x.new_empty((work.parts, kernel_size**2 + 1, channels), dtype=torch.float32)
    with torch.cuda.device_of(x):
        weight_grad_kernel[(work.programs,)](
            _channels_last(grad), _channels_last(x), partial,
            channels, height, width, *grad.shape[2:],
            work.strips, work.strip_rows, work.tiles_w, work.tiles_c, work.items, work.parts,
            K=kernel_size, STRIDE=stride, **tile.constants,
            num_warps=tile.warps, num_stages=1,
        )  # fmt: skip
        add_parts_kernel[(triton.cdiv(channels, CHANNELS_AT_ONCE), kernel_size**2 + 1)](
            partial, of_weight, of_bias, channels, work.parts,
            TAPS=kernel_size**2, BLOCK_P=PARTS_AT_ONCE, BLOCK_C=CHANNELS_AT_ONCE, num_warps=4,
        )  # fmt: skip
    return of_weight, of_bias


def tune(x: Tensor, weight: Tensor, stride: int, residual: bool) -> dict[Key, Tile | Strip]:
    """Measure how each of the three is divided best at these sizes, on this device; `prefer` takes what this gives."""
    kernel_size, (height, width) = weight.shape[-1], x.shape[2:]
    before = dict(measured())
    grad = forward(x, weight, None, stride, residual)
    runs = {
        "forward": lambda: forward(x, weight, None, stride, residual),
        "input_grad": lambda: input_grad(grad, weight, height, width, stride, residual),
        "weight_grad": lambda: weight_grad(grad, x, kernel_size, stride),
    }
    best: dict[Key, Tile | Strip] = {}
    for kernel, run in runs.items():
        key = key_of(kernel, x.dtype, grad.shape, kernel_size, stride)
        times = {}
        for tile in candidates(kernel, x.dtype, grad.shape, kernel_size, stride):
            prefer({key: tile})
            times[tile] = triton.testing.do_bench(run, return_mode="median")
        best[key] = min(times, key=lambda tile: times[tile])
    prefer(before)
    return best


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _taps(weight: Tensor) -> Tensor:
    """[k·k, C], a copy: channels side by side, as lanes want them."""
    return weight.flatten(1).t().contiguous()


@triton.jit
def forward_kernel(
    x_ptr, taps_ptr, bias_ptr, y_ptr,
    channels, height, width, out_height, out_width, tiles_h, tiles_w, tiles_c,
    K: tl.constexpr, STRIDE: tl.constexpr, HAS_BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """TILE_H rows × TILE_W columns of the output of an image, BLOCK_C channels."""
    PAD: tl.constexpr = K // 2
    program = tl.program_id(0)
    c = program % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    column = program // tiles_c % tiles_w * TILE_W + tl.arange(0, TILE_W)[:, None]
    row = program // (tiles_c * tiles_w) % tiles_h * TILE_H
    image = (program // (tiles_c * tiles_w * tiles_h)).to(tl.int64)
    is_channel = c < channels
    pitch, out_pitch = width * channels, out_width * channels
    first_row = STRIDE * row - PAD
    x_ptr += image * (height * pitch) + first_row * pitch

    start = tl.zeros((TILE_W, BLOCK_C), tl.float32)
    if HAS_BIAS:
        start += tl.load(bias_ptr + c, is_channel, 0).to(tl.float32)
    sums = ()
    for _ in tl.static_range(TILE_H):
        sums += (start,)
    for v in range(K):
        taps = ()
        tap_ptr = taps_ptr + (v * channels + c)
        for u in tl.static_range(K):
            tap = tl.load(tap_ptr, is_channel, 0).to(tl.float32)
            if RESIDUAL and u == PAD:  # x itself is a convolution too, with 1 in the middle
                tap += tl.where(v == PAD, 1.0, 0.0)
            taps += (tap,)
            tap_ptr += K * channels
        in_column = STRIDE * column + v - PAD
        is_inside = is_channel & (in_column >= 0) & (in_column < width)
        lane_ptr = x_ptr + (in_column * channels + c)
        for r in tl.static_range(STRIDE * (TILE_H - 1) + K):
            is_there = is_inside & (first_row + r >= 0) & (first_row + r < height)
            x = tl.load(lane_ptr, is_there, 0).to(tl.float32)
            lane_ptr += pitch
            for i in tl.static_range(TILE_H):
                if r >= STRIDE * i and r < STRIDE * i + K:
                    sums = sums[:i] + (sums[i] + taps[r - STRIDE * i] * x,) + sums[i + 1 :]

    y_ptr += image * (out_height * out_pitch) + row * out_pitch
    is_inside = is_channel & (column < out_width)
    for i in tl.static_range(TILE_H):
        tl.store(y_ptr + i * out_pitch + (column * channels + c), sums[i], is_inside & (row + i < out_height))


@triton.jit
def input_grad_kernel(
    grad_ptr, taps_ptr, dx_ptr,
    channels, height, width, out_height, out_width, tiles_h, tiles_w, tiles_c,
    K: tl.constexpr, STRIDE: tl.constexpr, RESIDUAL: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The STRIDE·TILE_H rows × STRIDE·TILE_W columns of the input below a tile of the output's gradient.

    Row S·(a + g) + … of the input: dx[S·a + i, S·b + q] = Σ_gd taps[i + pad − S·g, q + pad − S·d] · grad[a + g, b + d].
    So for each remainder q of the columns by the stride, and each i, the taps are known, and no lane computes a tap
    that meets a hole of the stride, but for d where v = q + pad − S·d is no column of the kernel: its taps are 0.
    """
    PAD: tl.constexpr = K // 2
    BEFORE: tl.constexpr = PAD // STRIDE
    AFTER: tl.constexpr = (STRIDE - 1 + PAD) // STRIDE
    program = tl.program_id(0)
    c = program % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    column = program // tiles_c % tiles_w * TILE_W + tl.arange(0, TILE_W)[:, None]
    row = program // (tiles_c * tiles_w) % tiles_h * TILE_H
    image = (program // (tiles_c * tiles_w * tiles_h)).to(tl.int64)
    is_channel = c < channels
    pitch, out_pitch = width * channels, out_width * channels
    grad_ptr += image * (out_height * out_pitch) + (row - BEFORE) * out_pitch

    sums = ()  # [i, q]
    for _ in tl.static_range(TILE_H * STRIDE * STRIDE):
        sums += (tl.zeros((TILE_W, BLOCK_C), tl.float32),)
    for d in range(-BEFORE, AFTER + 1):
        taps = ()  # [q, u]
        for q in tl.static_range(STRIDE):
            v = q + PAD - STRIDE * d
            is_tap = is_channel & (v >= 0) & (v < K)
            tap_ptr = taps_ptr + (v * channels + c)
            for u in tl.static_range(K):
                tap = tl.load(tap_ptr, is_tap, 0).to(tl.float32)
                if RESIDUAL and u == PAD:
                    tap += tl.where(v == PAD, 1.0, 0.0)
                taps += (tap,)
                tap_ptr += K * channels
        is_inside = is_channel & (column + d >= 0) & (column + d < out_width)
        lane_ptr = grad_ptr + ((column + d) * channels + c)
        for r in tl.static_range(BEFORE + TILE_H + AFTER):
            out_row = row + r - BEFORE
            is_there = is_inside & (out_row >= 0) & (out_row < out_height)
            grad = tl.load(lane_ptr, is_there, 0).to(tl.float32)
            lane_ptr += out_pitch
            for i in tl.static_range(TILE_H * STRIDE):
                if i + PAD >= STRIDE * (r - BEFORE) and i + PAD < STRIDE * (r - BEFORE) + K:
                    for q in tl.static_range(STRIDE):
                        product = taps[q * K + i + PAD - STRIDE * (r - BEFORE)] * grad
                        sums = sums[: i * STRIDE + q] + (sums[i * STRIDE + q] + product,) + sums[i * STRIDE + q + 1 :]

    dx_ptr += image * (height * pitch) + STRIDE * row * pitch
    for i in tl.static_range(TILE_H * STRIDE):
        for q in tl.static_range(STRIDE):
            in_column = STRIDE * column + q
            is_there = is_channel & (in_column < width) & (STRIDE * row + i < height)
            tl.store(dx_ptr + i * pitch + (in_column * channels + c), sums[i * STRIDE + q], is_there)


@triton.jit
def weight_grad_kernel(
    grad_ptr, x_ptr, partial_ptr,
    channels, height, width, out_height, out_width, strips, strip_rows, tiles_w, tiles_c, items, parts,
    K: tl.constexpr, STRIDE: tl.constexpr,
    TAP_ROWS: tl.constexpr, TILE_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One part's sums for TAP_ROWS rows of the kernel, BLOCK_C channels: of every `parts`-th item, a strip of rows
    of TILE_W columns of an image, from top to bottom.

    dW[u, v] = Σ grad[i, j] · x[S·i + u − pad, S·j + v − pad]. Step t brings row t of the gradient into a window of the
    last ones and goes over the rows S·t + e of the input, e < S: that row meets grad[t − m] under tap u = e + S·m.
    """
    PAD: tl.constexpr = K // 2
    CHUNKS: tl.constexpr = (K + TAP_ROWS - 1) // TAP_ROWS
    WINDOW: tl.constexpr = (TAP_ROWS + STRIDE - 1) // STRIDE
    program = tl.program_id(0)
    first_tap = program % CHUNKS * TAP_ROWS
    c = program // CHUNKS % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    part = program // (CHUNKS * tiles_c)
    is_channel = c < channels
    pitch, out_pitch = width * channels, out_width * channels

    zero = tl.zeros((TILE_W, BLOCK_C), tl.float32)
    sums = ()  # [u, v]
    for _ in tl.static_range(TAP_ROWS * K):
        sums += (zero,)
    of_bias = zero
    for item in range(part, items, parts):
        column = item % tiles_w * TILE_W + tl.arange(0, TILE_W)[:, None]
        start = item // tiles_w % strips * strip_rows
        end = tl.minimum(start + strip_rows, out_height)
        image = (item // (tiles_w * strips)).to(tl.int64)
        image_grad_ptr = grad_ptr + image * (out_height * out_pitch)
        image_x_ptr = x_ptr + image * (height * pitch)
        is_out = is_channel & (column < out_width)
        window = ()
        for _ in tl.static_range(WINDOW):
            window += (zero,)
        for t in range(start, end + WINDOW - 1):
            grad = tl.load(image_grad_ptr + t * out_pitch + (column * channels + c), is_out & (t < end), 0)
            window = (grad.to(tl.float32),) + window[: WINDOW - 1]
            of_bias += window[0]
            for e in tl.static_range(STRIDE):
                row = STRIDE * t + first_tap + e - PAD
                is_row = is_channel & (row >= 0) & (row < height)
                lane_ptr = image_x_ptr + row * pitch + ((STRIDE * column - PAD) * channels + c)
                for v in tl.static_range(K):
                    in_column = STRIDE * column + v - PAD
                    is_there = is_row & (in_column >= 0) & (in_column < width)
                    x = tl.load(lane_ptr, is_there, 0).to(tl.float32)
                    lane_ptr += channels
                    for m in tl.static_range(WINDOW):
                        if e + STRIDE * m < TAP_ROWS:
                            total = sums[(e + STRIDE * m) * K + v] + window[m] * x
                            sums = sums[: (e + STRIDE * m) * K + v] + (total,) + sums[(e + STRIDE * m) * K + v + 1 :]

    partial_ptr += part.to(tl.int64) * (K * K + 1) * channels
    flat_c = program // CHUNKS % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    for u in tl.static_range(TAP_ROWS):
        for v in tl.static_range(K):
            is_tap = (flat_c < channels) & (first_tap + u < K)
            tap = (first_tap + u) * K + v
            tl.store(partial_ptr + tap * channels + flat_c, tl.sum(sums[u * K + v], axis=0), is_tap)
    is_first = (flat_c < channels) & (first_tap == 0)
    tl.store(partial_ptr + K * K * channels + flat_c, tl.sum(of_bias, axis=0), is_first)


@triton.jit
def add_parts_kernel(
    partial_ptr, weight_ptr, bias_ptr, channels, parts,
    TAPS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A tap's sum over all parts (the bias's after the last tap), stored as torch lays out weights, [C, k·k]."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    tap = tl.program_id(1)
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for first in range(0, parts, BLOCK_P):
        part = first + tl.arange(0, BLOCK_P)[:, None]
        offset = part.to(tl.int64) * ((TAPS + 1) * channels) + tap * channels + c[None, :]
        total += tl.load(partial_ptr + offset, (part < parts) & (c < channels)[None, :], 0)
    result = tl.sum(total, axis=0)
    tl.store(weight_ptr + c * TAPS + tap, result, (c < channels) & (tap < TAPS))
    tl.store(bias_ptr + c, result, (c < channels) & (tap == TAPS))
