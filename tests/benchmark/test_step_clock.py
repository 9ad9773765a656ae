"""The clock of a training step: each moment counts for one part, on the host and on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fat_train.augment.policy import AugmentConfig
from fat_train.benchmark.step import Mark, Row, Split, Window, loader_rate, put_on_device
from fat_train.benchmark.step_clock import StepClock, part_of
from fat_train.loss.cross_entropy import CrossEntropy
from fat_train.task.classification import Classification
from fat_train.task.step import StepKey
from fat_train.types import Batch, UserError

LOOP = "[_TrainingEpochLoop].train_dataloader_next"


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that stands still until it is set."""
    now = SimpleNamespace(s=0.0)
    for module in ("step", "step_clock"):
        monkeypatch.setattr(f"fat_train.benchmark.{module}.time", SimpleNamespace(perf_counter=lambda: now.s))
    return now


@pytest.fixture
def clock_of() -> Iterator[Callable[..., StepClock]]:
    clocks = []

    def clock_of(*, updates: int, accumulate: int = 1) -> StepClock:
        window = Window.of(warmup=1, updates=updates, steps_per_epoch=100, log_every_n_steps=50, trace=False)
        clocks.append(StepClock(window, accumulate=accumulate, log_every_n_steps=50, cuda=False, trace=None))
        return clocks[-1]

    yield clock_of
    for clock in clocks:
        clock.close()


@pytest.mark.parametrize(
    ("action", "part"),
    [
        (LOOP, "data"),
        ("[Strategy]DDPStrategy.batch_to_device", "copy"),
        ("[Strategy]SingleDeviceStrategy.backward", "backward"),
        ("[Strategy]SingleDeviceStrategy.training_step", None),
        ("[LightningModule]TrainingModule.configure_gradient_clipping", "clip"),
        ("[LightningModule]TrainingModule.optimizer_step", "optimizer"),
        ("[LightningModule]TrainingModule.transfer_batch_to_device", None),
        ("[LightningModule]TrainingModule.on_before_batch_transfer", "copy"),
        ("[LightningModule]TrainingModule.on_train_batch_start", "callbacks"),
        ("[Callback]EMA.on_train_batch_end", "ema"),
        ("[Callback]MetricsCsv.on_train_batch_end", "callbacks"),
        ("run_training_batch", None),
        ("forward", "forward"),
    ],
)
def test_lightnings_names_become_parts_and_the_others_belong_to_what_they_lie_in(action: str, part: str | None) -> None:
    assert part_of(action) == part


def test_every_moment_counts_once_for_the_innermost_part(now: SimpleNamespace, clock_of) -> None:
    clock = clock_of(updates=1)
    steps = [  # what begins (+) or ends (-), and how long after what came before
        (0, f"+{LOOP}"),
        (2, f"-{LOOP}"),
        (1, "+run_training_batch"),
        (1, "+[LightningModule]TrainingModule.optimizer_step"),
        (1, "+[Strategy]S.training_step"),
        (1, "+forward"),
        (5, "-forward"),
        (1, "-[Strategy]S.training_step"),
        (0, "+[Strategy]S.backward"),
        (1, "+[Callback]SkipNonFinite.on_before_backward"),
        (3, "-[Callback]SkipNonFinite.on_before_backward"),
        (7, "-[Strategy]S.backward"),
        (4, "-[LightningModule]TrainingModule.optimizer_step"),
        (1, "-run_training_batch"),
    ]
    for _ in range(3):
        for seconds, step in steps:
            now.s += seconds
            (clock.start if step[0] == "+" else clock.stop)(step[1:])
    (row,) = clock.rows
    assert row.update == 2
    assert row.host_s == {"data": 2, "forward": 5, "backward": 8, "optimizer": 7, "callbacks": 3, "rest": 3}
    assert row.total_s == 28


def test_an_update_is_all_of_its_micro_batches(now: SimpleNamespace, clock_of) -> None:
    clock = clock_of(accumulate=2, updates=3)
    for _ in range(12):
        clock.start(LOOP)
        now.s += 1
        clock.stop(LOOP)
    assert [(row.update, row.host_s["data"]) for row in clock.rows] == [(2, 2), (3, 2), (4, 2)]


