"""A run that makes no progress ends by itself, and says where each of its ranks stood."""

from __future__ import annotations

import faulthandler
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from fat_train.__main__ import main
from fat_train.types import EXIT_HUNG

MINUTES = "callback.guard.hang_minutes"
TWO = ["trainer.accelerator=cpu", "trainer.devices=2", "schedule.epochs=100000", f"{MINUTES}=0.1"]


@contextmanager
def started(*command: str) -> Iterator[subprocess.Popen[str]]:
    """A process, ended with everything that it has started, stopped or not."""
    with subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def in_its_session(leader: int) -> set[int]:
    """Living processes of a session (zombies, which wait for somebody to ask, are none)."""
    found = set()
    for folder in Path("/proc").iterdir():
        with suppress(OSError, ValueError):
            state, _, _, session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(session) == leader and state not in "ZX":
                found.add(int(folder.name))
    return found


def wait_until(come: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 200
    while not come():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def the_other(leader: int) -> int:
    """The process of rank 1."""
    (other,) = (
        pid for pid in in_its_session(leader) - {leader} if b"fat_train" in Path(f"/proc/{pid}/cmdline").read_bytes()
    )
    return other


def test_a_loader_that_blocks_for_ever_ends_the_run_with_the_stacks_of_all_threads(
    tmp_path: Path, tiny: list[str]
) -> None:
    script = str(Path(__file__).parent / "hanging_run.py")
    with started(script, "wait", *tiny, f"folder={tmp_path}", "name=run", f"{MINUTES}=0.03") as process:
        said, _ = process.communicate(timeout=200)
    assert process.returncode == EXIT_HUNG
    kept = (tmp_path / "run" / "hang_rank0.txt").read_text()
    for text in (said, kept):
        assert "rank 0 of 1 made no progress for 0.03 minutes: 3 updates done, epoch 1" in text
        assert "the last it began was a training batch" in text
        assert "in wait_for_a_disk" in text
        assert "training_epoch_loop.py" in text
    assert str(tmp_path / "run" / "hang_rank0.txt") in said


@pytest.mark.slow
def test_a_process_whose_python_no_longer_runs_is_ended_all_the_same(tmp_path: Path, tiny: list[str]) -> None:
    script = str(Path(__file__).parent / "hanging_run.py")
    with started(script, "hold", *tiny, f"folder={tmp_path}", "name=run", f"{MINUTES}=0.03") as process:
        said, _ = process.communicate(timeout=200)
    assert process.returncode == 1
    assert "Timeout" in said
    assert "in wait_for_a_disk" in said


@pytest.mark.slow
@pytest.mark.parametrize("stopped_rank", [0, 1])
def test_where_one_rank_stands_still_all_end(tmp_path: Path, tiny: list[str], stopped_rank: int) -> None:
    with started("-m", "fat_train", *tiny, f"folder={tmp_path}", "name=run", *TWO) as process:
        wait_until((tmp_path / "run" / "checkpoints" / "last.ckpt").exists)
        pids = [process.pid, the_other(process.pid)]
        os.kill(pids[stopped_rank], signal.SIGSTOP)
        moving = 1 - stopped_rank
        if stopped_rank == 0:
            wait_until(lambda: pids[1] not in in_its_session(process.pid))
            os.kill(pids[stopped_rank], signal.SIGCONT)
        said, _ = process.communicate(timeout=200)
        wait_until(lambda: not in_its_session(process.pid))
    assert process.returncode != 0
    if stopped_rank == 1:
        assert process.returncode == EXIT_HUNG
    assert re.search(rf"rank {moving} of 2 made no progress for 0\.[13] minutes", said), "0.3 at an epoch's end"
    waits = ("torch/distributed", "in backward", "callback/agreement.py")
    assert any(place in said for place in waits), f"it does not wait for the other:\n{said}"
    assert (tmp_path / "run" / f"hang_rank{moving}.txt").exists()


@pytest.mark.parametrize("words", [[], ["optim.base_lr=1e30"]], ids=["finished", "stopped by a fault"])
def test_a_run_that_is_over_leaves_nobody_watching(
    tmp_path: Path, tiny: list[str], words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    armed = []
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda *_, **__: armed.append(True))
    monkeypatch.setattr(faulthandler, "cancel_dump_traceback_later", armed.clear)
    status = main([*tiny, *words, f"folder={tmp_path}", "schedule.epochs=1"])
    assert status == (2 if words else 0)
    assert not armed
    assert "hang-watch" not in {thread.name for thread in threading.enumerate()}
