from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from fat_train.data.datamodule import FolderDataConfig, open_data
from fat_train.data.encode import Recipe, encode_image
from fat_train.data.index import FileIndex, Place
from fat_train.data.pack import Packed, PackSettings, pack
from fat_train.data.picture import read_rgb
from fat_train.data.shard import scan_shards
from fat_train.data.shard_writer import keys_of
from fat_train.types import UserError


def packed(root: Path, out: Path, workers: int = 1, **settings: object) -> Packed:
    source = open_data(FolderDataConfig(root=str(root)))
    chosen = PackSettings(**({"out": str(out), "short_side_px": 64} | settings))  # type: ignore[arg-type]
    return pack(source.train, source.val, chosen, workers, Console(file=io.StringIO()))


def content(out: Path) -> dict[str, str]:
    """Every file but the lists, which hold the shards' times, by its checksum."""
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.suffix != ".npz"
    }


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of 320 noisy images, of which a shard of one million bytes holds some thirty."""
    root = tmp_path_factory.mktemp("many")
    rng = np.random.default_rng(0)
    for split, count in (("train", 40), ("val", 24)):
        for class_name in "abcde":
            (root / split / class_name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(256, size=(100, 130, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / class_name / f"{number:03d}.jpg", quality=98)
    return root


@pytest.fixture(scope="module")
def whole(many: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`many`, packed in one go by this process."""
    out = tmp_path_factory.mktemp("whole") / "out"
    packed(many, out, short_side_px=90, max_shard_mb=1)
    return out


def test_a_packed_set_has_the_labels_and_the_order_of_its_source(picture_root: Path, tmp_path: Path) -> None:
    source = open_data(FolderDataConfig(root=str(picture_root)))
    there = packed(picture_root, tmp_path / "out")
    assert (there.images, there.shards) == (36, 2)
    assert there.source_bytes == sum(path.stat().st_size for path in picture_root.rglob("*.JPEG"))
    result = open_data(FolderDataConfig(root=str(tmp_path / "out")))
    for ours, theirs in ((result.train, source.train), (result.val, source.val)):
        assert ours.classes == theirs.classes
        np.testing.assert_array_equal(ours.targets, theirs.targets)
        assert [path.rpartition(".")[0] for path in ours.paths] == [path.rpartition(".")[0] for path in theirs.paths]
        for row in range(len(theirs)):
            image, original = read_rgb(ours.place(row)), read_rgb(theirs.place(row))
            original = original.resize(image.size, Image.Resampling.LANCZOS)
            difference = np.asarray(image, float) - np.asarray(original, float)
            assert np.abs(difference).mean() < 12, theirs.paths[row]  # of another picture it is 50


@pytest.mark.parametrize(
    ("size", "side", "expected"),
    [
        ((500, 375), 320, (427, 320)),
        ((375, 500), 320, (320, 427)),
        ((333, 333), 320, (320, 320)),
        ((400, 320), 320, (400, 320)),
        ((20, 400), 320, (20, 400)),
        ((500, 375), None, (500, 375)),
    ],
)
def test_the_shorter_side_is_what_was_asked_for_and_nothing_is_enlarged(
    tmp_path: Path, size: tuple[int, int], side: int | None, expected: tuple[int, int]
) -> None:
    Image.linear_gradient("L").resize(size).convert("RGB").save(tmp_path / "x.jpg")
    encoded = encode_image(Place(str(tmp_path / "x.jpg")), Recipe(side, 90))
    with Image.open(io.BytesIO(encoded.content)) as image:
        assert image.size == expected
    assert (encoded.content == (tmp_path / "x.jpg").read_bytes()) == (expected == size)


def test_what_is_no_plain_rgb_jpeg_becomes_one_and_what_is_stays_as_it_is(picture_root: Path) -> None:
    index = open_data(FolderDataConfig(root=str(picture_root))).train
    changed = 0
    for row in range(len(index)):
        source = index.place(row).read()
        stored = encode_image(index.place(row), Recipe(None, 90)).content
        with Image.open(io.BytesIO(source)) as before, Image.open(io.BytesIO(stored)) as after:
            assert (after.format, after.mode, after.size) == ("JPEG", "RGB", before.size)
            plain = (before.format, before.mode) == ("JPEG", "RGB")
            if not plain:
                assert after.layer[0][1:3] == (2, 2), "chroma at half the resolution, both ways"
                assert "exif" not in after.info
        assert (stored == source) == plain
        changed += not plain
    assert changed == 9


