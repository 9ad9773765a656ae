"""DALI's pipelines as a plain function, for holding them against the reference picture by picture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from nvidia.dali.pipeline import Pipeline

from fat_train.augment.draws import Draws
from fat_train.augment.policy import RANDOM_INTERPOLATION, AugmentConfig
from fat_train.data.dali.graph import Execution, build_eval_pipeline, build_train_pipeline, feed_draws, feed_paths
from fat_train.data.index import Place
from fat_train.data.picture import PictureSpec

IMAGES_A_RUN = 64


class CarryOut:
    """What `fat_train.data.picture.make_pictures` does, by the pipelines that training and validation run.

    Args:
        num_threads: CPU threads.
        device_id: CUDA device that decodes and augments; None is the CPU.
        torch_ops: `Execution.torch_ops`.
    """

    def __init__(self, *, num_threads: int, device_id: int | None = None, torch_ops: bool = True) -> None:
        self.execution = Execution(IMAGES_A_RUN, num_threads, device_id, torch_ops=torch_ops)
        self._pipelines: dict[tuple[PictureSpec, int | None], Pipeline] = {}

    def __call__(self, places: Sequence[Place], draws: Draws | None, spec: PictureSpec) -> UInt8[np.ndarray, "B H W 3"]:
        """Decode any number of images and make the network's input of each; without draws, as for validation."""
        pipeline = self._pipeline(spec, None if draws is None else draws.op.shape[1])
        pictures = np.empty((len(places), spec.image_px, spec.image_px, 3), np.uint8)
        for first in range(0, len(places), IMAGES_A_RUN):
            rows = np.arange(first, min(first + IMAGES_A_RUN, len(places)))
            feed_paths(pipeline, [str(place) for place in places[first : first + IMAGES_A_RUN]])
            if draws is not None:
                feed_draws(pipeline, draws.take(rows), spec)
            pipeline.schedule_run()
            (outputs,) = pipeline.share_outputs()
            pictures[rows] = np.asarray(outputs.as_cpu().as_tensor())
            pipeline.release_outputs()
        return pictures

    def _pipeline(self, spec: PictureSpec, num_ops: int | None) -> Pipeline:
        if (spec, num_ops) not in self._pipelines:
            if num_ops is None:
                built = build_eval_pipeline(spec, self.execution)
            else:
                built = build_train_pipeline(spec, _any_recipe(num_ops), self.execution)
            self._pipelines[spec, num_ops] = built
        return self._pipelines[spec, num_ops]


def _any_recipe(num_ops: int) -> AugmentConfig:
    """One whose pipeline carries out any draws with so many operations: each may warp, and with either kernel."""
    return AugmentConfig(auto_augment=f"rand-n{num_ops}" if num_ops else None, interpolation=RANDOM_INTERPOLATION)
