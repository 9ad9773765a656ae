from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from fat_train.data import shard as shard_module
from fat_train.data.shard import has_shards, scan_shards
from fat_train.data.tar import read_shard
from fat_train.types import MissingPathError, UserError

Samples = dict[str, bytes]


def write_tar(path: Path, members: Samples, tar_format: int = tarfile.USTAR_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tar_format) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            info.mtime = 1.5  # type: ignore[assignment]  # a fraction makes a header of its own in the PAX format
            archive.addfile(info, io.BytesIO(content))
    return path


def samples(*keys_and_labels: tuple[str, int]) -> Samples:
    members: Samples = {}
    for key, label in keys_and_labels:
        members[f"{key}.cls"] = str(label).encode()
        members[f"{key}.jpg"] = f"image of {key}".encode()
    return members


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FAT_TRAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes; three training images in two shards, two validation images in one."""
    root = tmp_path / "set"
    write_tar(root / "train" / "a.tar", samples(("x/3", 1), ("x/1", 0)))
    write_tar(root / "train" / "b.tar", samples(("x/2", 0)))
    write_tar(root / "val" / "c.tar", samples(("x/5", 1), ("x/4", 0)))
    return root


def counted(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The shards that are read from here on."""
    read: list[Path] = []

    def reading(path: Path) -> object:
        read.append(path)
        return read_shard(path)

    monkeypatch.setattr(shard_module, "read_shard", reading)
    return read


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_kind_of_tar_gives_names_places_and_labels(tmp_path: Path, tar_format: int) -> None:
    folder = "a folder/ü" if tar_format == tarfile.USTAR_FORMAT else "a folder/ü" + 60 * "long"
    members = samples((f"{folder}/one", 3), ("two", 0))
    members |= {"three.JPEG": b"x" * 700, "three.json": b'{"label": 7}', "three.txt": b"words", "four.png": b"y"}
    members |= {"four.json": b'{"cls": 5}', "four.cls": b"6\n"}
    path = write_tar(tmp_path / "s.tar", members, tar_format)
    shard = read_shard(path)
    assert shard.names == [f"{folder}/one.jpg", "two.jpg", "three.JPEG", "four.png"]
    assert shard.target.tolist() == [3, 0, 7, 6]
    with path.open("rb") as file:
        for name, offset, size in zip(shard.names, shard.offset, shard.size, strict=True):
            file.seek(offset)
            assert file.read(size) == members[name]


@pytest.mark.parametrize(
    ("train", "val"),
    [
        ("train/000.tar", "val/000.tar"),
        ("imagenet1k-train-0000.tar", "imagenet1k-validation-00.tar"),
        ("my_Train_0.tar", "my_val_0.tar"),
    ],
)
def test_both_ways_of_naming_are_recognised(tmp_path: Path, train: str, val: str) -> None:
    write_tar(tmp_path / train, samples(("a", 0), ("b", 1)))
    write_tar(tmp_path / val, samples(("c", 1), ("d", 0)))
    assert has_shards(tmp_path)
    found, held = scan_shards(tmp_path)
    assert (len(found), len(held)) == (2, 2)
    assert held.place(0).read() == b"image of d"
    assert str(held.place(0)) == f"{tmp_path / val}:d.jpg"


def test_archives_that_are_no_shards_do_not_hide_a_folder_of_images(tmp_path: Path) -> None:
    assert not has_shards(tmp_path)
    for name in ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "interval.tar"):
        (tmp_path / name).touch()
    assert not has_shards(tmp_path)
    (tmp_path / "train" / "n01440764").mkdir(parents=True)
    (tmp_path / "train" / "n01440764.tar").touch()
    (tmp_path / "train.tar").touch()
    assert not has_shards(tmp_path)


