"""From a set to its shards and to a trained model, by the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from fat_train.__main__ import main
from fat_train.data.datamodule import FolderDataConfig, open_data
from fat_train.data.picture import read_rgb
from fat_train.metric.record import read_rows

RUN = ["model=fat_nano", "augment=light", "trainer.global_batch=16", "schedule.epochs=1", "schedule.warmup_epochs=0"]
RUN += ["debug.max_steps_per_epoch=6", "trainer.log_every_n_steps=1", "data.num_workers=1", "trainer.accelerator=cpu"]


def test_a_packed_set_trains_to_the_bit_as_its_source_does_and_is_evaluated(
    tmp_path: Path, digits_cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The digits are small already: they are stored byte for byte, and the order of the rows is that of the files."""
    monkeypatch.chdir(tmp_path)
    assert main(["pack", "data=digits", "out=shards", "short_side_px=64", "num_workers=1", "verify=true"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("data           digits: 1,442 training and 355 validation images of 10 classes in ")
    assert said[1].startswith("packed         1,797 images, 3.0 MB -> ")
    assert said[1].endswith(" s, verified")
    words = said[2].partition("-m fat_train ")[2].split()
    assert words == ["data=imagenet_packed", "data.root=shards", "data.image_px=64", "data.eval_resize_px=64"]

    assert main([*RUN, *words, "name=packed"]) == 0
    assert main([*RUN, "data=digits", "name=files"]) == 0
    losses = {
        name: [row["train/loss"] for row in read_rows(tmp_path / "runs" / "debug" / name / "metrics.csv")]
        for name in ("packed", "files")
    }
    assert len(losses["files"]) >= 6
    assert losses["packed"] == losses["files"]

    for shard in (tmp_path / "shards" / "train").iterdir():
        shard.unlink()  # validation does without
    capsys.readouterr()
    assert main(["evaluate", "checkpoint=runs/debug/packed/checkpoints/last.ckpt", "trainer.accelerator=cpu"]) == 0
    assert "355 images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data=digits"], "out is missing: give it as out=<str>"),
        (["data=synthetic", "out=x"], "data=synthetic has no files to pack"),
        (["out=x", "data.root=/nowhere"], "data.root=/nowhere is not there"),
        (["out=x", "short_side_px=200"], "short_side_px=200 is under data.image_px=224"),
        (["out=x", "val_short_side_px=224"], "val_short_side_px=224 is under data.eval_resize_px=256"),
        (["out=x", "qualty=90"], "unknown key qualty; did you mean quality?"),
        (["out=/dev/null/x", "data=digits"], "cannot write into /dev/null/x"),
    ],
)
def test_what_cannot_be_packed_is_one_message(
    words: list[str],
    message: str,
    tmp_path: Path,
    digits_cache: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [*words, "short_side_px=64"] if "/dev/null/x" in words[0] else words
    assert main(["pack", *words]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_photographs_become_smaller_and_keep_labels_and_order(imagenet_samples: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / "set" / split).mkdir(parents=True)
        for folder in sorted(imagenet_samples.iterdir())[:20]:
            (tmp_path / "set" / split / folder.name).symlink_to(folder)
    assert main(["pack", f"data.root={tmp_path / 'set'}", f"out={tmp_path / 'out'}", "num_workers=1"]) == 0
    source = open_data(FolderDataConfig(root=str(tmp_path / "set")))
    shards = open_data(FolderDataConfig(root=str(tmp_path / "out")))
    assert shards.train.classes == source.train.classes
    assert [Path(path).stem for path in shards.train.paths] == [Path(path).stem for path in source.train.paths]
    sizes = [read_rgb(shards.train.place(row)).size for row in range(20)]
    assert all(min(size) <= 320 for size in sizes)
    assert sum(min(size) == 320 for size in sizes) > 10
    kept = [shards.val.place(row).read() == source.val.place(row).read() for row in range(20)]
    assert sum(kept) > 15, "validation images that are RGB are stored as they are"
