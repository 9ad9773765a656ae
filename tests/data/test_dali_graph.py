"""Whole pictures: the DALI pipelines against PIL and timm, file by file, for the same drawn values."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from jaxtyping import Float64
from PIL import Image

from fat_train.augment.draws import Draws, crop_box, draw
from fat_train.augment.policy import AugmentConfig
from fat_train.data.index import Place
from fat_train.data.picture import PictureSpec, make_pictures

pytest.importorskip("nvidia.dali", reason="DALI is not installed")

from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.data_node import DataNode
from nvidia.dali.pipeline import Pipeline

from fat_train.data.dali.graph import (
    CENTRE,
    Execution,
    build_eval_pipeline,
    build_train_pipeline,
    crop_box_nodes,
    feed_draws,
    feed_paths,
)

FILL = (124, 116, 104)
# Mean grey levels of the worst picture. PIL rounds to 8 bits between its two passes, across first; torch does so too,
# down first; DALI's own resize does not round. With RandAugment two warps in a row are the worst, see test_dali_op.
CROP_TOLERANCE = 0.5
EVAL_TOLERANCE = 0.3
FULL_TOLERANCE = 2.5
LOWERINGS = pytest.mark.parametrize("torch_ops", [True, False], ids=["cpu", "as_on_a_gpu"])


def spec_of(config: AugmentConfig, image_px: int = 112) -> PictureSpec:
    ratio = (config.crop_ratio[0], config.crop_ratio[1])
    return PictureSpec(
        image_px=image_px, eval_resize_px=128, interpolation=config.eval_interpolation, crop_ratio=ratio, fill=FILL
    )


@pytest.fixture(scope="module", params=["made", "real"])
def paths(request: pytest.FixtureRequest) -> list[str]:
    if request.param == "made":
        return [str(path) for path in sorted(request.getfixturevalue("picture_root").glob("*/*/*"))]
    return [str(path) for path in sorted(request.getfixturevalue("imagenet_samples").glob("*/*"))[::4]]


def run(pipeline: Pipeline, paths: list[str], draws: Draws | None, spec: PictureSpec) -> np.ndarray:
    feed_paths(pipeline, paths)
    if draws is not None:
        feed_draws(pipeline, draws, spec)
    pipeline.schedule_run()
    (outputs,) = pipeline.share_outputs()
    return np.asarray(outputs.as_cpu().as_tensor()).copy()


def means_apart(
    paths: list[str], config: AugmentConfig | None, device_id: int | None = None, torch_ops: bool = True
) -> Float64[np.ndarray, " N"]:
    """Mean difference of each file's picture, grey levels."""
    spec = spec_of(config or AugmentConfig())
    execution = Execution(max_batch=len(paths), num_threads=2, device_id=device_id, torch_ops=torch_ops)
    if config is None:
        draws, pipeline = None, build_eval_pipeline(spec, execution)
    else:
        draws = draw(config, spec.image_px, np.random.default_rng(5), len(paths))
        pipeline = build_train_pipeline(spec, config, execution)
    ours, theirs = run(pipeline, paths, draws, spec), make_pictures([Place(path) for path in paths], draws, spec)
    return np.abs(ours.astype(int) - theirs).mean(axis=(1, 2, 3))


@LOWERINGS
def test_the_evaluation_transform_gives_pils_picture(paths: list[str], torch_ops: bool) -> None:
    apart = means_apart(paths, None, torch_ops=torch_ops)
    assert apart.max() <= (EVAL_TOLERANCE if torch_ops else CROP_TOLERANCE)


@LOWERINGS
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "random"])
def test_decode_crop_resize_and_flip_give_pils_picture(paths: list[str], interpolation: str, torch_ops: bool) -> None:
    config = AugmentConfig(auto_augment=None, interpolation=interpolation)
    assert means_apart(paths, config, torch_ops=torch_ops).max() <= CROP_TOLERANCE


@LOWERINGS
@pytest.mark.parametrize("interpolation", ["bicubic", "random"])
def test_the_whole_recipe_gives_timms_picture(paths: list[str], interpolation: str, torch_ops: bool) -> None:
    apart = means_apart(paths, AugmentConfig(interpolation=interpolation), torch_ops=torch_ops)
    assert apart.mean() <= (0.4 if torch_ops else 0.7)
    assert apart.max() <= FULL_TOLERANCE


def test_three_augment_and_colour_jitter_on_a_cpu_are_timms_but_for_the_crop(paths: list[str]) -> None:
    apart = means_apart(paths, AugmentConfig(auto_augment="3a", color_jitter=0.3))
    assert apart.max() <= 2 * CROP_TOLERANCE  # the colours may be spread by up to 1.3 ** 3


def test_three_augment_and_colour_jitter_as_on_a_gpu_are_timms_but_for_the_blur(paths: list[str]) -> None:
    apart = means_apart(paths, AugmentConfig(auto_augment="3a", color_jitter=0.3), torch_ops=False)
    assert apart.mean() <= 0.7
    assert apart.max() <= FULL_TOLERANCE


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    "config", [None, AugmentConfig(auto_augment=None), AugmentConfig()], ids=["eval", "crop", "full"]
)
def test_a_gpu_gives_the_cpus_pictures_but_for_its_jpeg_decoder(paths: list[str], config: AugmentConfig | None) -> None:
    apart = means_apart(paths, config, device_id=0)
    assert np.median(apart) <= 2.0
    assert apart.max() <= 6.0


@pipeline_def
def _boxes() -> tuple[DataNode, DataNode]:
    candidates = fn.external_source(name="candidates", dtype=types.FLOAT64, ndim=2)
    encoded = fn.io.file.read(fn.external_source(name="path", dtype=types.UINT8, ndim=1))
    return crop_box_nodes(candidates, encoded)


@pytest.mark.parametrize(("width", "height"), [(500, 375), (97, 211), (1000, 12), (13, 900), (64, 64), (3, 2)])
@pytest.mark.parametrize(
    "config",
    [
        AugmentConfig(),
        AugmentConfig(crop_scale=[0.9, 1.0], crop_ratio=[0.4, 0.7]),  # many fall back to the central crop
        AugmentConfig(crop_scale=[1.0, 1.0], crop_ratio=[1.0, 1.0]),
    ],
    ids=["deit", "narrow", "square"],
)
def test_the_crop_box_is_the_policys_to_the_pixel(
    width: int, height: int, config: AugmentConfig, tmp_path: Path
) -> None:
    path, count = tmp_path / "blank.png", 300
    Image.new("RGB", (width, height)).save(path)
    ratio = (config.crop_ratio[0], config.crop_ratio[1])
    crops = draw(config, 64, np.random.default_rng(9), count).crop
    central = np.broadcast_to(np.array([*ratio, CENTRE, CENTRE]), (count, 1, 4))
    pipeline = _boxes(**Execution(count, num_threads=1, device_id=None).arguments())
    pipeline.build()
    feed_paths(pipeline, [str(path)] * count)
    pipeline.feed_input("candidates", np.concatenate([crops, central], axis=1))
    pipeline.schedule_run()
    ours = np.concatenate([np.asarray(nodes.as_tensor()) for nodes in pipeline.share_outputs()], axis=1)
    np.testing.assert_array_equal(ours, [crop_box(attempts, height, width, ratio) for attempts in crops])
