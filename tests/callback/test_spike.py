"""A loss that jumps is said once; a noisy one, a lasting one and the start of a run are not."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from broken_run import break_updates, mend
from fat_train.__main__ import main
from fat_train.callback.spike import SpikeWatch
from fat_train.checkpoint.weights import read_checkpoint


@pytest.fixture(autouse=True)
def whole() -> Iterator[None]:
    yield
    mend()


def noise(count: int, seed: int = 0) -> list[float]:
    """A loss that falls from 7 to 3 with some noise."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.linspace(7, 3, count) + 0.2 * torch.randn(count, generator=generator)).tolist()


def jumps(watch: SpikeWatch, losses: list[float]) -> list[int]:
    return [number for number, loss in enumerate(losses) if watch.jumps(loss)]


@pytest.mark.parametrize("seed", range(5))
def test_noise_is_no_jump(seed: int) -> None:
    assert jumps(SpikeWatch(sigma=6.0, window=100), noise(5000, seed)) == []


def test_a_jump_is_said_at_its_first_update_alone_and_again_after_it_has_come_back() -> None:
    losses = noise(1000)
    for number in (300, 301, 302, 700):
        losses[number] += 4
    assert jumps(SpikeWatch(sigma=6.0, window=100), losses) == [300, 700]


def test_a_lasting_jump_becomes_the_new_level() -> None:
    losses = noise(400) + [9 + loss / 10 for loss in noise(2000)]
    losses[-1] += 8
    assert jumps(SpikeWatch(sigma=6.0, window=100), losses) == [400, len(losses) - 1]


def test_before_the_window_has_passed_nothing_is_said() -> None:
    assert jumps(SpikeWatch(sigma=6.0, window=100), [1.0] * 99 + [50.0]) == []
    assert jumps(SpikeWatch(sigma=6.0, window=100), [1.0] * 100 + [50.0]) == [100]


def test_a_loss_that_hardly_moves_may_move_a_little() -> None:
    assert jumps(SpikeWatch(sigma=6.0, window=10), [0.5] * 100 + [0.55] + [0.5] * 100 + [0.6]) == [201]


def test_a_loss_that_is_not_finite_is_not_taken_in() -> None:
    watch = SpikeWatch(sigma=6.0, window=100)
    assert jumps(watch, [*noise(200), float("nan"), float("inf")]) == []
    assert watch.seen == 200


def test_a_resumed_watch_says_the_same() -> None:
    losses = noise(600)
    losses[300] = losses[301] = losses[500] = 20.0
    whole, first, second = (SpikeWatch(sigma=6.0, window=50) for _ in range(3))
    said = jumps(whole, losses)
    begun = jumps(first, losses[:301])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert begun + [301 + number for number in jumps(second, losses[301:])] == said == [300, 500]
    assert second.state_dict() == whole.state_dict()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_says_update_loss_mean_and_rate_and_goes_on(
    tmp_path: Path, tiny: list[str], capsys: pytest.CaptureFixture[str], accumulate: int
) -> None:
    break_updates("high", [9, 10])
    words = [*tiny, f"folder={tmp_path}", "name=run", "schedule.epochs=4", "callback.guard.spike_window=4"]
    assert main([*words, f"trainer.max_batch_per_device={8 // accumulate}"]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "jumped" in line]
    assert len(said) == 1
    found = re.fullmatch(
        r"update 10: the loss jumped to ([\d.]+) from ([\d.]+), the mean of about 4 updates \(learning rate .*\)",
        said[0],
    )
    assert found
    assert float(found[1]) > 20 * float(found[2])
    assert read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["callbacks"]["SpikeWatch"]["seen"] == 16


def test_zero_sigma_watches_nothing(tmp_path: Path, tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    break_updates("high", [9])
    words = [*tiny, f"folder={tmp_path}", "name=run", "schedule.epochs=3", "callback.guard.spike_window=4"]
    assert main([*words, "callback.guard.spike_sigma=0"]) == 0
    assert "jumped" not in capsys.readouterr().out
