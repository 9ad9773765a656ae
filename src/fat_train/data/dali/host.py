"""What torch does several times faster than DALI's CPU operators, inside the DALI pipeline.

On a CPU DALI's antialiased cubic resize takes longer than decoding the JPEG; torch's 8-bit kernels are vectorised, and
make PIL's pictures. An image is one thread's work; torch releases the GIL while it computes. A GPU needs none of this.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import UInt8
from torch import Tensor

from fat_train.augment.policy import INTERPOLATIONS, AugmentConfig, RandAugment
from fat_train.data.dali.host_op import Picture, Room, carry_out
from fat_train.data.dali.op import Column
from fat_train.data.picture import PictureSpec, eval_geometry
from fat_train.threads import torch_threads

Pictures = list[UInt8[np.ndarray, "H W 3"]]
Arrays = list[np.ndarray]
Stage = Callable[..., Pictures]
NO_TABLE = np.empty((0, Column.LATE + 1), np.float32)


class ImageThreads:
    """Threads that carry out a function image by image, and the pictures that they make."""

    def __init__(self, count: int, px: int, max_batch: int) -> None:
        self._count = count
        self._px = px
        self._max_batch = max_batch
        self._made: dict[int, UInt8[Tensor, "B H W 3"]] = {}
        self._own = threading.local()
        self._pool = torch_threads(count, self._begin)

    def _begin(self) -> None:
        self._own.room = Room(self._px)

    def close(self) -> None:
        """Let go of the threads and of what they made: DALI never forgets a function that it was given."""
        self._pool.shutdown(wait=False)
        self._made.clear()

    def each(self, stage: int, images: int, make: Callable[[int, Picture, Room], None]) -> Pictures:
        """Call `make(image, out, room)` for 0 … images − 1, which fills `out`; returns what was made, as arrays.

        A stage's pictures are overwritten by its next call: DALI has copied them by then.
        """
        if stage not in self._made:
            self._made[stage] = torch.empty(self._max_batch, self._px, self._px, 3, dtype=torch.uint8)
        out = self._made[stage][:images]
        turn = itertools.count()

        def work() -> None:
            while (image := next(turn)) < images:
                make(image, out[image], self._own.room)

        for future in [self._pool.submit(work) for _ in range(min(self._count, images))]:
            future.result()
        return list(out.numpy())


def train_stages(spec: PictureSpec, augment: AugmentConfig, threads: ImageThreads) -> list[Stage]:
    """Build the places in the training pipeline where pictures pass through torch.

    The first resizes a crop, flips it and carries out its operations up to the first that is DALI's, a rotation.
    Where the recipe has those, stage k carries out what comes after the k-th of an image and before the next.

    Returns:
        Functions for `fn.python_function`: a list an input, an array an image.
    """
    count = augment.num_ops if isinstance(augment.policy, RandAugment) else 1
    return [_crop_stage(spec, threads), *(_operation_stage(number, spec, threads) for number in range(1, count))]


def _crop_stage(spec: PictureSpec, threads: ImageThreads) -> Stage:
    def stage(crops: Arrays, views: Arrays, tables: Arrays | None = None) -> Pictures:
        def make(image: int, out: Picture, room: Room) -> None:
            flip, kernel = views[image]
            picture = resized(torch.from_numpy(crops[image]), spec.image_px, spec.image_px, int(kernel))
            if flip:
                picture = picture.flip(1)
            table = NO_TABLE if tables is None else tables[image]
            carry_out(picture, table[table[:, Column.PHASE] == 0], spec, room, out)

        return threads.each(0, len(crops), make)

    return stage


def _operation_stage(number: int, spec: PictureSpec, threads: ImageThreads) -> Stage:
    def stage(pictures: Arrays, tables: Arrays) -> Pictures:
        def make(image: int, out: Picture, room: Room) -> None:
            table = tables[image]
            carry_out(torch.from_numpy(pictures[image]), table[table[:, Column.PHASE] == number], spec, room, out)

        return threads.each(number, len(pictures), make)

    return stage


def eval_stage(spec: PictureSpec, threads: ImageThreads) -> Stage:
    """Resize the shorter side and cut the centre out."""
    px, kernel = spec.image_px, INTERPOLATIONS.index(spec.interpolation)

    def stage(images: Arrays) -> Pictures:
        def make(image: int, out: Picture, _room: Room) -> None:
            whole = torch.from_numpy(images[image])
            height, width, top, left = eval_geometry(whole.shape[0], whole.shape[1], spec.eval_resize_px, px)
            out.copy_(resized(whole, height, width, kernel)[top : top + px, left : left + px])

        return threads.each(0, len(images), make)

    return stage


def resized(picture: Picture, height: int, width: int, kernel: int) -> Picture:
    """PIL's antialiased resize; torch took its 8-bit kernels from there."""
    planes = picture.permute(2, 0, 1)[None]
    return (
        F.interpolate(planes, (height, width), mode=INTERPOLATIONS[kernel], antialias=True)[0]
        .permute(1, 2, 0)
        .contiguous()
    )