def index_of(*paths: str, classes: tuple[str, ...] = ("a",)) -> FileIndex:
    targets = np.array([classes.index(path.split("/")[0]) for path in paths])
    return FileIndex(Path("/nowhere"), paths, targets, classes)


def test_keys_are_the_paths_without_suffix_where_these_do() -> None:
    index = index_of("a/1.jpg", "a/sub/2.png", "n 1/x y.jpg", "n 1/z.jpg", classes=("a", "n 1"))
    assert keys_of(index) == ["a/1", "a/sub/2", "n_1/x_y", "n_1/z"]


@pytest.mark.parametrize(
    "paths",
    [
        ("a/1.jpg", "a/1.png"),
        ("a/x.1.jpg", "a/x_1.jpg"),
        ("a/a.b.jpg", "a/a.jpg"),
        ("a/x y.jpg", "a/x\ty.jpg"),
        ("a/.../1.jpg", "a/1.jpg"),
    ],
)
def test_keys_differ_have_no_dots_and_sort_as_the_rows_do(paths: tuple[str, ...]) -> None:
    keys = keys_of(index_of(*paths))
    assert sorted(set(keys)) == keys
    assert not any("." in key.rpartition("/")[2] or " " in key for key in keys)
    assert all(key.startswith("a/") for key in keys)


def test_classes_whose_names_are_no_folders_are_numbered() -> None:
    index = FileIndex(Path("/nowhere"), ("1.jpg", "2.jpg"), np.array([0, 1]), ("a b", "a_b"))
    assert keys_of(index) == ["0/1", "1/2"]


def test_shards_are_full_mixed_and_plain_tar(many: Path, whole: Path) -> None:
    shards = sorted((whole / "train").glob("*.tar"))
    sizes = [shard.stat().st_size for shard in shards]
    assert len(shards) >= 3
    assert max(sizes) <= 10**6
    assert min(sizes[:-1]) > 950_000
    with tarfile.open(shards[0]) as archive:
        names = archive.getnames()
        labels = [archive.extractfile(name).read() for name in names if name.endswith(".cls")]  # type: ignore[union-attr]
    assert len(set(labels)) == 5
    assert [name.partition(".")[2] for name in names[:4]] == ["cls", "jpg", "cls", "jpg"]
    manifest = json.loads((whole / "manifest.json").read_text())
    for shard in shards:
        about = manifest["shards"]["train"][shard.name]
        assert about["sha256"] == hashlib.sha256(shard.read_bytes()).hexdigest()
        assert about["bytes"] == shard.stat().st_size
    assert sum(about["images"] for about in manifest["shards"]["train"].values()) == 200


COMMAND = [
    "-m",
    "fat_train",
    "pack",
    "short_side_px=90",
    "data.image_px=64",
    "data.eval_resize_px=64",
    "max_shard_mb=1",
]


def test_a_killed_packing_goes_on_to_the_same_bytes_and_leaves_no_process(
    many: Path, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = [sys.executable, *COMMAND, f"data.root={many}", f"out={out}", "num_workers=2"]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, start_new_session=True) as process:
        while not recorded(out):
            assert process.poll() is None
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    before = {path: path.stat().st_mtime_ns for path in recorded(out)}
    assert len(list(out.glob("*/*.tar"))) < len(list(whole.glob("*/*.tar")))
    deadline = time.monotonic() + 20
    while session_members(process.pid):
        assert time.monotonic() < deadline, "processes of a killed packing live on"
        time.sleep(0.05)
    (out / "train" / ".train-000001.tar.part").write_bytes(b"half of it")

    result = packed(many, out, workers=1, short_side_px=90, max_shard_mb=1, verify=True)
    assert content(out) == content(whole)
    assert result.images == 320
    assert {path: path.stat().st_mtime_ns for path in before} == before, "a finished shard was written again"


def recorded(out: Path) -> list[Path]:
    """The finished training shards."""
    manifest = out / "manifest.json"
    shards = json.loads(manifest.read_bytes())["shards"]["train"] if manifest.is_file() else ()
    return [out / "train" / name for name in shards]


