"""Every contestant reads the same files and makes the same kind of batch."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from fat_train.benchmark.loader import OPENERS, RECIPES, ImagesConfig, Job
from fat_train.data.digits import digits_root
from fat_train.types import UserError

DALI = importlib.util.find_spec("nvidia") is not None
IN_THIS_PROCESS = ["dali", "dali_stock", "dali_uint8"] if DALI else []


@pytest.fixture(scope="module")
def job_of(digits_cache: Path):
    index = ImagesConfig(root=str(digits_root()), at_most=20).open()
    spec = ImagesConfig(image_px=32, eval_resize_px=36).spec()
    return lambda recipe: Job(index=index, packed=index, repeats=2, recipe=recipe, batch_size=4, workers=1, data=spec)


@pytest.mark.parametrize("name", IN_THIS_PROCESS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_dalis_contestants_see_the_same_files_as_often(name: str, recipe: str, job_of) -> None:
    job = job_of(recipe)
    stream = OPENERS[name](job)
    reference = OPENERS["dali_uint8"](job).facts
    assert {key: stream.facts[key] for key in ("images", "files")} == {
        key: reference[key] for key in ("images", "files")
    }
    assert stream.facts["images"] == 40
    uint8 = name.endswith("_uint8")
    assert stream.facts["shape"] == ([4, 32, 32, 3] if uint8 else [4, 3, 32, 32])
    assert stream.facts["dtype"] == str(torch.uint8 if uint8 else torch.float32)
    assert sum(next(stream.work) for _ in range(12)) == 48, "it ends after an epoch"


def test_files_are_spread_over_the_classes(digits_cache: Path) -> None:
    index = ImagesConfig(root=str(digits_root()), at_most=50).open()
    assert len(index) == len(set(index.paths)) == 50
    assert set(index.targets.tolist()) == set(range(10))
    assert len(ImagesConfig(root=str(digits_root())).open()) == 1442


def test_class_folders_alone_do_and_val_where_there_is_no_train(tmp_path: Path, digits_cache: Path) -> None:
    assert len(ImagesConfig(root=str(digits_root() / "val")).open()) == 355
    (tmp_path / "val").symlink_to(digits_root() / "val")
    assert len(ImagesConfig(root=str(tmp_path)).open()) == 355


@pytest.mark.skipif(importlib.util.find_spec("ffcv") is not None, reason="FFCV is installed")
def test_ffcv_says_that_it_is_not_installed(job_of) -> None:
    with pytest.raises(UserError, match="FFCV is not installed"):
        OPENERS["ffcv"](job_of("crop"))
