"""What every backbone can do, whatever its family: the methods that the trainer, the exporter and a timm user call.

A family file subclasses `Backbone` and `Stage`, builds its modules and answers five questions: `embed`, `run_stage`,
`final_norm`, `drop_after`, `group_matcher`. Names and meanings of the public methods are timm's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

import torch
from jaxtyping import Float
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from fat_train.model.fold import ONLY_EVALUATES, fold, refuse_unfolded
from fat_train.types import Pyramid, UserError

Map = Float[Tensor, "B _C _H _W"]  # any map: the underscores leave its sizes free from one argument to the next
Model = TypeVar("Model", bound="Backbone")  # beartype has no way with `Self`


class StageOutput(NamedTuple):
    """`map`: the last map at the stage's own stride (one level of the pyramid). `next`: what the next stage reads."""

    map: Map
    next: Map


class Stage(nn.Module):
    """A run of blocks that can be recomputed in the backward pass; a family says how they follow each other."""

    blocks: nn.ModuleList

    def __init__(self) -> None:
        super().__init__()
        self.grad_checkpointing = False

    def run_block(self, block: nn.Module, *inputs: Any) -> Any:
        """`block(*inputs)`. With `grad_checkpointing` its activations are recomputed; gradients and buffers stay.

        The recomputation draws the same random numbers (drop path) and leaves BatchNorm's running statistics alone,
        which it would otherwise move a second time.
        """
        if not (self.grad_checkpointing and torch.is_grad_enabled()):
            return block(*inputs)
        if torch.compiler.is_compiling():  # a traced graph writes each buffer once by itself
            return checkpoint(block, *inputs, use_reentrant=False)
        return checkpoint(block, *inputs, use_reentrant=False, context_fn=partial(_checkpoint_contexts, block))


