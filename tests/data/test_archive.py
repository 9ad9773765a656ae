"""Loading out of archives gives what loading out of files gives, in both back ends."""

from __future__ import annotations

import importlib.util
import re
import resource
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from fat_train.augment.policy import AugmentConfig
from fat_train.data.archive import OpenArchives
from fat_train.data.datamodule import FolderDataConfig, build_loader, open_data
from fat_train.data.index import FileIndex, Members
from fat_train.data.loader import Loader
from fat_train.types import UserError

needs_dali = pytest.mark.skipif(importlib.util.find_spec("nvidia") is None, reason="DALI is not installed")
BACKENDS = [pytest.param("dali", marks=needs_dali), "torch"]


@pytest.fixture(scope="session")
def shard_root(picture_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`picture_root` in archives as they are: grey-scale, CMYK, EXIF-turned, and PNG under the name of a JPEG."""
    root = tmp_path_factory.mktemp("shards")
    for split in ("train", "val"):
        (root / split).mkdir()
        for number in range(2):
            with tarfile.open(root / split / f"{number}.tar", "w") as archive:
                for path in sorted((picture_root / split).rglob("*.JPEG"))[number::2]:
                    label = root / "label"
                    label.write_text(str(("ant", "bee", "cat").index(path.parent.name)))
                    name = f"{path.parent.name}/{path.stem}"
                    archive.add(label, f"{name}.cls")
                    archive.add(path, f"{name}.jpeg")
    (root / "classes.txt").write_text("ant\nbee\ncat\n")
    return root


def loader_of(config: FolderDataConfig, split: str) -> Loader:
    source = open_data(config)
    index = source.train if split == "train" else source.val
    return build_loader(config, index, split, AugmentConfig(), batch_per_device=4)


def packed(root: Path, backend: str, num_workers: int = 1) -> FolderDataConfig:
    return FolderDataConfig(root=str(root), backend=backend, num_workers=num_workers, image_px=32, eval_resize_px=40)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("split", ["train", "val"])
def test_pictures_out_of_archives_are_those_out_of_files(
    picture_root: Path, shard_root: Path, backend: str, split: str
) -> None:
    workers = int(backend == "dali")
    files = FolderDataConfig(
        root=str(picture_root), backend=backend, num_workers=workers, image_px=32, eval_resize_px=40
    )
    theirs = list(loader_of(files, split))
    ours = list(loader_of(packed(shard_root, backend, workers), split))
    assert len(ours) == len(theirs) > 3
    for one, other in zip(ours, theirs, strict=True):
        assert all(torch.equal(*fields) for fields in zip(one, other, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_loader_of_archives_goes_on_in_the_middle_of_an_epoch(shard_root: Path, backend: str) -> None:
    config = packed(shard_root, backend, int(backend == "dali"))
    whole = list(loader_of(config, "train"))
    restored = loader_of(config, "train")
    restored.load_state_dict({"epoch": 0, "batch": 2})
    rest = list(restored)
    assert len(rest) == 3
    assert all(torch.equal(one.images, other.images) for one, other in zip(rest, whole[2:], strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_image_that_cannot_be_read_is_named_with_its_archive(shard_root: Path, tmp_path: Path, backend: str) -> None:
    archive = tmp_path / "val" / "0.tar"
    for path in shard_root.rglob("*.*"):
        copy = tmp_path / path.relative_to(shard_root)
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(path.read_bytes())
    loader = loader_of(packed(tmp_path, backend, 1), "val")
    row = next(row for row in range(len(loader.index)) if loader.index.place(row).file == str(archive))
    place = loader.index.place(row)
    content = bytearray(archive.read_bytes())
    content[place.offset : place.offset + 200] = b"x" * 200
    archive.write_bytes(content)
    with pytest.raises(UserError, match=rf"^cannot read the image {re.escape(str(archive))}:{place.member} \("):
        list(loader)


@needs_dali
def test_an_image_in_an_archive_that_dali_alone_refuses_is_named_too(
    shard_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    test_module = "fat_train.data.dali.loader"
    monkeypatch.setattr(f"{test_module}.read_rgb", lambda _place: None)  # PIL reads kinds that DALI does not
    (tmp_path / "0.tar").write_bytes(b"GIF87a" * 20)
    members = Members(("0.tar",), np.zeros(2, np.int64), np.zeros(2, np.int64), np.full(2, 6))
    index = FileIndex(tmp_path, ("a.gif", "b.gif"), np.array([0, 1]), ("0", "1"), members)
    loader = build_loader(packed(tmp_path, "dali"), index, "val", None, batch_per_device=2)
    with pytest.raises(UserError, match=r"0\.tar:a\.gif \(DALI cannot decode it, although PIL can"):
        list(loader)


@needs_dali
def test_images_are_handed_over_without_a_copy(shard_root: Path) -> None:
    index = open_data(packed(shard_root, "dali")).train
    archives = OpenArchives(index)
    rows = np.array([3, 0, 20])
    views = archives.images(rows)
    assert [bytes(view) for view in views] == [index.place(row).read() for row in rows]
    assert not any(view.flags.owndata or view.flags.writeable for view in views)


def test_an_archive_that_is_gone_or_cut_since_it_was_listed_is_named(shard_root: Path, tmp_path: Path) -> None:
    index = open_data(packed(shard_root, "torch")).train
    moved = FileIndex(tmp_path, index.paths, index.targets, index.classes, index.members)
    with pytest.raises(UserError, match=rf"cannot open the archive {tmp_path}/0\.tar: No such file"):
        OpenArchives(moved)
    for content, message in ((b"", "it is empty"), (b"x" * 100, "ends after 100 bytes; its last image ended at")):
        (tmp_path / "0.tar").write_bytes(content)
        with pytest.raises(UserError, match=message):
            OpenArchives(moved)


def test_more_archives_than_a_process_may_open_at_first_are_opened(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    names = tuple(f"{number}.tar" for number in range(200))
    for name in names:
        (tmp_path / name).write_bytes(name.encode())
    rows = np.arange(len(names))
    members = Members(names, rows, np.zeros_like(rows), np.full_like(rows, 5))
    index = FileIndex(tmp_path, names, rows, names, members)
    in_use = len(list(Path("/proc/self/fd").iterdir()))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (in_use + 100, hard))
        views = OpenArchives(index).images(rows)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert bytes(views[-1]) == b"199.t"
    del views
    assert len(list(Path("/proc/self/fd").iterdir())) <= in_use + 1


def test_a_set_in_one_folder_describes_itself_by_that_folder(shard_root: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / f"{split}.tar").write_bytes((shard_root / split / "0.tar").read_bytes())
    assert open_data(FolderDataConfig(root=str(tmp_path))).describe().endswith(f"of 3 classes in {tmp_path}")
    assert open_data(FolderDataConfig(root=str(shard_root))).describe().endswith(f"of 3 classes in {shard_root}")
