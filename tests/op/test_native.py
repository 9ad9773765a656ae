"""The C++ kernels against the definitions in float64, and what happens where they cannot be compiled."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fat_train import create_model
from fat_train.op import attention as attention_op
from fat_train.op import depthwise as depthwise_op
from fat_train.op.attention import attention
from fat_train.op.choice import OpConfig, recording, using
from fat_train.op.depthwise import depthwise_conv
from fat_train.op.native.library import library

pytestmark = pytest.mark.skipif(library() is None, reason="no C++ compiler here")
NATIVE = OpConfig(depthwise="native", attention="native")
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def normal(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed))


def image(*sizes: int, seed: int = 0) -> Tensor:
    return normal(*sizes, seed=seed).contiguous(memory_format=torch.channels_last)


def leaves(*tensors: Tensor | None, dtype: torch.dtype) -> list[Tensor | None]:
    """Copies that gradients are wanted of, laid out as they were."""
    return [None if t is None else t.detach().to(dtype).requires_grad_() for t in tensors]


@pytest.mark.parametrize("kernel_size", [3, 5, 7, 9])
@pytest.mark.parametrize(("stride", "residual"), [(1, False), (1, True), (2, False)])
@pytest.mark.parametrize(
    ("channels", "height", "width"), [(32, 14, 14), (5, 7, 5), (40, 9, 16), (16, 1, 1), (24, 2, 23)]
)
def test_depthwise_convolution_is_the_definition_in_value_and_gradients(
    kernel_size, stride, residual, channels, height, width
):
    x, weight = image(3, channels, height, width), normal(channels, 1, kernel_size, kernel_size, seed=1)
    bias = None if channels == 40 else normal(channels, seed=2)
    wanted = leaves(x, weight, bias, dtype=torch.float64)
    got = leaves(x, weight, bias, dtype=torch.float32)
    with using(NATIVE):
        y = depthwise_conv(*got, stride, residual=residual)
    reference = depthwise_op.plain(*wanted, stride, residual)
    assert "fat_train" in type(y.grad_fn).__name__, "our kernel has done it"
    assert y.is_contiguous(memory_format=torch.channels_last)
    slope = normal(*y.shape, seed=3)
    y.backward(slope)
    reference.backward(slope.double())
    torch.testing.assert_close(y.double(), reference, **TOLERANCE)
    for ours, theirs in zip(got, wanted, strict=True):
        if ours is not None:
            size = theirs.grad.norm()
            torch.testing.assert_close(ours.grad.double() / size, theirs.grad / size, **TOLERANCE)


def heads(batch: int, tokens: int, count: int, depth: int, seed: int, parts: int = 1) -> list[Tensor]:
    """Views [B, M, tokens, D] of `parts` maps that share their memory, as `FASA` makes them."""
    maps = normal(batch, tokens, parts, count, depth, seed=seed) * 2
    return [part.transpose(1, 2) for part in maps.unbind(2)]


@pytest.mark.parametrize(
    ("batch", "count", "queries", "keys", "depth"),
    [(2, 3, 50, 49, 16), (1, 2, 7, 5, 32), (2, 1, 13, 100, 64), (1, 1, 1, 1, 16), (1, 2, 600, 16, 16)],
)
def test_attention_is_the_definition_in_value_and_gradients(batch, count, queries, keys, depth):
    inputs = [*heads(batch, queries, count, depth, seed=0), *heads(batch, keys, count, depth, seed=1, parts=2)]
    wanted, got = leaves(*inputs, dtype=torch.float64), leaves(*inputs, dtype=torch.float32)
    with using(NATIVE):
        out = attention(*got)
    assert "fat_train" in type(out.grad_fn).__name__, "our kernel has done it"
    assert out.stride() == torch.empty_like(got[0]).stride()
    reference = attention_op.plain(*wanted)
    slope = normal(*out.shape, seed=2)
    out.backward(slope)
    reference.backward(slope.double())
    torch.testing.assert_close(out.double(), reference, **TOLERANCE)
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-4)


def test_attention_holds_scores_that_would_overflow_an_exponential():
    q, k, v = (30 * t for t in (*heads(1, 9, 1, 16, seed=0), *heads(1, 8, 1, 16, seed=1, parts=2)))
    wanted = attention_op.plain(q.double(), k.double(), v.double())
    with using(NATIVE):
        torch.testing.assert_close(attention(q, k, v).double(), wanted, rtol=1e-4, atol=1e-4)


def test_torchs_counter_counts_our_attention():
    inputs = leaves(*heads(2, 9, 3, 16, seed=0), *heads(2, 5, 3, 16, seed=1, parts=2), dtype=torch.float32)
    with using(NATIVE), FlopCounterMode(display=False) as counter:
        attention(*inputs).sum().backward()
    assert counter.get_total_flops() == 7 * 2 * 2 * 3 * 9 * 5 * 16, "two products forward; five backward"


@pytest.mark.parametrize("way", ["depthwise", "attention"])
def test_results_do_not_depend_on_the_number_of_threads(way):
    def run() -> list[Tensor]:
        if way == "depthwise":
            inputs = leaves(image(5, 40, 14, 14), normal(40, 1, 5, 5), normal(40), dtype=torch.float32)
            y = depthwise_conv(*inputs)
        else:
            views = [*heads(3, 196, 2, 16, seed=0), *heads(3, 49, 2, 16, seed=1, parts=2)]
            inputs = leaves(*views, dtype=torch.float32)
            y = attention(*inputs)
        y.square().sum().backward()
        return [y.detach(), *(t.grad for t in inputs)]

    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with using(NATIVE):
                results.append(run())
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # torch's own check asks for it
def test_torch_finds_nothing_wrong_with_how_the_operations_are_registered():
    x, weight, bias = image(2, 16, 6, 5), normal(16, 1, 3, 3), normal(16)
    q, k, v = *heads(1, 6, 2, 16, seed=0), *heads(1, 4, 2, 16, seed=1, parts=2)
    for operation, arguments in (
        (depthwise_op._forward, (x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), 1, True)),
        (depthwise_op._input_grad, (image(2, 16, 3, 3), weight.detach(), 6, 5, 2, False)),
        (depthwise_op._weight_grad, (image(2, 16, 6, 5), x.detach(), 3, 1)),
        (attention_op._forward, (q.requires_grad_(), k.requires_grad_(), v.requires_grad_())),
        (attention_op._grad, tuple(t.detach() for t in (q, q, k, v))),
    ):
        torch.library.opcheck(operation, arguments)


@pytest.fixture
def nothing_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a process that has not looked for a compiler yet, on a machine that has compiled nothing."""
    monkeypatch.setenv("FAT_TRAIN_CACHE", str(tmp_path))
    library.cache_clear()
    yield
    library.cache_clear()


