from __future__ import annotations

import gc
import time
from pathlib import Path

import pytest

pytest.importorskip("nvidia.dali", reason="DALI is not installed")

from fat_train.augment.policy import AugmentConfig
from fat_train.data.dali.loader import DaliLoader
from fat_train.data.datamodule import FolderDataConfig, build_loader, open_data
from fat_train.types import UserError


def threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def dali_loader(root: Path, split: str) -> DaliLoader:
    config = FolderDataConfig(root=str(root), backend="dali", num_workers=3, image_px=32, eval_resize_px=40)
    source = open_data(config)
    index = source.train if split == "train" else source.val
    loader = build_loader(config, index, split, AugmentConfig(), batch_per_device=4)
    assert isinstance(loader, DaliLoader)
    return loader


def test_epochs_share_one_pipeline_and_its_threads_end_with_the_loader(picture_root: Path) -> None:
    gc.collect()
    before = threads()
    loader = dali_loader(picture_root, "train")
    list(loader)
    during = threads()
    assert during > before
    for epoch in (1, 2):
        loader.set_epoch(epoch)
        list(loader)
        next(iter(loader))
        assert threads() == during
    del loader
    deadline = time.monotonic() + 10
    while threads() > before and time.monotonic() < deadline:  # torch's threads are told to end, not waited for
        time.sleep(0.01)
    assert threads() <= before


def test_a_file_that_dali_alone_refuses_is_named_too(
    picture_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for split in ("train", "val"):
        (tmp_path / split / "ant").mkdir(parents=True)
        for name in ("1.jpg", "2.jpg"):
            (tmp_path / split / "ant" / name).write_bytes((picture_root / "train" / "ant" / "000.JPEG").read_bytes())
    victim = tmp_path / "val" / "ant" / "2.jpg"
    victim.write_bytes(b"GIF87a")
    # PIL reads kinds that DALI does not; let it be one of those.
    monkeypatch.setattr("fat_train.data.dali.loader.read_rgb", lambda _path: None)
    with pytest.raises(UserError, match=rf"cannot read the image {victim} \(DALI cannot decode it, although PIL can"):
        list(dali_loader(tmp_path, "val"))
