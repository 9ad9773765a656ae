"""A contestant trains or answers for real, says what it costs, and makes do with the memory that there is."""

from __future__ import annotations

import re
import resource
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from fat_train.benchmark.model import ModelJob, contestant_of, inference_step, open_model, random_images, training_step
from fat_train.benchmark.race import Contestant, Stream, race
from fat_train.model.fat import FATConfig
from fat_train.types import UserError
from second_family import PlainNetConfig

TINY = FATConfig(name="tiny", widths=[8, 12, 16, 24], depths=[1, 1, 1, 1], num_heads=[2, 3, 4, 6])


def job_of(**changes: Any) -> ModelJob:
    given: dict[str, Any] = {
        "contestant": "ours",
        "name": "tiny",
        "config": TINY,
        "mode": "train",
        "batch_size": 4,
        "image_px": 64,
        "precision": "32",
        "device": "cpu",
        "compile_mode": "default",
    }
    return ModelJob(**given | changes)


@pytest.mark.parametrize("mode", ["train", "infer"])
def test_facts_are_those_of_the_network_and_both_forms_cost_the_same_on_paper(mode: str) -> None:
    streams = [open_model(job_of(contestant=name, mode=mode), 4) for name in ("ours", "reference")]
    assert [next(stream.work) for stream in streams] == [4, 4]
    ours, reference = (stream.facts for stream in streams)
    with torch.device("meta"):
        assert ours["parameters"] == sum(p.numel() for p in TINY.build(1000).parameters())
    assert (ours["batch_size"], ours["batch_size_asked"], ours["image_px"]) == (4, 4, 64)
    passes = ours["flops_per_step"] / 4 / (2e9 * ours["gmacs"])
    assert 2.5 < passes < 3 if mode == "train" else passes == pytest.approx(1)
    assert ours["cold_start_s"] > 0
    assert all(ours[key] == reference[key] for key in ("flops_per_step", "bytes_per_step", "gmacs", "parameters"))


@pytest.mark.parametrize("contestant", ["ours", "ours_folded"])
def test_a_model_of_another_family_is_counted_as_it_is_built_and_has_no_plain_reference(contestant: str) -> None:
    config = PlainNetConfig()
    job = job_of(contestant=contestant, name="plainnet", config=config, mode="infer", image_px=32)
    stream = open_model(job, 4)
    assert next(stream.work) == 4
    macs = 64 * 3 * 8 * 16 + 9 * (64 * 8 * 8 + 16 * 8 * 12 + 4 * 12 * 16 + 1 * 16 * 24) + 24 * 1000
    assert stream.facts["gmacs"] == pytest.approx(macs / 1e9)
    assert stream.facts["flops_per_step"] == 4 * 2 * macs
    assert stream.facts["parameters"] == sum(parameter.numel() for parameter in config.build(1000).parameters())
    with pytest.raises(UserError, match="the plain reference is written for FAT; plainnet is of another family"):
        open_model(replace(job, contestant="reference"), 4)


@pytest.mark.parametrize("precision", ["32", "bf16-mixed"])
def test_a_training_step_changes_weights_and_leaves_no_gradient(precision: str) -> None:
    job = job_of(precision=precision)
    model = job.build()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    training_step(model, job)()
    assert all(parameter.grad is None for parameter in model.parameters())
    changed = [name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])]
    assert len(changed) > 0.9 * len(before)
    assert all(parameter.isfinite().all() and parameter.dtype == torch.float32 for parameter in model.parameters())


def test_inference_keeps_no_graph_and_runs_at_the_precision_asked_for() -> None:
    job = job_of(mode="infer", precision="bf16-mixed")
    model = job.build()
    seen: list[torch.Tensor] = []
    model.register_forward_hook(lambda *called: seen.append(called[-1]))
    inference_step(model, job)()
    assert not model.training
    assert seen[0].dtype == torch.bfloat16
    assert seen[0].grad_fn is None


def test_images_are_noise_in_the_layout_of_the_network() -> None:
    ours, reference = random_images(job_of()), random_images(job_of(contestant="reference"))
    assert ours.is_contiguous(memory_format=torch.channels_last)
    assert reference.is_contiguous()
    assert 0.9 < float(ours.std()) < 1.1


def test_a_peer_is_timms_model() -> None:
    stream = open_model(job_of(contestant="peer", name="regnety_002", config=None, mode="infer", image_px=32), 4)
    assert stream.facts["parameters"] == 3_162_996
    assert next(stream.work) == 4