class Backbone(nn.Module, ABC):
    """A classifier `forward_features` -> `forward_head` whose stages also give a feature pyramid.

    A family's constructor ends with `reset_classifier(num_classes)`, which makes `head`, the last of its modules. Where
    layers stand between the last map and its pooling the family puts them into `conv_head` before that.

    Args:
        num_classes: width of the classifier; 0 leaves it out (`forward` then gives the pooled features).
        in_chans: channels of the image.
        num_features: channels of what `forward_features` gives.
        head_hidden_size: channels that enter the classifier; `num_features` unless `conv_head` gives others.
        feature_info: one entry a pyramid level, fine to coarse: `num_chs`, `reduction` (stride against the image) and
            the `module`, with `hook_type`, whose input or output is that level's map.

    Raises:
        UserError: `num_classes` below 0 or `in_chans` below 1.
    """

    feature_info: list[dict[str, Any]]
    head: nn.Module

    def __init__(
        self,
        *,
        num_classes: int,
        in_chans: int,
        num_features: int,
        feature_info: list[dict[str, Any]],
        head_hidden_size: int | None = None,
    ) -> None:
        super().__init__()
        if in_chans < 1:
            raise UserError(f"in_chans must be at least 1; got {in_chans}")
        self.num_features = num_features
        self.head_hidden_size = num_features if head_hidden_size is None else head_hidden_size
        self.in_chans = in_chans
        self.feature_info = feature_info
        self.conv_head: nn.Module = nn.Identity()
        self.global_pool = "avg"
        self.num_classes = num_classes
        self.reparameterized = False

    @abstractmethod
    def embed(self, x: Float[Tensor, "B C H W"]) -> Map:
        """The stem: from the image to the map that the first stage reads."""

    @abstractmethod
    def run_stage(self, stage: int, x: Map) -> StageOutput:
        """Stage number `stage` (from 0) on what the stage before it handed on."""

    @abstractmethod
    def final_norm(self, x: Map) -> Map:
        """What stands between the last stage and the pooling."""

    def norm_pooled(self, x: Float[Tensor, "B C"]) -> Float[Tensor, "B C"]:
        """What stands between the pooling and the classifier: nothing, unless the family says otherwise."""
        return x

    @abstractmethod
    def drop_after(self, stage: int) -> None:
        """Remove every module that the maps up to and including this stage's do not need."""

    @abstractmethod
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's patterns that sort parameters by depth: the stem, then a group a block (`coarse`: a group a stage)."""

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each stage's blocks in the backward pass instead of keeping their activations: memory for time."""
        for module in self.modules():
            if isinstance(module, Stage):
                module.grad_checkpointing = enable

    def train(self: Model, mode: bool = True) -> Model:
        """Switch between training and evaluation, as any module does.

        Raises:
            UserError: training, after `reparameterize`.
        """
        if mode and self.reparameterized:
            raise UserError(ONLY_EVALUATES)
        return super().train(mode)

    def reparameterize(self: Model) -> Model:
        """Compute the same with fewer operations, in place and for good: for inference, after the weights are loaded.

        BatchNorms and sums with a depth-wise convolution's own input become part of convolutions (`model.fold`), no
        parameter asks for a gradient any more, and the model only evaluates from now on. In float32 the logits move by
        rounding alone. Another type is best taken afterwards, `model.reparameterize().bfloat16()`: what is folded then
        has not been rounded yet.

        The state dict keeps the names of what is left, without the BatchNorms' own. It fits a reparameterised model of
        the same size; weights from before fit it no more, and are refused.

        Returns:
            The model itself. A second call changes nothing.
        """
        if not self.reparameterized:
            fold(self)
            self.eval().requires_grad_(False)
            self.register_load_state_dict_pre_hook(refuse_unfolded)
            self.reparameterized = True
        return self

    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay beside the one-dimensional ones, which never have it: none."""
        return set()

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K"] | Map:
        """Logits of normalised images; with `num_classes` 0 the pooled features."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Float[Tensor, "B C H W"]) -> Map:
        """The last map, `num_features` channels, not pooled; normalised unless `conv_head` begins with that."""
        x = self.embed(x)
        for stage in range(len(self.feature_info)):
            x = self.run_stage(stage, x).next
        return self.final_norm(x)

    def forward_head(self, x: Map, pre_logits: bool = False) -> Float[Tensor, "B K"] | Map:
        """Pool and classify what `forward_features` gave; `pre_logits` stops before the classifier.

        A map comes back where `reset_classifier` has turned pooling off.
        """
        x = self.conv_head(x)  # [B, C, H, W]
        if self.global_pool == "avg":
            x = self.norm_pooled(x.mean(dim=(2, 3)))  # [B, C]
        return x if pre_logits else self.head(x)

    def forward_intermediates(
        self,
        x: Float[Tensor, "B C H W"],
        indices: int | Sequence[int] | None = None,
        *,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Map] | tuple[Map, list[Map]]:
        """The pyramid's maps, by timm's signature.

        Args:
            x: normalised images.
            indices: levels to give, from 0; an int means the last so many; None all.
            norm: normalise the last level by the final norm (the others have none).
            stop_early: run no stage beyond the last level asked for.
            output_fmt: "NCHW"; there is no other.
            intermediates_only: leave the final features out of the answer.

        Returns:
            The maps, fine to coarse, alone or after the final features (those of the last stage that ran).
        """
        if output_fmt != "NCHW":
            raise UserError(f"output_fmt must be NCHW; got {output_fmt}")
        num_stages = len(self.feature_info)
        taken, last_taken = feature_take_indices(num_stages, None if indices is None else _plain(indices))
        num_run = last_taken + 1 if stop_early else num_stages
        maps = []
        x = self.embed(x)
        for stage in range(num_run):
            level, x = self.run_stage(stage, x)
            if stage + 1 == num_stages:
                x = self.final_norm(x)
                level = x if norm else level
            if stage in taken:
                maps.append(level)
        return maps if intermediates_only else (x, maps)

    def pyramid(self, x: Float[Tensor, "B C H W"]) -> Pyramid:
        """All levels, not normalised, with their strides; the family's docstring says which tensor each one is."""
        _, maps = self.forward_intermediates(x)
        return Pyramid(tuple(maps), tuple(level["reduction"] for level in self.feature_info))

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the given levels do not need, so that a feature extractor has no idle parameter (DDP minds).

        Returns:
            The levels kept, as indices from 0.
        """
        taken, last_taken = feature_take_indices(len(self.feature_info), _plain(indices))
        if last_taken + 1 < len(self.feature_info):
            self.drop_after(last_taken)
            self.feature_info = self.feature_info[: last_taken + 1]
            self.num_features = self.feature_info[-1]["num_chs"]
            prune_norm = prune_head = True
        if prune_norm:
            self.norm: nn.Module = nn.Identity()
        if prune_head:
            self.conv_head, self.head_hidden_size = nn.Identity(), self.num_features
            self.reset_classifier(0, "")
        return taken

    def get_classifier(self) -> nn.Module:
        """The last linear layer; `nn.Identity` where there are no classes."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a fresh one.

        Args:
            num_classes: its width; 0 for none.
            global_pool: "avg", or "" for no pooling, which leaves no room for classes; None keeps what is set.

        Raises:
            UserError: a negative width, another pooling, or classes without pooling.
        """
        pool = self.global_pool if global_pool is None else global_pool
        if pool not in ("avg", ""):
            raise UserError(f'global_pool must be "avg" or "" (none); got {pool!r}')
        if not pool and num_classes:
            raise UserError(f'global_pool "" gives maps, which {num_classes} classes cannot read: set num_classes=0')
        if num_classes < 0:
            raise UserError(f"num_classes must be at least 0; got {num_classes}")
        like = next(self.parameters())
        self.head = (
            nn.Linear(self.head_hidden_size, num_classes, device=like.device, dtype=like.dtype)
            if num_classes
            else nn.Identity()
        )
        self.num_classes, self.global_pool = num_classes, pool


class ModelConfig(Protocol):
    """What the configuration of any family of models is: a dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def name(self) -> str:
        """Name of its yaml."""
        ...

    @property
    def depths(self) -> list[int]:
        """Blocks of each stage; each stage is a level of the pyramid."""
        ...

    def build(self, num_classes: int, in_chans: int = 3) -> Backbone:
        """The model, with fresh weights."""
        ...


