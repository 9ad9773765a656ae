"""What travels beside the weights can be read back without running code."""

from __future__ import annotations

import subprocess
from pathlib import Path

import torch

from fat_train.checkpoint.provenance import git_state, provenance, versions


def test_it_survives_a_checkpoint_that_is_read_without_unpickling_code(tmp_path: Path) -> None:
    about = provenance(
        {"seed": 0, "optim": {"betas": [0.9, 0.999]}},
        model="fat_b0",
        classes=("cat", "dog"),
        steps_per_epoch=7,
        fingerprints={"train": "a", "val": "b"},
    )
    torch.save(about, tmp_path / "about.pt")
    assert torch.load(tmp_path / "about.pt", weights_only=True) == about
    assert about["num_classes"] == 2


def test_versions_name_what_a_result_depends_on() -> None:
    assert versions()["torch"].startswith(torch.__version__.partition("+")[0])
    assert {"python", "timm", "torchvision", "pytorch-lightning"} <= versions().keys()


def test_git_state_is_the_checkouts_own() -> None:
    repository = Path(__file__).parents[2]
    told = subprocess.run(["git", "rev-parse", "HEAD"], cwd=repository, capture_output=True, text=True, check=False)
    state = git_state()
    if told.returncode:
        assert state is None
    else:
        assert state is not None
        assert state["commit"] == told.stdout.strip()
