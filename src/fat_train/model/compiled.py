"""torch.compile of a backbone, in place: parameters, state-dict keys, copies and pickles stay the plain model's."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from fat_train.model.backbone import Backbone, Stage

OFF, REGIONAL = "off", "regional"
CUDA_GRAPHS = ("reduce-overhead", "max-autotune")
WAYS = (OFF, "default", *CUDA_GRAPHS, REGIONAL)
GRAPHS = 64
"""Most graphs of one function. All blocks share one, and each shape of theirs has a graph in training and another in
evaluation; after torch's own limit of 8 the others would silently run as eager code."""


def compile_model(model: Backbone, way: str, backend: str = "inductor") -> None:
    """Have the model, or each of its blocks, traced and compiled when it first runs.

    Args:
        model: before it is moved, copied or wrapped by DistributedDataParallel.
        way: one of `WAYS`. `regional` compiles blocks, alike ones once; the others the whole model as one graph.
        backend: torch's name of the compiler.

    Shapes are constants of a graph: a second size of images or batch is another graph, not a slower one for all sizes.
    """
    if way == OFF:
        return
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
    mode = way if way in CUDA_GRAPHS else None
    stages = [module for module in model.modules() if isinstance(module, Stage)]
    parts = [block for stage in stages for block in stage.blocks] if way == REGIONAL else [model]
    for part in parts:
        _compile(part, {"dynamic": False, "mode": mode, "backend": backend})


def compile_copy(copy: nn.Module) -> None:
    """Compile a deep copy, which is a plain model, as its original is: the two share their graphs."""
    for module in copy.modules():
        if (words := _words(module)) is not None:
            _compile(module, words)


def is_compiled(model: nn.Module) -> bool:
    """Whether it, or a part of it, was compiled."""
    return any(_words(module) is not None for module in model.modules())


def graphs_of(model: nn.Module, batch_idx: int) -> AbstractContextManager[Any]:
    """For validation: after its first batch nothing more is compiled, and a batch of another size runs as eager code.

    That is the last one, which may be smaller: its own graph would take a minute, to save a fraction of a second.
    """
    return torch.compiler.set_stance("eager_on_recompile") if batch_idx and is_compiled(model) else nullcontext()


def _compile(module: nn.Module, words: dict[str, Any]) -> None:
    module.compile(**words)
    module.compiled_with = words  # type: ignore[assignment]  # for copies


def _words(module: nn.Module) -> dict[str, Any] | None:
    return getattr(module, "compiled_with", None)
