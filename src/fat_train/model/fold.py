"""A trained network as fewer operations that compute the same in evaluation: what is linear and fixed by then goes into
the convolution or linear layer before it, or the 1×1 convolution behind it.

Everything is computed in float64 and rounded once, to the type that the weights have.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fat_train.layer.conv import DepthwiseConv2d
from fat_train.types import UserError

ONLY_EVALUATES = (
    "a reparameterised model only evaluates: its BatchNorms are part of its convolutions. "
    "To train, build it again (create_model) and load the weights from before"
)
WEIGHTS_FIRST = "a reparameterised model has no BatchNorms to load: load the weights first, then call reparameterize()"


def fold(model: nn.Module) -> None:
    """Fold in place whatever can be, for evaluation:

    - x + DWConv(x): the sum into the kernel's centre tap;
    - a BatchNorm right behind a convolution or linear layer: into its weight and bias. It follows in a `Sequential`,
      or the module that runs both names them in its class: `conv_norm_pairs = (("dwconv", "bn"),)`;
    - a BatchNorm right before a 1×1 convolution, which alone reads it: into that one's weight and bias. It precedes in
      a `Sequential`, or `norm_conv_pairs = (("norm", "proj"),)` names them.

    `nn.Identity` takes the BatchNorm's place, so that the other modules keep their names. Drop path needs nothing: in
    evaluation it is the identity already.
    """
    modules = list(model.modules())
    with torch.no_grad():
        for module in modules:
            if isinstance(module, DepthwiseConv2d) and module.residual:
                fold_residual(module)
        for module in modules:
            for layer_name, norm_name in _pairs(module, "conv_norm_pairs"):
                layer, norm = getattr(module, layer_name), getattr(module, norm_name)
                if _is_foldable(layer, norm):
                    fold_batch_norm(layer, norm)
                    setattr(module, norm_name, nn.Identity())
            for norm_name, layer_name in _pairs(module, "norm_conv_pairs"):
                norm, layer = getattr(module, norm_name), getattr(module, layer_name)
                if _is_pointwise(layer) and _is_fixed(norm):
                    fold_norm_before(norm, layer)
                    setattr(module, norm_name, nn.Identity())


def fold_residual(conv: DepthwiseConv2d) -> None:
    """x + DWConv(x) as one DWConv: 1 is added to each channel's centre tap."""
    middle = conv.kernel_size[0] // 2
    weight = _exact(conv.weight)
    weight[:, 0, middle, middle] += 1
    conv.weight.copy_(weight)
    conv.residual = False


def fold_batch_norm(layer: nn.Conv2d | nn.Linear, norm: _BatchNorm) -> None:
    """BN(W ⊗ x + b) as one layer, by BN's running statistics.

    BN(z) = s ⊙ z + t with s = weight / √(variance + eps), t = bias − s ⊙ mean, channel by channel, so that
    BN(W ⊗ x + b) = (s ⊙ W) ⊗ x + (s ⊙ b + t). Padding does no harm: it comes before both.
    """
    scale, shift = _scale_and_shift(norm)
    bias = _bias_of(layer)
    weight = _exact(layer.weight)
    layer.weight.copy_(weight * scale.view(-1, *[1] * (weight.ndim - 1)))
    bias.copy_(_exact(bias) * scale + shift)


def fold_norm_before(norm: _BatchNorm, layer: nn.Conv2d) -> None:
    """W ⊗ BN(x) + b as one 1×1 convolution: with s and t as above, (W ⊙ s) ⊗ x + (W t + b), s along W's columns.

    A larger kernel would not do: its padding is 0 behind the norm, where x's own would be −t / s.
    """
    scale, shift = _scale_and_shift(norm)
    bias = _bias_of(layer)
    weight = _exact(layer.weight)  # [c, C, 1, 1]
    layer.weight.copy_(weight * scale.view(1, -1, 1, 1))
    bias.copy_(_exact(bias) + weight.flatten(1) @ shift)


def refuse_unfolded(
    module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any, strict: bool, *lists: list[str]
) -> None:
    """A hook before `load_state_dict`: weights from before the folding would be taken for folded ones.

    Raises:
        UserError: `state` has names that the folded model has not.
    """
    del metadata, strict, lists
    own = module.state_dict(prefix=prefix)
    if any(name.startswith(prefix) and name not in own for name in state):
        raise UserError(WEIGHTS_FIRST)


def _pairs(module: nn.Module, attribute: str) -> Iterator[tuple[str, str]]:
    """Names of the children of `module` where the second reads what the first gives, and nothing else does."""
    yield from getattr(module, attribute, ())
    if isinstance(module, nn.Sequential):
        names = [name for name, _ in module.named_children()]
        yield from pairwise(names)


def _is_foldable(layer: nn.Module, norm: nn.Module) -> bool:
    """One behind an activation is not behind the convolution."""
    return (
        isinstance(layer, nn.Conv2d | nn.Linear) and getattr(layer, "activation", "none") == "none" and _is_fixed(norm)
    )


def _is_pointwise(layer: nn.Module) -> bool:
    return (
        isinstance(layer, nn.Conv2d)
        and layer.kernel_size == (1, 1)
        and layer.padding in ((0, 0), "valid", "same")
        and layer.groups == 1
    )


def _is_fixed(norm: nn.Module) -> bool:
    """A norm without running statistics normalises by the batch in evaluation too."""
    return isinstance(norm, _BatchNorm) and norm.running_mean is not None and norm.running_var is not None


def _scale_and_shift(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """(s, t) of BN(z) = s ⊙ z + t, exact."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = (_exact(norm.running_var) + norm.eps).rsqrt()
    if norm.weight is not None:
        scale *= _exact(norm.weight)
    shift = -scale * _exact(norm.running_mean)
    if norm.bias is not None:
        shift += _exact(norm.bias)
    return scale, shift


def _bias_of(layer: nn.Conv2d | nn.Linear) -> Tensor:
    """Its bias, which it gets as zeros where it has none."""
    if layer.bias is None:
        layer.bias = nn.Parameter(layer.weight.new_zeros(len(layer.weight)))
    return layer.bias


def _exact(tensor: Tensor) -> Tensor:
    """A copy in float64, on the CPU: not every device has that type."""
    return tensor.detach().to("cpu", torch.float64, copy=True)
