"""Two machines, here two processes that know of each other by their environment alone, train as one machine does."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from fat_train.__main__ import main
from fat_train.checkpoint.weights import read_checkpoint
from fat_train.metric.record import Row, read_rows

DIGITS = [
    "experiment=digits",
    "schedule.epochs=2",
    "schedule.warmup_epochs=1",
    "trainer.log_every_n_steps=1",
    "trainer.accelerator=cpu",
    "model.drop_path_rate=0.1",
    "data.num_workers=1",
]
TWO_NODES = [*DIGITS, "trainer.num_nodes=2", "trainer.devices=1"]
Cli = Callable[..., subprocess.CompletedProcess[str]]


class Job:
    """The same command on two nodes; what each says goes to a file."""

    def __init__(self, folder: Path, *words: str, **environments: dict[str, str]) -> None:
        self.logs = [folder / f"node{number}.log" for number in range(2)]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        self.nodes = []
        for number, log in enumerate(self.logs):
            own = environments.get(f"node{number}") or {"NODE_RANK": str(number)}
            environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **own}
            command = [sys.executable, "-m", "fat_train", *TWO_NODES, f"folder={folder}", *words]
            with log.open("wb") as file:
                self.nodes.append(subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT))

    def wait(self) -> list[int]:
        """Exit statuses of both."""
        return [node.wait(timeout=280) for node in self.nodes]

    def said(self, number: int) -> str:
        return self.logs[number].read_text()


@contextlib.contextmanager
def job(folder: Path, *words: str, **environments: dict[str, str]) -> Iterator[Job]:
    started = Job(folder, *words, **environments)
    try:
        yield started
    finally:
        for node in started.nodes:
            node.kill()
            node.wait()


@pytest.fixture(scope="module")
def one_node(tmp_path_factory: pytest.TempPathFactory, digits_cache: Path, cli: Cli) -> Path:
    """The run of one node with two devices; what it said lies beside it."""
    folder = tmp_path_factory.mktemp("one")
    done = cli(*DIGITS, "trainer.devices=2", f"folder={folder}")
    assert done.returncode == 0, done.stderr
    (folder / "said").write_text(done.stdout)
    return folder / "fat_nano_digits"


def without_times(run: Path) -> list[Row]:
    return [row | {"images_per_s": "", "epoch_s": ""} for row in read_rows(run / "metrics.csv")]


def assert_same(run: Path, other: Path) -> None:
    assert without_times(run) == without_times(other)
    ours, theirs = (read_checkpoint(folder / "checkpoints" / "last.ckpt") for folder in (run, other))
    assert all(torch.equal(ours["state_dict"][name], value) for name, value in theirs["state_dict"].items())
    (our_moments,), (their_moments,) = ours["optimizer_states"], theirs["optimizer_states"]
    for number, moments in their_moments["state"].items():
        assert all(torch.equal(our_moments["state"][number][name], value) for name, value in moments.items())


def test_two_nodes_train_to_the_bits_of_one_node_with_two_devices(one_node: Path, tmp_path: Path) -> None:
    with job(tmp_path) as started:
        assert started.wait() == [0, 0], started.said(0) + started.said(1)
    assert "64 = 32 images x 2 devices" in started.said(0)
    assert started.said(1) == "", "one node speaks"
    assert_same(tmp_path / "fat_nano_digits", one_node)


def test_two_processes_count_every_validation_image_once_as_one_process_does(
    one_node: Path, capsys: pytest.CaptureFixture[str], cli: Cli
) -> None:
    """Trained by two processes, evaluated by one and by two: the same integers."""
    said = (one_node.parent / "said").read_text()
    assert "64 = 32 images x 2 devices" in said
    assert "statistics are of each process (CPU)" in said
    words = ["evaluate", f"checkpoint={one_node / 'checkpoints' / 'last.ckpt'}"]
    capsys.readouterr()
    assert main([*words, "trainer.devices=1", "batch_size=100"]) == 0
    printed = [capsys.readouterr().out, cli(*words, "trainer.devices=2", "batch_size=37").stdout]
    by_one, by_two = (next(line for line in text.splitlines() if line.startswith("raw")) for text in printed)
    assert by_one == by_two
    assert by_one.endswith("355 images")
    last = read_rows(one_node / "metrics.csv")[-1]
    assert f"top-1 {float(last['val/top1']):.3f} %   top-5 {float(last['val/top5']):.3f} %" in by_one
    assert last["val/count"] == "355"


@pytest.mark.slow
def test_nodes_that_torchrun_names_train_to_the_same_bits(one_node: Path, tmp_path: Path) -> None:
    named = {
        f"node{number}": {
            "RANK": str(number),
            "GROUP_RANK": str(number),
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "1",
            "TORCHELASTIC_RUN_ID": "run",
        }
        for number in range(2)
    }
    with job(tmp_path, **named) as started:
        assert started.wait() == [0, 0], started.said(0) + started.said(1)
    assert_same(tmp_path / "fat_nano_digits", one_node)


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_the_loss_of_a_node_ends_the_other_in_plain_words_and_both_resume(
    lost: int, one_node: Path, tmp_path: Path
) -> None:
    run = tmp_path / "fat_nano_digits"
    with job(tmp_path) as started:
        deadline = time.monotonic() + 250
        while not (run / "checkpoints" / "last.ckpt").exists() or len(read_rows(run / "metrics.csv")) < 26:
            assert all(node.poll() is None for node in started.nodes), started.said(0) + started.said(1)
            assert time.monotonic() < deadline
            time.sleep(0.01)
        started.nodes[lost].kill()
        assert started.nodes[1 - lost].wait(timeout=120) == 1
    *_, stopped, goes_on = started.said(1 - lost).splitlines()
    assert f"Error: rank {1 - lost} stops, since another process of the job has ended or cannot be reached" in stopped
    assert goes_on == "When all processes have ended, the same commands go on from the last checkpoint"
    assert "Traceback" not in started.said(1 - lost)

    with job(tmp_path) as again:
        assert again.wait() == [0, 0], again.said(0) + again.said(1)
    assert "resuming       from" in again.said(0)
    assert_same(run, one_node)
