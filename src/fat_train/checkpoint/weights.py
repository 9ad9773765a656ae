"""Weights from a file into a model: ours, the authors', DDP's or safetensors; all of them or none."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fat_train.model.fold import WEIGHTS_FIRST
from fat_train.types import MissingPathError, UserError

WHICH = ("raw", "ema")
# What Lightning, DistributedDataParallel and torch.compile put before the names of the model they wrap.
WRAPPER_PREFIXES = ("model.", "module.", "_orig_mod.")
NAMES_SHOWN = 8


def load_weights(model: nn.Module, path: str | Path, *, which: str = "raw") -> None:
    """Load the weights of a file into `model`, in place; the model's device and precision stay.

    Args:
        model: has exactly the file's parameters and buffers.
        path: as for `read_state_dict`.
        which: as for `read_state_dict`.

    Raises:
        MissingPathError: no such file.
        UserError: not a checkpoint, or names or shapes differ (both sides are listed); nothing has been loaded then.
    """
    apply_state_dict(model, read_state_dict(path, which), source=str(path))


def read_state_dict(path: str | Path, which: str = "raw") -> dict[str, Tensor]:
    """The weights of a file under the model's own names, on the CPU.

    Args:
        path: `.safetensors`, or what `torch.save` wrote: our `.ckpt`, or a state dict, bare or under `state_dict` or
            `model`. Prefixes of Lightning, DDP and torch.compile are taken off. No code in the file is run.
        which: `raw`, or `ema` for the moving average that our checkpoints can hold beside it.

    Raises:
        MissingPathError: no such file.
        UserError: the file is damaged, holds no weights, or no average when that is asked for.
    """
    if which not in WHICH:
        raise UserError(f"which must be one of {', '.join(WHICH)}; got {which}")
    content = read_checkpoint(Path(path))
    if which == "ema":
        if not isinstance(content.get("ema"), Mapping):
            raise UserError(f"checkpoint: {path} holds no EMA weights, only raw ones")
        content = content["ema"]
    for key in ("state_dict", "model"):
        if isinstance(content.get(key), Mapping):
            content = content[key]
            break
    state = _unwrap(content)
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"checkpoint: {path} holds no weights: neither a state dict nor one under state_dict or model")
    return state


def apply_state_dict(model: nn.Module, state: Mapping[str, Tensor], *, source: str) -> None:
    """Copy `state` into `model` if names and shapes agree.

    Raises:
        UserError: they differ; the message lists what the file lacks, what it has too much, and other shapes.
    """
    own = model.state_dict()
    reshaped = [
        f"{name} (file {list(state[name].shape)}, model {list(tensor.shape)})"
        for name, tensor in own.items()
        if name in state and state[name].shape != tensor.shape
    ]
    differences = {
        "missing in the file": [name for name in own if name not in state],
        "unexpected in the file": [name for name in state if name not in own],
        "of another shape": reshaped,
    }
    if any(differences.values()):
        lines = [f"  {kind} ({len(names)}): {_some(names)}" for kind, names in differences.items() if names]
        if getattr(model, "reparameterized", False):
            lines.append(f"  {WEIGHTS_FIRST}")
        in_file, in_model = num_classes_of(state), num_classes_of(own)
        if in_file != in_model:
            lines.append(f"  the head's width differs: checkpoint has {in_file} classes, model {in_model}")
        raise UserError("\n".join([f"checkpoint: {source} is of another model; nothing was loaded", *lines]))
    model.load_state_dict(state)


def num_classes_of(state: Mapping[str, Tensor]) -> int:
    """Width of the classifier in a state dict; 0 where there is none."""
    return state["head.weight"].shape[0] if "head.weight" in state else 0


def read_checkpoint(path: Path) -> Mapping[str, Any]:
    """All that a checkpoint file holds, tensors on the CPU; no code in the file is run.

    Raises:
        MissingPathError: no such file.
        UserError: the file is damaged, or holds no dictionary.
    """
    if not path.is_file():
        raise MissingPathError(f"checkpoint: no file {path}")
    try:
        content = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except pickle.UnpicklingError as error:
        reason = "damaged, or holds Python objects beside tensors and plain values, which are never unpickled"
        raise UserError(f"checkpoint: cannot read {path}: {reason}") from error
    except (SafetensorError, RuntimeError, EOFError, ValueError, KeyError, IndexError) as error:
        raise UserError(f"checkpoint: cannot read {path}: damaged, or not a checkpoint ({error})") from error
    if not isinstance(content, Mapping):
        raise UserError(f"checkpoint: {path} holds a {type(content).__name__}, not a dictionary of weights")
    return content


def _unwrap(state: Mapping[str, Any]) -> dict[str, Any]:
    """Take off wrappers' prefixes, from outside in; what lies beside a wrapped model (metrics, losses) goes too."""
    unwrapped = {str(name): value for name, value in state.items()}
    while prefix := next((p for p in WRAPPER_PREFIXES if any(name.startswith(p) for name in unwrapped)), None):
        unwrapped = {name.removeprefix(prefix): value for name, value in unwrapped.items() if name.startswith(prefix)}
    return unwrapped


def _some(names: list[str]) -> str:
    more = f", and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more
