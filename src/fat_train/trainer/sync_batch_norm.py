"""BatchNorm over the images of all ranks, in a form that torch.compile traces and that no host waits for."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from pytorch_lightning.plugins.layer_sync import LayerSync
from torch import Tensor, distributed, nn
from torch.distributed._functional_collectives import all_reduce


class SumOverRanks(torch.autograd.Function):
    """The sum of a tensor over all ranks; so is its gradient, as each rank's loss depends on it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """A collective."""
        del ctx
        return all_reduce(x, "sum", _all_ranks())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """A collective."""
        del ctx
        return all_reduce(gradient.contiguous(), "sum", _all_ranks())


def _all_ranks() -> distributed.ProcessGroup:
    group = distributed.group.WORLD
    assert group is not None
    return group


class SyncBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` whose mean and variance are those of all ranks, each of which has equally many images.

    torch's own SyncBatchNorm allows for ranks without images: it looks for them on the host, in each layer of each
    forward pass, which stops the GPU's queue and cuts a compiled graph in two. Training batches here are of one size.
    """

    def forward(self, input: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """Normalise; in training by the statistics of this batch on all ranks, which enter the running ones."""
        if not self.training:
            return super().forward(input)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        x, ranks = input.to(torch.promote_types(input.dtype, torch.float32)), distributed.get_world_size()
        var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
        own = torch.stack([mean, var])[None]  # [1, 2, C]
        before = distributed.get_rank()
        rows = [own.new_zeros(before, 2, len(mean)), own, own.new_zeros(ranks - before - 1, 2, len(mean))]
        means, variances = SumOverRanks.apply(torch.cat(rows)).unbind(1)  # [ranks, C] each: one message for both
        mean = means.mean(0)
        var = variances.mean(0) + (means - mean).square().mean(0)
        with torch.no_grad():
            number = ranks * input.numel() // input.shape[1]
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (number / (number - 1)), self.momentum)
            self.num_batches_tracked.add_(1)
        scale = self.weight * torch.rsqrt(var + self.eps)
        shift = self.bias - mean * scale
        return torch.addcmul(shift[:, None, None], x, scale[:, None, None]).to(input.dtype)


class SyncBatchNorms(LayerSync):
    """Lightning's plug: the layers get the other forward pass, and keep parameters, buffers and names."""

    def apply(self, model: nn.Module) -> nn.Module:
        """Synchronise all of them."""
        return self._exchange(model, nn.BatchNorm2d, SyncBatchNorm2d)

    def revert(self, model: nn.Module) -> nn.Module:
        """Make them plain again."""
        return self._exchange(model, SyncBatchNorm2d, nn.BatchNorm2d)

    @staticmethod
    def _exchange(model: nn.Module, old: type[nn.Module], new: type[nn.Module]) -> nn.Module:
        for module in model.modules():
            if type(module) is old:
                module.__class__ = new
        return model
