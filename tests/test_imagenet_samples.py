"""The 300-epoch road on real ImageNet photographs, cut short: full DeiT augmentation, FAT-B0, evaluation, preview."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from fat_train.__main__ import main
from fat_train.metric.record import read_rows

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def root(imagenet_samples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set whose training and validation images are the same 202 photographs."""
    folder = tmp_path_factory.mktemp("imagenet")
    for split in ("train", "val"):
        (folder / split).symlink_to(imagenet_samples)
    return folder


def test_fat_b0_trains_is_evaluated_and_previewed_on_photographs(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["model=fat_b0", f"data.root={root}", "trainer.global_batch=16", "schedule.epochs=2", f"folder={tmp_path}"]
    words.append("schedule.warmup_epochs=1")
    assert main(words) == 0
    last = read_rows(tmp_path / "fat_b0_imagenet" / "metrics.csv")[-1]
    assert (last["step"], last["val/count"]) == ("24", "202")

    capsys.readouterr()
    checkpoint = tmp_path / "fat_b0_imagenet" / "checkpoints" / "last.ckpt"
    assert main(["evaluate", f"checkpoint={checkpoint}", "batch_size=33", "data.backend=dali"]) == 0
    assert f"top-1 {float(last['val/top1']):.3f} %" in capsys.readouterr().out

    assert main(["preview", *words, "count=16", f"out={tmp_path / 'sheet.png'}"]) == 0
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 6 * 224
