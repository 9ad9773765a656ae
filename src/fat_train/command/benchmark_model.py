"""benchmark model: how fast the networks train and answer, beside the plain equations, each other and timm's models."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fat_train.benchmark.model import COMPILE_MODES, CONTESTANTS, DTYPES, MODES, ModelJob, has_reference
from fat_train.benchmark.model_heats import Heat, Raced, heats_of, run_heats, scaling_heats
from fat_train.benchmark.model_plot import draw_accuracy, draw_growth, draw_speed
from fat_train.benchmark.model_result import Growth, growths_of
from fat_train.benchmark.model_table import as_csv, exceptions, markdown, terminal_tables, verdicts
from fat_train.benchmark.peers import ALL, peers_of
from fat_train.checkpoint.io import write_atomically
from fat_train.command.assemble import path_of_out
from fat_train.command.say import say
from fat_train.config.resolve import resolve
from fat_train.config.run import plain
from fat_train.config.zoo import facts_of, list_models, load_model_node
from fat_train.model.backbone import ModelConfig
from fat_train.op.choice import OpConfig
from fat_train.report.machine import machine_facts
from fat_train.types import UserError, one_of

DEVICES = ("auto", "cpu", "gpu")
LEAST_PX = 32
LEAST_WIDTH = 100
ON_CPU = ("reference", "ours", "ours_folded", "ours_folded_compiled")
BATCH_OF = {"cpu": 16, "cuda": 128}
PUBLISHED_PX = 224


@dataclass(frozen=True, kw_only=True)
class ModelBenchmarkSettings:
    """What stands in `conf/benchmark_model.yaml` beside the group `model`."""

    models: list[str] = field(default_factory=list)
    """Several models by name, instead of `model`."""
    modes: list[str] = field(default_factory=lambda: ["train", "infer"])
    """train, infer, and latency: inference of a single image."""
    contestants: list[str] | None = None
    """Forms of the model: reference (FAT alone has one), ours, each also _compiled, ours_folded; null: what the device
    has time for."""
    peers: list[str] | None = None
    """timm's models beside it, by name; "all" stands for the paper's table; null: all on a GPU, none on a CPU."""
    batch_size: int | None = None
    """Images of a step; halved where memory has no room for them; null: 128 on a GPU, 16 on a CPU."""
    image_px: int = PUBLISHED_PX
    """Height and width of the images, pixels; peers have those of their published top-1."""
    precision: str = "32"
    """32, bf16-mixed or 16-mixed, as of the trainer."""
    rounds: int = 5
    """Turns of each contestant that count."""
    seconds: float = 3.0
    """Length of a turn, or one step where that is longer."""
    device: str = "auto"
    """auto takes a GPU where there is one; or cpu, gpu."""
    compile: str = "default"
    """torch.compile's mode for the compiled contestants."""
    scaling: bool = False
    """Time the first model also at other batches, resolutions and depths, and fit how the cost grows."""
    out: str = "runs/benchmark_model.json"
    """Where the numbers are kept, with .csv, .md and pictures beside it."""

    def __post_init__(self) -> None:
        for name, known in (("modes", MODES), ("contestants", CONTESTANTS)):
            words = getattr(self, name)
            if words is None:
                continue
            if not words or len(set(words)) < len(words):
                raise UserError(f"{name} must name at least one, and none twice; got {words}")
            for word in words:
                one_of(name, word, known)
        if self.contestants and "train" in self.modes and all("folded" in name for name in self.contestants):
            raise UserError(
                f"contestants={self.contestants}: a folded model only evaluates; give modes=[infer] or add ours"
            )
        for name in ("rounds", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1; got {value}")
        if self.seconds <= 0:
            raise UserError(f"seconds must be positive; got {self.seconds}")
        if self.image_px < LEAST_PX:
            raise UserError(f"image_px must be at least {LEAST_PX}, the networks' coarsest stride; got {self.image_px}")
        one_of("precision", self.precision, DTYPES)
        one_of("device", self.device, DEVICES)
        one_of("compile", self.compile, COMPILE_MODES)
        if self.device == "gpu" and not torch.cuda.is_available():
            raise UserError("device=gpu: torch finds no GPU here; give device=cpu")
        if self.precision == "16-mixed" and self.kind == "cpu":
            raise UserError("precision=16-mixed needs a GPU; on the CPU give 32 or bf16-mixed")

    @property
    def kind(self) -> str:
        """cpu or cuda."""
        return "cuda" if self.device == "gpu" or (self.device == "auto" and torch.cuda.is_available()) else "cpu"

    @property
    def forms(self) -> list[str]:
        """The contestants, or the device's usual ones."""
        return self.contestants or list(ON_CPU if self.kind == "cpu" else CONTESTANTS)

    @property
    def peer_words(self) -> list[str]:
        """The peers, or the device's usual ones."""
        return self.peers if self.peers is not None else [] if self.kind == "cpu" else [ALL]

    def template(self) -> ModelJob:
        """What all contestants have in common."""
        return ModelJob(
            contestant="ours",
            name="",
            config=None,
            mode=self.modes[0],
            batch_size=self.batch_size or BATCH_OF[self.kind],
            image_px=self.image_px,
            precision=self.precision,
            device=self.kind,
            compile_mode=self.compile,
        )


def run(tree: DictConfig) -> Raced:
    """Time all, print the table, keep it with its pictures.

    Raises:
        UserError: a wrong setting, or a name that nobody knows.
    """
    values = plain(tree)
    model_node, op = values.pop("model", {}), resolve(values.pop("op", {}), OpConfig, where="op")
    if isinstance(values.get("peers"), str):  # peers=all, as one writes it
        values["peers"] = [values["peers"]]
    settings: ModelBenchmarkSettings = resolve(values, ModelBenchmarkSettings, where="")
    out = path_of_out(settings.out, ".json")
    models: list[ModelConfig] = [resolve(node, where="model") for node in map(load_model_node, settings.models)]
    models = models or [resolve(model_node, where="model")]
    left_out = without_reference(models, settings)
    peers = peers_of(settings.peer_words, settings.image_px)
    top1_of = {config.name: published_top1(config) for config in models if settings.image_px == PUBLISHED_PX}
    top1_of |= {name: peer.top1 for name, peer in peers.items()}

    facts = machine_facts(out.parent)
    threads = torch.get_num_threads()
    cores = f"{facts['CPU cores']} cores, {threads} thread{'s' * (threads > 1)}"
    machine = f"{facts['GPU 0'] if settings.kind == 'cuda' else cores}, torch {facts['torch']}"
    template = replace(settings.template(), op=op)
    op.refuse_impossible(settings.kind)
    say(f"machine        {machine}")
    say(
        f"networks       {', '.join(config.name for config in models)} as {', '.join(settings.forms)}"
        f"{f'; {len(peers)} peers' if peers else ''}; precision {settings.precision}, batches of {template.batch_size}"
    )
    console = Console()
    console.width = max(console.width, LEAST_WIDTH)  # a pipe is said to have 80 columns, which would cut names off
    heats = heats_of(template, models, settings.forms, settings.modes, peers)
    raced = time_all(heats, top1_of, settings, console)
    growths = scale(template, settings, models[0], console) if settings.scaling else {}

    lines = [
        f"device: {raced.device.flops_per_s / 1e9:,.0f} GFLOP/s in a matrix product at precision {settings.precision}, "
        f"{raced.device.bytes_per_s / 1e9:,.1f} GB/s in a copy (read and written together)",
        *left_out,
        *exceptions(raced.results, raced.device),
        *verdicts(raced.results),
        *(f"{models[0].name} {growth.line()}" for several in growths.values() for growth in several),
    ]
    for table in terminal_tables(raced.results, raced.device):
        console.print(table)
    for line in lines:
        say(line)
    kept = {
        "machine": facts,
        "settings": {name: value for name, value in plain(tree).items() if name != "out"},
        "device": raced.device.__dict__,
        "lines": lines,
        "results": [result.as_dict(raced.device) for result in raced.results],
        "scaling": [growth.__dict__ for several in growths.values() for growth in several],
    }
    for path, text in (
        (out, json.dumps(kept, indent=1)),
        (out.with_suffix(".csv"), as_csv(raced.results)),
        (out.with_suffix(".md"), markdown(raced.results, raced.device, [f"machine: {machine}", *lines])),
    ):
        write_atomically(path, text)
    title = f"{machine}, precision {settings.precision}, batches of {template.batch_size}"
    pictures = [draw_speed(raced.results, title, _beside(out, "speed"))]
    pictures += [one for one in [draw_accuracy(raced.results, title, _beside(out, "accuracy"))] if one is not None]
    if growths:
        pictures.append(draw_growth(growths, f"{models[0].name}: {title}", _beside(out, "scaling")))
    say(f"details        {out}, .csv, .md (with what each number counts)")
    say(f"pictures       {', '.join(str(path) for path in pictures)}")
    return raced


def without_reference(models: list[ModelConfig], settings: ModelBenchmarkSettings) -> list[str]:
    """A line where the plain reference is left out, since a model's family has none.

    Raises:
        UserError: it was asked for by name.
    """
    forms = [name for name in settings.forms if name.startswith("reference")]
    names = [config.name for config in models if not has_reference(config)]
    if not forms or not names:
        return []
    if settings.contestants is not None:
        raise UserError(
            f"contestants={forms[0]}: the plain equations are written for FAT alone; leave out {', '.join(forms)}, or "
            f"{', '.join(names)}"
        )
    return [f"{', '.join(forms)}: left out of {', '.join(names)}; the plain equations are written for FAT alone"]


def published_top1(config: ModelConfig) -> float | None:
    """The paper's top-1 of a model whose settings are its yaml's, from the yaml's header; None where it has none."""
    if config.name not in list_models() or resolve(load_model_node(config.name), where="model") != config:
        return None
    top1 = facts_of(config.name).paper_top1
    return None if top1 is None else float(top1)


def time_all(
    heats: list[Heat], top1_of: dict[str, float | None], settings: ModelBenchmarkSettings, console: Console
) -> Raced:
    """All heats, with a bar."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        turns = sum(heat.entrants for heat in heats) * (settings.rounds + 2)  # start, warm-up, rounds
        bar = progress.add_task("", total=turns)
        return run_heats(
            heats,
            top1_of,
            rounds=settings.rounds,
            seconds=settings.seconds,
            on_turn=lambda name, doing: progress.update(bar, description=f"{name} {doing}", advance=1),
        )


def scale(
    template: ModelJob, settings: ModelBenchmarkSettings, config: ModelConfig, console: Console
) -> dict[str, list[Growth]]:
    """Cost against batch, pixels and blocks: axis -> a growth of each eager form that was asked for."""
    eager = ("reference", "ours") if has_reference(config) else ("ours",)
    forms = [name for name in eager if name in settings.forms] or settings.forms[:1]
    axes = scaling_heats(template, config, forms)
    growths = {}
    for axis, jobs in axes.items():
        raced = time_all([Heat(jobs, None)], {}, settings, console)
        growths[axis] = growths_of(axis, raced.results)
    return growths


def _beside(out: Path, what: str) -> Path:
    return out.with_name(f"{out.stem}_{what}.png")
