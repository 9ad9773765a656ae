"""What the README says to type, works as it stands there."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fat_train.__main__ import main
from fat_train.config.compose import compose

REPOSITORY = Path(__file__).parents[1]
Cli = Callable[..., subprocess.CompletedProcess[str]]
README = (REPOSITORY / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [
    line.partition("   #")[0].strip()
    for language, block in BLOCKS
    if language == "bash"
    for line in block.splitlines()
    if "-m fat_train" in line
]


def test_the_readme_fits_two_hundred_lines() -> None:
    assert len(README.splitlines()) <= 200


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_readme_does_what_it_can_here(
    command: str,
    digits_cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Those that want ImageNet stop at its missing folder, naming it; all others run to their end."""
    monkeypatch.chdir(tmp_path)
    python, m, package, *words = shlex.split(command)
    assert (python, m, package) == ("python", "-m", "fat_train")
    status = main(words)
    said = capsys.readouterr()
    if "data.root=/path/to/imagenet" in words:
        assert status == 2
        assert "data.root=/path/to/imagenet" in said.err
    else:
        assert status == 0, said.err


def test_a_process_of_its_own_runs_a_command_as_it_stands_there(cli: Cli) -> None:
    assert "python -m fat_train --help" in COMMANDS
    done = cli("--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: python -m fat_train")


def test_the_python_of_the_readme_runs(tmp_path: Path) -> None:
    (code,) = (block for language, block in BLOCKS if language == "python")
    save = 'import torch\ntorch.save(model.state_dict(), "last.ckpt")\nfat_train.load_weights'
    code = code.replace("fat_train.load_weights", save)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_target_that_the_readme_names_is_in_the_makefile() -> None:
    targets = set(re.findall(r"^([a-z-]+):.*## ", (REPOSITORY / "Makefile").read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", README, flags=re.MULTILINE))
    assert named
    assert named <= targets


def test_every_file_that_the_readme_links_to_is_there() -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert (REPOSITORY / link).exists(), link


@pytest.mark.parametrize("name", ["train", "sweep_drop_path"])
def test_the_slurm_scripts_are_for_sbatch(name: str) -> None:
    script = REPOSITORY / "slurm" / f"{name}.sbatch"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    done = subprocess.run(["bash", str(script)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert f"submit this file: sbatch slurm/{name}.sbatch" in done.stderr


def test_the_environment_may_say_where_the_data_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FAT_TRAIN_DATA", str(tmp_path))
    for choice in ("imagenet", "imagenet_packed"):
        assert compose("train", [f"data={choice}"]).data.root == str(tmp_path)
    assert compose("train", ["data.root=elsewhere"]).data.root == "elsewhere"
    assert "root" not in compose("train", ["data=digits"]).data
