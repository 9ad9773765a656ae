"""export: a trained model as one file that runs without fat_train, torch's .pt2 or ONNX."""

from __future__ import annotations

import io
import json
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.export import Dim, ExportedProgram

from fat_train.augment.policy import AugmentConfig
from fat_train.checkpoint.io import replacing
from fat_train.checkpoint.provenance import versions
from fat_train.checkpoint.weights import WHICH, apply_state_dict, read_state_dict
from fat_train.command.assemble import path_of_out
from fat_train.command.from_checkpoint import about_run
from fat_train.command.say import say
from fat_train.config.resolve import resolve
from fat_train.config.run import plain
from fat_train.model.backbone import Backbone
from fat_train.op.choice import REFERENCE, using
from fat_train.types import UserError, one_of

PT2, ONNX = ".pt2", ".onnx"
IMAGES, LOGITS, BATCH = "images", "logits", "batch"
ABOUT_FILE = "fat_train.json"
"""In a .pt2, what an .onnx has as its metadata."""
LEAST_PX = 32
TRACED_BATCH = 2
"""torch.export takes a size of 1 for a constant."""
CHECKED_BATCHES = (1, 3)
ALLOWED = 1e-3
"""Largest difference over the largest logit: far above what rounding makes of it (1e-6), far below a fault."""

Runner = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """The whole of `conf/export.yaml`."""

    checkpoint: str
    """File with the weights and, beside them, the configuration of their run."""
    out: str
    """Where the model goes; the ending decides what is written, .pt2 or .onnx."""
    weights: str = "raw"
    """raw or ema."""
    reparameterize: bool = True
    """Write what `model.reparameterize()` makes of the model: faster, and equal but for rounding."""
    image_px: int | None = None
    """Height and width of the images, pixels; null takes the run's."""
    dynamic_batch: bool = True
    """Whether the file takes any number of images at once; else one."""

    def __post_init__(self) -> None:
        one_of("weights", self.weights, WHICH)
        if self.image_px is not None and self.image_px < LEAST_PX:
            raise UserError(f"image_px must be at least {LEAST_PX}, the networks' coarsest stride; got {self.image_px}")


def run(tree: DictConfig) -> float | None:
    """Write the model; returns by how much its logits differ from the model's, None where nothing here can run it.

    Raises:
        UserError: a wrong setting, a checkpoint that gives no model, a model without an ONNX form, a file that cannot
            be written, or one that computes something else. What `out` was before, it then still is.
    """
    settings = resolve(plain(tree), ExportSettings, where="")
    out = path_of_out(settings.out, (PT2, ONNX))
    if out.suffix == ONNX:
        _refuse_without_onnx()
    checkpoint = Path(settings.checkpoint).expanduser()
    model, about = _open(checkpoint, settings)
    px, classes = about["image_px"], about["num_classes"]
    say(f"checkpoint     {checkpoint} ({about['model']}, {classes} classes, {settings.weights} weights)")
    batches = CHECKED_BATCHES if settings.dynamic_batch else (1, 1)
    noise = torch.Generator().manual_seed(0)
    images = [torch.randn(batch, 3, px, px, generator=noise) for batch in batches]
    with using(REFERENCE), torch.no_grad():  # torch's own operations alone: who runs the file has no kernel of ours
        wanted = [model(x) for x in images]
        if settings.reparameterize:
            model.reparameterize()
        program = _trace(model, px, settings.dynamic_batch)
        content, kind = _as_pt2(program, about) if out.suffix == PT2 else _as_onnx(program, about)
        difference = _write(content, out, images, wanted)
    batch = BATCH if settings.dynamic_batch else "1"
    say(f"input          {IMAGES}, float32 [{batch}, 3, {px}, {px}]: (pixel / 255 - mean) / std of RGB")
    say(f"               with mean {about['mean']}, std {about['std']}")
    say(f"output         {LOGITS}, float32 [{batch}, {classes}]")
    say(f"file           {out}: {len(content) / 1e6:,.1f} MB, {kind}, with the names of the classes")
    if difference is None:
        say("check          none: onnxruntime, which could run the file here, is not installed")
    else:
        how_many = " and ".join(str(batch) for batch in batches)
        largest = max(logits.abs().max().item() for logits in wanted)
        say(
            f"check          loaded again, on {how_many} random images: within {difference:.1e} of the model's logits, "
            f"of which the largest is {largest:.3g}"
        )
    return difference


def _refuse_without_onnx() -> None:
    missing = [package for package in ("onnx", "onnxscript") if find_spec(package) is None]
    if missing:
        raise UserError(
            f'out=*{ONNX} needs {" and ".join(missing)}, not installed here: pip install "fat_train[onnx]". '
            f"out=*{PT2} needs torch alone"
        )


