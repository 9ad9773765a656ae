"""AdamW with the decay that vision transformers use: none on 1-D parameters and biases."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_
from torch.optim import AdamW, Optimizer

from fat_train.types import UserError


@dataclass(frozen=True, kw_only=True)
class AdamWConfig:
    """AdamW (Loshchilov and Hutter, 2019) under the DeiT/Swin/FAT settings."""

    base_lr: float = 5e-4
    """Rate for a global batch of `lr_per_images`; the rate used is base_lr x global batch / lr_per_images."""
    lr_per_images: int = 512
    """Images that `base_lr` (and the schedule's warm-up and minimum rates) are given for."""
    weight_decay: float = 0.05
    """Decoupled decay of matrices and kernels; 1-D parameters and biases get none."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """Decay of the first and of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    clip_grad_norm: float = 5.0
    """Largest norm of the whole gradient, applied once an update; 0 turns clipping off."""

    def __post_init__(self) -> None:
        if self.base_lr <= 0:
            raise UserError(f"optim.base_lr must be positive; got {self.base_lr}")
        if self.lr_per_images < 1:
            raise UserError(f"optim.lr_per_images must be at least 1; got {self.lr_per_images}")
        if self.eps <= 0:
            raise UserError(f"optim.eps must be positive; got {self.eps}")
        if self.weight_decay < 0 or self.clip_grad_norm < 0:
            raise UserError(
                "optim.weight_decay and optim.clip_grad_norm must not be negative; "
                f"got {self.weight_decay} and {self.clip_grad_norm}"
            )
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"optim.betas must be two numbers in [0, 1); got {self.betas}")

    def build(self, model: nn.Module, *, lr: float) -> AdamW:
        """The optimiser over the trainable parameters of `model`, in two groups: without and with decay.

        Args:
            model: a module; its `no_weight_decay()`, where it has one, names further parameters without decay.
            lr: the rate already scaled to the global batch.
        """
        exempt: set[str] = getattr(model, "no_weight_decay", set)()
        groups = param_groups_weight_decay(model, self.weight_decay, no_weight_decay_list=exempt)
        optimizer = AdamW(groups, lr=lr, betas=(self.betas[0], self.betas[1]), eps=self.eps, fused=True)
        # The fused kernel offers to undo float16's loss scaling by itself, and then nothing may clip before it. Take
        # the offer back: the scaler undoes its scaling first, as with any other optimiser, and clipping is allowed.
        optimizer._step_supports_amp_scaling = False
        return optimizer


def clip_gradient(optimizer: Optimizer, max_norm: float) -> Float[Tensor, " P"]:
    """Scale the whole gradient to a Euclidean norm of at most `max_norm` (0: any); one that is not finite stays.

    The host waits for nothing. Returns the norm of each parameter's gradient before that, in the order of
    `parameters_with_gradient`; the norm of these norms is the whole gradient's.
    """
    parameters = parameters_with_gradient(optimizer)
    norms = torch.stack(torch._foreach_norm([p.grad for p in parameters if p.grad is not None]))
    if max_norm:
        whole = torch.linalg.vector_norm(norms)
        clip_grads_with_norm_(parameters, max_norm, torch.where(whole.isfinite(), whole, 0.0))
    return norms


def parameters_with_gradient(optimizer: Optimizer) -> list[nn.Parameter]:
    """Those that the next step changes."""
    return [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def leave_out_where(optimizer: Optimizer, bad: Float[Tensor, ""]) -> None:
    """Let each `step` change nothing where `bad` is 1: neither weights nor moments nor the count of steps.

    A fused AdamW reads `bad` on its own device when it steps, so the host need not know what it holds. The attribute is
    the one by which torch's GradScaler tells its fused optimisers of a gradient that is not finite.
    """
    optimizer.found_inf = bad  # type: ignore[attr-defined]


def left_out(optimizer: Optimizer) -> Float[Tensor, ""] | None:
    """1 on the device where the newest step changed nothing, else 0; None where nobody has asked for that."""
    return getattr(optimizer, "found_inf", None)
