"""Weights come in from every kind of file that people have, whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fat_train import create_model, load_weights
from fat_train.checkpoint.weights import num_classes_of, read_state_dict
from fat_train.model.backbone import Backbone
from fat_train.types import MissingPathError, UserError


def nano(num_classes: int = 10, seed: int = 0) -> Backbone:
    torch.manual_seed(seed)
    return create_model("fat_nano", num_classes=num_classes)


def copy_of(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


def same(state: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in state)


@pytest.mark.parametrize(
    "layout",
    {
        "bare": lambda state: state,
        "under model": lambda state: {"model": state, "epoch": 299, "max_accuracy": 77.6},
        "under state_dict": lambda state: {"state_dict": state},
        "of DDP": lambda state: {"model": prefixed(state, "module.")},
        "of Lightning": lambda state: {"state_dict": prefixed(state, "model.") | {"loss.weight": torch.ones(3)}},
        "of Lightning, compiled": lambda state: {"state_dict": prefixed(state, "model._orig_mod.")},
    }.items(),
    ids=lambda item: item[0],
)
def test_a_file_in_each_known_layout_loads(tmp_path, layout):
    source, target = nano(seed=1), nano(seed=2)
    torch.save(layout[1](source.state_dict()), tmp_path / "weights.pth")
    load_weights(target, tmp_path / "weights.pth")
    assert same(target.state_dict(), source.state_dict())


def test_safetensors_load(tmp_path):
    source, target = nano(seed=1), nano(seed=2)
    save_file(copy_of(source), tmp_path / "weights.safetensors")
    load_weights(target, str(tmp_path / "weights.safetensors"))
    assert same(target.state_dict(), source.state_dict())


def test_raw_and_average_weights_of_one_checkpoint_are_told_apart(tmp_path):
    raw, average, target = nano(seed=1), nano(seed=2), nano(seed=3)
    checkpoint = {"state_dict": prefixed(raw.state_dict(), "model."), "ema": {"state_dict": average.state_dict()}}
    torch.save(checkpoint, tmp_path / "last.ckpt")
    load_weights(target, tmp_path / "last.ckpt")
    assert same(target.state_dict(), raw.state_dict())
    load_weights(target, tmp_path / "last.ckpt", which="ema")
    assert same(target.state_dict(), average.state_dict())


def test_weights_take_the_models_precision(tmp_path):
    torch.save(nano(seed=1).half().state_dict(), tmp_path / "half.pth")
    target = nano(seed=2)
    load_weights(target, tmp_path / "half.pth")
    assert {parameter.dtype for parameter in target.parameters()} == {torch.float32}


def test_a_file_of_another_model_is_refused_with_both_sides_and_nothing_is_loaded(tmp_path):
    state = copy_of(nano(seed=1))
    del state["norm.bias"], state["patch_embed.conv5.weight"]
    state["surplus.weight"] = torch.ones(1)
    state["norm.weight"] = torch.ones(3)
    torch.save(state, tmp_path / "other.pth")
    target = nano(seed=2)
    before = copy_of(target)
    with pytest.raises(UserError) as refusal:
        load_weights(target, tmp_path / "other.pth")
    message = str(refusal.value)
    assert "missing in the file (2): patch_embed.conv5.weight, norm.bias" in message
    assert "unexpected in the file (1): surplus.weight" in message
    assert "of another shape (1): norm.weight (file [3], model [64])" in message
    assert "classes" not in message
    assert same(target.state_dict(), before)


def test_another_number_of_classes_is_called_by_its_name(tmp_path):
    torch.save(nano(num_classes=1000).state_dict(), tmp_path / "imagenet.pth")
    with pytest.raises(UserError, match="head's width differs: checkpoint has 1000 classes, model 10"):
        load_weights(nano(num_classes=10), tmp_path / "imagenet.pth")


def test_long_lists_are_cut_and_counted(tmp_path):
    torch.save(nano().state_dict(), tmp_path / "nano.pth")
    with pytest.raises(UserError, match=r"missing in the file \(\d+\): .*, and \d+ more") as refusal:
        load_weights(create_model("fat_b0"), tmp_path / "nano.pth")
    assert len(str(refusal.value)) < 2000


def test_classes_are_counted_from_the_head():
    assert num_classes_of(nano(num_classes=7).state_dict()) == 7
    assert num_classes_of(nano(num_classes=0).state_dict()) == 0


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(MissingPathError, match=r"checkpoint: no file .*nowhere\.ckpt"):
        load_weights(nano(), tmp_path / "nowhere.ckpt")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    "content", [b"", b"plain text, no weights\n", bytes(range(256)) * 40], ids=["", "text", "bytes"]
)
def test_a_file_that_is_no_checkpoint_is_refused_by_its_path(tmp_path, suffix, content):
    path = tmp_path / f"broken{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"cannot read .*broken"):
        read_state_dict(path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_cut_short_is_refused_by_its_path(tmp_path, suffix):
    path = tmp_path / f"cut{suffix}"
    if suffix == ".pth":
        torch.save(nano().state_dict(), path)
    else:
        save_file(copy_of(nano()), path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=r"cannot read .*cut"):
        read_state_dict(path)


class Payload:
    """What a hostile pickle would name."""

    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


def test_no_code_in_a_file_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": nano().state_dict(), "args": Payload()}, tmp_path / "hostile.pth")
    with pytest.raises(UserError, match="never unpickled"):
        read_state_dict(tmp_path / "hostile.pth")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("content", [{}, {0: 3}, [1, 2], torch.ones(3)], ids=["empty", "numbers", "list", "tensor"])
def test_a_file_without_weights_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "no_weights.pth")
    with pytest.raises(UserError, match=r"no weights|not a dictionary of weights"):
        read_state_dict(tmp_path / "no_weights.pth")


def test_an_average_that_is_not_there_is_not_replaced_by_the_raw_weights(tmp_path):
    torch.save(nano().state_dict(), tmp_path / "raw.pth")
    with pytest.raises(UserError, match="holds no EMA weights"):
        read_state_dict(tmp_path / "raw.pth", which="ema")
    with pytest.raises(UserError, match="which must be one of raw, ema; got both"):
        read_state_dict(tmp_path / "raw.pth", which="both")
