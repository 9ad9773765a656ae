"""Killed at any moment and started again by the same command, a run ends as if nothing had happened, to the bit.

The kills are real, the processes are a user's (`tests/fault`). What is compared: images with their augmentation,
weights, their average, moments, all else that checkpoints hold, rows of metrics.csv, and which files there are.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fault.harness import After, At, Moment, Training, differences, random_moments, rows_of, table

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are found under /proc")

DIGITS = [  # all that is drawn at random is on: crops, erasing with noise, mixing, drop path
    "experiment=digits",
    "data.subset=0.3",
    "data.num_workers=1",
    "augment.erase_prob=0.25",
    "augment.mixup_alpha=0.8",
    "augment.mix_prob=1.0",
    "model.drop_path_rate=0.1",
    "schedule.epochs=3",
    "schedule.warmup_epochs=1",
    "trainer.log_every_n_steps=4",
    "callback.ema.decay=0.9",
]
ACCUMULATED = ["trainer.max_batch_per_device=16"]
WITHIN_EPOCHS = ["callback.checkpoint.every_n_steps=2"]
TWO = ["trainer.devices=2", "trainer.accelerator=cpu"]
Runs = dict[str, tuple[Training, Training]]


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """Runs by name, the killed one and the unbroken one; at the end a table of all kills, for -s and in `kills.md`."""
    runs: Runs = {}
    yield runs
    text = table(runs)
    (tmp_path_factory.getbasetemp() / "kills.md").write_text(text + "\n")
    print(f"\n{text}")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, digits_cache: Path) -> Callable[[list[str]], Training]:
    """The run of some words that nobody kills, made once."""
    made: dict[tuple[str, ...], Training] = {}

    def run(words: list[str]) -> Training:
        if tuple(words) not in made:
            training = made[tuple(words)] = Training(words, tmp_path_factory.mktemp("unbroken"))
            assert training.finish().status == 0
        return made[tuple(words)]

    return run


def kill_and_compare(name: str, moments: list[Moment], theirs: Training, folder: Path, ledger: Runs) -> None:
    killed = Training(theirs.words, folder)
    for moment in moments:
        life = killed.live(moment)
        if isinstance(moment, After) and not life.killed and life.status == 0:
            break
        assert life.killed, f"{moment} never came:\n{life.said}"
        assert "still there" not in life.others, f"{moment}: {life.others}"
    if killed.lives[-1].killed:
        killed.finish()
    ledger[name] = killed, theirs
    assert differences(killed, theirs) == []


def test_a_run_killed_at_named_moments_ends_as_the_unbroken_one(
    unbroken: Callable[[list[str]], Training], tmp_path: Path, ledger: Runs
) -> None:
    theirs = unbroken([*DIGITS, "callback.checkpoint.every_n_steps=8"])
    moments = [
        At("best-*.ckpt named"),  # and there is no last.ckpt yet
        At("half the weights updated", 4),
    ]
    kill_and_compare("quick", moments, theirs, tmp_path, ledger)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "words", "moments"),
    [
        (
            "one process, dali",
            WITHIN_EPOCHS,
            [
                At("writing config.yaml"),
                At("loading", 4),
                At("backward", 4),
                At("reading the checkpoint"),
                At("restored, before an update"),
                At("half a checkpoint written"),
                At("half a row of metrics.csv"),
                At("validation", 3),
                At("previous.ckpt named", 2),
                At("best-*.ckpt named"),
                At("last.ckpt named", 2),
                At("removing the former best"),
                At("half a report"),
            ],
        ),
        (
            "one process, torch, accumulating, epochs' ends alone",
            ["data.backend=torch", *ACCUMULATED],
            [
                At("forward", 26),
                At("before the update", 2),
                At("replacing metrics.csv"),
                At("last.ckpt named"),
                At("before the report"),
            ],
        ),
        (
            "two processes, dali, accumulating",
            [*TWO, *ACCUMULATED, *WITHIN_EPOCHS],
            [
                At("backward", 6, rank=1, whole_group=False),
                At("loading", 9, whole_group=False),
                At("after the update", 3, rank=1),
                At("checkpoint not yet synced", 2),
                At("validation", 2, rank=1, whole_group=False),
                At("restored, before an update", rank=1, whole_group=False),
                After(0.2, training=True, rank=0),
            ],
        ),
        (
            "two processes, torch",
            [*TWO, "data.backend=torch", *WITHIN_EPOCHS],
            [At("forward", 8, rank=1, whole_group=False), At("half a checkpoint written", 2)],
        ),
    ],
)
def test_wherever_it_is_killed(
    name: str,
    words: list[str],
    moments: list[Moment],
    unbroken: Callable[[list[str]], Training],
    tmp_path: Path,
    ledger: Runs,
) -> None:
    """Named moments, then some of the clock, unless the run is over by then; FAT_TRAIN_FAULT_SEED draws other ones."""
    theirs = unbroken([*DIGITS, *words])
    seed = int(os.environ.get("FAT_TRAIN_FAULT_SEED", "0")) + len(name)
    kill_and_compare(name, [*moments, *random_moments(seed, 3, like=theirs)], theirs, tmp_path, ledger)


@pytest.mark.slow
def test_a_checkpoint_is_of_its_update_however_far_the_training_has_gone_on_when_it_is_copied(
    unbroken: Callable[[list[str]], Training], tmp_path: Path
) -> None:
    """The background is half a second late with copying: longer than a forward and a backward pass take."""
    words = [*DIGITS, "callback.checkpoint.every_n_steps=1"]
    late = Training(words, tmp_path, drag_s=0.5)
    late.live(At("last.ckpt named", 4))
    late.finish()
    assert differences(late, unbroken(words)) == []


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [([], TWO), (TWO, [])])
def test_a_run_goes_on_with_another_number_of_processes(
    first: list[str],
    then: list[str],
    unbroken: Callable[[list[str]], Training],
    tmp_path: Path,
) -> None:
    """In the middle of an epoch: the same images in the same updates; it says that the weights are not the same."""
    words = [*DIGITS, *WITHIN_EPOCHS]
    theirs = unbroken(words)
    ours = Training([*words, *first], tmp_path)
    assert ours.live(At("backward", 9)).checkpoint in (6, 8)  # that of update 8 may still be on its way
    ours.words = [*words, *then]
    life = ours.finish()
    assert "The weights will not be equal to the bit" in life.said
    assert ours.updates() == theirs.updates()
    our_rows, their_rows = rows_of(ours.run), rows_of(theirs.run)
    names = ("epoch", "step", "lr", "val/count", "epoch_s")
    assert [[row[name] for name in names] for row in our_rows] == [[row[name] for name in names] for row in their_rows]
    losses = [[float(row["train/loss"]) for row in rows] for rows in (our_rows, their_rows)]
    assert losses[0] == pytest.approx(losses[1], rel=0.1)