def _open(checkpoint: Path, settings: ExportSettings) -> tuple[Backbone, dict[str, Any]]:
    """The model in evaluation, channels-last, and what a program needs to know that feeds it."""
    run = about_run(checkpoint)
    config = {group: resolve(run["config"][group], where=group) for group in ("model", "data")}
    augment = resolve(run["config"]["augment"], AugmentConfig, where="augment")
    data, px = config["data"], settings.image_px or config["data"].image_px
    model = config["model"].build(num_classes=run["num_classes"]).eval().requires_grad_(False)
    apply_state_dict(model, read_state_dict(checkpoint, settings.weights), source=str(checkpoint))
    about = {
        "model": run["model"],
        "weights": settings.weights,
        "reparameterized": settings.reparameterize,
        "num_classes": run["num_classes"],
        "classes": run["classes"],
        "image_px": px,
        "resize_px": round(px * data.eval_resize_px / data.image_px),  # shorter side before the centre crop
        "interpolation": augment.eval_interpolation,
        "mean": data.mean,
        "std": data.std,
        "versions": {name: versions()[name] for name in ("fat_train", "torch") if name in versions()},
    }
    return model.to(memory_format=torch.channels_last), about


def _trace(model: Backbone, px: int, dynamic_batch: bool) -> ExportedProgram:
    """The model as a graph of torch's operations, without the lines of code that they come from: their paths are
    nobody else's business."""
    shapes = ({0: Dim(BATCH, min=1)},) if dynamic_batch else None
    x = torch.zeros(TRACED_BATCH if dynamic_batch else 1, 3, px, px).to(memory_format=torch.channels_last)
    program = torch.export.export(model, (x,), dynamic_shapes=shapes, strict=True)  # else len(x) would be a constant
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    return program


def _as_pt2(program: ExportedProgram, about: dict[str, Any]) -> tuple[bytes, str]:
    content = io.BytesIO()
    with warnings.catch_warnings():
        # Of a channels-last weight, whose numbers are all there in another order; on a CPU, as here, nothing is lost.
        warnings.filterwarnings("ignore", "No complete tensor found in the group", UserWarning)
        torch.export.save(program, content, extra_files={ABOUT_FILE: json.dumps(about, indent=1)})
    return content.getvalue(), f"torch.export of torch {version('torch')}"


def _as_onnx(program: ExportedProgram, about: dict[str, Any]) -> tuple[bytes, str]:
    try:
        made = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            input_names=[IMAGES],
            output_names=[LOGITS],
            dynamic_shapes=({0: BATCH},) if program.range_constraints else None,  # the name; what varies is traced
        )
    except torch.onnx.OnnxExporterError as error:
        raise UserError(
            f"{about['model']} cannot be written as ONNX: {_obstacle(error)}. out=*{PT2} has no such limit"
        ) from error
    assert made is not None
    opset = made.model.opset_imports[""]
    about = about | {"opset": opset}
    made.model.metadata_props.update(
        {key: value if isinstance(value, str) else json.dumps(value) for key, value in about.items()}
    )
    return made.model_proto.SerializeToString(), f"ONNX opset {opset}"


def _obstacle(error: BaseException) -> str:
    """The operation that torch's exporter stopped at, else the last of its reasons."""
    reasons = [str(error)]
    while error.__cause__ is not None:
        error = error.__cause__
        reasons.append(str(error))
    for pattern in (r"No ONNX function found for <OpOverload\(op='([\w.]+)'", r"call_function\[target=([\w.]+)\]"):
        found = re.search(pattern, "\n".join(reasons))
        if found:
            return f"torch {version('torch')} has no ONNX form of its operation {found[1]}"
    return reasons[-1].partition("\n")[0]


def _write(content: bytes, out: Path, images: Sequence[Tensor], wanted: Sequence[Tensor]) -> float | None:
    """Write, load and compare, and only then give the file its name.

    Raises:
        UserError: the system refuses, or the logits are not those wanted.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(out) as beside:
            beside.write_bytes(content)
            runner = _load_pt2(beside) if out.suffix == PT2 else _load_onnx(beside)
            return None if runner is None else _compare(runner, out, images, wanted)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from error


def _compare(runner: Runner, out: Path, images: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    pairs = [(runner(x), logits) for x, logits in zip(images, wanted, strict=True)]
    largest = torch.stack([logits.abs().max() for _, logits in pairs]).max().item()
    difference = torch.stack([(found - logits).abs().max() for found, logits in pairs]).max().item()
    if not difference <= ALLOWED * largest:  # so that no number at all is refused too
        raise UserError(
            f"out={out} was not kept: loaded again it computes something else, logits that differ by {difference:.3g} "
            f"from the model's, of which the largest is {largest:.3g}"
        )
    return difference


def _load_pt2(file: Path) -> Runner:
    with file.open("rb") as opened:
        return torch.export.load(opened).module()


def _load_onnx(file: Path) -> Runner | None:
    if find_spec("onnxruntime") is None:
        return None
    session = import_module("onnxruntime").InferenceSession(file, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run([LOGITS], {IMAGES: x.numpy()})[0])
