"""`python runner.py PLAN word …`: the command line of `python -m fat_train word …`, killed at a moment that PLAN names.

PLAN is the JSON of `Plan`. Whatever is wrapped here, the product computes what it computes without it; a kill is a real
SIGKILL. Lightning starts this script again, with the same arguments, for each further rank.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import signal
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

CHECKPOINT = ".ckpt"
Hit = Callable[[], None]


class Plan(NamedTuple):
    """What one life of a training is to record, and where it is to end."""

    record: str
    """Folder of the image stream and of the word about the kill."""
    life: int
    point: str = ""
    """A name in `POINTS`; blank lets the process run."""
    call: int = 1
    """The kill comes when the point is passed for this time in this life."""
    rank: int = 0
    """Process that counts and is killed."""
    whole_group: bool = True
    """Kill all processes of the run in one go, not this rank alone."""
    drag_s: float = 0.0
    """Seconds that each checkpoint waits in the background before it is copied, and again before it is written."""


def main() -> int:
    plan = Plan(*json.loads(sys.argv[1]))
    record_images(plan)
    if plan.drag_s:
        drag(plan.drag_s)
    if plan.point and plan.rank == own_rank():
        POINTS[plan.point](Countdown(plan))
    from fat_train.__main__ import main as fat_train  # noqa: PLC0415  # as late as a user's command would

    return fat_train(sys.argv[2:])


def own_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


class Countdown:
    """Called each time the point is passed."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.left = plan.call

    def __call__(self) -> None:
        self.left -= 1
        if self.left == 0:
            self.kill()

    def kill(self) -> None:
        write_line(Path(self.plan.record) / "kills", f"{self.plan.life}")
        if self.plan.whole_group:
            group = os.getpgid(0)
            assert group in (os.getpid(), os.getppid()), "a group of its own, or others would be killed"
            os.killpg(group, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)


def write_line(path: Path, line: str) -> None:
    """One write to a file opened for appending: there whole, or not at all."""
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, f"{line}\n".encode())
    os.close(file)


def record_images(plan: Plan) -> None:
    """A line a micro-batch: life, update, micro-batch, then of each image its row and a CRC-32 of pixels and boxes."""
    from fat_train.task.classification import Classification  # noqa: PLC0415

    path = Path(plan.record) / f"stream-{own_rank()}"
    train_step = Classification.train_step

    def recorded(self: Any, batch: Any, key: Any) -> Any:
        rows = zip(batch.indices.tolist(), batch.images.numpy(), batch.erase.numpy(), strict=True)
        images = " ".join(f"{row}:{zlib.crc32(boxes.tobytes(), zlib.crc32(image)):08x}" for row, image, boxes in rows)
        write_line(path, f"{plan.life} {key.update} {key.micro_batch} {images}")
        return train_step(self, batch, key)

    Classification.train_step = recorded


def drag(seconds: float) -> None:
    """Let the training run far ahead of what is still to be copied and written."""
    import time  # noqa: PLC0415

    from fat_train.checkpoint import writer  # noqa: PLC0415

    before(writer._Copies, "begin", lambda: time.sleep(seconds))
    before(writer, "write_checkpoint", lambda: time.sleep(seconds))


def before(owner: Any, name: str, hit: Hit) -> None:
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        hit()
        return original(*args, **kwargs)

    setattr(owner, name, wrapped)


def after(owner: Any, name: str, hit: Hit) -> None:
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        hit()
        return result

    setattr(owner, name, wrapped)


def reading_checkpoint(hit: Hit) -> None:
    from fat_train.trainer.module import TrainingModule  # noqa: PLC0415

    after(TrainingModule, "on_load_checkpoint", hit)


def restored(hit: Hit) -> None:
    from fat_train.callback.metrics_csv import MetricsCsv  # noqa: PLC0415

    before(MetricsCsv, "on_train_start", hit)


def writing_config(hit: Hit) -> None:
    from fat_train.checkpoint.run_folder import RunFolder  # noqa: PLC0415

    before(RunFolder, "write_config", hit)


def loading(hit: Hit) -> None:
    """Inside the training loader's __next__."""
    from fat_train.trainer.loaders import AtRunPosition  # noqa: PLC0415

    iterate = AtRunPosition.__iter__

    def wrapped(self: AtRunPosition) -> Iterator[Any]:
        for batch in iterate(self):
            hit()
            yield batch

    AtRunPosition.__iter__ = wrapped  # type: ignore[method-assign]


def forward(hit: Hit) -> None:
    from fat_train.task.classification import Classification  # noqa: PLC0415

    before(Classification, "train_step", hit)


