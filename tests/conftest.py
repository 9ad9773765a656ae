"""What every test may ask for."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from jaxtyping import install_import_hook

from real_slurm import slurm  # noqa: F401 - a fixture

# Every shape in a signature of the mathematics is checked while the tests run, but not in processes that a test starts:
# those are a user's. torch.compile cannot trace the checks: the tests of it run with JAXTYPING_DISABLE=1, apart.
MATHEMATICS = ["model", "loss", "augment.device", "augment.mix", "metric.topk"]
install_import_hook([f"fat_train.{part}" for part in MATHEMATICS], "beartype.beartype")

TINY = [
    "model=fat_nano",
    "data=synthetic",
    "data.image_px=32",
    "data.eval_resize_px=32",
    "data.num_images=32",
    "data.num_val_images=16",
    "data.num_classes=4",
    "augment=none",
    "trainer.global_batch=8",
    "schedule.warmup_epochs=0",
]
REPOSITORY = Path(__file__).parents[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files at the root run the whole system, which takes longest: first, so that no core has nothing left to do."""
    items.sort(key=lambda item: len(item.path.parts))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("compile") and not os.environ.get("JAXTYPING_DISABLE"):
        pytest.skip(
            "torch.compile cannot trace shape checks: run with JAXTYPING_DISABLE=1 -m compile, as make test does"
        )


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Papers' golden numbers and real ImageNet photographs that lie beside a checkout, never in it."""
    folder = REPOSITORY.parent / "shared"
    if not folder.is_dir():
        pytest.skip(
            f"no folder {folder.name}/ beside the checkout: golden files and ImageNet samples are not distributed"
        )
    return folder


@pytest.fixture(scope="session")
def imagenet_samples(shared_dir: Path) -> Path:
    """202 photographs of ImageNet, one a class, as `<wnid>/<file>.JPEG`."""
    folder = shared_dir / "data" / "imagenet-samples"
    if not folder.is_dir():
        pytest.skip("the folder of ImageNet samples is not there")
    return folder


@pytest.fixture(scope="session")
def tiny() -> list[str]:
    """Words of a run that takes a second: four updates an epoch, no disk but its folder."""
    return TINY


@pytest.fixture(scope="session")
def second_family(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Words that choose a model of `second_family.py`, by a user's own folder of yamls."""
    folder = tmp_path_factory.mktemp("mine")
    (folder / "model").mkdir()
    (folder / "model" / "plainnet.yaml").write_text("_target_: second_family.PlainNetConfig\nname: plainnet\n")
    return ["--config-dir", str(folder), "model=plainnet"]


@pytest.fixture(scope="session")
def cli() -> Callable[..., subprocess.CompletedProcess[str]]:
    """`python -m fat_train <words>` as a process of its own, as a user starts it; its output is captured."""

    def run(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "fat_train", *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, **options)

    return run


@pytest.fixture(scope="session")
def digits_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The embedded digits written into a folder of the tests, not into the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FAT_TRAIN_CACHE", str(folder))
        yield folder
