"""What lies on the disk is damaged, or the disk is full, read-only, or not the one of yesterday: said, and mended."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from fat_train.__main__ import main
from fat_train.checkpoint.io import find_damage
from fat_train.checkpoint.weights import read_checkpoint
from fault.harness import differences_in, rows_of

EPOCHS = 3
UPDATES = 4 * EPOCHS


def words_in(folder: Path, tiny: list[str]) -> list[str]:
    return [*tiny, f"schedule.epochs={EPOCHS}", f"folder={folder}", "name=run", "callback.ema.decay=0.9"]


@pytest.fixture
def words(tiny: list[str], tmp_path: Path) -> list[str]:
    return words_in(tmp_path, tiny)


@pytest.fixture(scope="module")
def whole(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that nothing befell."""
    folder = tmp_path_factory.mktemp("whole")
    assert main(words_in(folder, tiny)) == 0
    return folder / "run"


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """A copy of it, for a test to damage."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """A file system of a few MB in memory, mounted with the given options."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small disk")
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(*options: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no small disk can be mounted here: {done.stderr.strip()}")
        return folder

    yield mount
    if folder.is_mount():
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def assert_same_end(run: Path, whole: Path) -> None:
    """Weights, average, moments and rows are those of the run that nothing befell."""
    names = [sorted(file.name for file in (folder / "checkpoints").iterdir()) for folder in (run, whole)]
    assert names[0] == names[1]
    assert rows_of(run) == rows_of(whole)
    for name in names[0]:
        assert find_damage(run / "checkpoints" / name) == ""
        pair = [read_checkpoint(folder / "checkpoints" / name) for folder in (run, whole)]
        assert list(differences_in(*pair)) == []


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.unlink()  # the file may have a second name, whose content is to stay
    file.write_bytes(content)


def empty(file: Path) -> None:
    file.unlink()
    file.touch()


def overwrite(file: Path) -> None:
    file.unlink()
    file.write_text("<html>404</html>")


@pytest.mark.parametrize("damage", [cut, flip_a_bit, empty, overwrite, Path.unlink])
def test_a_damaged_last_checkpoint_is_named_and_the_one_before_it_is_used(
    damage: Callable[[Path], None], words: list[str], run: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = run / "checkpoints" / "last.ckpt"
    damage(last)
    assert main(words) == 0
    said = capsys.readouterr().out
    assert f"warning        {last} is" in said
    assert f"resuming       from {run / 'checkpoints' / 'previous.ckpt'}, at update {UPDATES - 4}" in said
    assert_same_end(run, whole)


def test_with_both_newest_checkpoints_damaged_the_best_one_is_used(
    words: list[str], run: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = next((run / "checkpoints").glob("best-*.ckpt"))
    updates = 4 * int(best.name.split("-")[1])
    for name in ("last.ckpt", "previous.ckpt"):
        flip_a_bit(run / "checkpoints" / name)
    assert main(words) == 0
    said = capsys.readouterr().out
    assert said.count("is damaged: the checksum of its part") == 2
    if updates < UPDATES:
        assert f"resuming       from {best}, at update {updates}" in said
    assert_same_end(run, whole)


def test_without_a_whole_checkpoint_nothing_is_begun(
    words: list[str], run: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in (run / "checkpoints").iterdir():
        flip_a_bit(file)
    before = rows_of(run)
    assert main(words) == 2
    said = capsys.readouterr().err
    assert all(file.name in said for file in (run / "checkpoints").iterdir())
    assert "resume=never overwrite=true" in said
    assert rows_of(run) == before


def test_a_best_checkpoint_that_was_removed_is_said_and_the_next_best_kept(
    words: list[str], run: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = next((run / "checkpoints").glob("best-*.ckpt"))
    gone.unlink()
    assert main([*words, f"schedule.epochs={EPOCHS + 2}"]) == 0
    said = capsys.readouterr().out
    assert said.count(gone.name) == 1
    assert f"{gone.name} is gone" in said
    (best,) = (run / "checkpoints").glob("best-*.ckpt")
    assert int(best.name.split("-")[1]) > EPOCHS


def test_a_disk_that_fills_up_costs_the_checkpoints_that_do_not_fit_and_nothing_else(
    words: list[str], whole: Path, small_disk: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """The run goes on with the old checkpoint and says so; with room again the same command ends it, to the bit."""
    size = (whole / "checkpoints" / "last.ckpt").stat().st_size
    run = small_disk(f"size={int(2.9 * size) // 1024}k") / "run"  # room for two checkpoints
    words = [*words, f"folder={run.parent}"]
    assert main(words) == 2
    printed = capsys.readouterr()
    last = run / "checkpoints" / "last.ckpt"
    assert f"could not save {last}: No space left on device" in printed.out
    assert f"The run goes on with {last}" in printed.out
    assert "training is over, but its last checkpoint could not be saved" in printed.err
    assert "Traceback" not in printed.err
    kept = read_checkpoint(last)["global_step"]
    assert 0 < kept < UPDATES
    small_disk("remount", f"size={5 * size // 1024}k")
    assert main(words) == 0
    assert f"at update {kept}" in capsys.readouterr().out
    assert_same_end(run, whole)


@pytest.mark.parametrize("there_before", [False, True])
def test_a_read_only_run_folder_is_found_before_anything_is_trained(
    there_before: bool, words: list[str], small_disk: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    disk = small_disk("size=40m")
    words = [*words, f"folder={disk}"]
    if there_before:
        assert main(words) == 0
        capsys.readouterr()
    small_disk("remount", "ro")
    assert main([*words, f"schedule.epochs={EPOCHS + 1}"]) == 2
    printed = capsys.readouterr()
    assert f"the run's folder {disk / 'run'} cannot be written to: Read-only file system" in printed.err
    assert "epoch" not in printed.out


def test_what_differs_from_the_former_start_is_shown(
    words: list[str], run: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, f"schedule.epochs={EPOCHS + 1}", "optim.base_lr=0.001"]) == 0
    said = capsys.readouterr().out
    assert f"changed      schedule.epochs: {EPOCHS} -> {EPOCHS + 1}" in said
    assert "changed      optim.base_lr: 0.0005 -> 0.001" in said
    assert main([*words, "schedule.epochs=2"]) == 0
    assert "schedule.epochs=2 asks for no more" in capsys.readouterr().out


@pytest.mark.parametrize("word", ["trainer.global_batch=7", "trainer.global_batch=16"])
def test_another_global_batch_is_another_run(
    word: str, words: list[str], run: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """32 images make four updates an epoch with 7 a batch, too."""
    assert main([*words, word, f"schedule.epochs={EPOCHS + 1}"]) == 2
    assert "trainer.global_batch" in capsys.readouterr().err
    assert_same_end(run, whole)


def test_a_flipped_bit_anywhere_in_a_checkpoint_is_found_or_harmless(tmp_path: Path) -> None:
    """In the directory and the headers of the archive too, which its checksums do not cover."""
    content = {"weights": torch.arange(300.0), "updates": 7}
    file = tmp_path / "x.ckpt"
    torch.save(content, file)
    whole = file.read_bytes()
    for place in range(0, len(whole), 3):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << place % 8
        file.write_bytes(flipped)
        if not find_damage(file):
            assert list(differences_in(read_checkpoint(file), content)) == [], place