def backward(hit: Hit) -> None:
    """The loss has its gradient, the weights have not."""
    from fat_train.task.classification import Classification  # noqa: PLC0415

    train_step = Classification.train_step

    def wrapped(self: Any, batch: Any, key: Any) -> Any:
        out = train_step(self, batch, key)
        out.logits.register_hook(lambda _: hit())
        return out

    Classification.train_step = wrapped


def halfway_update(hit: Hit) -> None:
    """One of the optimiser's two groups of weights is of the update, the other is not yet."""
    from importlib import import_module  # noqa: PLC0415

    calls = itertools.count()  # one a group
    before(import_module("torch.optim.adam"), "adam", lambda: hit() if next(calls) % 2 else None)


def before_update(hit: Hit) -> None:
    from importlib import import_module  # noqa: PLC0415

    calls = itertools.count()
    before(import_module("torch.optim.adam"), "adam", lambda: None if next(calls) % 2 else hit())


def after_update(hit: Hit) -> None:
    from torch.optim.optimizer import register_optimizer_step_post_hook  # noqa: PLC0415

    register_optimizer_step_post_hook(lambda *_: hit())


def validation(hit: Hit) -> None:
    from fat_train.task.classification import Classification  # noqa: PLC0415

    before(Classification, "eval_step", hit)


def half_a_row(hit: Hit) -> None:
    """The first half of a row is in metrics.csv."""
    from fat_train.callback.metrics_csv import CsvFile  # noqa: PLC0415
    from fat_train.metric.record import format_row  # noqa: PLC0415

    append = CsvFile.append

    def wrapped(self: CsvFile, row: dict[str, str]) -> None:
        line = format_row(row)
        size = self.path.stat().st_size
        write_line(self.path, line[: len(line) // 2])
        os.truncate(self.path, size + len(line) // 2)
        hit()
        os.truncate(self.path, size)
        append(self, row)

    CsvFile.append = wrapped  # type: ignore[method-assign]


def half_a_checkpoint(hit: Hit) -> None:
    """The first half of a checkpoint is in its temporary file; the training goes on meanwhile."""
    import torch  # noqa: PLC0415

    save = torch.save

    def wrapped(content: Any, path: Path, *args: Any, **kwargs: Any) -> None:
        save(content, path, *args, **kwargs)
        whole = path.read_bytes()
        os.truncate(path, len(whole) // 2)
        hit()
        path.write_bytes(whole)

    torch.save = wrapped  # type: ignore[assignment]


def before_sync(hit: Hit) -> None:
    """A checkpoint's temporary file is whole, as far as this process is concerned."""
    sync = os.fsync

    def wrapped(file: int) -> None:
        if CHECKPOINT in Path(f"/proc/self/fd/{file}").readlink().name:
            hit()
        sync(file)

    os.fsync = wrapped


def at_rename(hit: Hit, *, name: str, done: bool = False) -> None:
    """Before, or after, something is renamed to `name`…"""
    rename = os.replace

    def wrapped(source: Any, target: Any, **kwargs: Any) -> None:
        ours = Path(target).name.startswith(name)
        if ours and not done:
            hit()
        rename(source, target, **kwargs)
        if ours and done:
            hit()

    os.replace = wrapped


def removing_best(hit: Hit) -> None:
    """The new best checkpoint is there, and the one that it beats, too."""
    unlink = os.unlink

    def wrapped(path: Any, **kwargs: Any) -> None:
        if Path(path).name.startswith("best-") and Path(path).exists():
            hit()
        unlink(path, **kwargs)

    os.unlink = wrapped


def reporting(hit: Hit) -> None:
    import fat_train.command.train as command  # noqa: PLC0415

    before(command, "write_report", hit)


def half_a_report(hit: Hit) -> None:
    """The curves are drawn, the table is not written."""
    from fat_train.report import table  # noqa: PLC0415

    after(table, "draw_curves", hit)


POINTS: dict[str, Callable[[Any], None]] = {
    "writing config.yaml": writing_config,
    "reading the checkpoint": reading_checkpoint,
    "restored, before an update": restored,
    "replacing metrics.csv": functools.partial(at_rename, name="metrics.csv"),
    "loading": loading,
    "forward": forward,
    "backward": backward,
    "before the update": before_update,
    "half the weights updated": halfway_update,
    "after the update": after_update,
    "validation": validation,
    "half a row of metrics.csv": half_a_row,
    "half a checkpoint written": half_a_checkpoint,
    "checkpoint not yet synced": before_sync,
    "best-*.ckpt named": functools.partial(at_rename, name="best-", done=True),
    "previous.ckpt named": functools.partial(at_rename, name="previous", done=True),
    "last.ckpt named": functools.partial(at_rename, name="last", done=True),
    "removing the former best": removing_best,
    "before the report": reporting,
    "half a report": half_a_report,
}

if __name__ == "__main__":
    sys.exit(main())
