"""Networks side by side: the same random images, the same loss and optimiser, on the same device."""

from __future__ import annotations

import gc
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import nn

from fat_train.benchmark.model_cost import count, open_copy, open_gemm
from fat_train.benchmark.plain_fat import PlainFAT
from fat_train.benchmark.race import Contestant, Stream
from fat_train.callback.kernels import load_stored
from fat_train.memory import keep_freed_memory
from fat_train.model.backbone import ModelConfig
from fat_train.model.fat import FATConfig
from fat_train.op.choice import OpConfig, use
from fat_train.optim.adamw import AdamWConfig
from fat_train.types import UserError

NUM_CLASSES = 1000
MODES = ("train", "infer", "latency")
CONTESTANTS = ("reference", "reference_compiled", "ours", "ours_compiled", "ours_folded", "ours_folded_compiled")
DTYPES = {"32": torch.float32, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
LEARNING_RATE = 1e-5
PIECE_S = 0.25
"""Least length of a piece of work on a GPU: the host waits for the device at its end alone, so that the wait is no part
of what is timed."""
WARM_STEPS = 2
"""Steps after the first one, before the memory is read: kernels are chosen and buffers taken by then."""
NO_ROOM = "not enough memory"
KILLED = tuple(f"its process ended with status {status}" for status in (-9, 137))
"""What a race says of a process that the system ended for its size."""
OUT_OF_MEMORY = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "bad_alloc",
    "could not create a primitive",
)
"""What torch and the libraries below it say on a CPU; the last is oneDNN's, of a buffer that it cannot have."""


@dataclass(frozen=True, kw_only=True)
class ModelJob:
    """What one contestant does."""

    contestant: str
    """One of `CONTESTANTS`, or "peer"."""
    name: str
    """Of the model: of its yaml, or timm's."""
    config: ModelConfig | None
    """The model's settings, of any family; None for a peer."""
    mode: str
    """One of `MODES`."""
    batch_size: int
    image_px: int
    precision: str
    """One of `DTYPES`."""
    device: str
    """cpu or cuda."""
    compile_mode: str
    """One of `COMPILE_MODES`."""
    op: OpConfig = field(default_factory=OpConfig)
    """How our forms compute their operations."""

    @property
    def trains(self) -> bool:
        """Whether a step goes back through the network."""
        return self.mode == "train"

    @property
    def compiles(self) -> bool:
        """Whether torch.compile takes part."""
        return self.contestant.endswith("_compiled")

    @property
    def channels_last(self) -> bool:
        """Whether activations lie as NHWC: for all that is ours, and where the compiler may choose anyway."""
        return self.contestant.startswith("ours") or self.compiles

    def build(self) -> nn.Module:
        """The network, on its device and in its mode, not compiled.

        Raises:
            UserError: the contestant does not have what it is asked for.
        """
        torch.manual_seed(0)
        if self.config is None:
            model: nn.Module = timm.create_model(self.name)
        elif self.contestant.startswith("reference"):
            if not isinstance(self.config, FATConfig):
                raise UserError(f"the plain reference is written for FAT; {self.name} is of another family")
            model = PlainFAT(self.config, NUM_CLASSES)
        else:
            model = self.config.build(num_classes=NUM_CLASSES)
        model.train(self.trains)
        if "folded" in self.contestant:
            model = folded(model)
        model = model.to(self.device)
        return model.to(memory_format=torch.channels_last) if self.channels_last else model


def has_reference(config: ModelConfig) -> bool:
    """Whether the model's equations are also written plainly: those of FAT are."""
    return isinstance(config, FATConfig)


def folded(model: nn.Module) -> nn.Module:
    """The network as it is deployed.

    Raises:
        UserError: its class cannot be folded.
    """
    if not hasattr(model, "reparameterize"):
        raise UserError(f"{type(model).__name__} has no reparameterize() to fold it with")
    return model.eval().reparameterize()  # type: ignore[operator]


def contestant_of(job: ModelJob, asked: int | None = None) -> Contestant:
    """As a race takes it; a batch that memory has no room for is halved until it has, each try a process of its own.

    oneDNN keeps the error of a buffer that it could not have and makes no further kernel, and a system may end a
    process for its size: so that none goes on after that.

    Args:
        job: what to do.
        asked: images that were asked for, where `job` has fewer.
    """
    asked = job.batch_size if asked is None else asked
    return Contestant(f"{job.name} {job.contestant}", partial(open_model, job, asked), partial(_halved, job, asked))


