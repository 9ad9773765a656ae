"""An update at which a run stopped is computed again from its file alone, and the fault is found."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from broken_run import break_updates, mend
from fat_train.__main__ import main

RUN = ["optim.base_lr=1e-3", "optim.lr_per_images=8", "schedule.epochs=2", "model.drop_path_rate=0.3", "name=run"]


@pytest.fixture(autouse=True)
def whole() -> Iterator[None]:
    yield
    mend()


def replayed(file: Path, capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, str]:
    """What the command says, by the first word of each line."""
    capsys.readouterr()
    assert main(["replay", f"file={file}", *words]) == 0
    return {line[:15].strip(): line[15:] for line in capsys.readouterr().out.splitlines()}


def test_a_real_explosion_is_found_again_with_the_first_module_that_it_breaks(
    tmp_path: Path, tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*tiny, *RUN, f"folder={tmp_path}", "optim.base_lr=1e30", "optim.clip_grad_norm=0"]
    assert main([*words, "callback.guard.max_skipped=0"]) == 2
    said = replayed(tmp_path / "run" / "nonfinite_update_2_rank0.pt", capsys)
    assert said["loss"] == "nan (in the run nan)"
    assert said["weights"].startswith("finite, up to ")
    assert float(said["weights"].split()[-1]) > 1e20
    assert "is the first that is not finite; its input is, up to" in said["forward"]
    assert "conv" in said["forward"] or "norm" in said["forward"]
    assert "nan" in said["layers.0"]


def test_drop_path_mixing_and_erasing_are_those_of_the_run_to_the_bit(
    tmp_path: Path, tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The run's gradient is spoilt from outside, so its loss is a number: the same comes out of the file alone."""
    break_updates("gradient", [3])
    words = [*tiny, *RUN, f"folder={tmp_path}", "augment=deit", "callback.guard.max_skipped=0"]
    assert main([*words, "trainer.max_batch_per_device=4"]) == 2
    mend()
    file = tmp_path / "run" / "nonfinite_update_4_rank0.pt"
    capsys.readouterr()
    assert main(["replay", f"file={file}"]) == 0
    said = capsys.readouterr().out
    losses = [line.split() for line in said.splitlines() if line.startswith("loss ")]
    assert len(losses) == 2, "both micro-batches, since neither of their losses tells which is at fault"
    for _, again, _, _, _, then in losses:
        assert again == then.rstrip(")")
    assert losses[0][1] != losses[1][1]
    assert "forward        the output of each module is finite" in said
    assert "micro-batch    1: 4 images" in said


def test_a_fault_in_the_loss_alone_is_told_from_one_in_a_module(
    tmp_path: Path, tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    break_updates("loss", [1])
    assert main([*tiny, *RUN, f"folder={tmp_path}", "callback.guard.max_skipped=0"]) == 2
    said = replayed(tmp_path / "run" / "nonfinite_update_2_rank0.pt", capsys)
    assert said["loss"] == "inf (in the run inf)"
    assert said["forward"] == "the output of each module is finite; the loss is not"
    assert said["backward"].startswith("the gradient at the output of head (Linear) is the first")


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_lower_precisions_are_computed_as_such(
    tmp_path: Path, tiny: list[str], capsys: pytest.CaptureFixture[str], precision: str
) -> None:
    """float16 trains on GPUs alone; its file can be looked at on a machine without one."""
    break_updates("loss", [1])
    words = [*tiny, *RUN, f"folder={tmp_path}", "callback.guard.max_skipped=0", "trainer.precision=bf16-mixed"]
    assert main(words) == 2
    mend()
    file = tmp_path / "run" / "nonfinite_update_2_rank0.pt"
    content = torch.load(file, weights_only=True)
    content["fat_train"]["config"]["trainer"]["precision"] = precision
    torch.save(content, file)
    said = replayed(file, capsys, "accelerator=cpu")
    assert said["computed"] == f"on cpu with trainer.precision={precision}"
    assert 0.5 < float(said["loss"].split()[0]) < 10


def test_a_file_that_holds_no_update_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", f"file={tmp_path / 'no.pt'}"]) == 2
    assert "no such file" in capsys.readouterr().err
    torch.save({"state_dict": {}}, tmp_path / "other.pt")
    assert main(["replay", f"file={tmp_path / 'other.pt'}"]) == 2
    assert "holds no update: give a nonfinite_update_*.pt" in capsys.readouterr().err
    assert main(["replay", "fil=x"]) == 2
    assert "did you mean file?" in capsys.readouterr().err
