"""What the machine does not have is refused before anything is loaded."""

from __future__ import annotations

from inspect import signature
from pathlib import Path

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from fat_train.trainer.build import TrainerConfig, _buffers, available_cores, build_trainer
from fat_train.types import UserError


def test_more_processes_than_cores_are_refused_with_what_is_there() -> None:
    cores = available_cores()
    config = TrainerConfig(accelerator="cpu", devices=cores + 1)
    with pytest.raises(UserError, match=rf"trainer\.devices={cores + 1} asks for more .* {cores} CPU core"):
        config.refuse_impossible()
    TrainerConfig(accelerator="cpu", devices=cores).refuse_impossible()


def test_a_gpu_where_there_is_none_is_refused() -> None:
    count = torch.cuda.device_count()
    with pytest.raises(UserError, match=rf"this machine has {count} GPU"):
        TrainerConfig(accelerator="gpu", devices=count + 1).refuse_impossible()


def test_loss_scaling_on_the_cpu_is_refused_with_what_works() -> None:
    with pytest.raises(UserError, match="give 32 or bf16-mixed"):
        TrainerConfig(accelerator="cpu", precision="16-mixed").refuse_impossible()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"devices": 0}, r"trainer\.devices must be at least 1; got 0"),
        ({"accelerator": "tpu"}, r"trainer\.accelerator=tpu is not known"),
        ({"precision": "fp16"}, r"trainer\.precision=fp16 is not known"),
        ({"global_batch": -1}, r"trainer\.global_batch must be at least 1; got -1"),
    ],
)
def test_impossible_settings_are_refused_by_name(settings: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        TrainerConfig(**settings)


def test_no_rank_is_asked_for_signals_before_a_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Lightning from 2.5.2 on does before every batch of several processes, called by its name there."""
    asked: list[object] = []
    monkeypatch.setattr(torch.distributed, "broadcast", lambda *words, **named: asked.append((words, named)))
    config = TrainerConfig(accelerator="cpu")
    words = {"epochs": 1, "accumulate": 1, "clip_grad_norm": 0.0, "callbacks": [], "loggers": []}
    loop = build_trainer(config, folder=tmp_path, **words).fit_loop.epoch_loop  # type: ignore[arg-type]
    if hasattr(loop, "_broadcast_sigterm_tensor"):
        loop._broadcast_sigterm_tensor()
        assert asked == []
        type(loop)._broadcast_sigterm_tensor(loop)
        assert len(asked) == 1, "Lightning's own asks, or there was nothing to turn off"


def test_buffers_are_sent_round_on_cpus_alone_by_a_name_that_torch_knows() -> None:
    parameters = signature(DistributedDataParallel).parameters
    (name,) = _buffers("gpu")
    assert name in parameters
    assert _buffers("gpu") == {name: False}
    assert _buffers("cpu") == {}