def _halved(job: ModelJob, asked: int, why: str) -> Contestant | None:
    if job.batch_size == 1 or not why.startswith((NO_ROOM, *KILLED)):
        return None
    return contestant_of(replace(job, batch_size=job.batch_size // 2), asked)


def device_contestants(job: ModelJob) -> list[Contestant]:
    """Two that show what the device can do, at the precision of `job`."""
    repeats = 10 if job.device == "cuda" else 1
    return [
        Contestant("gemm", partial(open_gemm, job.device, DTYPES[job.precision], repeats)),
        Contestant("copy", partial(open_copy, job.device, repeats)),
    ]


def open_model(job: ModelJob, asked: int) -> Stream:
    """Build the network, do the first steps, count.

    Args:
        job: what to do.
        asked: images of a step that the user asked for.

    Raises:
        UserError: the batch has no room, or the contestant does not have what it is asked for.
    """
    try:
        return _open(job, asked)
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        images = f"batch of {job.batch_size} images" if job.batch_size > 1 else "single image"
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{NO_ROOM} for a {images} of {job.image_px} px ({why})") from error


def _is_out_of_memory(error: Exception) -> bool:
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return known or any(words in str(error) for words in OUT_OF_MEMORY)


def _open(job: ModelJob, asked: int) -> Stream:
    on_gpu = job.device == "cuda"
    if on_gpu:
        torch.backends.cudnn.benchmark = True  # as the trainer does
    if job.contestant.startswith("ours"):
        use(job.op)
        if on_gpu:
            load_stored(torch.device("cuda")).take()
        else:
            keep_freed_memory()  # as a training on a CPU does
    memory = MemoryMeter(on_gpu)
    model = job.build()
    step = training_step(model, job) if job.trains else inference_step(model, job)
    started = time.perf_counter()
    step()
    _finish(on_gpu)
    cold_start_s = time.perf_counter() - started
    for _ in range(WARM_STEPS):
        step()
    _finish(on_gpu)
    peak_mib = memory.peak_mib()
    steps = _steps_of_a_piece(step, job)
    plain = plain_of(model, job)
    shape = (job.batch_size, 3, job.image_px, job.image_px)
    cost, cost_of_one = count(plain, shape, job.trains), count(plain, (1, *shape[1:]), trains=False)
    facts: dict[str, Any] = {
        "batch_size": job.batch_size,
        "batch_size_asked": asked,
        "image_px": job.image_px,
        "parameters": cost.parameters,
        "gmacs": cost_of_one.flops / 2e9,
        "flops_per_step": cost.flops,
        "bytes_per_step": cost.bytes(DTYPES[job.precision].itemsize),
        "peak_memory_mib": peak_mib,
        "cold_start_s": cold_start_s,
        "threads": torch.get_num_threads(),
    }
    return Stream(_pieces(step, job, steps), facts, torch.cuda.empty_cache if on_gpu else gc.collect)


def plain_of(model: nn.Module, job: ModelJob) -> nn.Module:
    """What is counted, whatever form runs: a FAT as its equations read, another family as it is built, a peer itself.

    Custom operations and folding would hide what a network computes; on torch's device "meta" there are none.
    """
    if job.config is None:
        return model
    with torch.device("meta"):
        return PlainFAT(job.config, NUM_CLASSES) if isinstance(job.config, FATConfig) else job.config.build(NUM_CLASSES)


def training_step(model: nn.Module, job: ModelJob) -> Callable[[], object]:
    """Forward, loss, backward, fused AdamW, gradients dropped; always the same random images and targets."""
    images, autocast = random_images(job), _autocast(job)
    targets = torch.randint(NUM_CLASSES, (job.batch_size,), device=job.device)
    optimizer = AdamWConfig().build(model, lr=LEARNING_RATE)
    scaler = torch.amp.GradScaler(job.device, enabled=job.precision == "16-mixed")
    run = _compiled(model, job)

    def step() -> None:
        with autocast():
            loss = F.cross_entropy(run(images).float(), targets, label_smoothing=0.1)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    return step


def inference_step(model: nn.Module, job: ModelJob) -> Callable[[], object]:
    """Forward alone."""
    images, autocast, run = random_images(job), _autocast(job), _compiled(model, job)

    @torch.no_grad()
    def step() -> None:
        with autocast():
            run(images)

    return step


def random_images(job: ModelJob) -> torch.Tensor:
    """Normal numbers, as normalised images are: zeros would spare a device work, and heat."""
    images = torch.randn(job.batch_size, 3, job.image_px, job.image_px, device=job.device)
    return images.contiguous(memory_format=torch.channels_last) if job.channels_last else images


def _compiled(model: nn.Module, job: ModelJob) -> Callable[[torch.Tensor], torch.Tensor]:
    if not job.compiles:
        return model
    words: dict[str, Any] = {"mode": job.compile_mode}
    if "folded" in job.contestant and job.device == "cpu" and job.compile_mode == "default":
        words = {"options": {"freezing": True}}  # weights are constants: oneDNN lays them out for itself, once
    compiled: Callable[[torch.Tensor], torch.Tensor] = torch.compile(model, **words)
    return compiled


def _autocast(job: ModelJob) -> Callable[[], AbstractContextManager[object]]:
    if job.precision == "32":
        return nullcontext
    return partial(torch.autocast, job.device, dtype=DTYPES[job.precision])


def _steps_of_a_piece(step: Callable[[], object], job: ModelJob) -> int:
    """One where each is waited for: on a CPU, and of a single image."""
    if job.device != "cuda" or job.mode == "latency":
        return 1
    started = time.perf_counter()
    step()
    _finish(on_gpu=True)
    return max(1, math.ceil(PIECE_S / (time.perf_counter() - started)))


def _pieces(step: Callable[[], object], job: ModelJob, steps: int) -> Iterator[int]:
    while True:
        for _ in range(steps):
            step()
        _finish(job.device == "cuda")
        yield steps * job.batch_size


def _finish(on_gpu: bool) -> None:
    if on_gpu:
        torch.cuda.synchronize()


class MemoryMeter:
    """The most memory in use at a time since the meter was made, before the network is: weights included.

    On a GPU what torch has given to tensors; on a CPU the resident pages of the process over those that it had then.
    """

    def __init__(self, on_gpu: bool) -> None:
        self._on_gpu = on_gpu
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
            return
        gc.collect()
        with suppress(OSError):  # where the peak cannot start anew it is that of the process, imports included
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        self._before = _resident("VmRSS:")

    def peak_mib(self) -> float:
        """Mebibytes."""
        if self._on_gpu:
            return torch.cuda.max_memory_allocated() / 2**20
        return max(0.0, _resident("VmHWM:") - self._before) / 2**20


def _resident(key: str) -> float:
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith(key):
                return 1024.0 * int(line.split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak) * (1 if sys.platform == "darwin" else 1024)
