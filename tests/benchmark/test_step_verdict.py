"""The sentence names what bounds a run, by how much, and a setting that is not yet what it could be."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fat_train.benchmark.step import Row, Split
from fat_train.benchmark.step_verdict import Setup, sentence, verdict_of

GPU = Setup(
    device="gpu",
    precision="32",
    compiled=False,
    channels_last=True,
    grad_checkpointing=False,
    batch_per_device=128,
    accumulate=1,
    memory_share=0.6,
    backend="dali",
    decode="gpu",
    workers=16,
    cores=16,
    packed=False,
)
CPU = replace(GPU, device="cpu", decode="cpu", memory_share=None)
BUSY = {"data": 0.0, "forward": 0.3, "loss": 0.01, "backward": 0.6, "clip": 0.01, "optimizer": 0.05, "rest": 0.03}


def host(**seconds: float) -> Split:
    return Split([Row(2, BUSY | seconds)], images=100)


def device(lead_s: float, **seconds: float) -> Split:
    return Split([Row(2, {"data": 0.9, "rest": 0.1}, BUSY | seconds, lead_s)], images=100)


@pytest.mark.parametrize(
    ("split", "setup", "what", "first"),
    [
        (host(), CPU, "the CPU's forward and backward pass", "a GPU"),
        (
            host(),
            replace(CPU, channels_last=False),
            "the CPU's forward and backward pass",
            "trainer.channels_last=true",
        ),
        (host(), replace(CPU, precision="bf16-mixed"), "the CPU's forward and backward pass", "trainer.precision=32"),
        (host(data=0.3), CPU, "the input pipeline", "a set made smaller by the command pack"),
        (host(data=0.3), replace(CPU, packed=True), "the input pipeline", "more CPU cores a device"),
        (host(data=0.3), replace(CPU, workers=2), "the input pipeline", "data.num_workers=16 (it is 2)"),
        (host(data=0.3), replace(CPU, backend="torch"), "the input pipeline", "data.backend=dali"),
        (host(data=0.3), replace(CPU, backend="synthetic"), "the input pipeline", "data=imagenet"),
        (host(ema=2.0), CPU, "the optimiser", "a larger trainer.global_batch (128 images a device"),
        (host(augment=2.0), CPU, "augmentation on the device", "augment.mix_mode=batch"),
        (host(callbacks=2.0), CPU, "what the callbacks do", "a larger trainer.log_every_n_steps"),
        (device(0.5), GPU, "the GPU's forward and backward pass", "trainer.precision=bf16-mixed"),
        (device(0.5), replace(GPU, precision="bf16-mixed"), "the GPU's forward and backward pass", "trainer.compile"),
        (device(0.5), replace(GPU, grad_checkpointing=True), "the GPU's forward", "trainer.grad_checkpointing=false"),
        (device(0.001), GPU, "the host's launches", "trainer.compile=default"),
        (
            device(0.001),
            replace(GPU, compiled=True, accumulate=4, batch_per_device=32, memory_share=0.1),
            "the host's launches",
            "a larger trainer.max_batch_per_device (32 images at once)",
        ),
        (device(0.0, data=0.5), replace(GPU, decode="cpu"), "the input pipeline", "data.decode=gpu"),
    ],
)
def test_the_verdict_names_the_bound_and_what_to_change(split: Split, setup: Setup, what: str, first: str) -> None:
    verdict = verdict_of(split, setup)
    assert verdict.what.startswith(what)
    assert verdict.change[0].startswith(first)
    assert verdict.ms == pytest.approx(1000 * verdict.share * split.update_s)


def test_a_wait_of_the_host_that_the_gpu_does_not_feel_is_no_bound() -> None:
    split = device(0.5)
    assert split.share("data", device=False) == pytest.approx(0.9)
    assert not verdict_of(split, GPU).waits


def test_where_every_setting_is_right_the_sentence_says_so() -> None:
    split = device(0.5)
    verdict = verdict_of(split, replace(GPU, precision="bf16-mixed", compiled=True))
    assert sentence(verdict, split, "it takes long") == (
        "the GPU's forward and backward pass bounds this run: 910.0 of 1,000.0 ms an update (91%); "
        "no setting is left to try; it takes long"
    )


def test_who_waits_is_told_what_a_free_loader_would_bring() -> None:
    split = host(data=1.0)
    assert "waited for 1,000.0 of 2,000.0 ms an update (50%), 100 in place of 50 img/s without it" in sentence(
        verdict_of(split, CPU), split, ""
    )
