"""The DALI pipelines of training and of validation: from paths and drawn values to uint8 pictures.

No operator here is random, reads a list of files or keeps a state: what comes out of a run is a function of what was
fed for it.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from nvidia.dali import fn, math, pipeline_def, types
from nvidia.dali.data_node import DataNode
from nvidia.dali.pipeline import Pipeline

from fat_train.augment.draws import CROP_ATTEMPTS, Draws
from fat_train.augment.policy import AugmentConfig, RandAugment
from fat_train.data.dali.host import ImageThreads, Stage, eval_stage, train_stages
from fat_train.data.dali.op import (
    INTERPOLATION,
    Column,
    Slot,
    Warp,
    operation_table,
    perspective,
    rand_augment,
    slot_of,
    turn_of,
    whole,
    with_kernel,
)
from fat_train.data.picture import PictureSpec

PATH = "path"
ENCODED = "encoded"
CROP = "crop"
VIEW = "view"  # whether to flip, and the row of `INTERPOLATIONS` for the resize
OPERATIONS = "operations"
ROUNDING = 2.0**52  # adding it to a float64 and taking it away again rounds half to even, as Python does
CENTRE = (
    0.5 - 2.0**-30
)  # place of the central crop; the bit under one half makes an odd margin's smaller part come first


class Execution(NamedTuple):
    """Where and how a pipeline runs."""

    max_batch: int
    """Most images in a run."""
    num_threads: int
    """CPU threads."""
    device_id: int | None
    """CUDA device that decodes and augments; None is the CPU."""
    archives: bool = False
    """Whether the images are in archives: `feed_encoded` takes the place of `feed_paths`."""
    torch_ops: bool = True
    """Whether a CPU leaves to torch what that does faster (`host.py`). Without it a CPU runs what a GPU runs."""

    def image_threads(self, spec: PictureSpec) -> ImageThreads | None:
        """The threads for torch's part, where it has one."""
        if self.device_id is not None or not self.torch_ops:
            return None
        return ImageThreads(self.num_threads, spec.image_px, self.max_batch)

    @property
    def decoder(self) -> str:
        """DALI's name of where JPEGs are decoded."""
        return "cpu" if self.device_id is None else "mixed"

    def arguments(self) -> dict[str, Any]:
        """What every DALI pipeline is told."""
        return {
            "batch_size": self.max_batch,
            "num_threads": self.num_threads,
            "device_id": self.device_id,
            "exec_dynamic": True,
            # With more, the first `schedule_run` wants that many batches at once; the runs in flight are not limited.
            "prefetch_queue_depth": 1,
        }


def build_train_pipeline(spec: PictureSpec, augment: AugmentConfig, execution: Execution) -> Pipeline:
    """Build the pipeline that carries out draws of `augment`; feed it `feed_draws` and the images."""
    threads = execution.image_threads(spec)
    stages = [] if threads is None else train_stages(spec, augment, threads)
    return _built(_train_graph(spec, augment, stages, execution, **execution.arguments()), threads)


def build_eval_pipeline(spec: PictureSpec, execution: Execution) -> Pipeline:
    """Build the pipeline of validation; feed it the images."""
    threads = execution.image_threads(spec)
    stage = None if threads is None else eval_stage(spec, threads)
    return _built(_eval_graph(spec, stage, execution, **execution.arguments()), threads)


def _built(pipeline: Pipeline, threads: ImageThreads | None) -> Pipeline:
    pipeline.build()
    if threads is not None:
        weakref.finalize(pipeline, threads.close)
    return pipeline


def feed_paths(pipeline: Pipeline, paths: list[str]) -> None:
    """Feed the files of the next run."""
    pipeline.feed_input(PATH, [_as_bytes(path) for path in paths])


def feed_encoded(pipeline: Pipeline, images: list[UInt8[np.ndarray, " bytes"]]) -> None:
    """Feed the bytes of the next run's images. They are not copied: DALI refers to the arrays until the run is over."""
    pipeline.feed_input(ENCODED, images)


def feed_draws(pipeline: Pipeline, draws: Draws, spec: PictureSpec) -> None:
    """Feed what is drawn for the images of the next run."""
    batch = len(draws)
    central = np.broadcast_to(np.array([*spec.crop_ratio, CENTRE, CENTRE]), (batch, 1, 4))
    pipeline.feed_input(CROP, np.concatenate([draws.crop, central], axis=1))
    pipeline.feed_input(VIEW, np.stack([draws.flip, draws.kernel[:, 0]], axis=1).astype(np.float32))
    if draws.op.shape[1]:
        pipeline.feed_input(OPERATIONS, operation_table(draws, spec.image_px))


def _as_bytes(path: str) -> UInt8[np.ndarray, " length"]:
    return np.frombuffer(path.encode(errors="surrogateescape"), np.uint8)


@pipeline_def(enable_conditionals=True)
def _train_graph(spec: PictureSpec, augment: AugmentConfig, stages: list[Stage], execution: Execution) -> DataNode:
    encoded = _encoded(execution.archives)
    candidates = fn.external_source(name=CROP, dtype=types.FLOAT64, ndim=2)  # [11, 4]
    corner, size = crop_box_nodes(candidates, encoded)
    crops = fn.decoders.image_slice(
        encoded,
        fn.cast(corner, dtype=types.INT32),
        fn.cast(size, dtype=types.INT32),
        axes=[0, 1],
        normalized_anchor=False,
        normalized_shape=False,
        device=execution.decoder,
        output_type=types.RGB,
        adjust_orientation=False,
    )
    view = fn.external_source(name=VIEW, dtype=types.FLOAT, ndim=1)
    if stages:
        return _with_torch(crops, view, spec, augment, stages)
    extent = fn.cast(size, dtype=types.FLOAT)
    images = with_kernel(
        augment.interpolation, whole(view[1]), lambda kernel: _flipped_resize(crops, extent, view[0], kernel, spec)
    )
    if augment.num_ops:
        images = rand_augment(images, _slots(_table(), augment), Warp(augment.interpolation, spec.fill))
    return images