def test_rows_are_sorted_by_class_and_name_over_all_shards(root: Path) -> None:
    train, val = scan_shards(root)
    assert train.paths == ("x/1.jpg", "x/2.jpg", "x/3.jpg")
    np.testing.assert_array_equal(train.targets, [0, 0, 1])
    assert [train.place(row).read() for row in range(3)] == [b"image of x/1", b"image of x/2", b"image of x/3"]
    assert val.paths == ("x/4.jpg", "x/5.jpg")
    assert train.classes == val.classes == ("0", "1")


def test_classes_are_named_by_the_file_beside_the_shards(root: Path) -> None:
    (root / "classes.txt").write_text("sea snake\r\ntench, Tinca\n")
    assert scan_shards(root)[0].classes == ("sea snake", "tench, Tinca")


def test_numbers_of_classes_sort_as_words(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write_tar(tmp_path / split / "0.tar", samples(*((f"k{label}", label) for label in range(11))))
    classes = scan_shards(tmp_path)[0].classes
    assert classes[0] == "00"
    assert sorted(classes) == list(classes)


def test_a_second_start_reads_no_shard(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = scan_shards(root)
    read = counted(monkeypatch)
    again = scan_shards(root)
    assert not read
    for one, other in zip(first, again, strict=True):
        assert (one.paths, one.classes, one.fingerprint) == (other.paths, other.classes, other.fingerprint)
        assert [one.place(row) for row in range(len(one))] == [other.place(row) for row in range(len(other))]
        assert one.targets.dtype == other.targets.dtype == np.int64


def test_a_shard_that_changed_came_or_went_is_noticed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scan_shards(root)
    read = counted(monkeypatch)
    write_tar(root / "train" / "b.tar", samples(("x/2", 1)))
    os.utime(root / "train" / "b.tar", ns=(0, 10**18))
    assert scan_shards(root)[0].targets.tolist() == [0, 1, 1]
    assert {path.name for path in read} == {"a.tar", "b.tar"}
    write_tar(root / "train" / "c.tar", samples(("x/9", 0)))
    assert scan_shards(root)[0].paths == ("x/1.jpg", "x/9.jpg", "x/2.jpg", "x/3.jpg")
    (root / "train" / "c.tar").unlink()
    assert len(scan_shards(root)[0]) == 3


def test_a_spoiled_list_is_made_anew(root: Path) -> None:
    scan_shards(root)
    for content in (b"", b"nonsense", (root / "train.index.npz").read_bytes()[:200]):
        (root / "train.index.npz").write_bytes(content)
        assert len(scan_shards(root)[0]) == 3


def test_a_folder_that_cannot_be_written_is_remembered_in_the_cache(
    root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = shard_module.write_whole

    def refusing(path: Path, content: bytes) -> None:  # root may write into every folder: no mode would stop it
        if path.is_relative_to(root):
            raise PermissionError(13, "Permission denied", str(path))
        write(path, content)

    monkeypatch.setattr(shard_module, "write_whole", refusing)
    scan_shards(root)
    assert not list(root.rglob("*.idx")) + list(root.glob("*.npz"))
    names = {path.name for path in cache.rglob("*") if path.is_file()}
    assert names == {"a.idx", "b.idx", "c.idx", "train.index.npz", "val.index.npz"}
    read = counted(monkeypatch)
    assert len(scan_shards(root)[0]) == 3
    assert not read


def test_several_may_start_at_once(root: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        lists = list(pool.map(scan_shards, [root] * 8))
    assert {train.fingerprint for train, _ in lists} == {scan_shards(root)[0].fingerprint}
    assert not list(root.rglob("*.part"))


def test_our_index_is_that_of_dalis_tool(root: Path, tmp_path: Path) -> None:
    tool = pytest.importorskip("wds2idx", reason="DALI is not installed")
    scan_shards(root)
    with tool.IndexCreator(str(root / "train" / "a.tar"), str(tmp_path / "a.idx"), verbose=False) as creator:
        creator.create_index()
    assert (root / "train" / "a.idx").read_bytes() == (tmp_path / "a.idx").read_bytes()


def test_dalis_reader_reads_the_shards_by_our_index(root: Path) -> None:
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    from nvidia.dali import fn, pipeline_def, types  # noqa: PLC0415  # not installed everywhere

    scan_shards(root)

    @pipeline_def(batch_size=2, num_threads=1, device_id=None)
    def reading() -> tuple[object, ...]:
        images, labels = fn.readers.webdataset(
            paths=[str(root / "train" / "a.tar")],
            index_paths=[str(root / "train" / "a.idx")],
            ext=["jpg", "cls"],
            dtypes=[types.UINT8, types.UINT8],
        )
        return images, labels

    pipeline = reading()
    pipeline.build()
    images, labels = pipeline.run()
    assert [bytes(np.asarray(images[row])) for row in range(2)] == [b"image of x/3", b"image of x/1"]
    assert [bytes(np.asarray(labels[row])) for row in range(2)] == [b"1", b"0"]


def test_names_that_dalis_index_cannot_hold_make_none(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", samples(("sea snake/1", 0)))
    assert read_shard(path).dali_index is None


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut within an image": (lambda root: cut(root / "train/a.tar", 512 * 7 + 5), r"train/a\.tar is truncated"),
    "cut between files": (lambda root: cut(root / "train/a.tar", 512 * 4), r"train/a\.tar is truncated"),
    "broken in the middle": (
        lambda root: (root / "train/a.tar").write_bytes(
            (root / "train/a.tar").read_bytes()[:2048] + b"x" * 512 + (root / "train/a.tar").read_bytes()[2560:]
        ),
        r"train/a\.tar is broken at byte 2,048",
    ),
    "no archive": (lambda root: (root / "train/a.tar").write_bytes(b"no"), r"train/a\.tar is no tar archive"),
    "empty": (lambda root: (root / "train/a.tar").write_bytes(b""), r"train/a\.tar is no tar archive, or an empty one"),
    "no images": (lambda root: write_tar(root / "train/a.tar", {"a.txt": b""}), r"a\.tar holds no images"),
    "no label": (
        lambda root: write_tar(root / "train/a.tar", {"a.jpg": b"", "a.json": b"[]"}),
        r"a\.tar:a\.jpg has no label: a shard holds a\.cls",
    ),
    "no image": (
        lambda root: write_tar(root / "train/a.tar", samples(("b", 0)) | {"a.cls": b"0"}),
        r"a\.tar: a has a label and no image",
    ),
    "no number": (
        lambda root: write_tar(root / "train/a.tar", {"a.jpg": b"", "a.cls": b"cat"}),
        r"a\.tar:a\.cls must hold a class number from 0 on; got b'cat'",
    ),
    "negative": (lambda root: write_tar(root / "val/c.tar", samples(("a", -1))), r"from 0 on; got b'-1'"),
    "beyond the list": (
        lambda root: (root / "classes.txt").write_text("only\n"),
        r"train image x/3\.jpg has label 1, and classes\.txt names 1 classes, 0 to 0",
    ),
    "another class in val": (
        lambda root: write_tar(root / "val/d.tar", samples(("a", 2))),
        "1 classes have no image in the train shards: 2$",
    ),
    "a class less in val": (
        lambda root: write_tar(root / "val/c.tar", samples(("a", 1))),
        "1 classes have no image in the val shards: 0$",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_with_a_set_is_one_message(root: Path, what: str) -> None:
    spoil, message = WRONG[what]
    spoil(root)
    with pytest.raises(UserError, match=message) as error:
        scan_shards(root)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_split_without_shards_is_asked_for(root: Path, split: str) -> None:
    for file in (root / split).iterdir():
        file.unlink()
    with pytest.raises(MissingPathError, match=rf"data\.root=.* has no {split} shards: {split}/\*\.tar"):
        scan_shards(root)
    other = "val" if split == "train" else "train"
    assert len(scan_shards(root, (other,))) == 1
