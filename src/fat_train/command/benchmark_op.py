"""benchmark op: every way of computing each operation, timed at the sizes of a model; on a GPU the fastest are kept."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fat_train.benchmark.op_table import markdown, refused, terminal_table, verdict
from fat_train.callback.kernels import DTYPES, store
from fat_train.checkpoint.io import write_atomically
from fat_train.command.assemble import path_of_out
from fat_train.command.say import say
from fat_train.config.resolve import resolve
from fat_train.config.run import plain
from fat_train.config.zoo import load_model_node
from fat_train.data.digits import cache_folder
from fat_train.model.backbone import ModelConfig
from fat_train.op import table
from fat_train.op.choice import Key
from fat_train.op.table import Table
from fat_train.op.tune import Case, cases_of, copy_rate, tune
from fat_train.report.machine import machine_facts
from fat_train.trainer.build import PRECISIONS
from fat_train.types import UserError, one_of

DEVICES = ("auto", "cpu", "gpu")


@dataclass(frozen=True, kw_only=True)
class OpBenchmarkSettings:
    """What stands in `conf/benchmark_op.yaml` beside the group `model`."""

    models: list[str] = field(default_factory=list)
    """Several models by name, instead of `model`."""
    batch_size: int | None = None
    """Images of a batch; null: 128 on a GPU, 8 on a CPU."""
    image_px: int = 224
    """Height and width of the images, pixels."""
    precision: str | None = None
    """32, bf16-mixed or 16-mixed, as of the trainer; null: bf16-mixed on a GPU, 32 on a CPU."""
    device: str = "auto"
    """auto takes a GPU where there is one; or cpu, gpu."""
    training: bool = True
    """Choose by the time of forward and backward together; false: by that of forward alone."""
    rounds: int = 20
    """Turns of each way that count."""
    keep: bool = True
    """On a GPU: keep what is fastest for the runs to come."""
    out: str = "runs/benchmark_op.json"
    """Where the numbers are kept, with .md beside it."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "rounds"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1; got {value}")
        if self.image_px < 32:
            raise UserError(f"image_px must be at least 32, the networks' coarsest stride; got {self.image_px}")
        one_of("device", self.device, DEVICES)
        if self.precision is not None:
            one_of("precision", self.precision, PRECISIONS)
        if self.device == "gpu" and not torch.cuda.is_available():
            raise UserError("device=gpu: torch finds no GPU here; give device=cpu")
        if self.precision == "16-mixed" and self.on == "cpu":
            raise UserError("precision=16-mixed needs a GPU; on the CPU give 32 or bf16-mixed")

    @property
    def on(self) -> str:
        """cpu or cuda."""
        return "cuda" if self.device == "gpu" or (self.device == "auto" and torch.cuda.is_available()) else "cpu"

    @property
    def batch(self) -> int:
        """Images, given or the device's usual ones."""
        return self.batch_size or {"cpu": 8, "cuda": 128}[self.on]

    @property
    def word(self) -> str:
        """The precision, given or the device's usual one."""
        return self.precision or {"cpu": "32", "cuda": "bf16-mixed"}[self.on]


def run(tree: DictConfig) -> dict[str, Table]:
    """Time all, print the tables, keep them; returns model -> table.

    Raises:
        UserError: a wrong setting, or a model that nobody knows.
    """
    values = plain(tree)
    node = values.pop("model", {})
    settings: OpBenchmarkSettings = resolve(values, OpBenchmarkSettings, where="")
    out = path_of_out(settings.out, ".json")
    models: list[ModelConfig] = [resolve(load_model_node(name), where="model") for name in settings.models]
    models = models or [resolve(node, where="model")]
    device = torch.device(settings.on)
    torch.backends.cudnn.benchmark = device.type == "cuda"  # as in training
    facts = machine_facts(out.parent)
    rate = copy_rate(device)
    machine = (
        f"{facts.get('GPU 0', facts['CPU cores'] + ' cores')}, torch {facts['torch']}, triton {table.triton_version()}"
    )
    say(f"machine        {machine}; a copy moves {rate / 1e9:,.0f} GB/s, reading and writing together")
    console, found, measured = Console(), {}, {}
    for config in models:
        cases = cases_of(
            config.build(num_classes=1000),
            batch_size=settings.batch,
            image_px=settings.image_px,
            dtype=DTYPES[PRECISIONS[settings.word]],
        )
        counts: dict[Key, int] = {case.key: count for case, count in cases.items()}
        title = f"{config.name}, {settings.batch} images of {settings.image_px} px, precision {settings.word}"
        measured[config.name] = own = _tuned(cases, device, settings, title, console)
        lines = [f"machine: {machine}; a copy moves {rate / 1e9:,.0f} GB/s", *verdict(own, counts), *refused(own)]
        found[title] = (own, counts, lines)
        console.print(terminal_table(own, counts, rate, title))
        for line in (own.sentence(), *lines[1:]):
            say(line)
    kept = {
        "machine": facts,
        "copy_bytes_per_s": rate,
        "settings": {name: value for name, value in values.items() if name != "out"},
        "models": {title: {"lines": lines} | json.loads(own.as_json()) for title, (own, _, lines) in found.items()},
    }
    write_atomically(out, json.dumps(kept, indent=1))
    write_atomically(out.with_suffix(".md"), markdown(found, rate))
    say(f"details        {out}, .md (with what each number counts)")
    _keep(measured, device, settings)
    return measured


def _tuned(
    cases: Counter[Case], device: torch.device, settings: OpBenchmarkSettings, title: str, console: Console
) -> Table:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task(title, total=len(cases))
        return tune(
            sorted(cases),
            device,
            rounds=settings.rounds,
            training=settings.training,
            on_case=lambda case: progress.update(bar, description=f"{title}: {case.operation}", advance=1),
        )


def _keep(measured: dict[str, Table], device: torch.device, settings: OpBenchmarkSettings) -> None:
    if device.type != "cuda":
        say("op=auto        is a fixed choice on a CPU, which no measurement changes: runs repeat to the bit")
        return
    if not settings.keep:
        return
    for own in measured.values():
        trouble = store(own, device)
        if trouble:
            raise UserError(trouble)
    say(f"op=auto        takes what is fastest from {table.path_of(cache_folder(), device)}")