class StagedBackbone(Backbone):
    """A stem and stages in a row: what a stage gives is its level of the pyramid, and what the next one reads."""

    stem: nn.Module
    stages: nn.ModuleList

    def embed(self, x: Float[Tensor, "B C H W"]) -> Map:
        """Tokens at stride 4."""
        return self.stem(x)

    def run_stage(self, stage: int, x: Map) -> StageOutput:
        """The stage's output, twice."""
        x = self.stages[stage](x)
        return StageOutput(x, x)

    def drop_after(self, stage: int) -> None:
        """Remove the later stages."""
        self.stages = self.stages[: stage + 1]


def levels_of(widths: Sequence[int], depths: Sequence[int]) -> list[dict[str, Any]]:
    """`feature_info` of a `StagedBackbone`: each level is what the last block of its stage gives."""
    return [
        {"num_chs": width, "reduction": 4 * 2**stage, "module": f"stages.{stage}.blocks.{depth - 1}"}
        | {"hook_type": "forward"}
        for stage, (width, depth) in enumerate(zip(widths, depths, strict=True))
    ]


def _checkpoint_contexts(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), _running_stats_kept(block)


@contextmanager
def _running_stats_kept(block: nn.Module) -> Iterator[None]:
    """BatchNorms normalise by the batch as ever, but move their running mean and variance by nothing.

    Momentum 0 rather than `track_running_stats=False`: a norm that does not track saves fewer tensors for the backward
    pass, which `checkpoint` refuses. The count of batches has no such factor, so a scratch tensor takes the step.
    """
    norms = [module for module in block.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    kept = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        assert norm.num_batches_tracked is not None
        norm.momentum, norm.num_batches_tracked = 0.0, torch.zeros_like(norm.num_batches_tracked)
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, kept, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count


def _plain(indices: int | Sequence[int]) -> int | list[int]:
    return indices if isinstance(indices, int) else list(indices)