def session_members(session: int) -> list[str]:
    """Living processes of a session (field 6 of /proc/<pid>/stat), zombies aside."""
    members = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] not in "ZX":
            members.append(stat.parent.name)
    return members


def test_a_shard_that_is_gone_or_damaged_is_packed_again_alone(many: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    times = {path: path.stat().st_mtime_ns for path in out.glob("*/*.tar")}
    gone, damaged = out / "train" / "train-000001.tar", out / "val" / "val-000000.tar"
    gone.unlink()
    spoiled = bytearray(damaged.read_bytes())
    spoiled[5000] ^= 1
    damaged.write_bytes(spoiled)
    settings = {"short_side_px": 90, "max_shard_mb": 1}
    with pytest.raises(UserError, match=r"1 shards are not what was written: val/val-000000\.tar; delete them"):
        packed(many, out, verify=True, **settings)
    damaged.unlink()
    assert packed(many, out, verify=True, **settings).repacked == ("val/val-000000.tar",)
    assert content(out) == content(whole)
    assert {path for path, at in times.items() if path.stat().st_mtime_ns != at} == {gone, damaged}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quality": 80}, r"was begun with quality=92, not 80"),
        ({"short_side_px": None}, r"was begun with short_side_px=90, not null"),
        ({"max_shard_mb": 2}, r"was begun with max_shard_mb=1, not 2"),
        ({"val_short_side_px": 50}, r"was begun with val_short_side_px=null, not 50"),
    ],
)
def test_other_settings_in_the_same_folder_are_refused_by_name(
    many: Path, whole: Path, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        packed(many, whole, **({"short_side_px": 90, "max_shard_mb": 1} | settings))


def test_another_source_in_the_same_folder_is_refused(picture_root: Path, whole: Path) -> None:
    with pytest.raises(
        UserError, match=r"begun with another list of train images \(200 of 5 .*, not this one \(21 of 3"
    ):
        packed(picture_root, whole, short_side_px=90, max_shard_mb=1)


def test_a_folder_with_other_things_is_left_alone(picture_root: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"must be a new or empty folder, or one that pack began; it holds thesis\.tex"):
        packed(picture_root, tmp_path)
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(UserError, match=r"manifest\.json is not what pack writes"):
        packed(picture_root, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifest.json", "thesis.tex"]


def test_two_packings_do_not_write_into_one_folder(picture_root: Path, tmp_path: Path) -> None:
    other = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="another pack is writing there"):
        packed(picture_root, tmp_path)
    os.close(other)
    assert packed(picture_root, tmp_path).images == 36


def test_an_image_that_cannot_be_read_is_named_with_a_way_around_it(picture_root: Path, tmp_path: Path) -> None:
    root = tmp_path / "set"
    shutil.copytree(picture_root, root)
    victim = root / "val" / "bee" / "026.JPEG"
    victim.write_bytes(victim.read_bytes()[:700])
    message = rf"cannot read the image {victim} \(.*truncated.*\).*data\.exclude=<file> .* the line val/bee/026\.JPEG$"
    with pytest.raises(UserError, match=message):
        packed(root, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.part"))


def test_a_write_that_the_system_refuses_is_one_message_and_the_command_goes_on_later(
    many: Path, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, limits[1]))
    try:
        with pytest.raises(UserError) as error:
            packed(many, out, short_side_px=90, max_shard_mb=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(error.value) == (
        f"cannot write into {out}/train (File too large): make room, or give out=<another folder>; "
        "the same command goes on from there"
    )
    assert not list(out.rglob("*.part"))
    packed(many, out, short_side_px=90, max_shard_mb=1)
    assert content(out) == content(whole)


@pytest.mark.parametrize("field", ["short_side_px", "val_short_side_px", "max_shard_mb", "num_workers", "quality"])
def test_an_impossible_setting_is_refused_by_name(field: str) -> None:
    with pytest.raises(UserError, match=rf"^{field} must be"):
        PackSettings(out="x", **{field: 0})


def test_shards_can_be_packed_again(many: Path, whole: Path, tmp_path: Path) -> None:
    train, val = scan_shards(whole)
    settings = PackSettings(out=str(tmp_path), short_side_px=80)
    pack(train, val, settings, 1, Console(file=io.StringIO()))
    smaller, _ = scan_shards(tmp_path)
    assert smaller.paths == train.paths
    assert read_rgb(smaller.place(7)).size == (104, 80)