def test_the_window_holds_as_many_usual_updates_as_were_asked_for() -> None:
    window = Window.of(warmup=2, updates=5, steps_per_epoch=4, log_every_n_steps=50, trace=True)
    assert [n for n in range(window.first, window.end) if not window.is_turn(n)] == [2, 5, 6, 9, 10]
    assert window.probe == 14, "three are traced, and then comes no turn"
    assert window.total == 15
    assert window.epochs == 4
    logged = Window.of(warmup=1, updates=4, steps_per_epoch=100, log_every_n_steps=6, trace=False)
    assert logged.probe == 6, "update number 6 writes a row of metrics"
    with pytest.raises(UserError, match="an epoch of 2 updates has none between"):
        Window.of(warmup=1, updates=1, steps_per_epoch=2, log_every_n_steps=50, trace=False)


def test_the_devices_side_shows_starvation_and_how_far_the_host_is_ahead() -> None:
    rows = [Row(1, {"data": 1.0}), Row(2, {"data": 1.0})]
    marks = [
        Mark(1, "data", 0.0, 0.0),  # the device has nothing to do
        Mark(1, "forward", 2.0, 2.0),
        Mark(1, "backward", 2.5, 5.0),
        Mark(1, "optimizer", 3.0, 11.0),
        Mark(2, "data", 3.5, 12.0),  # and here it is behind: a wait of the host costs it nothing
        Mark(2, "forward", 6.0, 12.0),
        Mark(2, "backward", 6.5, 15.0),
        Mark(2, "end", 7.0, 21.0),
    ]
    put_on_device(rows, marks)
    assert rows[0].device_s == {"data": 2.0, "forward": 3.0, "backward": 6.0, "optimizer": 1.0}
    assert rows[1].device_s == {"data": 0.0, "forward": 3.0, "backward": 6.0}
    assert [row.lead_s for row in rows] == [8.0, 14.0]
    assert rows[0].total_s == 12.0


def test_shares_are_of_all_updates_and_speed_is_the_devices_where_there_is_one() -> None:
    rows = [Row(2, {"data": 0.1, "forward": 0.3}), Row(3, {"data": 0.3, "forward": 0.3})]
    split = Split(rows, images=10)
    assert not split.on_device
    assert split.share("data") == pytest.approx(0.4)
    assert split.share("data", "forward") == pytest.approx(1)
    assert split.median_ms("data") == pytest.approx(200)
    assert split.images_per_s == pytest.approx(20)
    assert split.images_per_s_unless_waiting == pytest.approx(20 / 0.6)
    assert (split.occurs("forward"), split.occurs("ema")) == (True, False)
    for row in rows:
        row.device_s = {"data": 0.0, "forward": 0.5}
    assert split.images_per_s == pytest.approx(20)
    assert split.share("data") == 0
    assert split.share("data", device=False) == pytest.approx(0.4)


def test_the_turn_of_an_epoch_is_what_two_updates_take_longer_there() -> None:
    split = Split([Row(2, {"rest": 1.0}), Row(3, {"rest": 1.0})], images=1)
    assert split.turn_s([Row(4, {"rest": 1.5}), Row(5, {"data": 4.0})]) == pytest.approx(3.5)
    assert split.turn_s([Row(5, {"data": 4.0})]) is None


def test_a_loader_is_timed_after_the_batches_that_were_made_ahead(now: SimpleNamespace) -> None:
    def batches(count: int):
        for number in range(count):
            now.s += 0.0 if number < 3 else 0.5
            yield Batch(*(torch.zeros(4) for _ in range(4)))

    assert loader_rate(batches(20), discard=3, seconds=2.0) == pytest.approx(8)
    assert loader_rate(batches(4), discard=3, seconds=2.0) is None


def test_a_compiled_model_keeps_its_graph_under_the_clock(clock_of) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    task = Classification(model, CrossEntropy(0.1), AugmentConfig(), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    images = torch.randint(256, (4, 8, 8, 3), dtype=torch.uint8)
    batch = Batch(images, torch.arange(4), torch.arange(4), torch.zeros((4, 1, 4), dtype=torch.int64))
    key = StepKey(0, 0, 0, 0)
    expected = task.train_step(batch, key)
    model.compile(backend="eager", fullgraph=True)  # a break in the graph is an error
    clock = clock_of(updates=1)
    clock.attach(task)
    for _ in range(clock.window.total):  # the last of them under the eyes that look for reads
        clock.start(LOOP)
        clock.stop(LOOP)
        timed = task.train_step(batch, key)
        torch.testing.assert_close(timed.loss, expected.loss)
    assert clock._reads is not None
    (row,) = clock.rows
    assert min(row.host_s[part] for part in ("augment", "forward", "loss")) > 0
