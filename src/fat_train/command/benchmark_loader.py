"""benchmark loader: how many images a second each loader makes of the same files on the same cores."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from omegaconf import DictConfig
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fat_train.benchmark.loader import OPENERS, RECIPES, ImagesConfig, Job, contestants_of
from fat_train.benchmark.race import Outcome, race
from fat_train.benchmark.table import as_csv, cost_lines, markdown, terminal_table, verdict
from fat_train.checkpoint.io import write_atomically
from fat_train.command.assemble import path_of_out
from fat_train.command.say import say
from fat_train.config.resolve import resolve
from fat_train.config.run import plain
from fat_train.data.datamodule import cores_of_rank
from fat_train.data.index import FileIndex
from fat_train.report.machine import estimate, machine_facts
from fat_train.types import UserError, one_of

EPOCH_AT_LEAST = 2**17
"""Images of an epoch: the list is gone through as often as that takes, as each loader runs dry at an epoch's end."""
IMAGENET_IMAGES, IMAGENET_EPOCHS = 1_281_167, 300


@dataclass(frozen=True, kw_only=True)
class LoaderBenchmarkSettings:
    """The whole of `conf/benchmark_loader.yaml`."""

    data: ImagesConfig = field(default_factory=ImagesConfig)
    """The images."""
    recipes: list[str] = field(default_factory=lambda: ["crop", "full"])
    """What is made of them: crop, full, eval."""
    contestants: list[str] = field(default_factory=lambda: ["dali", "torch", "timm", "torchvision", "dali_stock"])
    """Who takes part; each is a process a recipe, and all live to the end."""
    rounds: int = 5
    """Turns of each contestant that count."""
    seconds: float = 10.0
    """Length of a turn."""
    batch_size: int = 64
    """Images of a batch."""
    workers: int | None = None
    """Threads or processes of each contestant; null takes one a core."""
    out: str = "runs/benchmark_loader.json"
    """Where the numbers are kept, with .csv and .md beside it."""

    def __post_init__(self) -> None:
        for name, known in (("recipes", RECIPES), ("contestants", OPENERS)):
            words = getattr(self, name)
            if not words or len(set(words)) < len(words):
                raise UserError(f"{name} must name at least one, and none twice; got {words}")
            for word in words:
                one_of(name, word, known)
        for name in ("rounds", "batch_size", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1; got {value}")
        if self.seconds <= 0:
            raise UserError(f"seconds must be positive; got {self.seconds}")


def run(tree: DictConfig) -> dict[str, list[Outcome]]:
    """Time all, print the table, keep it; returns recipe -> outcomes.

    Raises:
        UserError: a wrong setting, or no images.
    """
    settings = resolve(plain(tree), LoaderBenchmarkSettings, where="")
    out = path_of_out(settings.out, ".json")
    index = settings.data.open()
    workers = settings.workers or cores_of_rank(1)
    facts = machine_facts(out.parent, index.root)
    machine = f"{facts['CPU cores']} cores, {facts['memory']}, torch {facts['torch']}, DALI {facts['DALI']}"
    say(f"machine        {machine}")
    say(f"images         {len(index):,} files of {len(index.classes):,} classes in {index.root}")
    console = Console()
    read_once(index)
    results = time_all(settings, index, workers, console)

    said = verdict(results, workers)
    lines = [f"machine: {machine}; {workers} workers, batches of {settings.batch_size}"]
    if said is not None:
        lines += [said[0], estimate(said[1], IMAGENET_IMAGES, IMAGENET_EPOCHS)]
    lines += [f"RandAugment and erasing, {line}" for line in cost_lines(results, workers)]
    kept = {
        "machine": facts,
        "settings": {name: value for name, value in plain(tree).items() if name != "out"} | {"workers": workers},
        "lines": lines,
        "results": {recipe: [outcome.__dict__ for outcome in outcomes] for recipe, outcomes in results.items()},
    }
    for path, text in (
        (out, json.dumps(kept, indent=1)),
        (out.with_suffix(".csv"), as_csv(results)),
        (out.with_suffix(".md"), markdown(results, lines)),
    ):
        write_atomically(path, text)
    console.print(terminal_table(results))
    for line in lines[1:]:
        say(line)
    say(f"details        {out}, .csv, .md (with what each number counts)")
    return results


def read_once(index: FileIndex) -> None:
    """Bring the files into the page cache.

    Raises:
        UserError: one cannot be read.
    """
    try:
        with ThreadPoolExecutor(16) as pool:
            for _ in pool.map(lambda row: len(index.place(row).read()), range(len(index))):
                pass
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from error


def time_all(
    settings: LoaderBenchmarkSettings, index: FileIndex, workers: int, console: Console
) -> dict[str, list[Outcome]]:
    """One race of all contestants with all recipes; returns recipe -> outcomes."""
    turns = len(settings.contestants) * len(settings.recipes) * (settings.rounds + 2)  # start, warm-up, rounds
    packed = settings.data.open_packed()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    contestants = []
    for recipe in settings.recipes:
        job = Job(
            index=index,
            packed=packed,
            repeats=-(-EPOCH_AT_LEAST // len(index)),
            recipe=recipe,
            batch_size=settings.batch_size,
            workers=workers,
            data=settings.data.spec(),
        )
        contestants += contestants_of(settings.contestants, job)
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("", total=turns)
        outcomes = race(
            contestants,
            rounds=settings.rounds,
            seconds=settings.seconds,
            discard=2 * workers + 4,  # torch's workers make two batches ahead each, DALI three in all
            on_turn=lambda name, doing: progress.update(bar, description=f"{name} {doing}", advance=1),
        )
    count = len(settings.contestants)
    return {recipe: outcomes[n * count : (n + 1) * count] for n, recipe in enumerate(settings.recipes)}
