"""FASA's gates and their product on CUDA: one pass over two maps forward, one over three back.

Bytes that move, with e bytes a number: forward 2·e read, e written a number of a map; back 3·e read, 2·e written. The
definition in torch moves 8·e or 13·e forward, and keeps four or six maps for the way back.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
"""Numbers of a program: 8 a thread, one load of 16 bytes a map in half precision, two in float32."""
NUM_WARPS = 4


@triton.jit
def product_kernel(
    q_ptr, g_ptr, y_ptr,
    numel,
    BOTH_WAYS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y = SiLU(g) · l with l = SiLU(q); times Sigmoid(l) with `BOTH_WAYS`."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    q = tl.load(q_ptr + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(g_ptr + at, mask=inside, other=0.0).to(tl.float32)
    local = q * tl.sigmoid(q)
    y = g * tl.sigmoid(g) * local
    if BOTH_WAYS:
        y *= tl.sigmoid(local)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def product_grad_kernel(
    grad_ptr, q_ptr, g_ptr, of_q_ptr, of_g_ptr,
    numel,
    BOTH_WAYS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dq = dy · SiLU(g) · m'(l) · SiLU'(q) and dg = dy · m(l) · SiLU'(g), m(l) = l or l · Sigmoid(l) = SiLU(l).

    SiLU'(z) = s · (1 + z · (1 − s)) with s = Sigmoid(z).
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
    q = tl.load(q_ptr + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(g_ptr + at, mask=inside, other=0.0).to(tl.float32)
    of_local, of_global = tl.sigmoid(q), tl.sigmoid(g)
    local = q * of_local
    slope = of_local * (1 + q * (1 - of_local))
    if BOTH_WAYS:
        gate = tl.sigmoid(local)
        slope *= gate * (1 + local * (1 - gate))
        local *= gate
    of_q = grad * g * of_global * slope
    of_g = grad * local * of_global * (1 + g * (1 - of_global))
    tl.store(of_q_ptr + at, of_q.to(of_q_ptr.dtype.element_ty), mask=inside)
    tl.store(of_g_ptr + at, of_g.to(of_g_ptr.dtype.element_ty), mask=inside)


def forward(q_prime: Tensor, global_: Tensor, both_ways: bool) -> Tensor:
    """SiLU(X'_global) ⊙ SiLU(Q') [⊙ Sigmoid(SiLU(Q'))], channels-last, in the type of Q'.

    Args:
        q_prime: [B, C, H, W], float32, bfloat16 or float16; as `global_`, in any layout.
        global_: X'_global, [B, C, H, W].
        both_ways: whether the last factor is there.
    """
    q_prime, global_ = _side_by_side(q_prime, global_)
    y = torch.empty_like(q_prime)
    if y.numel():
        with torch.cuda.device_of(y):
            product_kernel[(triton.cdiv(y.numel(), BLOCK),)](
                q_prime, global_, y, y.numel(), BOTH_WAYS=both_ways, BLOCK=BLOCK, num_warps=NUM_WARPS
            )
    return y


def grad(grad: Tensor, q_prime: Tensor, global_: Tensor, both_ways: bool) -> tuple[Tensor, Tensor]:
    """Gradients of Q' and X'_global, channels-last, each in its map's type.

    Args:
        grad: of the product, [B, C, H, W] in any layout.
        q_prime, global_, both_ways: what `forward` was given.
    """
    grad, q_prime, global_ = _side_by_side(grad, q_prime, global_)
    of_q, of_g = torch.empty_like(q_prime), torch.empty_like(global_)
    if of_q.numel():
        with torch.cuda.device_of(of_q):
            product_grad_kernel[(triton.cdiv(of_q.numel(), BLOCK),)](
                *(grad, q_prime, global_, of_q, of_g, of_q.numel()),
                BOTH_WAYS=both_ways,
                BLOCK=BLOCK,
                num_warps=NUM_WARPS,
            )
    return of_q, of_g


def _side_by_side(*maps: Tensor) -> tuple[Tensor, ...]:
    """The same place of each map at the same place of memory."""
    return tuple(given.contiguous(memory_format=torch.channels_last) for given in maps)
