"""The fastest way of each operation is found at a model's own sizes; what computes something else is never taken."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fat_train.model.fat import FAT, FATConfig
from fat_train.op import choice, table
from fat_train.op.choice import REFERENCE
from fat_train.op.pointwise import pointwise_conv
from fat_train.op.table import Milliseconds, Row
from fat_train.op.triton import depthwise_tile
from fat_train.op.tune import NO_CASE, Case, _fastest, cases_of, copy_rate, tune

CPU = torch.device("cpu")
ATTENTION = Case("attention", torch.float32, (2, 2, 16, 8, 4))
sdpa = F.scaled_dot_product_attention


@pytest.fixture(autouse=True)
def nothing_measured() -> Iterator[None]:
    yield
    choice.prefer({})


@pytest.fixture(scope="module")
def model() -> FAT:
    torch.manual_seed(0)
    config = FATConfig(name="tiny", widths=[8, 8, 16, 16], depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2])
    return config.build(num_classes=3).to(memory_format=torch.channels_last)


def test_the_cases_are_those_of_a_real_forward_pass_and_the_model_is_not_touched(model: FAT) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    cases = cases_of(model, batch_size=2, image_px=32, dtype=torch.float32)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with choice.recording() as seen:
        model(torch.randn(2, 3, 32, 32))
    assert cases == Counter(Case(one.operation, torch.float32, tuple(one.sizes)) for one in seen)
    assert {case.operation for case in cases} == set(choice.WAYS)


def test_what_was_measured_is_found_again_inside_autocast(model: FAT) -> None:
    cases = cases_of(model, batch_size=2, image_px=32, dtype=torch.bfloat16)
    choice.prefer({case.key: "gemm" for case in cases if case.operation == "pointwise"})
    x = torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    with choice.recording() as seen, torch.autocast("cpu", torch.bfloat16):
        model(x)
    ways = Counter(one.way for one in seen if one.operation == "pointwise")
    assert ways == {"gemm": sum(count for case, count in cases.items() if case.operation == "pointwise")}


@pytest.mark.compile
def test_a_compiled_graph_reads_the_table_without_a_break() -> None:
    weight, bias = torch.randn(5, 8, 1, 1), torch.randn(5)
    case = Case("pointwise", torch.float32, (4, 8, 6, 6, 5))
    choice.prefer({case.key: "gemm"})
    fast = torch.compile(lambda x: pointwise_conv(x, weight, bias), fullgraph=True, backend="aot_eager")
    for images in (4, 3, 2):  # of which one is in the table
        x = torch.randn(images, 8, 6, 6).contiguous(memory_format=torch.channels_last)
        with choice.recording() as seen:
            torch.testing.assert_close(fast(x), pointwise_conv(x, weight, bias))
        assert seen[-1].way == ("gemm" if images == 4 else "torch")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_operation_is_timed_in_all_the_ways_that_this_device_has(model: FAT, dtype: torch.dtype) -> None:
    cases = cases_of(model, batch_size=2, image_px=32, dtype=dtype)
    found = tune(cases, CPU, rounds=1)
    assert found.rows.keys() == {case.key for case in cases}
    for key, row in found.rows.items():
        assert not row.refused, key
        assert "triton" not in row.times
        assert row.way in row.times
        assert all(ms.forward > 0 and ms.step > 0 for ms in row.times.values())
    assert {way for key, row in found.rows.items() if key[0] == "pointwise" for way in row.times} == {"torch", "gemm"}
    norm = next(row for row in found.rows.values() if row.key[:3] == ("norm", str(dtype), "2"))
    numbers = int(torch.tensor([int(side) for side in norm.key[2:]]).prod())
    assert norm.forward_bytes == 2 * numbers * dtype.itemsize, "in and out"
    assert norm.step_bytes == 5 * numbers * dtype.itemsize, "again the input, both gradients"


def no_scale(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, k, v, scale=1.0)


def no_gradient_of_v(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, k, v.detach())


def last_image_left_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    y = sdpa(q, k, v)
    return torch.cat([y[:-1], 0 * y[-1:]])


def nothing(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, k, v) * torch.nan


def failing(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    raise RuntimeError("no kernel for this\nand a long story")


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (no_scale, "its error is"),
        (no_gradient_of_v, "its error is"),
        (last_image_left_out, "its error is"),
        (nothing, "its error is nan"),
        (failing, "RuntimeError: no kernel for this"),
    ],
)
def test_a_way_with_a_wrong_result_or_none_is_refused_by_name(
    wrong: object, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(F, "scaled_dot_product_attention", wrong)
    (row,) = tune([ATTENTION], CPU, rounds=1).rows.values()
    assert row.refused.keys() == {"sdpa"}
    assert row.refused["sdpa"].startswith(why)
    assert row.way == "torch"
    assert row.times.keys() == {"torch"}


def test_the_definition_stays_unless_another_way_is_clearly_faster() -> None:
    assert _fastest({"torch": 1.0, "gemm": 0.98}) == "torch"
    assert _fastest({"torch": 1.0, "gemm": 0.5}) == "gemm"
    assert _fastest({"sdpa": 1.0, "native": 0.99}) == "native", "where the definition was refused"
    assert _fastest({}) == "torch"


def test_measuring_draws_nothing_from_the_runs_own_random_numbers() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    tune([ATTENTION], CPU, rounds=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert copy_rate(CPU) > 1e7


def test_a_table_comes_back_from_its_file_and_a_damaged_one_counts_as_none(tmp_path: Path) -> None:
    made = tune([ATTENTION], CPU, rounds=1)
    file = table.path_of(tmp_path, CPU)
    assert table.load(file) is None
    file.parent.mkdir()
    file.write_text(made.as_json())
    assert table.load(file) == made
    assert made.is_of(CPU)
    file.write_text(made.as_json()[:-40])
    assert table.load(file) is None
    file.write_text(made.as_json().replace('"way": "', '"way": "x'))
    assert table.load(file) is None


def test_a_table_brings_back_how_the_cuda_kernels_divide_their_maps(tmp_path: Path) -> None:
    tile, strip = depthwise_tile.Tile(7, 8, 32, 4), depthwise_tile.Strip(5, 8, 32, 4)
    keys = [
        depthwise_tile.key_of(kernel, torch.bfloat16, (4, 32, 56, 56), 5, 1) for kernel in ("forward", "weight_grad")
    ]
    row = Row(("depthwise", "torch.bfloat16", "4"), "triton", tiles=((keys[0], tuple(tile)), (keys[1], tuple(strip))))
    made = table.empty(CPU).with_rows({row.key: row})
    (tmp_path / "table.json").write_text(made.as_json())
    again = table.load(tmp_path / "table.json")
    assert again == made
    try:
        again.take()
        assert depthwise_tile.measured() == {keys[0]: tile, keys[1]: strip}
        assert depthwise_tile.output_tile(torch.bfloat16, (9, 32, 56, 56), 5, 1) == tile
    finally:
        table.empty(CPU).take()
    assert depthwise_tile.measured() == {}


def test_the_sentence_counts_ways_and_a_fixed_choice_is_not_handed_on() -> None:
    keys = [("norm", "torch.float32", str(size)) for size in range(3)]
    rows = [Row(keys[0], "triton"), Row(keys[1], "triton", {"torch": Milliseconds(1, 2)}), Row(keys[2], "auto")]
    made = table.empty(CPU).with_rows({row.key: row for row in rows})
    assert made.sentence() == "norm: triton in 2, auto in 1 of 3 shapes"
    assert made.fastest() == {keys[0]: "triton", keys[1]: "triton"}
    assert made.lacks([keys[0], ("norm", "other")]) == [("norm", "other")]
    assert REFERENCE.norm == "torch"
    assert NO_CASE


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_a_gpu_a_tuned_network_computes_what_the_definitions_compute(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # which a matrix product does not use by itself
    torch.manual_seed(0)
    config = FATConfig(name="tiny", widths=[32, 80, 160, 256], depths=[2, 2, 2, 1], num_heads=[2, 5, 10, 16])
    model = config.build(num_classes=10).to("cuda", memory_format=torch.channels_last)
    found = tune(cases_of(model, batch_size=4, image_px=64, dtype=dtype), torch.device("cuda"), rounds=3)
    assert not {key: row.refused for key, row in found.rows.items() if row.refused}
    choice.prefer(found.fastest())
    x = torch.randn(4, 3, 64, 64, device="cuda").contiguous(memory_format=torch.channels_last)
    results = []
    for config_of_ops in (REFERENCE, choice.OpConfig(), choice.OpConfig(norm="triton", interaction="triton")):
        model.zero_grad()
        with choice.using(config_of_ops), torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            logits = model(x)
        logits.float().square().sum().backward()
        results.append([logits.detach().float(), *(one.grad.clone() for one in model.parameters())])
    tolerance = 1e-3 if dtype == torch.float32 else 5e-2
    for other in results[1:]:
        pairs = zip(other, results[0], strict=True)
        off = [float((ours - plain).norm() / plain.norm().clamp(min=1e-3)) for ours, plain in pairs]
        assert off[0] < tolerance, "logits"
        assert sorted(off)[len(off) // 2] < tolerance, "gradients; those of biases before a norm are all but 0"