def _flipped_resize(crops: DataNode, extent: DataNode, flip: DataNode, kernel: Any, spec: PictureSpec) -> DataNode:
    return fn.resize(
        crops,
        size=[spec.image_px, spec.image_px],
        interp_type=kernel,
        antialias=True,
        roi_start=fn.stack(0.0 * flip, extent[1] * flip),  # a region whose end lies before its start is mirrored
        roi_end=fn.stack(extent[0], extent[1] * (1.0 - flip)),
    )


def _with_torch(
    crops: DataNode, view: DataNode, spec: PictureSpec, augment: AugmentConfig, stages: list[Stage]
) -> DataNode:
    first, *further = stages
    if not augment.num_ops:
        return _host(first, crops, view)
    table = _table()
    images = _host(first, crops, view, table)  # most images are finished here
    if isinstance(augment.policy, RandAugment):
        warp = Warp(augment.interpolation, spec.fill)
        for number in range(augment.num_ops):
            turn = turn_of(table[number])
            if turn.branch == 1:
                images = perspective(images, turn, warp)
            if number < len(further):
                images = _late(further[number], images, table, whole(table[number, Column.LATE]))
    return images


def _late(stage: Stage, images: DataNode, table: DataNode, late: DataNode) -> DataNode:
    if late == 1:
        images = _host(stage, images, table)
    return images


def _host(function: Stage, *inputs: DataNode) -> DataNode:
    return fn.python_function(*inputs, function=function, batch_processing=True, num_outputs=1, output_layouts="HWC")


@pipeline_def
def _eval_graph(spec: PictureSpec, stage: Stage | None, execution: Execution) -> DataNode:
    encoded = _encoded(execution.archives)
    images = fn.decoders.image(encoded, device=execution.decoder, output_type=types.RGB, adjust_orientation=False)
    if stage is not None:
        return _host(stage, images)
    size = _size_of(encoded)
    resized = math.floor(size * float(spec.eval_resize_px) / math.min(size[0], size[1]))
    corner = _round((resized - float(spec.image_px)) * 0.5)
    scale = size / resized
    # Resizing the centre alone gives the pixels that resizing the whole and cutting the centre out gives.
    return fn.resize(
        images,
        size=[spec.image_px, spec.image_px],
        interp_type=INTERPOLATION[spec.interpolation],
        antialias=True,
        roi_start=fn.cast(corner * scale, dtype=types.FLOAT),
        roi_end=fn.cast((corner + float(spec.image_px)) * scale, dtype=types.FLOAT),
    )


def _encoded(archives: bool) -> DataNode:
    if archives:
        return fn.external_source(name=ENCODED, dtype=types.UINT8, ndim=1, no_copy=True)
    return fn.io.file.read(fn.external_source(name=PATH, dtype=types.UINT8, ndim=1))


def _table() -> DataNode:
    return fn.external_source(name=OPERATIONS, dtype=types.FLOAT, ndim=2)


def _slots(table: DataNode, augment: AugmentConfig) -> list[Slot]:
    return [slot_of(table[number]) for number in range(augment.num_ops)]


def _size_of(encoded: DataNode) -> DataNode:
    """Height and width in pixels, as float64."""
    return fn.peek_image_shape(encoded, adjust_orientation=False, dtype=types.FLOAT64)[:2]


def crop_box_nodes(candidates: DataNode, encoded: DataNode) -> tuple[DataNode, DataNode]:
    """`fat_train.augment.draws.crop_box` as a graph: corner (top, left) and size (height, width), float64 pixels.

    The central crop, which is taken where no attempt fits, is an eleventh candidate that always fits; its row holds
    the bounds of width/height in place of area and ratio.
    """
    size = _size_of(encoded)
    height, width = size[0], size[1]
    number = types.Constant(np.arange(CROP_ATTEMPTS + 1, dtype=np.int32))
    central = fn.cast(number == CROP_ATTEMPTS, dtype=types.FLOAT64)
    central_height = math.min(height, _round(width / candidates[CROP_ATTEMPTS, 0]))
    central_width = math.min(width, _round(height * candidates[CROP_ATTEMPTS, 1]))
    area_px, ratio = candidates[:, 0] * (height * width), candidates[:, 1]
    heights = _round(math.sqrt(area_px / ratio)) * (1.0 - central) + central_height * central  # [11]
    widths = _round(math.sqrt(area_px * ratio)) * (1.0 - central) + central_width * central
    fits = (heights <= height) & (widths <= width) & (heights > 0) & (widths > 0)
    first = fn.reductions.min(number + (fits == 0) * np.int32(CROP_ATTEMPTS + 1))
    crop_height, crop_width = heights[first], widths[first]
    left = math.floor(candidates[first, 2] * (width - crop_width + 1.0))
    top = math.floor(candidates[first, 3] * (height - crop_height + 1.0))
    return fn.stack(top, left), fn.stack(crop_height, crop_width)


def _round(values: DataNode) -> DataNode:
    return (values + ROUNDING) - ROUNDING