@pytest.mark.usefixtures("nothing_compiled")
@pytest.mark.parametrize(
    ("environment", "words"),
    [({"PATH": "", "CXX": ""}, r"no C\+\+ compiler"), ({"CXX": "false"}, "false cannot compile our kernels")],
)
@torch.no_grad()
def test_without_a_working_compiler_torch_does_the_work_and_one_warning_says_so(monkeypatch, environment, words):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    model = create_model("fat_nano", num_classes=10).eval().to(memory_format=torch.channels_last)
    with pytest.warns(UserWarning, match=words) as warned, recording() as seen:
        logits = [model(image(1, 3, 32, 32)) for _ in range(2)]
    assert len(warned) == 1
    assert all(one.shape == (1, 10) and one.isfinite().all() for one in logits)
    assert "native" not in {one.way for one in seen}


@pytest.mark.slow
def test_where_the_cache_cannot_be_written_kernels_are_compiled_for_this_process_alone(tmp_path):
    (tmp_path / "file").write_text("no folder can be made in here")
    code = "from fat_train.op.native.library import library; print(library()._name)"
    surroundings = os.environ | {"FAT_TRAIN_CACHE": str(tmp_path / "file" / "x")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=surroundings, capture_output=True, text=True, check=True, timeout=120
    )
    assert str(tmp_path) not in done.stdout
    assert not Path(done.stdout.strip()).exists(), "and nothing is left behind"