def test_what_cannot_be_folded_says_so() -> None:
    with pytest.raises(UserError, match=r"RegNet has no reparameterize\(\)"):
        open_model(job_of(contestant="ours_folded", name="x", config=Unfoldable()), 4)


class Unfoldable:
    def build(self, num_classes: int) -> torch.nn.Module:
        return timm.create_model("regnety_002", num_classes=num_classes)


def _with_room_for(mebibytes: int, job: ModelJob, asked: int) -> Stream:
    """In a process of its own: nothing but so much may be taken beyond what the process has by now."""
    open_model(replace(job, batch_size=2, image_px=32), 2)  # kernels and threads are there
    (kilobytes,) = re.findall(r"VmSize:\s+(\d+) kB", Path("/proc/self/status").read_text())
    limit = 1024 * int(kilobytes) + mebibytes * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    return open_model(job, asked)


def _contestant_with_room_for(mebibytes: int, job: ModelJob) -> Contestant:
    """`contestant_of`, in smaller rooms."""

    def enclosed(one: Contestant | None) -> Contestant | None:
        if one is None:
            return None
        _, (smaller, asked) = one.open.func, one.open.args  # type: ignore[attr-defined]
        return Contestant(
            one.name, partial(_with_room_for, mebibytes, smaller, asked), lambda why: enclosed(one.instead(why))
        )

    entrant = enclosed(contestant_of(job))
    assert entrant is not None
    return entrant


@pytest.mark.slow  # three processes that import torch, one after another
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="sizes of a process are read from /proc")
def test_a_batch_that_memory_has_no_room_for_is_halved_until_it_has() -> None:
    # ours keeps freed memory, and a limit on addresses then also counts the gaps in it: a later step may find no room
    (outcome,) = race(
        [_contestant_with_room_for(200, job_of(contestant="reference", mode="infer", batch_size=8192))],
        rounds=1,
        seconds=0.0,
        discard=0,
        on_turn=print,
    )
    assert outcome.why_not == ""
    assert 32 <= outcome.facts["batch_size"] <= 2048  # the images alone of 4,096 take 192 MiB
    assert outcome.facts["batch_size_asked"] == 8192
    assert 1 < outcome.facts["peak_memory_mib"] < 250


def test_a_batch_without_room_is_tried_again_with_half_of_it_and_a_single_image_is_not() -> None:
    petabytes = job_of(mode="infer", batch_size=2, image_px=2**23)  # more than a process can address
    with pytest.raises(UserError, match="not enough memory for a batch of 2 images of 8388608 px") as refusal:
        open_model(petabytes, 8)
    smaller = contestant_of(petabytes, 8).instead(str(refusal.value))
    assert smaller is not None
    assert smaller.open.args == (replace(petabytes, batch_size=1), 8)  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="for a single image of 8388608 px") as refusal:
        smaller.open()
    assert smaller.instead(str(refusal.value)) is None
    assert contestant_of(petabytes).instead("its process ended with status -9") is not None
    assert contestant_of(petabytes).instead("it has no reparameterize()") is None


@pytest.mark.slow
@pytest.mark.compile
def test_a_compiled_contestant_runs_and_tells_how_long_its_first_step_took() -> None:
    stream = open_model(job_of(contestant="reference_compiled", mode="infer"), 4)
    assert next(stream.work) == 4
    assert stream.facts["cold_start_s"] > 1


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["train", "infer", "latency"])
@pytest.mark.parametrize("precision", ["32", "bf16-mixed", "16-mixed"])
def test_on_a_gpu_a_piece_is_long_enough_to_hide_the_wait_for_the_device(mode: str, precision: str) -> None:
    batch = 1 if mode == "latency" else 4
    stream = open_model(job_of(mode=mode, precision=precision, device="cuda", batch_size=batch), 4)
    images = next(stream.work)
    assert images == 1 if mode == "latency" else images >= 4 * batch
    assert 0 < stream.facts["peak_memory_mib"] < 1000
    stream.rest()


@pytest.mark.gpu
def test_on_a_gpu_a_batch_that_memory_has_no_room_for_is_refused_by_its_size() -> None:
    job = job_of(device="cuda", batch_size=2**14)
    torch.cuda.set_per_process_memory_fraction(2**30 / torch.cuda.get_device_properties(0).total_memory)
    try:
        with pytest.raises(UserError, match="not enough memory for a batch of 16384 images") as refusal:
            open_model(job, job.batch_size)
        assert contestant_of(job).instead(str(refusal.value)) is not None
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
