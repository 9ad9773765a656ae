"""GroupNorm over whole channels-last maps on CUDA: two passes forward, two back, every sum in the same order each time.

An image is N = H·W·C numbers side by side. Its moments and sums are taken by several programs, each of a stretch of it;
the programs of the next pass put the parts together, each for itself, so that nothing waits for a third launch.

Bytes that move, of an image's map with e bytes a number: forward 2·N·e read, N·e written; back 4·N·e read, N·e written.
The second reading finds in the second-level cache (50 MB on an H100 or H200) what fits there. All loads and stores are
of 16 bytes where C is a multiple of 16, as it is in every FAT.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048
"""Numbers of a tile: 16 a thread, which are 2 (half) or 4 (float32) loads of 16 bytes."""
NUM_WARPS = 4
TILES_AT_LEAST = 2
"""Tiles of a program, where the map has so many: its constants are read once."""
PROGRAMS_A_PROCESSOR = 12
"""Programs in flight hide the latency of memory; a few more than fit at once fill the last round."""
CPU_PROGRAMS = 8
"""In Triton's interpreter: some, so that parts are put together there too."""


@triton.jit
def moments_kernel(
    x_ptr, parts_ptr,
    numel, splits, tiles,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Count, mean and squared deviations of a stretch of `tiles` tiles, by Welford's recurrence in every lane; then
    Chan's rule over the lanes. `parts` is [B, splits, 3]."""
    program = tl.program_id(0)
    image, split = program // splits, program % splits
    x_ptr += image.to(tl.int64) * numel
    lane = tl.arange(0, BLOCK)
    first = split * tiles * BLOCK
    mean = tl.zeros([BLOCK], tl.float32)
    deviations = tl.zeros([BLOCK], tl.float32)
    for tile in range(tiles):
        at = first + tile * BLOCK + lane
        x = tl.load(x_ptr + at, mask=at < numel, other=0.0).to(tl.float32)
        off = tl.where(at < numel, x - mean, 0.0)
        mean += off * (1.0 / (tile + 1))  # a lane that has run out adds 0: the count is right for all others
        deviations += off * (x - mean)
    left = numel - first - lane  # numbers from this lane's first one to the end of the map
    counts = tl.minimum(tl.maximum((left + BLOCK - 1) // BLOCK, 0), tiles).to(tl.float32)
    count = tl.sum(counts, axis=0)
    whole = tl.sum(counts * mean, axis=0) / tl.maximum(count, 1.0)
    off = mean - whole
    parts_ptr += program.to(tl.int64) * 3
    tl.store(parts_ptr, count)
    tl.store(parts_ptr + 1, whole)
    tl.store(parts_ptr + 2, tl.sum(deviations + counts * off * off, axis=0))


@triton.jit
def normalise_kernel(
    x_ptr, parts_ptr, weight_ptr, bias_ptr, y_ptr, mean_ptr, rstd_ptr,
    numel, channels, step, eps, splits, tiles,
    BLOCK: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """y = (x − mean) · rstd · weight + bias. A tile is `step` numbers, whole pixels: a lane keeps its channel."""
    program = tl.program_id(0)
    image, split = program // splits, program % splits
    part = tl.arange(0, SPLITS)
    of_part = parts_ptr + (image.to(tl.int64) * splits + part) * 3
    counts = tl.load(of_part, mask=part < splits, other=0.0)
    means = tl.load(of_part + 1, mask=part < splits, other=0.0)
    deviations = tl.load(of_part + 2, mask=part < splits, other=0.0)
    mean = tl.sum(counts * means, axis=0) / numel
    off = means - mean
    variance = tl.sum(deviations + counts * off * off, axis=0) / numel
    rstd = 1.0 / tl.sqrt_rn(variance + eps)
    if split == 0:
        tl.store(mean_ptr + image, mean)
        tl.store(rstd_ptr + image, rstd)
    lane = tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + lane % channels).to(tl.float32) * rstd
    bias = tl.load(bias_ptr + lane % channels).to(tl.float32)
    x_ptr += image.to(tl.int64) * numel
    y_ptr += image.to(tl.int64) * numel
    for tile in range(split * tiles, split * tiles + tiles):
        at = tile * step + lane
        inside = (lane < step) & (at < numel)
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(y_ptr + at, ((x - mean) * weight + bias).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def sums_kernel(
    grad_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, of_image_ptr, of_weight_ptr, of_bias_ptr,
    numel, channels, step, splits, tiles,
    BLOCK: tl.constexpr, POWER: tl.constexpr,
):  # fmt: skip
    """A stretch's Σ dy·x̂ and Σ dy a channel [B·splits, C], and with them its Σ dy·w and Σ dy·w·x̂ [B, splits, 2].

    `POWER` is the largest power of two in C: lane l = q·POWER + r holds channel (q mod C/POWER)·POWER + r.
    """
    program = tl.program_id(0)
    image, split = program // splits, program % splits
    grad_ptr += image.to(tl.int64) * numel
    x_ptr += image.to(tl.int64) * numel
    mean, rstd = tl.load(mean_ptr + image), tl.load(rstd_ptr + image)
    lane = tl.arange(0, BLOCK)
    of_bias = tl.zeros([BLOCK], tl.float32)
    of_weight = tl.zeros([BLOCK], tl.float32)
    for tile in range(split * tiles, split * tiles + tiles):
        at = tile * step + lane
        inside = (lane < step) & (at < numel)
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        of_bias += grad
        of_weight += grad * ((x - mean) * rstd)
    weight = tl.load(weight_ptr + lane % channels).to(tl.float32)
    of_image_ptr += program.to(tl.int64) * 2
    tl.store(of_image_ptr, tl.sum(weight * of_bias, axis=0))
    tl.store(of_image_ptr + 1, tl.sum(weight * of_weight, axis=0))
    bias_rows = tl.reshape(of_bias, [BLOCK // POWER, POWER])
    weight_rows = tl.reshape(of_weight, [BLOCK // POWER, POWER])
    row = tl.arange(0, BLOCK // POWER)[:, None]
    column = tl.arange(0, POWER)
    odd = channels // POWER
    at_channel = program.to(tl.int64) * channels + column
    for turn in range(odd):
        own = row % odd == turn
        tl.store(of_bias_ptr + at_channel + turn * POWER, tl.sum(tl.where(own, bias_rows, 0.0), axis=0))
        tl.store(of_weight_ptr + at_channel + turn * POWER, tl.sum(tl.where(own, weight_rows, 0.0), axis=0))


@triton.jit
def grad_kernel(
    grad_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, of_image_ptr, out_ptr,
    numel, channels, step, splits, tiles,
    BLOCK: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """dx = rstd · (dy·w − Σ dy·w / N − x̂ · Σ dy·w·x̂ / N)."""
    program = tl.program_id(0)
    image, split = program // splits, program % splits
    part = tl.arange(0, SPLITS)
    of_part = of_image_ptr + (image.to(tl.int64) * splits + part) * 2
    plain = tl.sum(tl.load(of_part, mask=part < splits, other=0.0), axis=0) / numel
    along = tl.sum(tl.load(of_part + 1, mask=part < splits, other=0.0), axis=0) / numel
    mean, rstd = tl.load(mean_ptr + image), tl.load(rstd_ptr + image)
    lane = tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + lane % channels).to(tl.float32)
    grad_ptr += image.to(tl.int64) * numel
    x_ptr += image.to(tl.int64) * numel
    out_ptr += image.to(tl.int64) * numel
    for tile in range(split * tiles, split * tiles + tiles):
        at = tile * step + lane
        inside = (lane < step) & (at < numel)
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        out = rstd * (grad * weight - plain - (x - mean) * rstd * along)
        tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=inside)


def forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The normalised map in x's type; mean and reciprocal deviation of each image, float32 [B].

    Args:
        x: [B, C, H, W], float32, bfloat16 or float16, fewer than 2³¹ numbers an image.
        weight, bias: [C], of any of these types.
        eps: added to the variance.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    y, mean = torch.empty_like(x), x.new_empty(len(x), dtype=torch.float32)
    rstd = torch.empty_like(mean)
    if not x.numel():
        return y, mean.zero_(), rstd.zero_()
    numel, channels, step, block = _tile(x)
    with torch.cuda.device_of(x):
        splits, tiles = _splits(x, numel, block)
        parts = x.new_empty((len(x), splits, 3), dtype=torch.float32)
        moments_kernel[(len(x) * splits,)](x, parts, numel, splits, tiles, BLOCK=block, num_warps=NUM_WARPS)
        # The parts are as many in the second pass, but its tiles are whole pixels.
        normalise_kernel[(len(x) * splits,)](
            x,
            parts,
            weight.contiguous(),
            bias.contiguous(),
            y,
            mean,
            rstd,
            numel,
            channels,
            step,
            eps,
            splits,
            triton.cdiv(triton.cdiv(numel, step), splits),
            BLOCK=block,
            SPLITS=triton.next_power_of_2(splits),
            num_warps=NUM_WARPS,
        )
    return y, mean, rstd


def grad(grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x in its type and of weight and bias in float32 [C].

    Args:
        grad: of the normalised map, [B, C, H, W] in any layout.
        x, weight: what `forward` was given.
        mean, rstd: what it gave beside the map.
    """
    grad, x = (given.contiguous(memory_format=torch.channels_last) for given in (grad, x))
    out = torch.empty_like(x)
    if not x.numel():
        of_weight = x.new_zeros(x.shape[1], dtype=torch.float32)
        return out, of_weight, torch.zeros_like(of_weight)
    numel, channels, step, block = _tile(x)
    with torch.cuda.device_of(x):
        splits, tiles = _splits(x, numel, step)
        of_image = x.new_empty((len(x), splits, 2), dtype=torch.float32)
        of_channel = x.new_empty((2, len(x) * splits, channels), dtype=torch.float32)
        shared = (numel, channels, step, splits, tiles)
        given = (grad, x, weight.contiguous(), mean, rstd, of_image)
        sums_kernel[(len(x) * splits,)](
            *given, *of_channel, *shared, BLOCK=block, POWER=min(block, channels & -channels), num_warps=NUM_WARPS
        )
        grad_kernel[(len(x) * splits,)](
            *given, out, *shared, BLOCK=block, SPLITS=triton.next_power_of_2(splits), num_warps=NUM_WARPS
        )
        of_weight, of_bias = (parts.sum(dim=0) for parts in of_channel)  # an operation's results may not share memory
    return out, of_weight, of_bias


def _tile(x: Tensor) -> tuple[int, int, int, int]:
    """Numbers of an image, channels, numbers of a tile of whole pixels, and the lanes that hold it."""
    channels = x.shape[1]
    block = max(BLOCK, triton.next_power_of_2(channels))
    return x[0].numel(), channels, block // channels * channels, block


def _splits(x: Tensor, numel: int, tile: int) -> tuple[int, int]:
    """How many programs share an image, and how many tiles each of them goes through."""
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 0
    wanted = max(1, (processors * PROGRAMS_A_PROCESSOR or CPU_PROGRAMS) // len(x))
    whole = triton.cdiv(numel, tile)
    tiles = triton.cdiv(whole, min(wanted, max(1, whole // TILES_AT_LEAST)))
    return triton.cdiv(whole, tiles), tiles
