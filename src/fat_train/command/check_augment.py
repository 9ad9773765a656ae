"""check augment: does the pipeline carry out timm's augmentation, and does it draw as timm draws?"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from rich.console import Console

from fat_train.augment.policy import AugmentConfig
from fat_train.checkpoint.io import write_atomically
from fat_train.command.assemble import first_images, path_of_out, split_settings
from fat_train.command.say import say
from fat_train.config.run import Problems, RunConfig, plain, resolve_run
from fat_train.data.datamodule import (
    DigitsDataConfig,
    FolderDataConfig,
    choose_backend,
    cores_of_rank,
    open_data,
    picture_spec,
)
from fat_train.data.index import Place
from fat_train.data.photograph import embedded_photographs, find_photographs
from fat_train.data.picture import PictureSpec
from fat_train.report.distribution import as_dicts, compare, distribution_table, failures
from fat_train.report.drawn import our_draws, timm_draws
from fat_train.report.parity import Lowering, ParityRow, operation_rows, parity_table, road_rows, save_squares
from fat_train.report.parity_sheet import AMPLIFIED, SHOWN_LEVEL, operation_strips, parity_sheet, recipe_strips
from fat_train.types import UserError

CPU_LOWERING = "DALI, CPU"
GPU_OPERATORS = "as on a GPU"
"""DALI's own operators, which a GPU runs, on the CPU: their formulas are checked without one."""
DRAWS_AT_LEAST = 1000


@dataclass(frozen=True, kw_only=True)
class CheckAugmentSettings:
    """What `conf/check_augment.yaml` adds to a run's configuration."""

    images: int = 64
    """Photographs whose pictures are compared."""
    draws: int = 30_000
    """Images whose augmentation is drawn, by us and by timm each."""
    out: str = "runs/check_augment.png"
    """The picture to write; the numbers go beside it, as .json."""

    def __post_init__(self) -> None:
        if self.images < 1:
            raise UserError(f"images must be at least 1; got {self.images}")
        if self.draws < DRAWS_AT_LEAST:
            raise UserError(f"draws must be at least {DRAWS_AT_LEAST:,}, fewer prove little; got {self.draws}")


def run(tree: DictConfig) -> None:
    """Print both tables, write the picture and the numbers; the process ends with 2 where something is not timm's.

    Raises:
        UserError: the rows that do not hold, or something wrong with the words.
    """
    settings, values = split_settings(plain(tree), CheckAugmentSettings)
    out = path_of_out(settings.out, ".png")
    problems = Problems()
    config = resolve_run(values, problems)
    problems.raise_if_any()
    assert config is not None
    console = Console()
    found: dict[str, Any] = {"auto_augment": config.augment.auto_augment}
    failed: list[str] = []

    lowerings = _lowerings()
    with tempfile.TemporaryDirectory() as folder:
        places = _photographs(config, settings.images, Path(folder))
        if lowerings:
            rows = _compare_pictures(places, config, lowerings, out, Path(folder))
            console.print(parity_table(rows))
            found["pictures"] = [row.as_dict() for row in rows]
            failed += [f"{row.name} ({row.back_end})" for row in rows if not row.holds]

    px, seed = config.data.image_px, config.run.seed
    ours, timm = (draws(config.augment, px, settings.draws, seed) for draws in (our_draws, timm_draws))
    comparisons = compare(ours, timm, config.augment, px)
    console.print(distribution_table(comparisons, settings.draws))
    found["draws"] = as_dicts(comparisons)
    failed += failures(comparisons)
    numbers = out.with_suffix(".json")
    write_atomically(numbers, json.dumps(found, indent=1))
    if lowerings:
        say(f"pictures       {out}")
    say(f"numbers        {numbers}")
    if failed:
        raise UserError(f"the augmentation is not timm's; rows above that fail: {'; '.join(failed)}")


def _lowerings() -> dict[str, Lowering]:
    """The back ends to hold against PIL and timm; says so where there is none."""
    backend = choose_backend("auto", torch.device("cpu"))
    if backend.name != "dali":
        say(f"pictures       not compared, PIL and timm are the only back end here: {backend.reason}")
        return {}
    from fat_train.data.dali.carry_out import CarryOut  # noqa: PLC0415  # DALI is not installed everywhere

    threads = cores_of_rank(1)
    lowerings: dict[str, Lowering] = {CPU_LOWERING: CarryOut(num_threads=threads)}
    lowerings[GPU_OPERATORS] = CarryOut(num_threads=threads, torch_ops=False)
    if torch.cuda.is_available():
        lowerings["DALI, GPU"] = CarryOut(num_threads=threads, device_id=torch.cuda.current_device())
    return lowerings


def _photographs(config: RunConfig, count: int, folder: Path) -> list[Place]:
    if isinstance(config.data, FolderDataConfig) and config.data.root:
        places, of = find_photographs(config.data.root, count), config.data.root
    elif isinstance(config.data, DigitsDataConfig):
        index = first_images(open_data(config.data).train, count)
        places, of = [index.place(row) for row in range(len(index))], config.data.name
    else:
        places = embedded_photographs(folder, count)
        of = "scikit-learn's two photographs, cut up; data.root=<folder of images> takes your own"
    say(f"photographs    {len(places)} of {of}")
    return places


def _compare_pictures(
    places: Sequence[Place], config: RunConfig, lowerings: dict[str, Lowering], out: Path, folder: Path
) -> list[ParityRow]:
    """Measure, and write the sheet."""
    spec = picture_spec(config.data, config.augment)
    squares = save_squares(places, spec, folder)
    rows = operation_rows(squares, spec, config.augment, lowerings)
    rows += road_rows(places, spec, config.augment, lowerings, held=[CPU_LOWERING, GPU_OPERATORS])
    out.parent.mkdir(parents=True, exist_ok=True)
    _draw_sheet(places, squares, spec, config.augment, lowerings[CPU_LOWERING], out)
    return rows


def _draw_sheet(
    places: Sequence[Place],
    squares: Sequence[Place],
    spec: PictureSpec,
    augment: AugmentConfig,
    lowering: Lowering,
    out: Path,
) -> None:
    operations = (
        f"Each operation at level {SHOWN_LEVEL:g} of 10; the difference of grey levels is shown {AMPLIFIED}-fold"
    )
    recipe = f"The whole recipe from file to picture: {augment.auto_augment or 'no auto-augment'}"
    sections = [
        (operations, operation_strips(squares, spec, augment, lowering)),
        (recipe, recipe_strips(places, spec, augment, lowering)),
    ]
    parity_sheet(sections, out)
