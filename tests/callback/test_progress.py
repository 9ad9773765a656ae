from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pytorch_lightning import Callback, Trainer
from rich.console import Console

from fat_train.callback.progress import Progress, ProgressConfig
from fat_train.types import UserError

ESCAPE = "\x1b["
OFTEN = ProgressConfig(refresh_s=1e-6, line_every_s=1e-6)
SELDOM = ProgressConfig(refresh_s=1e-6, line_every_s=1000.0)


class Screen(Console):
    """A console whose output is read back."""

    def __init__(self, *, terminal: bool) -> None:
        colors = "standard" if terminal else "auto"
        super().__init__(file=io.StringIO(), force_terminal=terminal, width=110, color_system=colors)

    @property
    def text(self) -> str:
        assert isinstance(self.file, io.StringIO)
        return self.file.getvalue()

    @property
    def lines(self) -> list[str]:
        return self.text.splitlines()


@pytest.fixture
def progress(tiny_run: Any) -> Callable[..., Progress]:
    def make(config: ProgressConfig, console: Console, epochs: int = 3) -> Progress:
        return Progress(
            config,
            images_per_update=tiny_run.images_per_update,
            steps_per_epoch=tiny_run.updates_per_epoch,
            epochs=epochs,
            console=console,
        )

    return make


def fit(tiny_run: Any, *callbacks: Callback, **arguments: Any) -> Any:
    return tiny_run.fit(*callbacks, enable_progress_bar=True, **arguments)


def test_a_log_file_gets_no_terminal_codes(tiny_run: Any, progress: Callable[..., Progress]) -> None:
    screen = Screen(terminal=False)
    fit(tiny_run, progress(OFTEN, screen))
    assert len(screen.lines) > 10
    assert ESCAPE not in screen.text
    assert "\r" not in screen.text


def test_a_log_file_gets_a_line_at_once_and_one_an_epoch(tiny_run: Any, progress: Callable[..., Progress]) -> None:
    screen = Screen(terminal=False)
    module = fit(tiny_run, progress(SELDOM, screen))
    first, *of_epochs = screen.lines
    assert first.startswith("epoch 1/3 · update 0/4")
    assert len(of_epochs) == 3
    losses = [sum(module.losses[8 * epoch : 8 * epoch + 8]) / 8 for epoch in range(3)]
    for number, line in enumerate(of_epochs):
        assert line.startswith(f"epoch {number + 1}/3 · train/loss {losses[number]:.4f} · val/loss 1.5000")
        assert f"val/top1 {40 * (number + 1)}.00 (best)" in line
        assert re.search(r"lr \d\.\d\de-0\d · [\d,.]+ img/s · \d+ s$", line)


def test_a_plain_line_says_place_speed_rate_loss_best_and_time_left(
    tiny_run: Any, progress: Callable[..., Progress]
) -> None:
    screen = Screen(terminal=False)
    fit(tiny_run, progress(OFTEN, screen))
    pattern = (
        r"epoch 2/3 · update 3/4 · [\d,.]+ img/s · lr \S+ · loss \d\.\d{4} · best 40\.00 % \(epoch 1\) · \d+ s left"
    )
    assert re.search(pattern, screen.text)
    assert re.search(r"epoch 2/3 · validation batch 1/2 · \d+ s left", screen.text)


def test_a_terminal_gets_one_display_and_keeps_one_line_an_epoch(
    tiny_run: Any, progress: Callable[..., Progress]
) -> None:
    screen = Screen(terminal=True)
    fit(tiny_run, progress(OFTEN, screen))
    assert "━" in screen.text
    assert "\x1b[?25l" in screen.text  # the cursor is hidden …
    assert screen.text.count("\x1b[?25h") == screen.text.count("\x1b[?25l")  # … and comes back
    kept = [line for line in screen.lines if "train/loss" in line]
    assert [re.sub(r"\x1b\[\S*?[A-Zhl]", "", line).split(" ·")[0] for line in kept] == [
        "epoch 1/3",
        "epoch 2/3",
        "epoch 3/3",
    ]


def test_the_terminal_is_left_in_order_when_a_run_breaks(tiny_run: Any, progress: Callable[..., Progress]) -> None:
    screen = Screen(terminal=True)
    fit(tiny_run, progress(OFTEN, screen), tiny_run.kill_at(5))
    assert screen.text.rindex("\x1b[?25h") > screen.text.rindex("\x1b[?25l")


@pytest.mark.parametrize("saved_after", [4, 6])
def test_a_resumed_run_goes_on_at_its_place(
    saved_after: int, tiny_run: Any, progress: Callable[..., Progress], tmp_path: Path
) -> None:
    unbroken, broken, resumed = (Screen(terminal=False) for _ in range(3))
    fit(tiny_run, progress(SELDOM, unbroken))
    hook = "on_train_epoch_end" if saved_after == 4 else "on_train_batch_end"
    checkpoint = tmp_path / "saved.ckpt"
    fit(tiny_run, progress(SELDOM, broken), tiny_run.save_at(checkpoint, saved_after, hook), tiny_run.kill_at(7))
    fit(tiny_run, progress(SELDOM, resumed), resume=checkpoint)
    assert resumed.lines[0].startswith(f"epoch 2/3 · update {saved_after - 4}/4")
    assert "best 40.00 % (epoch 1)" in resumed.lines[0]
    facts = [line.split(" · lr")[0] for line in unbroken.lines[2:]]
    assert [line.split(" · lr")[0] for line in resumed.lines[1:]] == facts


def test_no_rank_but_the_first_prints(
    tiny_run: Any, progress: Callable[..., Progress], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "is_global_zero", property(lambda _: False))
    screen = Screen(terminal=True)
    fit(tiny_run, progress(OFTEN, screen))
    assert screen.text == ""


def test_validation_alone_is_shown_too(tiny_run: Any, progress: Callable[..., Progress]) -> None:
    screen = Screen(terminal=False)
    bar = Progress(OFTEN, images_per_update=0, steps_per_epoch=0, epochs=0, console=screen)
    tiny_run.validate(bar)
    assert re.match(r"validation batch 1/2 · \d+ s left", screen.lines[0])


def test_a_disabled_display_is_no_callback() -> None:
    assert ProgressConfig(enabled=False).build(images_per_update=8, steps_per_epoch=4, epochs=3) is None


@pytest.mark.parametrize("name", ["refresh_s", "line_every_s"])
def test_a_time_of_zero_is_refused_by_name(name: str) -> None:
    with pytest.raises(UserError, match=rf"callback\.progress\.{name} must be above 0"):
        ProgressConfig(**{name: 0.0})
